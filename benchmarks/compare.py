"""`make bench`: Lory and its peers on the same work, in one run, in turn.

    python -m benchmarks.compare --model small --reps 3 --threads 2

Batches of requests that come at once, 64 random tokens in and 64 out: the base alone, all on one
adapter, and each on an adapter of its own. Every contender runs each repetition in turn, after a
warm-up, on a machine that is waited for to be quiet; medians and their ratios go to a JSON in
benchmarks/results. It must not know how a contender works.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.contenders import Contender, HttpContender, peft_contender
from benchmarks.models import ROOT as MODELS
from benchmarks.models import SHAPES, Adapters, ensure_adapters, ensure_base
from benchmarks.server import serving
from lory_router.bench.machine import CpuWatch, tree_resident_bytes, wait_until_quiet
from lory_router.bench.workload import Popularity, Workload
from lory_router.config import CommandError
from lory_server.messages import Quantization

Scenario = Literal["base", "one", "distinct"]
SCENARIOS: tuple[Scenario, ...] = ("base", "one", "distinct")
TITLES: dict[Scenario, str] = {
    "base": "base alone",
    "one": "one adapter",
    "distinct": "distinct adapters",
}
WEIGHTS: dict[Quantization, str] = {"none": "bfloat16", "nf4": "NF4 computed in bfloat16"}
LORY = "Lory"
PEFT = "transformers + PEFT"


@dataclass(frozen=True)
class Case:
    """One batch shape on one scenario."""

    scenario: Scenario
    batch: int


@dataclass(frozen=True)
class Settings:
    """How everything is measured."""

    model: str
    threads: int
    reps: int
    warmup: int
    retries: int
    """How often an unclean run is made again."""
    quiet_limit_s: float
    batches: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    rank: int
    num_adapters: int
    seed: int
    quantize: Quantization = "none"

    @property
    def cases(self) -> Iterator[Case]:
        for batch in self.batches:
            for scenario in SCENARIOS:
                yield Case(scenario, batch)

    def workload(self, case: Case, names: tuple[str, ...]) -> Workload:
        return Workload(
            num_requests=case.batch,
            adapters=names,
            popularity=Popularity("distinct" if case.scenario == "distinct" else "identical"),
            base_share=1.0 if case.scenario == "base" else 0.0,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            vocab_size=SHAPES[self.model].vocab_size,
            seed=self.seed,
        )


def measure_case(
    contenders: Sequence[Contender], workload: Workload, settings: Settings
) -> dict[str, list[dict[str, Any]]]:
    """The kept runs of each contender, which take turns."""
    runs: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in contenders}
    for repetition in range(settings.warmup + settings.reps):
        for contender in contenders:
            if repetition < settings.warmup:
                contender.run(workload.requests(repetition), settings.output_tokens)
            else:
                runs[contender.name].append(_cleanest(contender, workload, repetition, settings))
    return runs


def _cleanest(
    contender: Contender, workload: Workload, repetition: int, settings: Settings
) -> dict[str, Any]:
    """One run, made again while others use the machine, as often as allowed."""
    attempt = 0
    while True:
        # A number of its own for each attempt: no prompt is ever sent twice.
        asks = workload.requests(repetition + 1000 * attempt)
        run = _run_once(contender, asks, settings)
        attempt += 1
        if run["clean"] is not False or attempt > settings.retries:
            return run | {"attempts": attempt}


def _run_once(contender: Contender, asks: Sequence[Any], settings: Settings) -> dict[str, Any]:
    wait_until_quiet(settings.quiet_limit_s)
    watch = CpuWatch(contender.pid)
    done = contender.run(asks, settings.output_tokens)
    shares = watch.stop()
    wanted = len(asks) * settings.output_tokens
    if done.output_tokens != wanted:
        raise RuntimeError(
            f"{contender.name}: {done.output_tokens} tokens came, {wanted} asked for"
        )
    return {
        "output_tokens_per_s": round(done.output_tokens / done.wall_s, 2),
        "wall_s": round(done.wall_s, 4),
        "cpu": shares.described(),
        "clean": shares.clean,
    }


def summarise(case: Case, runs: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """A case of the record: medians of each contender beside its runs."""
    return {
        "scenario": case.scenario,
        "requests": case.batch,
        "contenders": {
            name: {
                "output_tokens_per_s": statistics.median(
                    run["output_tokens_per_s"] for run in kept
                ),
                "clean": all(run["clean"] for run in kept),
                "runs": kept,
            }
            for name, kept in runs.items()
        },
    }


def ratios(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each batch size: a contender's adapters against its own base, and Lory against each."""
    rates = {
        (case["requests"], case["scenario"], name): figures["output_tokens_per_s"]
        for case in cases
        for name, figures in case["contenders"].items()
    }
    names = list(cases[0]["contenders"])
    found: list[dict[str, Any]] = []
    for batch in dict.fromkeys(case["requests"] for case in cases):
        against_base = {
            name: round(rates[batch, "distinct", name] / rates[batch, "base", name], 3)
            for name in names
        }
        against_peers = {
            name: {
                scenario: round(rates[batch, scenario, LORY] / rates[batch, scenario, name], 2)
                for scenario in SCENARIOS
            }
            for name in names
            if name != LORY
        }
        found.append(
            {
                "requests": batch,
                "distinct_to_base": against_base,
                "lory_to": against_peers,
            }
        )
    return found


def run(settings: Settings, peers: Sequence[HttpContender], models: Path) -> dict[str, Any]:
    """Everything but the head of the record."""
    shape = SHAPES[settings.model]
    base = ensure_base(shape, models)
    adapters = Adapters(shape, settings.rank, settings.num_adapters)
    folder = ensure_adapters(adapters, models)
    cases: list[dict[str, Any]] = []
    with ExitStack() as stack:
        log = models / f"lory-{settings.model}.log"
        server = stack.enter_context(serving(base, folder, lory_flags(settings), log))
        lory = HttpContender(LORY, server.url, server.pid, shape.name)
        names = adapters.names
        peft = stack.enter_context(
            peft_contender(base, folder, names, settings.threads, settings.quantize)
        )
        contenders: list[Contender] = [lory, peft, *peers]
        for case in settings.cases:
            runs = measure_case(contenders, settings.workload(case, names), settings)
            cases.append(summarise(case, runs))
            say(cases[-1])
        memory = {
            contender.name: round(tree_resident_bytes(contender.pid) / 2**30, 2)
            for contender in contenders
            if contender.pid
        }
    return {
        "model": settings.model,
        "settings": described(settings),
        "cases": cases,
        "ratios": ratios(cases),
        "memory_gib": memory,
    }


def lory_flags(settings: Settings) -> list[str]:
    """The batch is as large as the largest that comes; the rest are defaults."""
    context = settings.prompt_tokens + settings.output_tokens
    return [
        *("--threads", str(settings.threads)),
        *("--max-batch-rows", str(max(settings.batches))),
        *("--max-model-len", str(2 * context)),
        *("--dtype", "bfloat16"),
        *("--quantize", settings.quantize),
        *("--served-model-name", settings.model),
        *("--log-level", "warning"),
    ]


def described(settings: Settings) -> dict[str, Any]:
    shape = SHAPES[settings.model]
    return {
        "shape": {
            "hidden_size": shape.hidden_size,
            "num_layers": shape.num_layers,
            "num_heads": shape.num_heads,
            "num_kv_heads": shape.num_kv_heads,
            "intermediate_size": shape.intermediate_size,
            "vocab_size": shape.vocab_size,
        },
        "weights": f"random, {WEIGHTS[settings.quantize]}",
        "adapters": f"{settings.num_adapters}, rank {settings.rank}, all seven projections",
        "prompt_tokens": settings.prompt_tokens,
        "output_tokens": settings.output_tokens,
        "arrivals": "all requests of a batch at once; new prompts each run",
        "popularity": {
            "base": "no adapter",
            "one": "identical: every request on adapter 1",
            "distinct": "distinct: request k on adapter k",
        },
        "threads": settings.threads,
        "repetitions": settings.reps,
        "warmup_repetitions": settings.warmup,
        "lory_flags": " ".join(lory_flags(settings)),
        "tokens": "counted from usage; prompts not counted",
        "clean": "other processes used less than 0.2 cores",
    }


def say(case: Mapping[str, Any]) -> None:
    for name, figures in case["contenders"].items():
        mark = "" if figures["clean"] else "  (not clean: others used the machine)"
        rate = figures["output_tokens_per_s"]
        print(f"{case['requests']:4d} x {case['scenario']:9s} {name:22s} {rate:9.1f}/s{mark}")
    sys.stdout.flush()


def show(result: Mapping[str, Any]) -> None:
    names = list(result["cases"][0]["contenders"])
    table = Table("requests", "scenario", *names, title="output tokens per second, medians")
    for case in result["cases"]:
        cells = [_cell(case["contenders"][name]) for name in names]
        table.add_row(str(case["requests"]), TITLES[case["scenario"]], *cells)
    console = Console()
    console.print(table)
    for ratio in result["ratios"]:
        own = ", ".join(f"{name} {value:.2f}" for name, value in ratio["distinct_to_base"].items())
        console.print(f"{ratio['requests']} requests, distinct against own base: {own}")
        for name, value in ratio["lory_to"].items():
            line = ", ".join(f"{TITLES[s]} {value[s]:.1f}" for s in SCENARIOS)
            console.print(f"{ratio['requests']} requests, Lory against {name}: {line}")


def _cell(figures: Mapping[str, Any]) -> str:
    return f"{figures['output_tokens_per_s']:.1f}" + ("" if figures["clean"] else " (unclean)")


def find_peers(given: Sequence[str]) -> list[HttpContender]:
    """NAME=URL of each; one that does not answer is skipped aloud."""
    found: list[HttpContender] = []
    for text in given:
        name, separator, url = text.partition("=")
        if not separator:
            raise SystemExit(f"--peer {text!r}: write NAME=URL")
        try:
            found.append(HttpContender.at(name, url))
        except CommandError as error:
            print(f"skipped peer {name}: {error}")
    return found


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.compare",
        description="Measures Lory and its peers on the same work, in one run, in turn.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", choices=sorted(SHAPES), default="small", help="shape of the random base")
    add("--threads", type=int, default=2, help="CPU threads of each contender")
    add("--reps", type=int, default=3, help="measured runs of each case")
    add("--warmup", type=int, default=1, help="runs of each case before, not measured")
    add("--retries", type=int, default=2, help="times an unclean run is repeated")
    add("--quiet-limit", type=float, default=30.0, help="most seconds to wait for a quiet machine")
    add("--batches", type=int, nargs="+", default=[32, 8], help="requests that come at once")
    add("--prompt-tokens", type=int, default=64, help="random tokens in")
    add("--output-tokens", type=int, default=64, help="tokens out")
    add("--rank", type=int, default=16, help="of every adapter")
    add("--adapters", type=int, default=32, help="how many are made")
    add("--quantize", choices=sorted(WEIGHTS), default="none", help="the base's linears")
    add("--seed", type=int, default=0, help="of the prompts")
    add("--peer", action="append", default=[], help="NAME=URL of one more, with the same models")
    add("--models", type=Path, default=MODELS, help="folder of the made models")
    add("--out", type=Path, help="JSON file; without it one in benchmarks/results")
    return parser.parse_args(arguments)


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    settings = Settings(
        model=arguments.model,
        threads=arguments.threads,
        reps=arguments.reps,
        warmup=arguments.warmup,
        retries=arguments.retries,
        quiet_limit_s=arguments.quiet_limit,
        batches=tuple(arguments.batches),
        prompt_tokens=arguments.prompt_tokens,
        output_tokens=arguments.output_tokens,
        rank=arguments.rank,
        num_adapters=arguments.adapters,
        seed=arguments.seed,
        quantize=arguments.quantize,
    )
    head = record.facts("benchmarks.compare", argv)
    result = head | run(settings, find_peers(arguments.peer), arguments.models)
    show(result)
    kind = settings.model if settings.quantize == "none" else f"{settings.model}-nf4"
    name = f"cpu-compare-{kind}-{record.today()}.json"
    path = arguments.out or record.RESULTS / name
    record.write(path, result)
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])

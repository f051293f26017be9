"""`lory bench`: measures a running server, ours or any with /v1/completions, and writes JSON.

    options -> workload -> load (repetitions) -> figures -> table and JSON

It must not know torch, or how the server it measures works.
"""

import inspect
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.table import Table

from lory_router import __version__, remote
from lory_router.bench.client import Target
from lory_router.bench.figures import DEFINITIONS, medians, summarise
from lory_router.bench.load import CompletionsRoute, GenerateRoute, Load
from lory_router.bench.machine import CpuWatch, listening_pid, machine_facts, wait_until_quiet
from lory_router.bench.workload import Popularity, Workload, WorkloadError, adapter_names
from lory_router.caller_options import caller_key_option, server_url_option

DEFAULT_CONCURRENCY = 32
FACTS_TIMEOUT_S = 10.0
KEPT_FACTS = (
    "architecture",
    "max_batch_rows",
    "max_step_tokens",
    "max_total_tokens",
    "model_device_type",
    "model_dtype",
    "model_id",
    "quantize",
    "version",
    "vocab_size",
)


@dataclass(frozen=True)
class ServerFacts:
    """What a server says of itself before it is measured."""

    info: Mapping[str, Any]
    """Of GET /info; empty if it has no such page."""
    base_name: str
    adapters: tuple[str, ...]
    """Models that name another as their parent."""

    @classmethod
    def ask(cls, url: str, api_key: str) -> "ServerFacts":
        with remote.connect(url, api_key, FACTS_TIMEOUT_S) as client:
            models = remote.list_models(client)
            with remote.one_line_errors():
                info = client.get("/info")
        bases = [model["id"] for model in models if not model.get("parent")]
        adapters = tuple(model["id"] for model in models if model.get("parent"))
        facts = info.json() if info.is_success else {}
        kept = {name: facts[name] for name in KEPT_FACTS if name in facts}
        return cls(kept, bases[0] if bases else "", adapters)


@dataclass(frozen=True)
class Experiment:
    """What to run and how often."""

    load: Load
    workload: Workload
    warmup: int
    repetitions: int
    quiet_limit_s: float
    """Most seconds to wait for a quiet machine before each measured run."""
    server_pid: int
    """0: not known, and then nothing is called clean."""


def run_experiment(experiment: Experiment) -> list[dict[str, Any]]:
    """Every measured repetition in figures."""
    for number in range(experiment.warmup):
        experiment.load.run(experiment.workload.requests(number))
    return [
        _measure(experiment, number)
        for number in range(experiment.warmup, experiment.warmup + experiment.repetitions)
    ]


def _measure(experiment: Experiment, number: int) -> dict[str, Any]:
    asks = experiment.workload.requests(number)
    if experiment.quiet_limit_s:
        wait_until_quiet(experiment.quiet_limit_s)
    watch = CpuWatch(experiment.server_pid)
    outcomes, wall_s = experiment.load.run(asks)
    shares = watch.stop()
    figures = summarise(outcomes, wall_s)
    if experiment.load.concurrency:
        del figures["late_s"]
    return figures | {"cpu": shares.described(), "clean": shares.clean}


@dataclass(frozen=True)
class BenchOptions:
    """The command's options."""

    url: str = server_url_option()
    api_key: str = caller_key_option()
    route: Annotated[str, typer.Option(help="completions (/v1/completions) or generate.")] = (
        "completions"
    )
    stream: Annotated[bool, typer.Option(help="Ask for streams; no TTFT without.")] = True
    base_name: Annotated[
        str, typer.Option(help="What `model` calls the base; empty: first in /v1/models.")
    ] = ""
    adapters: Annotated[
        str, typer.Option(help="all that are served; names with commas; or a number of names.")
    ] = "all"
    adapter_pattern: Annotated[str, typer.Option(help="The names when --adapters is a number.")] = (
        "a{i:02d}"
    )
    popularity: Annotated[
        str, typer.Option(help="identical, uniform, zipf:ALPHA or distinct (round robin).")
    ] = "distinct"
    base_share: Annotated[float, typer.Option(help="Share of requests without adapter.")] = 0.0
    requests: Annotated[int, typer.Option(min=1, help="Requests of one repetition.")] = 128
    concurrency: Annotated[
        int, typer.Option(min=0, help="Closed loop: requests in flight; 0: 32 without --rate.")
    ] = 0
    rate: Annotated[
        float, typer.Option(min=0, help="Open loop: mean requests a second, Poisson.")
    ] = 0.0
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Random ids in a prompt.")] = 64
    prompt_file: Annotated[
        Path | None, typer.Option(help="Prompts as text, one a line, instead of random ids.")
    ] = None
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens of every answer.")] = 64
    vocab_size: Annotated[int, typer.Option(min=0, help="Of random ids; 0: from /info.")] = 0
    seed: Annotated[int, typer.Option(help="Of prompts, popularity and arrivals.")] = 0
    warmup: Annotated[int, typer.Option(min=0, help="Repetitions run first, unmeasured.")] = 1
    reps: Annotated[int, typer.Option(min=1, help="Repetitions measured.")] = 3
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds a request may take.")] = 600.0
    quiet_limit: Annotated[
        float, typer.Option(min=0, help="Most seconds to wait for a quiet machine before a run.")
    ] = 20.0
    server_pid: Annotated[
        int, typer.Option(min=0, help="The server's process; 0: found, if it is on this machine.")
    ] = 0
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None


def main(argv: list[str]) -> int:
    """The command; its exit code: 0 if every measured repetition had answers."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(help="Measure a running server under a stated load.")(_command)
    try:
        app(argv, prog_name="lory bench")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def _command(**values: Any) -> None:
    options = BenchOptions(**values)
    try:
        experiment, facts = make_experiment(options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    record = describe(experiment, asdict(options), facts)
    record["repetitions"] = run_experiment(experiment)
    record["median"] = medians(record["repetitions"])
    show(record)
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if not all(repetition["answered"] for repetition in record["repetitions"]):
        raise typer.Exit(1)


_command.__signature__ = inspect.signature(BenchOptions)  # type: ignore[attr-defined]
_command.__annotations__ = get_type_hints(BenchOptions, include_extras=True)


def make_experiment(options: BenchOptions) -> tuple[Experiment, ServerFacts]:
    """What the options ask of which server. Raises ValueError, and CommandError for the server."""
    if options.concurrency and options.rate:
        raise WorkloadError("--concurrency is a closed loop and --rate an open one: give one")
    target = Target.of(options.url, options.api_key)
    texts = _read_prompts(options.prompt_file, options.route)
    popularity = Popularity.parse(options.popularity)
    facts = ServerFacts.ask(options.url, options.api_key)
    workload = Workload(
        num_requests=options.requests,
        adapters=adapter_names(options.adapters, options.adapter_pattern, facts.adapters),
        popularity=popularity,
        base_share=options.base_share,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        vocab_size=options.vocab_size or facts.info.get("vocab_size", 0),
        seed=options.seed,
        texts=texts,
        rate_per_s=options.rate,
    )
    route = _route(options.route, options.base_name or facts.base_name)
    in_flight = 0 if options.rate else options.concurrency or DEFAULT_CONCURRENCY
    load = Load(target, route, options.output_tokens, options.stream, in_flight, options.timeout)
    pid = options.server_pid or listening_pid(target.host, target.port)
    return Experiment(load, workload, options.warmup, options.reps, options.quiet_limit, pid), facts


def describe(
    experiment: Experiment, options: Mapping[str, object], facts: ServerFacts
) -> dict[str, Any]:
    """The record, but for its figures."""
    load = experiment.load
    shown = {name: value for name, value in options.items() if name != "api_key"}
    loop = {"concurrency": load.concurrency} if load.concurrency else {}
    return {
        "kind": "lory bench",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command_line(shown),
        "versions": {"lory": __version__},
        "machine": machine_facts(),
        "server": {"url": shown.get("url"), "base": facts.base_name, **facts.info},
        "workload": experiment.workload.described() | loop | {"streaming": load.stream},
        "warmup_repetitions": experiment.warmup,
        "definitions": DEFINITIONS,
    }


def command_line(options: Mapping[str, object]) -> str:
    """The command that runs this again, every option spelt out."""
    words = ["lory", "bench"]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", str(value)]
    return shlex.join(words)


def show(record: Mapping[str, Any]) -> None:
    """The figures as a table; failures and unclean runs are said aloud."""
    table = Table("", "tokens/s", "requests/s", "TTFT p50", "ITL p50", "ITL p99", "latency p99")
    runs = record["repetitions"]
    for number, run in enumerate(runs, start=1):
        table.add_row(f"run {number}", *_cells(run))
    table.add_row("median", *_cells(record["median"]))
    console = Console()
    console.print(table)
    for number, run in enumerate(runs, start=1):
        for failure, count in run["failures"].items():
            console.print(f"run {number}: {count} failed: {failure}", markup=False)
    unclean = [str(number) for number, run in enumerate(runs, start=1) if run["clean"] is False]
    if unclean:
        console.print(f"others used the machine during run {', '.join(unclean)}: not clean")
    if any(run["clean"] is None for run in runs):
        console.print("whether others used the server's machine is not known from here")


def _cells(run: Mapping[str, Any]) -> Sequence[str]:
    def seconds(name: str, percentile: str) -> str:
        spread = run.get(name)
        return f"{spread[percentile] * 1000:.1f} ms" if spread else "-"

    return (
        f"{run['output_tokens_per_s']:.1f}",
        f"{run['requests_per_s']:.2f}",
        seconds("ttft_s", "p50"),
        seconds("itl_s", "p50"),
        seconds("itl_s", "p99"),
        seconds("latency_s", "p99"),
    )


def _route(name: str, base_name: str) -> CompletionsRoute | GenerateRoute:
    if name == "generate":
        return GenerateRoute()
    if name != "completions":
        raise WorkloadError(f"--route {name!r}: choose completions or generate")
    return CompletionsRoute(base_name)


def _read_prompts(path: Path | None, route: str) -> tuple[str, ...]:
    if path is None:
        if route == "generate":
            raise WorkloadError("--route generate takes text: give --prompt-file")
        return ()
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"--prompt-file: {error}") from error
    texts = tuple(line for line in lines if line)
    if not texts:
        raise WorkloadError(f"--prompt-file {path}: no prompt in it")
    return texts

"""What running streams notice when adapters arrive that nobody has loaded yet.

    python -m benchmarks.cold_adapters

Streams run; while they do, one short request after another comes for adapters, each for another
one. Three phases on one server: nothing arrives (quiet), the adapters arrive for the first time
(cold), the same again, now resident (warm). The gaps between the streams' tokens during the
arrivals are compared: cold against quiet is all that an arrival costs, cold against warm what the
loading of it costs. The engine steps with one thread, and that thread has a core to itself unless
--share-cores is given: all else (router, loading, the load generator) shares the others, so that
the design is measured and not where the system happens to put whom. It must not know how adapters
are loaded.
"""

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from benchmarks import record
from benchmarks.models import ROOT as MODELS
from benchmarks.models import SHAPES, Adapters, ensure_adapters, ensure_base
from benchmarks.server import RunningServer, serving
from lory_router.bench.client import Exchange, Target, exchange
from lory_router.bench.figures import spread
from lory_router.bench.load import CompletionsRoute, Load
from lory_router.bench.machine import CpuWatch, process_tree, wait_until_quiet
from lory_router.bench.workload import Ask, Popularity, Workload

Phase = Literal["quiet", "cold", "warm"]
PHASES: tuple[Phase, ...] = ("quiet", "cold", "warm")
REQUEST_TIMEOUT_S = 300.0
POLL_S = 0.005


@dataclass(frozen=True)
class Settings:
    """How everything is measured."""

    model: str
    num_cold: int
    rank: int
    num_streams: int
    """Running streams, each on a resident adapter of its own."""
    stream_tokens: int
    lead_s: float
    """From the first tokens of all streams to the first arrival."""
    arrival_gap_s: float
    arrival_prompt_tokens: int
    threads: int
    share_cores: bool
    reps: int
    quiet_limit_s: float
    seed: int

    @property
    def adapters(self) -> Adapters:
        return Adapters(SHAPES[self.model], self.rank, self.num_cold + self.num_streams)

    @property
    def cold_names(self) -> tuple[str, ...]:
        return self.adapters.names[: self.num_cold]

    @property
    def stream_names(self) -> tuple[str, ...]:
        return self.adapters.names[self.num_cold :]

    def workload(self, names: tuple[str, ...], prompt_tokens: int, seed: int) -> Workload:
        return Workload(
            num_requests=len(names),
            adapters=names,
            popularity=Popularity("distinct"),
            base_share=0.0,
            prompt_tokens=prompt_tokens,
            output_tokens=1,
            vocab_size=SHAPES[self.model].vocab_size,
            seed=seed,
        )


@dataclass(frozen=True)
class Window:
    """What happened during one phase."""

    streams: list[Exchange]
    arrivals: list[Exchange]
    began_s: float
    ended_s: float


async def run_phase(
    streams: Sequence[bytes], arrivals: Sequence[bytes], target: Target, settings: Settings
) -> Window:
    """Streams, and in the midst of them one arrival after another; `arrivals` may be empty."""

    running = [Exchange() for _ in streams]
    tasks = [_start(target, *pair) for pair in zip(streams, running, strict=True)]
    while not all(stream.arrivals or stream.failure for stream in running):
        await asyncio.sleep(POLL_S)
    await asyncio.sleep(settings.lead_s)
    began_s = time.perf_counter()
    arrived: list[asyncio.Task[Exchange]] = []
    for number in range(settings.num_cold):
        await asyncio.sleep(began_s + number * settings.arrival_gap_s - time.perf_counter())
        if arrivals:
            arrived.append(_start(target, arrivals[number], Exchange()))
    replies = await asyncio.gather(*arrived)
    ended_s = time.perf_counter()
    await asyncio.gather(*tasks)
    return Window(running, replies, began_s, ended_s)


def _start(target: Target, request: bytes, watched: Exchange) -> "asyncio.Task[Exchange]":
    return asyncio.create_task(exchange(target, request, REQUEST_TIMEOUT_S, watched))


def measure_phase(
    phase: Phase, number: int, server: RunningServer, settings: Settings
) -> dict[str, Any]:
    """One phase in figures. Raises RuntimeError if a request fails or the streams end too soon."""
    target = Target.of(server.url)
    route = CompletionsRoute(settings.model)
    stream_load = Load(target, route, settings.stream_tokens, True, 1, REQUEST_TIMEOUT_S)
    arrival_load = Load(target, route, 1, False, 1, REQUEST_TIMEOUT_S)
    streams = settings.workload(settings.stream_names, 16, settings.seed).requests(number)
    arrivals: list[Ask] = []
    if phase != "quiet":
        workload = settings.workload(
            settings.cold_names, settings.arrival_prompt_tokens, settings.seed + 1
        )
        arrivals = workload.requests(number)
    wait_until_quiet(settings.quiet_limit_s)
    watch = CpuWatch(server.pid)
    window = asyncio.run(
        run_phase(
            [stream_load.request(ask) for ask in streams],
            [arrival_load.request(ask) for ask in arrivals],
            target,
            settings,
        )
    )
    shares = watch.stop()
    gaps = stream_gaps(streams, window, stream_load)
    latencies = arrival_latencies(arrivals, window, arrival_load)
    return {
        "gap_s": spread(gaps),
        "num_gaps": len(gaps),
        "arrival_latency_s": spread(latencies),
        "window_s": round(window.ended_s - window.began_s, 3),
        "cpu": shares.described(),
        "clean": shares.clean,
    }


def stream_gaps(asks: Sequence[Ask], window: Window, load: Load) -> list[float]:
    """Gaps between tokens that end within the window."""
    gaps: list[float] = []
    for ask, done in zip(asks, window.streams, strict=True):
        outcome = load.outcome(ask, done, done.began_s)
        if outcome.failure:
            raise RuntimeError(f"a stream failed: {outcome.failure}")
        times = [done.began_s + at_s for at_s in outcome.token_times_s]
        if times[-1] <= window.ended_s:
            raise RuntimeError("a stream ended before the arrivals did; raise --stream-tokens")
        gaps += [
            after - before
            for before, after in pairwise(times)
            if window.began_s < after <= window.ended_s
        ]
    return gaps


def arrival_latencies(asks: Sequence[Ask], window: Window, load: Load) -> list[float]:
    outcomes = [
        load.outcome(ask, done, done.began_s)
        for ask, done in zip(asks, window.arrivals, strict=True)
    ]
    failures = {outcome.failure for outcome in outcomes if outcome.failure}
    if failures:
        raise RuntimeError(f"an arrival failed: {'; '.join(sorted(failures))}")
    return [outcome.latency_s for outcome in outcomes]


def run(settings: Settings, models: Path) -> dict[str, Any]:
    """Every repetition on a server of its own, so that its adapters are cold."""
    base = ensure_base(SHAPES[settings.model], models)
    folder = ensure_adapters(settings.adapters, models)
    repetitions: list[dict[str, Any]] = []
    for repetition in range(settings.reps):
        with serving(base, folder, lory_flags(settings), models / "lory-cold.log") as server:
            warm_up(server, settings)
            with nullcontext() if settings.share_cores else set_apart(server.pid):
                phases = {
                    phase: measure_phase(phase, repetition * len(PHASES) + place, server, settings)
                    for place, phase in enumerate(PHASES)
                }
        repetitions.append(phases)
        print(f"repetition {repetition + 1}: {line(phases)}", flush=True)
    return {
        "settings": asdict(settings) | {"lory_flags": " ".join(lory_flags(settings))},
        "repetitions": repetitions,
        "median": medians(repetitions),
        "clean": all(run[phase]["clean"] for run in repetitions for phase in PHASES),
    }


@contextmanager
def set_apart(server_pid: int) -> Iterator[None]:
    """The engine's first thread, which steps, on a core of its own; all others elsewhere."""
    cores = os.sched_getaffinity(0)
    first, *others = sorted(cores)
    if not others:
        raise RuntimeError("--share-cores is needed: there is but one core")
    tree = process_tree(server_pid)
    (engine,) = [pid for pid in tree if _arguments(pid)[1:3] == ["-m", "lory_server"]]
    for pid in (os.getpid(), *tree):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), others)
    os.sched_setaffinity(engine, [first])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _arguments(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def warm_up(server: RunningServer, settings: Settings) -> None:
    """The streams' own adapters become resident; the cold ones stay where they are."""
    load = Load(
        Target.of(server.url), CompletionsRoute(settings.model), 16, True, 8, REQUEST_TIMEOUT_S
    )
    outcomes, _ = load.run(settings.workload(settings.stream_names, 16, -1).requests(0))
    failures = {outcome.failure for outcome in outcomes if outcome.failure}
    if failures:
        raise RuntimeError(f"the warm-up failed: {'; '.join(sorted(failures))}")


def ratios(phases: dict[str, dict[str, Any]]) -> dict[str, float]:
    p50, p99 = (
        {phase: phases[phase]["gap_s"][name] for phase in PHASES} for name in ("p50", "p99")
    )
    return {
        "p50_cold_to_quiet": p50["cold"] / p50["quiet"],
        "p99_cold_to_quiet": p99["cold"] / p99["quiet"],
        "p99_cold_to_warm": p99["cold"] / p99["warm"],
    }


def medians(repetitions: Sequence[dict[str, dict[str, Any]]]) -> dict[str, float]:
    every = [ratios(phases) for phases in repetitions]
    found = {name: statistics.median(one[name] for one in every) for name in every[0]}
    for phase in PHASES:
        for name in ("p50", "p99"):
            values = [phases[phase]["gap_s"][name] for phases in repetitions]
            found[f"{phase}_gap_{name}_s"] = statistics.median(values)
    return {name: round(value, 5) for name, value in found.items()}


def line(phases: dict[str, dict[str, Any]]) -> str:
    p99 = ", ".join(f"{phase} {phases[phase]['gap_s']['p99'] * 1000:.1f} ms" for phase in PHASES)
    ratio = ratios(phases)["p99_cold_to_quiet"]
    mark = "" if all(phases[phase]["clean"] for phase in PHASES) else "  (not clean)"
    return f"gap p99 {p99}; cold to quiet {ratio:.2f}{mark}"


def lory_flags(settings: Settings) -> list[str]:
    return [
        *("--threads", str(settings.threads)),
        *("--max-batch-rows", str(2 * settings.num_streams)),
        *("--dtype", "bfloat16"),
        *("--served-model-name", settings.model),
        *("--log-level", "warning"),
    ]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.cold_adapters",
        description="Measures what running streams notice when adapters arrive for the first time.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", choices=sorted(SHAPES), default="small", help="shape of the random base")
    add("--cold", type=int, default=64, help="adapters that arrive")
    add("--rank", type=int, default=16, help="of every adapter")
    add("--streams", type=int, default=8, help="streams that run meanwhile")
    add("--stream-tokens", type=int, default=1024, help="tokens of each stream")
    add("--lead", type=float, default=0.2, help="seconds of streaming before the first arrives")
    add("--arrival-gap", type=float, default=0.03, help="seconds between two arrivals")
    add("--arrival-prompt-tokens", type=int, default=4, help="prompt of each arrival")
    add("--threads", type=int, default=1, help="CPU threads of the engine")
    add("--share-cores", action="store_true", help="leave it to the system who runs where")
    add("--reps", type=int, default=3, help="repetitions, each on a server of its own")
    add("--quiet-limit", type=float, default=30.0, help="most seconds to wait for a quiet machine")
    add("--seed", type=int, default=0, help="of the prompts")
    add("--models", type=Path, default=MODELS, help="folder of the made models")
    add("--out", type=Path, help="JSON file; without it one in benchmarks/results")
    return parser.parse_args(arguments)


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    settings = Settings(
        model=arguments.model,
        num_cold=arguments.cold,
        rank=arguments.rank,
        num_streams=arguments.streams,
        stream_tokens=arguments.stream_tokens,
        lead_s=arguments.lead,
        arrival_gap_s=arguments.arrival_gap,
        arrival_prompt_tokens=arguments.arrival_prompt_tokens,
        threads=arguments.threads,
        share_cores=arguments.share_cores,
        reps=arguments.reps,
        quiet_limit_s=arguments.quiet_limit,
        seed=arguments.seed,
    )
    result = record.facts("benchmarks.cold_adapters", argv) | run(settings, arguments.models)
    path = arguments.out or record.RESULTS / f"cold-adapters-{record.today()}.json"
    record.write(path, result)
    for name, value in result["median"].items():
        print(f"{name}: {value}")
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])

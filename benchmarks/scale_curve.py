"""Throughput and first tokens as adapters become more: 5 to thousands, all warm in host memory.

One server, as many adapters on its device at most whatever there are in all. It comes to know them
as the curve grows: the first pass over the counts is made when it knows no more than it is asked
for, the others when it knows all, in turn, so that no stretch of time is one count's alone.

Beside the curve, in the same turns: as many adapters as requests run at once, each request with one
of its own, so that all stay on the device and a step reads as many as it ever will. What more
adapters than those cost is the number of them. It must not know how anything is shown.
"""

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.crowd import Crowd, gathered
from benchmarks.models import Shape, ensure_base
from benchmarks.server import RunningServer, serving
from lory_router.bench.client import Target
from lory_router.bench.figures import summarise
from lory_router.bench.load import CompletionsRoute, Load
from lory_router.bench.machine import CpuWatch, tree_resident_bytes, wait_until_quiet
from lory_router.bench.workload import Ask, Popularity, Workload

REQUEST_TIMEOUT_S = 300.0
WARM_UP_TOKENS = 4
GROWING = 0
"""The pass in which the server knows no more adapters than it is asked for."""


@dataclass(frozen=True)
class Point:
    popularity: str
    count: int


@dataclass(frozen=True)
class CurveSettings:
    shape: Shape
    rank: int
    counts: tuple[int, ...]
    popularities: tuple[str, ...]
    concurrency: int
    requests: int
    """Of each point and pass."""
    prompt_tokens: int
    output_tokens: int
    passes: int
    """Beside the first."""
    resident: int
    """Most adapters on the device."""
    threads: int
    quiet_limit_s: float
    seed: int

    @property
    def curves(self) -> list[Point]:
        return [Point(text, count) for count in self.counts for text in self.popularities]

    @property
    def distinct(self) -> Point:
        return Point("distinct", self.concurrency)

    @property
    def crowd(self) -> Crowd:
        return Crowd(self.shape, self.rank, max(*self.counts, self.concurrency))

    @property
    def adapter_bytes(self) -> int:
        return 2 * self.rank * sum(a + b for _, a, b in self.shape.modules)

    def described(self) -> dict[str, Any]:
        return asdict(self) | {
            "shape": self.shape.name,
            "adapter_bytes": self.adapter_bytes,
            "lory_flags": " ".join(flags(self)),
            "formulas": {text: Popularity.parse(text).formula(0) for text in self.popularities},
        }


def flags(settings: CurveSettings) -> list[str]:
    """Room on the device for `resident` adapters, and on the host for all."""
    room = settings.adapter_bytes + (1 << 16)
    return [
        *("--threads", str(settings.threads)),
        *("--max-batch-rows", str(settings.concurrency)),
        *("--max-model-len", str(2 * (settings.prompt_tokens + settings.output_tokens))),
        *("--dtype", "bfloat16"),
        *("--max-resident-adapters", str(settings.resident)),
        *("--adapter-memory", str(settings.resident * room)),
        *("--adapter-host-memory", str((settings.crowd.count + settings.resident) * room)),
        *("--served-model-name", settings.shape.name),
        *("--log-level", "warning"),
    ]


def measure(settings: CurveSettings, models: Path) -> dict[str, Any]:
    base = ensure_base(settings.shape, models)
    with gathered([settings.crowd], models) as folder:
        log = models / "lory-scale.log"
        with serving(base, folder, flags(settings), log) as server:
            runs = dict(_growing(server, settings))
            for number, point in _in_turn(settings):
                runs[point].append(run(server, point, settings, number))
            resident_bytes = tree_resident_bytes(server.pid)
    points = [summary(point, runs[point]) for point in settings.curves]
    distinct = summary(settings.distinct, runs[settings.distinct])
    return {
        "points": points,
        "distinct": distinct,
        "drops": drops(points),
        "resident_bytes": resident_bytes,
    }


def _growing(
    server: RunningServer, settings: CurveSettings
) -> Iterator[tuple[Point, list[dict[str, Any]]]]:
    """The first pass: every count when no more are known."""
    names, known = settings.crowd.names, 0
    for point in sorted([*settings.curves, settings.distinct], key=lambda point: point.count):
        bring(server, names[known : point.count], settings)
        known = point.count
        yield point, [run(server, point, settings, GROWING)]


def _in_turn(settings: CurveSettings) -> Iterator[tuple[int, Point]]:
    draw = random.Random(settings.seed)
    points = [*settings.curves, settings.distinct]
    for number in range(GROWING + 1, GROWING + 1 + settings.passes):
        for point in draw.sample(points, len(points)):
            yield number, point


def bring(server: RunningServer, names: Sequence[str], settings: CurveSettings) -> None:
    """Ask each of these once, so that it is in host memory."""
    if names:
        workload = _workload(settings, names, "distinct", len(names), seed=-1)
        _send(server, workload.requests(len(names)), settings, WARM_UP_TOKENS)


def run(
    server: RunningServer, point: Point, settings: CurveSettings, number: int
) -> dict[str, Any]:
    """One pass over one point, in figures."""
    names = settings.crowd.names[: point.count]
    workload = _workload(settings, names, point.popularity, settings.requests, settings.seed)
    asks = workload.requests(1000 * point.count + number)
    wait_until_quiet(settings.quiet_limit_s)
    watch = CpuWatch(server.pid)
    figures = _send(server, asks, settings, settings.output_tokens)
    shares = watch.stop()
    wanted = ("output_tokens_per_s", "wall_s", "adapters_used", "ttft_s")
    return {key: figures[key] for key in wanted} | {
        "pass": number,
        "distinct_in_batch": _distinct(asks, settings.concurrency),
        "cpu": shares.described(),
        "clean": shares.clean,
    }


def _workload(
    settings: CurveSettings, names: Sequence[str], popularity: str, num_requests: int, seed: int
) -> Workload:
    return Workload(
        num_requests=num_requests,
        adapters=tuple(names),
        popularity=Popularity.parse(popularity),
        base_share=0.0,
        prompt_tokens=settings.prompt_tokens,
        output_tokens=settings.output_tokens,
        vocab_size=settings.shape.vocab_size,
        seed=seed,
    )


def _send(
    server: RunningServer, asks: Sequence[Ask], settings: CurveSettings, output_tokens: int
) -> dict[str, Any]:
    load = Load(
        Target.of(server.url),
        CompletionsRoute(settings.shape.name),
        output_tokens,
        stream=True,
        concurrency=settings.concurrency,
        timeout_s=REQUEST_TIMEOUT_S,
    )
    outcomes, wall_s = load.run(asks)
    figures = summarise(outcomes, wall_s)
    if figures["failures"]:
        raise RuntimeError(f"requests failed: {figures['failures']}")
    return figures


def _distinct(asks: Sequence[Ask], concurrency: int) -> float:
    """Mean number of adapters among as many requests in a row as run at once."""
    windows = range(0, len(asks), concurrency)
    found = [len({ask.adapter for ask in asks[at : at + concurrency]}) for at in windows]
    return round(statistics.mean(found), 2)


def summary(point: Point, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the passes in which all adapters are known; the first stands beside them."""
    later = [run for run in runs if run["pass"] != GROWING]
    return asdict(point) | {
        "output_tokens_per_s": statistics.median(run["output_tokens_per_s"] for run in later),
        "ttft_p50_s": statistics.median(run["ttft_s"]["p50"] for run in later),
        "ttft_p99_s": statistics.median(run["ttft_s"]["p99"] for run in later),
        "distinct_in_batch": statistics.median(run["distinct_in_batch"] for run in later),
        "growing_tokens_per_s": runs[0]["output_tokens_per_s"],
        "clean": all(run["clean"] for run in later),
        "runs": list(runs),
    }


def drops(points: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each popularity: what the most adapters lose against each smaller count."""
    found: dict[str, dict[str, float]] = {}
    for popularity in dict.fromkeys(point["popularity"] for point in points):
        rates = {
            point["count"]: point["output_tokens_per_s"]
            for point in points
            if point["popularity"] == popularity
        }
        most = rates[max(rates)]
        found[popularity] = {str(n): round(1 - most / rate, 4) for n, rate in rates.items()}
    return found

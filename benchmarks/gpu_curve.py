"""The curve: one base of the 8B shape on one device, and more and more adapters.

Throughput, time to first token and time per output token over 1 to 1,000 rank-16 adapters, all warm
in host memory, of which a fixed number fits the device; what one copy to the device takes, and what
a step loses meanwhile; and what a million tokens cost, beside one deployment per adapter.

The engine is the one that serves, whole but for two things: weights are random numbers made on the
device instead of read, and requests come from this process instead of HTTP. Adapters come through
its own store and reader processes from folders in memory (gpu_adapters.py says what these share).
It must not know where results go.
"""

import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import gpu_copies
from benchmarks.deadline import Deadline
from benchmarks.engine_drive import Driver, Reply, Request, closed_loop, smooth
from benchmarks.gpu_adapters import Kin, written
from benchmarks.gpu_base import RandomBase, llama_8b, model_name, tiny_llama
from benchmarks.gpu_copies import Arrived, Tiers
from benchmarks.models import SHAPES, Shape
from benchmarks.scale_sim import LLAMA_8B
from lory_router.bench.workload import FIRST_TOKEN_ID, Popularity
from lory_server.build import assemble, memory_needs
from lory_server.host_memory import free_host_bytes
from lory_server.memory_plan import MemoryPlan, plan_memory
from lory_server.messages import EngineOptions
from lory_server.model.spec import ModelSpec

GIB = 1 << 30
FILL_SHARE = 0.6
"""Of the time, in which adapters come to the host."""
FIRST_PASS_SHARE = 0.9
"""Of the time; what is left is for copies, and further passes."""

COST_FORMULA = (
    "price of an hour / (3600 * output tokens a second) * 1e6; one deployment per adapter: as many "
    "devices as adapters at the same price, for the same tokens a second in all"
)


@dataclass(frozen=True)
class Scale:
    """What is built, asked for and measured."""

    spec: ModelSpec
    shape: Shape
    """The same, as adapters are made for it."""
    rank: int
    counts: tuple[int, ...]
    """Of adapters; those that goals speak of first."""
    popularities: tuple[str, ...]
    resident: int
    """Adapters that the device's pool holds."""
    other_ranks: tuple[int, ...]
    """Of adapters that are copied, beside the curve's."""
    per_rank: int
    files: int
    """Of weights, that adapters of the curve share."""
    rows: int
    """Requests at once, and the largest batch."""
    step_tokens: int
    max_positions: int
    prompt_tokens: int
    output_tokens: tuple[int, int]
    """The fewest and the most, each number as likely."""
    warm_up_s: float
    window_s: float
    passes: int
    """Over all points, if there is time."""
    readers: int
    host_reserve_bytes: int
    """Of free host memory that adapters leave alone; at most an eighth of what was free."""
    copies: gpu_copies.Scale
    budget_s: float

    @property
    def at_once(self) -> int:
        """Adapters on their way to the host."""
        return max(2, 2 * self.readers)

    @property
    def kin(self) -> Kin:
        return Kin(self.shape, self.rank, max(self.counts), self.files)

    @property
    def others(self) -> tuple[Kin, ...]:
        return tuple(Kin(self.shape, rank, self.per_rank, 1) for rank in self.other_ranks)


FULL = Scale(
    spec=llama_8b(),
    shape=LLAMA_8B,
    rank=16,
    counts=(5, 1000, 32, 100, 500, 1),
    popularities=("uniform", "zipf:1.0"),
    resident=128,
    other_ranks=(8, 32, 64),
    per_rank=4,
    files=4,
    rows=64,
    step_tokens=512,
    max_positions=2048,
    prompt_tokens=128,
    output_tokens=(64, 192),
    warm_up_s=2.5,
    window_s=5.5,
    passes=3,
    readers=8,
    host_reserve_bytes=10 * GIB,
    copies=gpu_copies.Scale(
        rows=64, prompt_tokens=16, rounds=3, turns=4, steps=50, traced_steps=30
    ),
    budget_s=430.0,
)
TINY = Scale(
    spec=tiny_llama(),
    shape=SHAPES["tiny"],
    rank=4,
    counts=(2, 16),
    popularities=("uniform", "zipf:1.0"),
    resident=5,
    other_ranks=(2,),
    per_rank=2,
    files=2,
    rows=3,
    step_tokens=32,
    max_positions=256,
    prompt_tokens=5,
    output_tokens=(2, 4),
    warm_up_s=0.0,
    window_s=0.05,
    passes=2,
    readers=1,
    host_reserve_bytes=0,
    copies=gpu_copies.Scale(rows=2, prompt_tokens=4, rounds=2, turns=2, steps=4, traced_steps=2),
    budget_s=60.0,
)


@dataclass(frozen=True)
class Wishes:
    """What the command line says."""

    price_per_hour: float
    """Of one device, in any currency."""
    host_bytes: int = 0
    """For adapters, without a look at what is free; 0: what is free, less a reserve."""
    cuda_graphs: bool = True


@dataclass(frozen=True)
class Point:
    popularity: str
    count: int

    def __str__(self) -> str:
        return f"{self.count} adapters, {self.popularity}"


Keep = Callable[[dict[str, Any]], None]
Say = Callable[[str], None]


def measure(
    scale: Scale,
    device: torch.device,
    wishes: Wishes,
    deadline: Deadline,
    keep: Keep,
    say: Say,
) -> dict[str, Any]:
    """The findings, kept after each of them."""
    with (
        written((scale.kin, *scale.others)) as folder,
        built(scale, device, wishes, folder) as (driver, facts),
        smooth(),
    ):
        found = facts | _facts(scale, wishes, folder)
        say(f"engine built in {facts['build_s']} s")
        arrived, found["held"] = fill(driver, scale, wishes, deadline.part(FILL_SHARE))
        say(_held_line(found["held"]))
        keep(found)
        curve = Curve(driver, scale, arrived, wishes, found)
        first_end = deadline.part(FIRST_PASS_SHARE)
        for point in curve.order(0):
            _measure_point(curve, point, 0, first_end, keep, say)
        _copies(driver, scale, arrived, device, found, deadline)
        keep(found)
        for number in range(1, scale.passes):
            for point in curve.order(number):
                _measure_point(curve, point, number, deadline, keep, say)
        driver.engine.check()
    return found | {"passed": bool(found["points"]) and not found["held"]["shared"]}


def _measure_point(
    curve: "Curve", point: Point, number: int, deadline: Deadline, keep: Keep, say: Say
) -> None:
    if deadline.is_over:
        curve.miss(point)
        return
    run = curve.run(point, number)
    say(f"{point}: {run['output_tokens_per_s']:,.0f} tokens/s, {run['copies']} copies")
    keep(curve.found)


# -- the engine -------------------------------------------------------------------------------


@contextmanager
def built(
    scale: Scale, device: torch.device, wishes: Wishes, adapters: Path
) -> Iterator[tuple[Driver, dict[str, Any]]]:
    """An engine that serves, and what it took to build."""
    began_s = time.monotonic()
    with TemporaryDirectory(prefix="lory-base-") as base, torch.no_grad():
        made = RandomBase.of(scale.spec, device, scale.max_positions, scale.rows)
        decoder = made.decoder()
        options = options_of(scale, device, wishes, Path(base), adapters)
        plan = plan_memory(memory_needs(options, decoder))
        wake = threading.Event()
        engine = assemble(options, decoder, plan, wake.set)
    facts = {"build_s": round(time.monotonic() - began_s, 1), "memory": _table(plan)}
    try:
        yield Driver(engine, wake), facts
    finally:
        engine.close()


def options_of(
    scale: Scale, device: torch.device, wishes: Wishes, base: Path, adapters: Path
) -> EngineOptions:
    """The base's folder is empty: it has no tokenizer to compare those of adapters with."""
    kin, others = scale.kin, scale.others
    all_bytes = sum(one.count * one.adapter_bytes for one in (kin, *others))
    return EngineOptions(
        model=str(base),
        adapters_dir=str(adapters),
        device="cuda" if device.type == "cuda" else "cpu",
        dtype="bfloat16",
        quantize="nf4",
        max_batch_rows=scale.rows,
        max_step_tokens=scale.step_tokens,
        adapter_pool_bytes=scale.resident * (kin.adapter_bytes + (1 << 16)),
        max_resident_adapters=scale.resident,
        adapter_host_bytes=all_bytes + all_bytes // 16,
        reader_processes=scale.readers,
        cuda_graphs=wishes.cuda_graphs,
    )


def _table(plan: MemoryPlan) -> dict[str, int]:
    return dict(plan.table())


# -- the host tier ----------------------------------------------------------------------------


def fill(
    driver: Driver, scale: Scale, wishes: Wishes, deadline: Deadline
) -> tuple[list[Arrived], dict[str, Any]]:
    """Ask every adapter for a token, so that it is in host memory; as many as there is room for.

    What is in memory is counted by the engine, and by revisions: names that share one share memory.
    """
    kin = scale.kin
    line = [(name, other) for other in (*scale.others, kin) for name in other.names]
    prompt = (FIRST_TOKEN_ID,)
    arrived: list[Arrived] = []
    sent: dict[str, Kin] = {}
    bytes_sent, why, began_s = 0, "", time.monotonic()
    reserve_bytes = min(scale.host_reserve_bytes, free_host_bytes() // 8)
    driver.restart()
    while (line and not why) or sent:
        while line and not why and len(sent) < scale.at_once:
            name, of = line[0]
            why = _full(scale, wishes, deadline, reserve_bytes, bytes_sent, len(sent) + 1)
            if not why:
                del line[0]
                driver.send(Request(name, prompt, 1))
                sent[name] = of
                bytes_sent += of.adapter_bytes
        for reply in driver.turn():
            arrived.append(_arrived(reply, sent.pop(reply.adapter).rank))
    seconds = time.monotonic() - began_s
    loads = driver.tally.moved("load", "host")
    host_bytes = sum(move.num_bytes for move in loads)
    revisions = {one.revision for one in arrived}
    return arrived, {
        "adapters": sum(one.rank == scale.rank for one in arrived),
        "wanted": kin.count,
        "adapter_bytes": kin.adapter_bytes,
        "host_bytes": host_bytes,
        "loads": len(loads),
        "shared": len(arrived) - len(revisions),
        "why_no_more": why,
        "seconds": round(seconds, 1),
        "bytes_per_s": round(host_bytes / seconds),
    }


def _arrived(reply: Reply, rank: int) -> Arrived:
    assert reply.finished is not None
    return Arrived(reply.adapter, rank, reply.finished.adapter_revision)


def _full(
    scale: Scale,
    wishes: Wishes,
    deadline: Deadline,
    reserve_bytes: int,
    bytes_sent: int,
    on_their_way: int,
) -> str:
    """Why no more adapters come; empty while they may."""
    if deadline.is_over:
        return f"the time for it was over after {deadline.budget_s:g} s"
    next_bytes = on_their_way * scale.kin.adapter_bytes
    if wishes.host_bytes:
        is_full = bytes_sent + scale.kin.adapter_bytes > wishes.host_bytes
        return f"{wishes.host_bytes / GIB:.0f} GiB were allowed" if is_full else ""
    is_full = free_host_bytes() < reserve_bytes + next_bytes
    return "free host memory ran out (--host-gib takes some unseen)" if is_full else ""


def _held_line(held: dict[str, Any]) -> str:
    text = (
        f"{held['adapters']} of {held['wanted']} adapters are in host memory, "
        f"{held['host_bytes'] / 1e9:.1f} GB, read at {held['bytes_per_s'] / 1e9:.2f} GB/s"
    )
    return text + (f": {held['why_no_more']}" if held["why_no_more"] else "")


# -- the curve --------------------------------------------------------------------------------


class Curve:
    """Points, and the runs of each so far."""

    def __init__(
        self,
        driver: Driver,
        scale: Scale,
        arrived: Sequence[Arrived],
        wishes: Wishes,
        found: dict[str, Any],
    ) -> None:
        self.found = found
        self._driver = driver
        self._scale = scale
        self._price = wishes.price_per_hour
        self._names = [one.name for one in arrived if one.rank == scale.rank]
        self._runs: dict[Point, list[dict[str, Any]]] = {}

    def order(self, number: int) -> list[Point]:
        """As they are named at first; then at random, so that no stretch of time is one's alone.
        Where fewer adapters than wanted are in memory, all of them are the largest count."""
        held = len(self._names)
        counts = dict.fromkeys(min(count, held) for count in self._scale.counts if held)
        points = [Point(text, count) for count in counts for text in self._scale.popularities]
        return random.Random(number).sample(points, len(points)) if number else points

    def run(self, point: Point, number: int) -> dict[str, Any]:
        scale = self._scale
        requests = _requests(scale, self._names[: point.count], point, number)
        run = closed_loop(self._driver, requests, scale.rows, scale.warm_up_s, scale.window_s)
        self._runs.setdefault(point, []).append(run)
        self.found["points"] = [self._summary(one) for one in self._runs]
        return run

    def miss(self, point: Point) -> None:
        """It is named, unless it has been measured in an earlier pass."""
        missed = self.found["not_reached"]
        if point not in self._runs and str(point) not in missed:
            missed.append(str(point))

    def _summary(self, point: Point) -> dict[str, Any]:
        """Medians of the runs."""
        runs = self._runs[point]

        def median(*path: str) -> float:
            return round(statistics.median(_at(run, path) for run in runs), 6)

        rate = median("output_tokens_per_s")
        cost = self._price / 3600 / rate * 1e6
        return {
            "popularity": point.popularity,
            "count": point.count,
            "output_tokens_per_s": rate,
            "ttft_p50_s": median("ttft_s", "p50"),
            "ttft_p99_s": median("ttft_s", "p99"),
            "tpot_p50_s": median("tpot_s", "p50"),
            "tpot_p99_s": median("tpot_s", "p99"),
            "copies_a_request": median("copies_a_request"),
            "copied_bytes_per_s": median("copied_bytes_per_s"),
            "rows_a_step": median("rows_a_step"),
            "cost_per_million": round(cost, 4),
            "cost_per_million_dedicated": round(cost * point.count, 4),
            "runs": runs,
        }


def _at(value: Any, path: Sequence[str]) -> float:
    for key in path:
        value = value[key]
    return value


def _requests(scale: Scale, names: Sequence[str], point: Point, number: int) -> Iterator[Request]:
    """Without end; no two runs share a prompt."""
    draw = random.Random(f"{point}/{number}")
    popularity = Popularity.parse(point.popularity)
    tokens = range(FIRST_TOKEN_ID, scale.spec.vocab_size)
    while True:
        for chosen in popularity.choose(len(names), scale.rows, draw):
            prompt = tuple(draw.choices(tokens, k=scale.prompt_tokens))
            yield Request(names[chosen], prompt, draw.randint(*scale.output_tokens))


# -- copies -----------------------------------------------------------------------------------


def _copies(
    driver: Driver,
    scale: Scale,
    arrived: Sequence[Arrived],
    device: torch.device,
    found: dict[str, Any],
    deadline: Deadline,
) -> None:
    """Adapters of each rank alone, then beside streams."""
    of = scale.copies
    prompt = tuple(range(FIRST_TOKEN_ID, FIRST_TOKEN_ID + of.prompt_tokens))
    # One of each revision: none is copied while a stream runs on it.
    curve = list({one.revision: one for one in arrived if one.rank == scale.rank}.values())
    some = [one for one in arrived if one.rank != scale.rank] + curve[: scale.per_rank]
    tiers = Tiers(driver.engine._adapters)
    rows = min(of.rows, len(curve) - 1)
    parts: dict[str, Callable[[], object]] = {
        "loads": lambda: gpu_copies.copy_times(tiers, some, device, of.rounds),
        "first_tokens": lambda: gpu_copies.first_tokens(driver, tiers, some, prompt, of.rounds),
        "overlap": lambda: gpu_copies.overlap(
            driver, tiers, curve[:rows], curve[rows : rows + 8], of, prompt, device
        ),
    }
    for name, part in parts.items():
        if deadline.is_over or rows < 1:
            found["not_reached"].append(name)
        else:
            found[name] = part()


def _facts(scale: Scale, wishes: Wishes, folder: Path) -> dict[str, Any]:
    kin = scale.kin
    return {
        "model": model_name(scale.spec),
        "rank": scale.rank,
        "resident": scale.resident,
        "rows": scale.rows,
        "prompt_tokens": scale.prompt_tokens,
        "output_tokens": list(scale.output_tokens),
        "window_s": scale.window_s,
        "warm_up_s": scale.warm_up_s,
        "reader_processes": scale.readers,
        "cuda_graphs": wishes.cuda_graphs,
        "formulas": {text: Popularity.parse(text).formula(0) for text in scale.popularities},
        "load": "closed loop, in process; all requests of a point are cancelled at its end",
        "adapters": (
            f"{kin.count} names over {min(kin.files, kin.count)} files of weights, each with a "
            "configuration and a scale of its own: read, decoded and held in host memory each by "
            f"itself, from {folder.parent}"
        ),
        "bypassed": "HTTP and tokenizer; weights of the base are random, made on the device",
        "price_per_hour": wishes.price_per_hour,
        "cost": COST_FORMULA,
        "points": [],
        "not_reached": [],
    }

"""Adapters on their way from the host to the device: how long one takes, what waits for it, and
what a running step loses while copies go on.

By the tiers and the copier that serve. The figure beside them is a plain copy of as many bytes from
pinned memory, which no copy of pageable memory can beat. It must not know how adapters came to the
host, nor where results go.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch

from benchmarks.engine_drive import Driver, Request
from benchmarks.gpu_base import synchronize
from benchmarks.gpu_trace import traced
from lory_router.bench.figures import percentile
from lory_server.adapters.cache import AdapterCache
from lory_server.messages import AdapterMove
from lory_server.plan import AdapterDemand

COPY_TIMEOUT_S = 60.0
POLL_S = 0.0001
IN_FLIGHT = 3
"""Copies asked for at once while steps go on: what is done is seen once a step."""
PINNED_COPIES = 5


@dataclass(frozen=True)
class Scale:
    rows: int
    """Streams, each on an adapter of its own, while copies go on."""
    prompt_tokens: int
    rounds: int
    """Copies, and first tokens, of each adapter of a rank."""
    turns: int
    """Stretches with copies, and as many without, in turn."""
    steps: int
    """Of a stretch."""
    traced_steps: int

    @property
    def stream_tokens(self) -> int:
        """Enough that no stream ends meanwhile."""
        return 2 * self.turns * self.steps + self.traced_steps + self.steps + 32


@dataclass(frozen=True)
class Arrived:
    """An adapter in host memory."""

    name: str
    rank: int
    revision: str


class Tiers:
    """The engine's own tiers, asked directly."""

    def __init__(self, cache: AdapterCache) -> None:
        self._cache = cache

    def copy(self, revision: str) -> AdapterMove:
        """To the device, from which it was gone; nobody may hold it."""
        self.drop(revision)
        self._cache.drain_moves()
        self.want((revision,), frozenset())
        deadline_s = time.monotonic() + COPY_TIMEOUT_S
        while not self.is_there(revision):
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"adapter {revision} does not arrive on the device")
            time.sleep(POLL_S)
            self._cache.residency()
        moves = self._cache.drain_moves()
        return next(move for move in moves if (move.kind, move.tier) == ("load", "device"))

    def drop(self, revision: str) -> None:
        self._cache.device.drop(revision)

    def want(self, revisions: tuple[str, ...], in_use: frozenset[str]) -> None:
        self._cache.demand(AdapterDemand(in_use, revisions))

    def is_there(self, revision: str) -> bool:
        return revision in self._cache.device


class Pump:
    """Keeps copies going beside steps: what is there is dropped and wanted again."""

    def __init__(self, tiers: Tiers, revisions: Sequence[str], in_use: frozenset[str]) -> None:
        self._tiers = tiers
        self._line = cycle(revisions)
        self._in_use = in_use
        self._going: list[str] = []
        self._at_once = min(IN_FLIGHT, len(revisions))

    def turn(self) -> None:
        self._going = [one for one in self._going if not self._tiers.is_there(one)]
        while len(self._going) < self._at_once:
            following = next(self._line)
            self._tiers.drop(following)
            self._going.append(following)
        self._tiers.want(tuple(self._going), self._in_use)

    @property
    def is_going(self) -> bool:
        return any(not self._tiers.is_there(one) for one in self._going)


def copy_times(
    tiers: Tiers, adapters: Sequence[Arrived], device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """Medians, rank by rank; nothing else runs."""
    found: list[dict[str, Any]] = []
    for rank in sorted({one.rank for one in adapters}):
        revisions = [one.revision for one in adapters if one.rank == rank]
        for revision in revisions:
            tiers.copy(revision)  # for the first time: its pages come to this process
        moves = [tiers.copy(revision) for revision in revisions for _ in range(rounds)]
        seconds = statistics.median(move.seconds for move in moves)
        num_bytes = moves[0].num_bytes
        pinned_s = pinned_copy_s(num_bytes, device)
        found.append(
            {
                "rank": rank,
                "device_bytes": num_bytes,
                "to_device_ms": round(seconds * 1e3, 3),
                "bytes_per_s": round(num_bytes / seconds),
                "pinned_ms": round(pinned_s * 1e3, 3),
                "pinned_bytes_per_s": round(num_bytes / pinned_s),
                "copies": len(moves),
            }
        )
    return found


def pinned_copy_s(num_bytes: int, device: torch.device) -> float:
    """Of a plain copy, the best of some; on a CPU within its memory."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    times: list[float] = []
    for _ in range(PINNED_COPIES):
        synchronize(device)
        began_s = time.perf_counter()
        target.copy_(source, non_blocking=True)
        synchronize(device)
        times.append(time.perf_counter() - began_s)
    return min(times)


def first_tokens(
    driver: Driver, tiers: Tiers, adapters: Sequence[Arrived], prompt: tuple[int, ...], rounds: int
) -> list[dict[str, Any]]:
    """One request at a time: of an adapter in host memory, and again now that it is resident."""
    found: list[dict[str, Any]] = []
    for rank in sorted({one.rank for one in adapters}):
        names = [one for one in adapters if one.rank == rank]
        host_s: list[float] = []
        device_s: list[float] = []
        for one in names * rounds:
            tiers.drop(one.revision)
            for seconds in (host_s, device_s):
                reply = driver.answer([Request(one.name, prompt, 1)])[0]
                seconds.append(reply.ttft_s)
        found.append(
            {
                "rank": rank,
                "device_ms": round(statistics.median(device_s) * 1e3, 3),
                "host_ms": round(statistics.median(host_s) * 1e3, 3),
                "requests": len(host_s),
            }
        )
    return found


def overlap(
    driver: Driver,
    tiers: Tiers,
    streams: Sequence[Arrived],
    movers: Sequence[Arrived],
    scale: Scale,
    prompt: tuple[int, ...],
    device: torch.device,
) -> dict[str, Any]:
    """What steps of so many streams lose while `movers` are copied, and how idle the device is."""
    replies = [driver.send(Request(s.name, prompt, scale.stream_tokens)) for s in streams]
    while any(not reply.first_s for reply in replies):
        driver.turn()
    _steps(driver, scale.steps)
    pump = Pump(tiers, [one.revision for one in movers], frozenset(s.revision for s in streams))
    quiet_s: list[float] = []
    copying_s: list[float] = []
    copied: list[AdapterMove] = []
    for _ in range(scale.turns):
        quiet_s += _steps(driver, scale.steps)
        driver.restart()
        copying_s += _steps(driver, scale.steps, pump)
        copied += driver.tally.moved("load", "device")
        while pump.is_going:
            driver.turn()
    trace = traced(driver.turn, device, scale.traced_steps)
    if any(reply.finished for reply in replies):
        raise RuntimeError("a stream ended while it was measured")
    driver.drain()
    return {
        "rows": len(streams),
        "quiet": _spread(quiet_s),
        "copying": _spread(copying_s),
        "lost_share": round(statistics.fmean(copying_s) / statistics.fmean(quiet_s) - 1, 4),
        "copies": len(copied),
        "copied_bytes_per_s": round(sum(move.num_bytes for move in copied) / sum(copying_s)),
        "idle_share": round(1 - trace.busy_ms() / trace.span_ms(), 4) if trace.spans else None,
    }


def _steps(driver: Driver, count: int, pump: Pump | None = None) -> list[float]:
    """Seconds of so many turns of the loop, in each of which a step ends."""
    times: list[float] = []
    for _ in range(count):
        began_s = time.perf_counter()
        if pump is not None:
            pump.turn()
        driver.turn()
        times.append(time.perf_counter() - began_s)
    return times


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return {
        "mean_ms": round(statistics.fmean(seconds) * 1e3, 4),
        "p50_ms": round(percentile(seconds, 50) * 1e3, 4),
        "p99_ms": round(percentile(seconds, 99) * 1e3, 4),
        "steps": len(seconds),
    }

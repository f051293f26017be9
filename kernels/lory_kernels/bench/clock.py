"""How long a call takes: cold, with nothing it reads in a cache, and warm.

On a CPU a call is made on one copy of its inputs after the other, enough of them that the first has
left the caches when its turn comes again. On CUDA it is replayed from a graph where one can hold
it, between two events on the device, after a write over more than the second-level cache; warm it
is repeated within one graph. It must not know what is called.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lory_kernels.bench.case import Contender, Run, cloned, tensor_bytes

CPU_CACHE_BYTES = 96 << 20
"""Copies of a call's inputs are at least so many bytes together: three times 32 MB, the last-level
cache of many a server's core complex."""
MOST_COPIES = 512
FLUSH_BYTES = 256 << 20
WARM_CALLS = 20
"""In one graph, so that its launch is a small share."""
WARMUP_CALLS = 3


@dataclass(frozen=True, slots=True)
class Times:
    """Of one call, over some repetitions."""

    p10_s: float
    median_s: float
    p90_s: float
    repetitions: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Times":
        ordered = sorted(seconds)

        def place(share: float) -> float:
            return ordered[round(share * (len(ordered) - 1))]

        return cls(place(0.1), place(0.5), place(0.9), len(ordered))


@dataclass(frozen=True, slots=True)
class Timing:
    cold: Times | None
    """None where the inputs are too small for their copies to fill the caches."""
    warm: Times
    is_captured: bool
    """Replayed from a CUDA graph."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is repeated."""

    seconds: float = 0.1
    """For each figure; no repetition beyond it starts, but the fewest are always made."""
    fewest: int = 5
    most: int = 200


class Clock(Protocol):
    def measure(self, contender: Contender[Any], inputs: Any) -> Timing: ...

    def per_step(self, run: Run) -> Times:
        """Wall time of a call that may wait for the device, its end awaited."""
        ...


class CpuClock:
    def __init__(self, effort: Effort, *, can_be_cold: bool = True) -> None:
        self._effort = effort
        self._most_copies = MOST_COPIES if can_be_cold else 0

    def measure(self, contender: Contender[Any], inputs: Any) -> Timing:
        num_bytes = max(tensor_bytes(inputs), 1)
        copies = -(-CPU_CACHE_BYTES // num_bytes)
        is_cold = copies <= self._most_copies
        runs = [contender.prepare(cloned(inputs)) for _ in range(max(copies, 2) if is_cold else 1)]
        for run in runs:
            run()
        cold = self._repeat(runs) if is_cold else None
        return Timing(cold, self._repeat(runs[:1]), is_captured=False)

    def per_step(self, run: Run) -> Times:
        return self._repeat([run])

    def _repeat(self, runs: Sequence[Run]) -> Times:
        def once(number: int) -> float:
            run = runs[number % len(runs)]
            began_s = time.perf_counter()
            run()
            return time.perf_counter() - began_s

        return Times.of(_repeated(self._effort, once))


class CudaClock:
    """All on one stream: scratch that a contender keeps for its stream is there when a graph is
    captured."""

    def __init__(self, effort: Effort, device: torch.device) -> None:
        self._effort = effort
        self._stream = torch.cuda.Stream(device)
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        flush_bytes = max(FLUSH_BYTES, 4 * cache_bytes)
        self._flush = torch.empty(flush_bytes, dtype=torch.uint8, device=device)

    def measure(self, contender: Contender[Any], inputs: Any) -> Timing:
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            return self._measure(contender, inputs)

    def _measure(self, contender: Contender[Any], inputs: Any) -> Timing:
        run = contender.prepare(cloned(inputs))
        for _ in range(WARMUP_CALLS):
            run()
        torch.cuda.synchronize()
        if contender.can_capture:
            once, calls = self._captured(run, 1), WARM_CALLS
            many = self._captured(run, WARM_CALLS)
        else:
            once, many, calls = run, run, 1
        cold = self._events(once, 1, self._flush.zero_)
        warm = self._events(many, calls, lambda: None)
        return Timing(cold, warm, contender.can_capture)

    def _captured(self, run: Run, calls: int) -> Callable[[], None]:
        """A graph of so many calls."""
        graph = torch.cuda.CUDAGraph()
        with _without_garbage_collection(), torch.cuda.graph(graph, stream=self._stream):
            for _ in range(calls):
                run()
        return graph.replay

    def per_step(self, run: Run) -> Times:
        def once(_number: int) -> float:
            torch.cuda.synchronize()
            began_s = time.perf_counter()
            run()
            torch.cuda.synchronize()
            return time.perf_counter() - began_s

        once(0)
        return Times.of(_repeated(self._effort, once))

    def _events(self, run: Callable[[], object], calls: int, before: Callable[[], object]) -> Times:
        def once(_number: int) -> float:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before()
            began.record()
            run()
            ended.record()
            ended.synchronize()
            return began.elapsed_time(ended) / 1e3 / calls

        once(0)
        return Times.of(_repeated(self._effort, once))


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """What is freed within a capture ends it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _repeated(effort: Effort, once: Callable[[int], float]) -> list[float]:
    seconds: list[float] = []
    began_s = time.perf_counter()
    while len(seconds) < effort.most:
        if len(seconds) >= effort.fewest and time.perf_counter() - began_s > effort.seconds:
            break
        seconds.append(once(len(seconds)))
    return seconds

"""Host to device: a blob's chunks into their places in the pool, on a thread beside the step.

Two ways: plain copies for a pool in host memory, and a ring of pinned buffers with a stream of
its own for CUDA. When `copy` returns, the bytes are there. It must not know slots' states.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lory_server.adapters.blob import AdapterBlob
from lory_server.adapters.extents import Allocation
from lory_server.adapters.footprint import Columns
from lory_server.adapters.full_weights import NOTHING
from lory_server.adapters.pool import AdapterPool, SlotRow

PIECE_BYTES = 1024 * 1024
RING_BUFFERS = 4
RING_BUFFER_BYTES = 8 * 1024 * 1024


class Copier(Protocol):
    def copy(
        self,
        blob: AdapterBlob,
        columns: Columns,
        allocation: Allocation,
        full: Allocation = NOTHING,
    ) -> SlotRow:
        """Write the blob to its place in the pool, its full weights to theirs, and build the row
        that publishes it."""
        ...


def make_copier(pool: AdapterPool) -> Copier:
    return StagedCopier(pool) if pool.device.type == "cuda" else HostCopier(pool)


@dataclass(frozen=True, slots=True)
class Run:
    """Elements that are contiguous both in the blob and on the device."""

    source: int
    target: int
    length: int


def runs(blob: AdapterBlob, allocation: Allocation) -> Iterator[Run]:
    """The copies of a load to the pool; one, when the adapter lies in one extent."""
    return _runs(blob.chunk_starts, blob.pool_numel, allocation, blob.data.element_size())


def full_runs(blob: AdapterBlob, allocation: Allocation) -> Iterator[Run]:
    """The copies of its full weights."""
    if not blob.full_starts:
        return iter(())
    return _runs(blob.full_starts, blob.data.numel(), allocation, blob.data.element_size())


def _runs(
    starts: Sequence[int], last_end: int, allocation: Allocation, itemsize: int
) -> Iterator[Run]:
    ends = (*starts[1:], last_end)
    source, target = starts[0], allocation.chunk_starts[0] // itemsize
    end = source
    chunks = zip(starts, ends, allocation.chunk_starts, strict=True)
    for chunk, chunk_end, place in chunks:
        place //= itemsize
        if place - target != chunk - source:
            yield Run(source, target, end - source)
            source, target = chunk, place
        end = chunk_end
    yield Run(source, target, end - source)


def pieces(run: Run, length: int) -> Iterator[Run]:
    for done in range(0, run.length, length):
        yield Run(run.source + done, run.target + done, min(length, run.length - done))


class HostCopier:
    """Into a pool in host memory, with one thread (numpy's copy never starts more).

    Steps could read blobs where they lie. But they lie on pages of 4 KiB: SGMV over 32 distinct
    adapters of the small base took 3.9 -> 4.1 ms at every step, and one copy every other step, on
    another core, takes it from 2.94 to 2.97.
    """

    def __init__(self, pool: AdapterPool) -> None:
        self._pool = pool

    def copy(
        self,
        blob: AdapterBlob,
        columns: Columns,
        allocation: Allocation,
        full: Allocation = NOTHING,
    ) -> SlotRow:
        _copy_runs(blob.data, self._pool.data, runs(blob, allocation))
        _copy_runs(blob.data, self._pool.full.data, full_runs(blob, full))
        return self._pool.row(columns, allocation)


def _copy_runs(data: Tensor, there: Tensor, copies: Iterator[Run]) -> None:
    source, target = (one.view(torch.uint8).numpy() for one in (data, there))
    itemsize = data.element_size()
    for run in copies:
        for piece in pieces(run, PIECE_BYTES // itemsize):
            start, end = piece.source * itemsize, (piece.source + piece.length) * itemsize
            place = piece.target * itemsize
            target[place : place + end - start] = source[start:end]


class StagedCopier:
    """Into a CUDA pool: pageable blob -> pinned ring -> device, on a stream of its own.

    The places written belong to no adapter that a step in flight reads, so nothing waits for the
    compute stream; `copy` returns when the stream has done all of it.
    """

    def __init__(self, pool: AdapterPool, buffer_bytes: int = RING_BUFFER_BYTES) -> None:
        self._pool = pool
        self._stream = torch.cuda.Stream(pool.device)
        length = buffer_bytes // pool.dtype.itemsize
        self._ring = [
            torch.empty(length, dtype=pool.dtype, pin_memory=True) for _ in range(RING_BUFFERS)
        ]
        self._done = [torch.cuda.Event() for _ in self._ring]
        self._next = 0

    def copy(
        self,
        blob: AdapterBlob,
        columns: Columns,
        allocation: Allocation,
        full: Allocation = NOTHING,
    ) -> SlotRow:
        with torch.cuda.device(self._pool.device), torch.cuda.stream(self._stream):
            self._copy_runs(blob.data, self._pool.data, runs(blob, allocation))
            self._copy_runs(blob.data, self._pool.full.data, full_runs(blob, full))
            row = self._pool.row(columns, allocation)
            self._stream.synchronize()
        return row

    def _copy_runs(self, source: Tensor, there: Tensor, copies: Iterator[Run]) -> None:
        for run in copies:
            for piece in pieces(run, self._ring[0].numel()):
                self._stage(source, there, piece)

    def _stage(self, source: Tensor, there: Tensor, piece: Run) -> None:
        index = self._next
        self._next = (index + 1) % len(self._ring)
        self._done[index].synchronize()
        staged = self._ring[index][: piece.length]
        staged.copy_(source[piece.source : piece.source + piece.length])
        target = there[piece.target : piece.target + piece.length]
        target.copy_(staged, non_blocking=True)
        self._done[index].record(self._stream)

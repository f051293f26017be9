"""Who owns which bytes of the adapter pool: first fit over grains, whole or split at chunks.

    grains: |#####|.....|##|...........|####|      an adapter lies in one extent if one is free,
             used  free                            else its chunks fill several, never cut

Plain integers; it must not know tensors or adapters. Free + used = total holds after every call.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

GRAIN_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Extent:
    start: int
    """In bytes, as all of these."""
    size: int


@dataclass(frozen=True, slots=True)
class Allocation:
    extents: tuple[Extent, ...]
    chunk_starts: tuple[int, ...]
    """Byte offset of each chunk in the pool, in the order they were asked for."""
    num_bytes: int
    """What the extents take, padding included."""


class ExtentAllocator:
    def __init__(self, num_bytes: int, grain_bytes: int = GRAIN_BYTES) -> None:
        self.grain_bytes = grain_bytes
        self.total_bytes = num_bytes // grain_bytes * grain_bytes
        self.free_bytes = self.total_bytes
        self.used_bytes = 0
        self._starts: list[int] = [0] if self.total_bytes else []
        self._sizes: list[int] = [self.total_bytes] if self.total_bytes else []

    def padded(self, num_bytes: int) -> int:
        return -(-num_bytes // self.grain_bytes) * self.grain_bytes

    def allocate(self, chunk_bytes: Sequence[int]) -> Allocation | None:
        """Room for all chunks, or None. Never fails when `placeable_bytes` is large enough."""
        num_bytes = self.padded(sum(chunk_bytes))
        if num_bytes > self.free_bytes:
            return None
        whole = next(
            (s for s, n in zip(self._starts, self._sizes, strict=True) if n >= num_bytes), None
        )
        if whole is None:
            allocation = self._split(chunk_bytes)
        else:
            allocation = _whole(whole, num_bytes, chunk_bytes)
        if allocation is not None:
            for extent in allocation.extents:
                self._take(extent)
        return allocation

    def free(self, allocation: Allocation) -> None:
        for extent in allocation.extents:
            self._give(extent)

    def placeable_bytes(self, largest_chunk: int) -> int:
        """An adapter of this many bytes, with chunks of at most `largest_chunk`, surely fits.

        In each extent a split leaves less unused than the chunk that did not fit.
        """
        split = sum(max(0, size - largest_chunk) for size in self._sizes)
        return max(split, max(self._sizes, default=0))

    def check(self) -> None:
        """Free extents are apart and in order, and free + used = total."""
        assert sum(self._sizes) == self.free_bytes
        assert self.free_bytes + self.used_bytes == self.total_bytes
        ends = [start + size for start, size in zip(self._starts, self._sizes, strict=True)]
        assert all(end < start for end, start in zip(ends, self._starts[1:], strict=False))
        assert all(end <= self.total_bytes for end in ends)

    def _split(self, chunk_bytes: Sequence[int]) -> Allocation | None:
        """The largest chunks that still fit, extent by extent."""
        left: dict[int, list[int]] = {}
        for index in reversed(range(len(chunk_bytes))):
            left.setdefault(chunk_bytes[index], []).append(index)
        sizes = sorted(left, reverse=True)
        starts = [0] * len(chunk_bytes)
        extents: list[Extent] = []
        num_left = len(chunk_bytes)
        for start, size in zip(self._starts, self._sizes, strict=True):
            end = _fill(start, size, sizes, left, starts)
            if end > start:
                extents.append(Extent(start, self.padded(end - start)))
            num_left = sum(len(indices) for indices in left.values())
            if not num_left:
                break
        if num_left:
            return None
        return Allocation(tuple(extents), tuple(starts), sum(e.size for e in extents))

    def _take(self, extent: Extent) -> None:
        """Cut an allocated extent off the front of the free one that holds it."""
        index = bisect_left(self._starts, extent.start)
        self._starts[index] += extent.size
        self._sizes[index] -= extent.size
        if not self._sizes[index]:
            del self._starts[index], self._sizes[index]
        self._account(extent.size)

    def _give(self, extent: Extent) -> None:
        """Insert a free extent and join it with its neighbours."""
        index = bisect_left(self._starts, extent.start)
        self._starts.insert(index, extent.start)
        self._sizes.insert(index, extent.size)
        self._join(index)
        if index:
            self._join(index - 1)
        self._account(-extent.size)

    def _join(self, index: int) -> None:
        following = index + 1
        if following < len(self._starts):
            end = self._starts[index] + self._sizes[index]
            assert end <= self._starts[following], "an extent was freed twice"
            if end == self._starts[following]:
                self._sizes[index] += self._sizes[following]
                del self._starts[following], self._sizes[following]

    def _account(self, taken: int) -> None:
        self.used_bytes += taken
        self.free_bytes -= taken
        assert self.used_bytes >= 0
        assert self.free_bytes + self.used_bytes == self.total_bytes


def _whole(start: int, num_bytes: int, chunk_bytes: Sequence[int]) -> Allocation:
    starts: list[int] = []
    cursor = start
    for size in chunk_bytes:
        starts.append(cursor)
        cursor += size
    return Allocation((Extent(start, num_bytes),), tuple(starts), num_bytes)


def _fill(
    start: int, size: int, sizes: list[int], left: dict[int, list[int]], starts: list[int]
) -> int:
    """Place what fits of `left` (chunk size to indices) at `start`; returns where it ends."""
    cursor, end = start, start + size
    for chunk in sizes:
        indices = left[chunk]
        while indices and cursor + chunk <= end:
            starts[indices.pop()] = cursor
            cursor += chunk
    return cursor

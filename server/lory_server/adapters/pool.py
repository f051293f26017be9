"""The device tier's memory: one flat tensor for every resident adapter, and tables that find them.

In: chunks and slots. Out: places in the tensor, and rows of the tables that SGMV reads. It must
not know which adapter is worth keeping, or when bytes are copied.

Legend: S slots, K slices of a site, C slices of all sites.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lory_kernels.contract import SiteTable
from lory_server.adapters.extents import GRAIN_BYTES, Allocation, ExtentAllocator
from lory_server.adapters.format import CHUNK_ALIGN_BYTES, AdapterManifest
from lory_server.model.sites import Site


@dataclass(frozen=True, slots=True, eq=False)
class SlotRow:
    """One slot's entries in every site's table, on the device, not yet published."""

    a_offset_C: Tensor
    b_offset_C: Tensor
    rank_C: Tensor
    scale_C: Tensor


class AdapterPool:
    """Used by the engine's thread, but for `row` and the bytes of allocations being written."""

    def __init__(
        self,
        num_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        sites: Sequence[Site],
        max_slots: int,
        *,
        grain_bytes: int = GRAIN_BYTES,
    ) -> None:
        if max_slots < 1:
            raise ValueError(f"max_slots: {max_slots} is not at least 1")
        if grain_bytes % CHUNK_ALIGN_BYTES:
            raise ValueError(f"grain_bytes: {grain_bytes} is no multiple of {CHUNK_ALIGN_BYTES}")
        self.dtype = dtype
        self.device = device
        self.sites = tuple(sites)
        self.max_slots = max_slots
        self.extents = ExtentAllocator(num_bytes, grain_bytes)
        # Touched now: the first touch of a page beside a running step holds the step up.
        self.data = torch.zeros(
            self.extents.total_bytes // dtype.itemsize, dtype=dtype, device=device
        )
        self._make_tables()

    @property
    def total_bytes(self) -> int:
        return self.extents.total_bytes

    @property
    def free_bytes(self) -> int:
        return self.extents.free_bytes

    @property
    def used_bytes(self) -> int:
        return self.extents.used_bytes

    def needed_bytes(self, manifest: AdapterManifest) -> int:
        """What an adapter takes here when it lies in one extent."""
        return self.extents.padded(manifest.num_bytes(self.dtype.itemsize))

    def allocate(self, manifest: AdapterManifest) -> Allocation | None:
        return self.extents.allocate(manifest.chunk_bytes(self.dtype.itemsize))

    def free(self, allocation: Allocation) -> None:
        self.extents.free(allocation)

    def row(self, manifest: AdapterManifest, allocation: Allocation) -> SlotRow:
        """The table entries of an adapter at its place; any thread may build them."""
        a_offsets, b_offsets = [0] * self._num_columns, [0] * self._num_columns
        ranks, scales = [0] * self._num_columns, [0.0] * self._num_columns
        for index, part in enumerate(manifest.slices):
            column = self._first_columns[part.site] + part.slice
            a_offsets[column] = allocation.chunk_starts[2 * index] // self.dtype.itemsize
            b_offsets[column] = allocation.chunk_starts[2 * index + 1] // self.dtype.itemsize
            ranks[column] = part.rank
            scales[column] = part.scale
        return SlotRow(
            torch.tensor(a_offsets, dtype=torch.int64, device=self.device),
            torch.tensor(b_offsets, dtype=torch.int64, device=self.device),
            torch.tensor(ranks, dtype=torch.int32, device=self.device),
            torch.tensor(scales, dtype=torch.float32, device=self.device),
        )

    def publish(self, slot: int, row: SlotRow) -> None:
        """Make a slot's adapter visible to the steps submitted after this."""
        index_C = self._slot_zero_C + slot * self._stride_C
        columns = (row.a_offset_C, row.b_offset_C, row.rank_C, row.scale_C)
        for table, column in zip(self._flat, columns, strict=True):
            table.index_copy_(0, index_C, column)
            if column.is_cuda:
                column.record_stream(torch.cuda.current_stream(self.device))

    def _make_tables(self) -> None:
        """One flat tensor per field, site after site: a slot is published in four writes."""
        widths = [len(site.slices) for site in self.sites]
        self._num_columns = sum(widths)
        self._first_columns = [sum(widths[:i]) for i in range(len(widths))]
        entries = self.max_slots * self._num_columns
        dtypes = (torch.int64, torch.int64, torch.int32, torch.float32)
        self._flat = tuple(torch.zeros(entries, dtype=d, device=self.device) for d in dtypes)
        starts = [first * self.max_slots for first in self._first_columns]
        slot_zero = [
            start + k for start, width in zip(starts, widths, strict=True) for k in range(width)
        ]
        strides = [width for width in widths for _ in range(width)]
        self._slot_zero_C = torch.tensor(slot_zero, dtype=torch.int64, device=self.device)
        self._stride_C = torch.tensor(strides, dtype=torch.int64, device=self.device)
        self.tables = tuple(
            self._site_table(site, start) for site, start in zip(self.sites, starts, strict=True)
        )

    def _site_table(self, site: Site, start: int) -> SiteTable:
        width = len(site.slices)
        a, b, rank, scale = (
            flat[start : start + self.max_slots * width].view(self.max_slots, width)
            for flat in self._flat
        )
        return SiteTable(
            in_features=site.in_features,
            out_offsets=tuple(part.out_offset for part in site.slices),
            out_features=tuple(part.out_features for part in site.slices),
            a_offset_SK=a,
            b_offset_SK=b,
            rank_SK=rank,
            scale_SK=scale,
            alignment=CHUNK_ALIGN_BYTES // self.dtype.itemsize,
        )

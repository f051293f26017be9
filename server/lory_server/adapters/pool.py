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
from lory_server.adapters.ends import Ends, Placed, make_ends
from lory_server.adapters.extents import GRAIN_BYTES, Allocation, ExtentAllocator
from lory_server.adapters.footprint import ABSENT, AFTER_THE_CHUNKS, Columns, Footprint
from lory_server.adapters.full_weights import FullWeights
from lory_server.adapters.manifest import CHUNK_ALIGN_BYTES, AdapterManifest, is_end
from lory_server.model.sites import Site


@dataclass(frozen=True, slots=True, eq=False)
class SlotRow:
    """One slot's entries in every site's table, on the device, not yet published."""

    columns: tuple[Tensor, ...]
    """Each [C], in the order of the tables: offsets of A, B, gain and bias, ranks, scales."""


class AdapterPool:
    """Used by the engine's thread, but for what any thread may call, and the bytes of allocations
    being written."""

    def __init__(
        self,
        num_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        sites: Sequence[Site],
        max_slots: int,
        *,
        grain_bytes: int = GRAIN_BYTES,
        full: FullWeights | None = None,
    ) -> None:
        """`full`: where the same slots have weights of their own; None: nowhere."""
        if max_slots < 1:
            raise ValueError(f"max_slots: {max_slots} is not at least 1")
        if grain_bytes % CHUNK_ALIGN_BYTES:
            raise ValueError(f"grain_bytes: {grain_bytes} is no multiple of {CHUNK_ALIGN_BYTES}")
        self.dtype = dtype
        self.device = device
        self.sites = tuple(sites)
        self.full = full or FullWeights(0, dtype, device)
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

    def footprint(self, manifest: AdapterManifest) -> Footprint:
        """What an adapter takes here and says in the tables; any thread may work it out."""
        chunks = manifest.chunk_bytes(self.dtype.itemsize)
        full = manifest.full_bytes(self.dtype.itemsize)
        modules = (self.sites[part.site].slices[part.slice].module for part in manifest.slices)
        return Footprint(
            chunk_bytes=chunks,
            num_bytes=self.extents.padded(sum(chunks)),
            full_chunk_bytes=full,
            full_bytes=self.full.extents.padded(sum(full)),
            max_rank=manifest.max_rank,
            has_gain_or_bias=manifest.has_gain_or_bias,
            changes_ends=bool(manifest.full) or any(map(is_end, modules)),
            columns=self._columns(manifest, len(chunks)),
        )

    def allocate(self, footprint: Footprint) -> Allocation | None:
        return self.extents.allocate(footprint.chunk_bytes)

    def free(self, allocation: Allocation) -> None:
        self.extents.free(allocation)

    def row(self, columns: Columns, allocation: Allocation) -> SlotRow:
        """The table entries of an adapter at its place; any thread may build them."""
        itemsize = self.dtype.itemsize
        offsets = [start // itemsize for start in allocation.chunk_starts]
        starts = torch.tensor((*offsets, *AFTER_THE_CHUNKS), dtype=torch.int64)
        parts = (*starts[columns.chunks_4C], columns.rank_C, columns.scale_C)
        return SlotRow(tuple(part.to(self.device) for part in parts))

    def ends(self, manifest: AdapterManifest, place: Allocation, full: Allocation) -> Ends | None:
        """What the adapter has beside linears of the layers; any thread may make it."""
        return make_ends(
            manifest,
            self.sites,
            Placed(self.data, place.chunk_starts),
            Placed(self.full.data, full.chunk_starts),
            self.full.unit_offset_norms,
        )

    def publish(self, slot: int, row: SlotRow) -> None:
        """Make a slot's adapter visible to the steps submitted after this."""
        index_C = self._slot_zero_C + slot * self._stride_C
        for table, column in zip(self._flat, row.columns, strict=True):
            table.index_copy_(0, index_C, column)
            if column.is_cuda:
                column.record_stream(torch.cuda.current_stream(self.device))

    def _columns(self, manifest: AdapterManifest, num_chunks: int) -> Columns:
        chunks = {
            kind: [num_chunks + AFTER_THE_CHUNKS.index(absent)] * self._num_columns
            for kind, absent in ABSENT.items()
        }
        ranks, scales = [0] * self._num_columns, [0.0] * self._num_columns
        for part, indices in manifest.placed(range(num_chunks)):
            column = self._first_columns[part.site] + part.slice
            for kind, index in indices.items():
                chunks[kind][column] = index
            ranks[column] = part.rank
            scales[column] = part.scale
        return Columns(
            torch.tensor(list(chunks.values()), dtype=torch.int64),
            torch.tensor(ranks, dtype=torch.int32),
            torch.tensor(scales, dtype=torch.float32),
        )

    def _make_tables(self) -> None:
        """One flat tensor per field, site after site: a slot is published in six writes."""
        widths = [len(site.slices) for site in self.sites]
        self._num_columns = sum(widths)
        self._first_columns = [sum(widths[:i]) for i in range(len(widths))]
        entries = self.max_slots * self._num_columns
        self._flat = (
            *(
                torch.full((entries,), absent, dtype=torch.int64, device=self.device)
                for absent in ABSENT.values()
            ),
            torch.zeros(entries, dtype=torch.int32, device=self.device),
            torch.zeros(entries, dtype=torch.float32, device=self.device),
        )
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
        a, b, gain, bias, rank, scale = (
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
            gain_offset_SK=gain,
            bias_offset_SK=bias,
        )

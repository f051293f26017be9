"""Device memory of weights that adapters have in place of the base's: heads, embeddings, norms.

A budget of bytes of its own beside the pool's, so that a head of a gigabyte evicts other heads and
not a hundred small adapters. One copy a revision, for as long as its slot is shown. In: footprints
and slots. Out: places, and what the model reads of each slot. It must not know which adapter is
worth keeping, or when bytes are copied.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch

from lory_server.adapters.ends import Ends
from lory_server.adapters.extents import Allocation, ExtentAllocator
from lory_server.adapters.footprint import Footprint

NOTHING = Allocation((), (), 0)


class FullWeights:
    """Used by the engine's thread, but for the bytes of allocations being written."""

    def __init__(
        self,
        num_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        unit_offset_norms: bool = False,
    ) -> None:
        self.unit_offset_norms = unit_offset_norms
        self.extents = ExtentAllocator(num_bytes)
        # Not touched: on a CPU nothing is taken until an adapter has weights of its own.
        self.data = torch.empty(
            self.extents.total_bytes // dtype.itemsize, dtype=dtype, device=device
        )
        self._by_slot: dict[int, Ends] = {}
        self.by_slot: Mapping[int, Ends] = MappingProxyType(self._by_slot)
        """Of the slots that are shown and change more than linears of the layers."""

    @property
    def total_bytes(self) -> int:
        return self.extents.total_bytes

    @property
    def free_bytes(self) -> int:
        return self.extents.free_bytes

    def allocate(self, footprint: Footprint) -> Allocation | None:
        sizes = footprint.full_chunk_bytes
        return self.extents.allocate(sizes) if sizes else NOTHING

    def free(self, allocation: Allocation) -> None:
        self.extents.free(allocation)

    def publish(self, slot: int, ends: Ends | None) -> None:
        if ends is not None:
            self._by_slot[slot] = ends

    def withdraw(self, slot: int) -> None:
        self._by_slot.pop(slot, None)

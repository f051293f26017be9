"""What adapters of one shape have in common is kept once: their slices, and where chunks start.

An adapter of an 8B base has 224 slices, a quarter of a megabyte of small objects that no budget of
bytes counts. Those that one trainer wrote have equal ones. It must not know tiers or files.
"""

import threading
from collections import OrderedDict
from dataclasses import replace

from lory_server.adapters.blob import AdapterBlob
from lory_server.adapters.manifest import AdapterSlice

MAX_SHAPES = 128
"""Kept after their adapters are gone; of further ones the longest unused are shared no more."""

Slices = tuple[AdapterSlice, ...]


class Shapes:
    """Any thread may call."""

    def __init__(self, most: int = MAX_SHAPES) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._kept: OrderedDict[Slices, tuple[Slices, tuple[int, ...]]] = OrderedDict()

    def shared(self, blob: AdapterBlob) -> AdapterBlob:
        """The same, with what an earlier one has equally."""
        own = blob.manifest.slices
        with self._lock:
            slices, starts = self._kept.setdefault(own, (own, blob.chunk_starts))
            self._kept.move_to_end(own)
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        if slices is own:
            return blob
        return replace(blob, manifest=replace(blob.manifest, slices=slices), chunk_starts=starts)

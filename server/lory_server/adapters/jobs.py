"""The slow work of the host tier, as jobs for loader threads: look up, load, fold, list.

Each runs start to end on one thread and touches no state of the engine's thread but the budget.
It must not know tickets' owners, slots or the device.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

import torch

from lory_server.adapters.blob import AdapterBlob, with_manner
from lory_server.adapters.errors import AdapterCapacityError
from lory_server.adapters.fold import BaseFolder
from lory_server.adapters.footprint import Footprint
from lory_server.adapters.host import HostBudget
from lory_server.adapters.manifest import AdapterManifest
from lory_server.adapters.manner import read_manner_file, with_tokenizer
from lory_server.adapters.merge_sources import locate
from lory_server.adapters.reader import Reader
from lory_server.adapters.shapes import Shapes
from lory_server.adapters.store import AdapterStore, Signature
from lory_server.messages import AdapterEntry


@dataclass(frozen=True, slots=True)
class Located:
    tickets: tuple[int, ...]
    adapter_id: str
    signature: Signature


@dataclass(frozen=True, slots=True)
class LocateJob:
    """Which bytes does a name stand for at this moment?"""

    store: AdapterStore
    tickets: tuple[int, ...]
    """Of all who asked before it began."""
    adapter_id: str
    ended: Callable[[str], None]
    """Called with the name when the look is over, whatever came of it."""

    def run(self) -> Located:
        try:
            with locate(self.store, self.adapter_id) as files:
                return Located(self.tickets, self.adapter_id, files.signature)
        finally:
            self.ended(self.adapter_id)


@dataclass(frozen=True, slots=True)
class LoadKey:
    """What a load was asked for: all who ask for the same share it."""

    adapter_id: str
    signature: Signature


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    key: LoadKey
    blob: AdapterBlob
    signature: Signature
    """Of the files that were read; another one than the key's if they were replaced meanwhile."""
    is_settled: bool
    seconds: float
    footprint: Footprint
    """Of the blob as it is now."""


@dataclass(frozen=True, slots=True)
class NeedsRoom:
    """The budget is taken; come back with `num_bytes` reserved."""

    key: LoadKey
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What a valid adapter may need at most, and in which dtype."""

    dtype: torch.dtype
    pool_bytes: int
    full_bytes: int
    footprint: Callable[[AdapterManifest], Footprint]

    def check(self, manifest: AdapterManifest, budget: HostBudget) -> Footprint:
        """What it takes on the device, which is not too much."""
        footprint = self.footprint(manifest)
        if footprint.num_bytes > self.pool_bytes:
            raise AdapterCapacityError(
                f"takes {footprint.num_bytes} bytes on the device, the whole pool holds"
                f" {self.pool_bytes}; raise --adapter-memory or train a smaller rank"
            )
        if not manifest.needs_base:
            self.check_full(manifest, footprint)
        self.check_host(manifest.num_bytes(self.dtype.itemsize), budget)
        return footprint

    def check_full(self, manifest: AdapterManifest, footprint: Footprint) -> None:
        """Of what is left of its full weights when those that repeat others have been dropped."""
        if footprint.full_bytes > self.full_bytes:
            names = ", ".join(dict.fromkeys(weight.module for weight in manifest.full[:4]))
            raise AdapterCapacityError(
                f"takes {footprint.full_bytes} bytes on the device for weights of its own"
                f" ({names}), all adapters together may take {self.full_bytes}; raise"
                " --full-weights-memory"
            )

    def check_host(self, num_bytes: int, budget: HostBudget) -> None:
        if num_bytes > budget.total_bytes:
            raise AdapterCapacityError(
                f"takes {num_bytes} bytes on the host, all adapters together may take"
                f" {budget.total_bytes}; raise --adapter-host-memory"
            )
        if num_bytes > budget.unpinned_bytes:
            raise AdapterCapacityError(
                f"takes {num_bytes} bytes on the host, pinned adapters leave"
                f" {budget.unpinned_bytes}; unpin one, or raise --adapter-host-memory"
            )


@dataclass(frozen=True, slots=True, eq=False)
class LoadJob:
    """Validate and decode an adapter, if the budget has room for it."""

    store: AdapterStore
    readers: "SimpleQueue[Reader]"
    """Those that no load has; as many as loader threads."""
    spare_reader: Reader
    """For spare threads, while stuck loads have all of those."""
    limits: Limits
    budget: HostBudget
    shapes: Shapes
    key: LoadKey
    reserved_bytes: int = 0

    @property
    def adapter_id(self) -> str:
        return self.key.adapter_id

    def run(self) -> Loaded | NeedsRoom:
        reservation = _Reservation(self.budget, self.reserved_bytes)
        try:
            with self._reader() as reader:
                outcome = self._load(reservation, reader)
        except BaseException:
            reservation.give_up()
            raise
        if isinstance(outcome, NeedsRoom):
            reservation.give_up()
        return outcome

    @contextmanager
    def _reader(self) -> Iterator[Reader]:
        try:
            reader = self.readers.get_nowait()
        except Empty:
            yield self.spare_reader
            return
        try:
            yield reader
        finally:
            self.readers.put(reader)

    def _load(self, reservation: "_Reservation", reader: Reader) -> Loaded | NeedsRoom:
        reader.begin()
        started_s = time.monotonic()
        with locate(self.store, self.key.adapter_id) as files:
            manifest = reader.manifest(files)
            manner = read_manner_file(files.manifest_fd)
            manner = with_tokenizer(manner, manifest.tokenizer, manifest.vocab_size)
            footprint = self.limits.check(manifest, self.budget)
            num_bytes = manifest.num_bytes(self.limits.dtype.itemsize)
            if not reservation.cover(num_bytes):
                return NeedsRoom(self.key, num_bytes)
            blob = self.shapes.shared(with_manner(reader.blob(files, manifest), manner))
            files.check_unchanged()
            seconds = time.monotonic() - started_s
            return Loaded(self.key, blob, files.signature, files.is_settled, seconds, footprint)


@dataclass(frozen=True, slots=True, eq=False)
class Folded:
    loaded: Loaded
    """Ready for the device."""
    freed_bytes: int
    """Of those that were reserved for it."""


@dataclass(frozen=True, slots=True, eq=False)
class FoldJob:
    """Fold the base into an adapter that has been loaded."""

    folder: BaseFolder
    limits: Limits
    loaded: Loaded

    @property
    def adapter_id(self) -> str:
        return self.loaded.key.adapter_id

    def run(self) -> Folded:
        started_s = time.monotonic()
        blob = self.folder.fold(self.loaded.blob)
        footprint = self.limits.footprint(blob.manifest)
        self.limits.check_full(blob.manifest, footprint)
        seconds = self.loaded.seconds + time.monotonic() - started_s
        freed_bytes = self.loaded.blob.num_bytes - blob.num_bytes
        folded = replace(self.loaded, blob=blob, seconds=seconds, footprint=footprint)
        return Folded(folded, freed_bytes)


class _Reservation:
    """The bytes of the budget that one load holds while it runs."""

    def __init__(self, budget: HostBudget, num_bytes: int) -> None:
        self._budget = budget
        self._num_bytes = num_bytes

    def cover(self, num_bytes: int) -> bool:
        """Hold exactly `num_bytes`, if that can be had."""
        if num_bytes <= self._num_bytes:
            self._budget.release(self._num_bytes - num_bytes)
        elif self._num_bytes or not self._budget.try_reserve(num_bytes):
            return False
        self._num_bytes = num_bytes
        return True

    def give_up(self) -> None:
        self._budget.release(self._num_bytes)
        self._num_bytes = 0


@dataclass(frozen=True, slots=True)
class OnDisk:
    call_ids: tuple[int, ...]
    entries: dict[str, AdapterEntry]
    """By name, in order; as if none had been loaded."""


@dataclass(frozen=True, slots=True)
class ListJob:
    """One walk over the folder, for all who asked before it began."""

    store: AdapterStore
    call_ids: tuple[int, ...]

    def run(self) -> OnDisk:
        entries = {i: AdapterEntry(adapter_id=i, tier="disk") for i in self.store.list_ids()}
        return OnDisk(self.call_ids, entries)


@dataclass(frozen=True, slots=True)
class Nameless:
    folders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SurveyJob:
    """Which adapters in the folder can nobody ask for?"""

    store: AdapterStore

    def run(self) -> Nameless:
        return Nameless(self.store.list_nameless())

"""The device tier: which revisions lie in the pool, which are on their way, which must go.

In: the scheduler's demand and blobs of the host tier. Out: a frozen residency. Only the engine's
thread calls it; bytes are copied by one worker, and a slot is shown when its copy is complete.
It must not know files, requests or the host tier's budget.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from queue import Empty, SimpleQueue
from types import MappingProxyType

from lory_server.adapters.blob import AdapterBlob
from lory_server.adapters.copier import Copier, make_copier
from lory_server.adapters.ends import Ends
from lory_server.adapters.extents import Allocation, ExtentAllocator
from lory_server.adapters.host import HostEntry, HostTier
from lory_server.adapters.journal import Journal
from lory_server.adapters.manifest import AdapterManifest
from lory_server.adapters.matched import Facts
from lory_server.adapters.pool import AdapterPool, SlotRow
from lory_server.adapters.workers import JobFailed, Workers
from lory_server.plan import AdapterDemand, Residency, ResidentAdapter


@dataclass(frozen=True, slots=True, eq=False)
class _Tenure:
    """A revision's slot and place, from the start of its load to its eviction."""

    adapter_id: str
    slot: int
    allocation: Allocation
    full: Allocation
    """Its full weights' places."""
    manifest: AdapterManifest
    facts: Facts

    @property
    def num_bytes(self) -> int:
        return self.allocation.num_bytes + self.full.num_bytes


@dataclass(frozen=True, slots=True, eq=False)
class _Copied:
    revision: str
    row: SlotRow
    ends: Ends | None
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class _CopyJob:
    copier: Copier
    pool: AdapterPool
    blob: AdapterBlob
    allocation: Allocation
    full: Allocation
    started_s: float

    def run(self) -> _Copied:
        row = self.copier.copy(self.blob, self.allocation, self.full)
        ends = self.pool.ends(self.blob.manifest, self.allocation, self.full)
        return _Copied(self.blob.revision, row, ends, time.monotonic() - self.started_s)


class DeviceTier:
    def __init__(
        self, pool: AdapterPool, host: HostTier, journal: Journal, on_outcome: Callable[[], None]
    ) -> None:
        self.pool = pool
        self.pinned: dict[str, int] = {}
        self._host = host
        self._journal = journal
        self._copier = make_copier(pool)
        self._outcomes: SimpleQueue[object] = SimpleQueue()
        self._workers = Workers("lory-adapter-copy", 1, self._outcomes, on_outcome)
        self._resident: dict[str, _Tenure] = {}
        self._loading: dict[str, _Tenure] = {}
        self._free_slots = list(reversed(range(pool.max_slots)))
        self._last_use: dict[str, int] = {}
        self._clock = 0
        self._largest_chunk = 0
        self._largest_full = 0
        self._picture: Residency | None = None

    def __contains__(self, revision: str) -> bool:
        return revision in self._resident

    def __len__(self) -> int:
        return len(self._resident)

    @property
    def used_bytes(self) -> int:
        """Of all, full weights included."""
        return self.pool.used_bytes + self.pool.full.extents.used_bytes

    def residency(self) -> Residency:
        """Publish the copies that have ended; raises what a failed copy raised."""
        for copied in self._drain():
            self._finish(copied)
        if self._picture is None:
            self._picture = self._take_picture()
        return self._picture

    def demand(self, demand: AdapterDemand) -> None:
        """Start the loads that fit, most urgent first; the first that does not ends the search,
        so that no small adapter takes room again and again from a large one."""
        self._clock += 1
        for revision in demand.in_use & self._last_use.keys():
            self._last_use[revision] = self._clock
        kept = {*demand.in_use, *self.pinned}
        for urgency, revision in enumerate(demand.wanted):
            placed = revision in self._resident or revision in self._loading
            less_urgent = (*demand.wanted[urgency + 1 :], *demand.queued)
            if not placed and not self._try_load(revision, kept, less_urgent):
                break
            kept.add(revision)

    def drop(self, revision: str) -> None:
        """Evict a revision that no request and no pin needs, if it is here."""
        if revision in self._resident:
            self._evict(revision)

    def revisions(self, adapter_id: str) -> tuple[str, ...]:
        """Those that were brought here under a name; the host need not have them any more."""
        resident = self._resident.items()
        return tuple(known for known, tenure in resident if tenure.adapter_id == adapter_id)

    def facts(self, revision: str) -> Facts:
        return self._resident[revision].facts

    def num_bytes(self, revision: str) -> int:
        """What a revision takes here now, full weights included."""
        tenure = self._resident.get(revision) or self._loading.get(revision)
        return tenure.num_bytes if tenure else 0

    def stop(self) -> None:
        self._workers.stop()

    def join(self, timeout_s: float) -> None:
        self._workers.join(timeout_s)

    def check(self) -> None:
        """Free + used = total for slots and bytes; no two tenures share anything."""
        self.pool.extents.check()
        self.pool.full.extents.check()
        tenures = [*self._resident.values(), *self._loading.values()]
        slots = [tenure.slot for tenure in tenures] + self._free_slots
        assert sorted(slots) == list(range(self.pool.max_slots))
        shown = {tenure.slot for tenure in self._resident.values()}
        assert shown.issuperset(self.pool.full.by_slot)
        _check_apart([tenure.allocation for tenure in tenures], self.pool.extents)
        _check_apart([tenure.full for tenure in tenures], self.pool.full.extents)

    # -- loading ----------------------------------------------------------------------------

    def _try_load(self, revision: str, kept: set[str], less_urgent: tuple[str, ...]) -> bool:
        entry = self._host.entry(revision)
        manifest = entry.blob.manifest
        needed_bytes = self.pool.needed_bytes(manifest)
        victims = self._victims(kept, less_urgent)
        freeable = sum(self._resident[victim].allocation.num_bytes for victim in victims)
        if self.pool.free_bytes + freeable < needed_bytes or not (self._free_slots or victims):
            return False
        full_freeable = sum(self._resident[victim].full.num_bytes for victim in victims)
        if self.pool.full.free_bytes + full_freeable < self.pool.full.needed_bytes(manifest):
            return False
        return self._place(entry, victims)

    def _place(self, entry: HostEntry, victims: list[str]) -> bool:
        """Evict until there is room of both kinds, but nobody who has nothing of what is short."""
        manifest, full_weights = entry.blob.manifest, self.pool.full
        allocation = self.pool.allocate(manifest) if self._free_slots else None
        full = full_weights.allocate(manifest)
        for victim in victims:
            if allocation and full:
                break
            if allocation and not self._resident[victim].full.num_bytes:
                continue
            self._evict(victim)
            allocation = allocation or self.pool.allocate(manifest)
            full = full or full_weights.allocate(manifest)
        if allocation and full:
            self._start(entry, allocation, full)
            return True
        if allocation:
            self.pool.free(allocation)
        if full:
            full_weights.free(full)
        return False

    def _victims(self, kept: set[str], less_urgent: tuple[str, ...]) -> list[str]:
        """Who may go, first those nobody waits for, the least recently used first."""
        urgency = {revision: -index for index, revision in enumerate(less_urgent, start=1)}
        candidates = (revision for revision in self._resident if revision not in kept)
        nobody_waits = -len(urgency) - 1
        return sorted(
            candidates,
            key=lambda r: (urgency.get(r, nobody_waits), self._last_use[r]),
        )

    def _start(self, entry: HostEntry, allocation: Allocation, full: Allocation) -> None:
        blob = entry.blob
        self._host.hold(blob.revision)
        manifest = blob.manifest
        self._loading[blob.revision] = _Tenure(
            entry.adapter_id,
            self._free_slots.pop(),
            allocation,
            full,
            manifest,
            entry.facts,
        )
        self._last_use[blob.revision] = self._clock
        self._largest_chunk = max(
            self._largest_chunk, *manifest.chunk_bytes(self.pool.dtype.itemsize)
        )
        self._largest_full = max(
            self._largest_full, *manifest.full_bytes(self.pool.dtype.itemsize), 0
        )
        self._picture = None
        self._workers.submit(
            _CopyJob(self._copier, self.pool, blob, allocation, full, time.monotonic())
        )

    def _finish(self, copied: _Copied) -> None:
        tenure = self._loading.pop(copied.revision)
        self.pool.publish(tenure.slot, copied.row)
        self.pool.full.publish(tenure.slot, copied.ends)
        self._resident[copied.revision] = tenure
        self._host.release(copied.revision)
        self._picture = None
        num_bytes = tenure.num_bytes
        self._journal.loaded(
            "device", tenure.adapter_id, copied.revision, num_bytes, copied.seconds
        )

    def _evict(self, revision: str) -> None:
        started_s = time.monotonic()
        tenure = self._resident.pop(revision)
        self.pool.free(tenure.allocation)
        self.pool.full.free(tenure.full)
        self.pool.full.withdraw(tenure.slot)
        self._free_slots.append(tenure.slot)
        del self._last_use[revision]
        self._picture = None
        num_bytes, seconds = tenure.num_bytes, time.monotonic() - started_s
        self._journal.evicted("device", tenure.adapter_id, revision, num_bytes, seconds)

    # -- what others see --------------------------------------------------------------------

    def _drain(self) -> Iterator[_Copied]:
        while True:
            try:
                outcome = self._outcomes.get_nowait()
            except Empty:
                return
            if isinstance(outcome, JobFailed):
                raise RuntimeError("copying an adapter to the device failed") from outcome.error
            assert isinstance(outcome, _Copied)
            yield outcome

    def _take_picture(self) -> Residency:
        resident = {
            revision: ResidentAdapter(
                tenure.slot,
                tenure.allocation.num_bytes,
                tenure.manifest.max_rank,
                tenure.manifest.has_gain_or_bias,
                tenure.full.num_bytes,
            )
            for revision, tenure in self._resident.items()
        }
        return Residency(
            resident=MappingProxyType(resident),
            loading=frozenset(self._loading),
            free_bytes=self.pool.extents.placeable_bytes(self._largest_chunk),
            free_slots=len(self._free_slots),
            free_full_bytes=self.pool.full.extents.placeable_bytes(self._largest_full),
        )


def _check_apart(allocations: list[Allocation], extents: ExtentAllocator) -> None:
    taken = [extent for allocation in allocations for extent in allocation.extents]
    assert sum(extent.size for extent in taken) == extents.used_bytes
    in_order = sorted(taken, key=lambda extent: extent.start)
    for before, after in pairwise(in_order):
        assert before.start + before.size <= after.start

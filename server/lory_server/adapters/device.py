"""The device tier: which revisions lie in the pool, which are on their way, which must go.

In: the scheduler's demand and blobs of the host tier. Out: a frozen residency. Only the engine's
thread calls it; bytes are copied by one worker, and a slot is shown when its copy is complete.
A step's work here does not grow with the number of adapters. It must not know files, requests or
the host tier's budget.
"""

import time
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from itertools import pairwise
from queue import Empty, SimpleQueue
from types import MappingProxyType

from lory_server.adapters.blob import AdapterBlob
from lory_server.adapters.copier import Copier, make_copier
from lory_server.adapters.ends import Ends
from lory_server.adapters.extents import Allocation, ExtentAllocator
from lory_server.adapters.footprint import Footprint
from lory_server.adapters.host import HostEntry, HostTier
from lory_server.adapters.journal import Journal
from lory_server.adapters.matched import Facts
from lory_server.adapters.pool import AdapterPool, SlotRow
from lory_server.adapters.ranking import Ranking, worth
from lory_server.adapters.workers import JobFailed, Workers
from lory_server.plan import AdapterDemand, Residency, ResidentAdapter


@dataclass(frozen=True, slots=True, eq=False)
class _Tenure:
    """A revision's slot and place, from the start of its load to its eviction."""

    adapter_id: str
    allocation: Allocation
    full: Allocation
    """Its full weights' places."""
    shown: ResidentAdapter
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
    footprint: Footprint
    allocation: Allocation
    full: Allocation
    started_s: float

    def run(self) -> _Copied:
        row = self.copier.copy(self.blob, self.footprint.columns, self.allocation, self.full)
        ends = None
        if self.footprint.changes_ends:
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
        self._resident_bytes = 0
        self._shown: dict[str, ResidentAdapter] = {}
        """Of what is resident, ready to be copied into a picture."""
        self._loading: dict[str, _Tenure] = {}
        self._free_slots = list(reversed(range(pool.max_slots)))
        self._ranking = Ranking()
        """Of what is resident."""
        self._in_use: frozenset[str] = frozenset()
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
        for revision in self._in_use - demand.in_use:
            self._rank(revision)
        self._in_use = demand.in_use
        if not demand.wanted:
            return
        kept = {*demand.in_use, *self.pinned}
        for urgency, revision in enumerate(demand.wanted):
            placed = revision in self._resident or revision in self._loading
            less_urgent = demand.wanted[urgency + 1 :]
            if not placed and not self._try_load(revision, kept, less_urgent):
                break
            kept.add(revision)

    def drop(self, revision: str) -> None:
        """Evict a revision that no request and no pin needs, if it is here."""
        if revision in self._resident:
            self._evict(revision)

    def replaced(self, old_revision: str) -> None:
        """A name stands for another one now, and nobody may ask for this again."""
        self._rank(old_revision)

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
        slots = [tenure.shown.slot for tenure in tenures] + self._free_slots
        assert sorted(slots) == list(range(self.pool.max_slots))
        assert self._resident.keys() == self._shown.keys()
        assert len(self._ranking) == len(self._resident)
        assert self._resident_bytes == sum(shown.num_bytes for shown in self._shown.values())
        slots_shown = {shown.slot for shown in self._shown.values()}
        assert slots_shown.issuperset(self.pool.full.by_slot)
        _check_apart([tenure.allocation for tenure in tenures], self.pool.extents)
        _check_apart([tenure.full for tenure in tenures], self.pool.full.extents)

    # -- loading ----------------------------------------------------------------------------

    def _try_load(self, revision: str, kept: set[str], less_urgent: tuple[str, ...]) -> bool:
        entry = self._host.entry(revision)
        if not self._could_fit(entry, kept):
            return False
        awaited = [r for r in less_urgent if r in self._resident and r not in kept]
        spared = {*kept, *awaited}
        while (places := self._allocate(entry)) is None:
            if self._is_short_of_full_weights(entry):
                # Whoever has none makes no room by going.
                spared.update(r for r, shown in self._shown.items() if not shown.full_bytes)
                awaited = [r for r in awaited if self._shown[r].full_bytes]
            victim = self._ranking.pop(spared) or (awaited.pop() if awaited else None)
            if victim is None:
                return False
            self._evict(victim)
        self._start(entry, *places)
        return True

    def _could_fit(self, entry: HostEntry, kept: Set[str]) -> bool:
        """Whether there would be room and a slot, were all gone that are not kept."""
        stay = [self._shown[revision] for revision in kept if revision in self._shown]
        freeable_bytes = self._resident_bytes - sum(adapter.num_bytes for adapter in stay)
        has_slot = bool(self._free_slots) or len(self._resident) > len(stay)
        has_room = self.pool.free_bytes + freeable_bytes >= entry.footprint.num_bytes
        return has_slot and has_room and self._full_could_fit(entry, kept)

    def _full_could_fit(self, entry: HostEntry, kept: Set[str]) -> bool:
        full = self.pool.full
        needed_bytes = entry.footprint.full_bytes
        if needed_bytes <= full.free_bytes:
            return True
        leaving = (shown.full_bytes for r, shown in self._shown.items() if r not in kept)
        return full.free_bytes + sum(leaving) >= needed_bytes

    def _allocate(self, entry: HostEntry) -> tuple[Allocation, Allocation] | None:
        """Both places or none."""
        allocation = self.pool.allocate(entry.footprint) if self._free_slots else None
        if allocation is None:
            return None
        full = self.pool.full.allocate(entry.footprint)
        if full is None:
            self.pool.free(allocation)
            return None
        return allocation, full

    def _is_short_of_full_weights(self, entry: HostEntry) -> bool:
        """And of nothing else."""
        allocation = self.pool.allocate(entry.footprint) if self._free_slots else None
        if allocation is not None:
            self.pool.free(allocation)
        return allocation is not None

    def _rank(self, revision: str) -> None:
        """By how often it was asked for: bringing it back costs a copy of its bytes, so that cost
        and bytes cancel each other out."""
        if revision in self._resident:
            self._ranking.put(revision, worth(self._host.uses(revision), 1.0, 1))

    def _start(self, entry: HostEntry, allocation: Allocation, full: Allocation) -> None:
        blob, footprint = entry.blob, entry.footprint
        self._host.hold(blob.revision)
        shown = ResidentAdapter(
            self._free_slots.pop(),
            allocation.num_bytes,
            footprint.max_rank,
            footprint.has_gain_or_bias,
            full.num_bytes,
        )
        self._loading[blob.revision] = _Tenure(
            entry.adapter_id, allocation, full, shown, entry.facts
        )
        self._largest_chunk = max(self._largest_chunk, footprint.largest_chunk)
        self._largest_full = max(self._largest_full, footprint.largest_full)
        self._picture = None
        now_s = time.monotonic()
        self._workers.submit(
            _CopyJob(self._copier, self.pool, blob, footprint, allocation, full, now_s)
        )

    def _finish(self, copied: _Copied) -> None:
        tenure = self._loading.pop(copied.revision)
        num_bytes = tenure.allocation.num_bytes
        self.pool.publish(tenure.shown.slot, copied.row)
        self.pool.full.publish(tenure.shown.slot, copied.ends)
        self._resident[copied.revision] = tenure
        self._resident_bytes += num_bytes
        self._shown[copied.revision] = tenure.shown
        self._rank(copied.revision)
        self._host.release(copied.revision)
        self._picture = None
        self._journal.loaded(
            "device", tenure.adapter_id, copied.revision, tenure.num_bytes, copied.seconds
        )

    def _evict(self, revision: str) -> None:
        started_s = time.monotonic()
        tenure = self._resident.pop(revision)
        num_bytes = tenure.allocation.num_bytes
        self.pool.free(tenure.allocation)
        self.pool.full.free(tenure.full)
        self.pool.full.withdraw(tenure.shown.slot)
        self._free_slots.append(tenure.shown.slot)
        self._resident_bytes -= num_bytes
        del self._shown[revision]
        self._ranking.discard(revision)
        self._picture = None
        seconds = time.monotonic() - started_s
        self._journal.evicted("device", tenure.adapter_id, revision, tenure.num_bytes, seconds)

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
        return Residency(
            resident=MappingProxyType(self._shown.copy()),
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

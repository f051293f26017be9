"""The host tier: decoded blobs within a budget of bytes, kept while anybody holds them.

    reserve -> load -> put -> use, hold/release ... -> idle, the least worth first -> evicted

The budget is the one thing that loader threads share; everything else belongs to the engine's
thread. It must not know files, slots or requests.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from lory_server.adapters.blob import AdapterBlob
from lory_server.adapters.footprint import Footprint
from lory_server.adapters.matched import Facts, facts_of
from lory_server.adapters.ranking import Ranking, worth
from lory_server.model.sites import Site


class HostBudget:
    """Bytes promised and taken. Every call is a few additions under a lock."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.pinned_bytes = 0
        """The part that no load can have, however long it waits. Written by the engine's thread."""
        self._used_bytes = 0
        self._reserved_for_waiters = False
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self._used_bytes

    @property
    def unpinned_bytes(self) -> int:
        return self.total_bytes - self.pinned_bytes

    def hold_back(self, waiters: bool) -> None:
        """While loads wait for room, newcomers get none: first come, first served."""
        self._reserved_for_waiters = waiters

    def try_reserve(self, num_bytes: int, *, is_waiter: bool = False) -> bool:
        with self._lock:
            if self._reserved_for_waiters and not is_waiter:
                return False
            if self._used_bytes + num_bytes > self.total_bytes:
                return False
            self._used_bytes += num_bytes
            return True

    def release(self, num_bytes: int) -> None:
        with self._lock:
            self._used_bytes -= num_bytes
            assert self._used_bytes >= 0


@dataclass(slots=True, eq=False)
class HostEntry:
    adapter_id: str
    """The name it was first loaded under."""
    blob: AdapterBlob
    facts: Facts
    load_seconds: float
    """What it took to bring it here: reading, and folding if it needs the base."""
    footprint: Footprint
    """What it takes on the device."""
    uses: int = field(default=0)
    """Requests that were given it since it came, or since its name stood for it."""
    holds: int = field(default=0)
    names: set[str] = field(default_factory=set)
    """All that it has been resolved under."""


class HostTier:
    def __init__(self, budget: HostBudget, sites: Sequence[Site]) -> None:
        """`sites` are those that adapters are for."""
        self.budget = budget
        self._sites = sites
        self._entries: dict[str, HostEntry] = {}
        self._idle = Ranking()
        self._idle_bytes = 0
        self._revisions: dict[str, dict[str, None]] = {}
        """By name, in the order in which they came."""

    def __contains__(self, revision: str) -> bool:
        return revision in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, revision: str) -> HostEntry:
        return self._entries[revision]

    def put(
        self, adapter_id: str, blob: AdapterBlob, load_seconds: float, footprint: Footprint
    ) -> None:
        """Keep a blob whose bytes have been reserved; a second copy is dropped."""
        if blob.revision in self._entries:
            self.budget.release(blob.num_bytes)
            return
        facts = facts_of(blob.manifest, self._sites)
        entry = HostEntry(adapter_id, blob, facts, load_seconds, footprint)
        self._entries[blob.revision] = entry
        self._set_idle(entry)

    def use(self, revision: str) -> None:
        """Hold a revision for a request."""
        self._entries[revision].uses += 1
        self.hold(revision)

    def uses(self, revision: str) -> int:
        entry = self._entries.get(revision)
        return entry.uses if entry else 0

    def replaced(self, old_revision: str, revision: str) -> None:
        """A name stands for another revision: the old one's past speaks for the new one."""
        old = self._entries.get(old_revision)
        if old is None:
            return
        self._entries[revision].uses += old.uses
        old.uses = 0
        if not old.holds:
            self._rank(old)

    def hold(self, revision: str) -> None:
        entry = self._entries[revision]
        entry.holds += 1
        if entry.holds == 1:
            self._idle.discard(revision)
            self._idle_bytes -= entry.blob.num_bytes

    def release(self, revision: str) -> None:
        entry = self._entries[revision]
        assert entry.holds > 0, f"revision {revision} was released more often than it was held"
        entry.holds -= 1
        if not entry.holds:
            self._set_idle(entry)

    def name(self, revision: str, adapter_id: str) -> None:
        """Note that this is what an adapter is, or was."""
        self._entries[revision].names.add(adapter_id)
        self._revisions.setdefault(adapter_id, {})[revision] = None

    def revisions(self, adapter_id: str) -> tuple[str, ...]:
        """Those of an adapter that are here, oldest first."""
        return tuple(self._revisions.get(adapter_id, ()))

    def find(self, adapter_id: str, revision: str) -> str | None:
        """The adapter's latest revision here that begins so."""
        found = [known for known in self.revisions(adapter_id) if known.startswith(revision)]
        return found[-1] if found else None

    def held(self) -> Iterator[HostEntry]:
        return (entry for entry in self._entries.values() if entry.holds)

    def drop(self, revision: str) -> HostEntry | None:
        """Evict a blob that nobody holds."""
        if revision not in self._idle:
            return None
        self._idle.discard(revision)
        return self._forget(revision)

    def make_room(self, num_bytes: int) -> list[HostEntry]:
        """Evict idle blobs until `num_bytes` are free, or none if that cannot be."""
        if self.budget.free_bytes + self._idle_bytes < num_bytes:
            return []
        evicted: list[HostEntry] = []
        while self.budget.free_bytes < num_bytes and (revision := self._idle.pop()) is not None:
            evicted.append(self._forget(revision))
        return evicted

    def check(self) -> None:
        """Idle are those that nobody holds; all bytes are within what the budget has given."""
        idle = [entry for entry in self._entries.values() if not entry.holds]
        assert len(idle) == len(self._idle)
        assert all(entry.blob.revision in self._idle for entry in idle)
        assert sum(entry.blob.num_bytes for entry in idle) == self._idle_bytes
        kept_bytes = sum(entry.blob.num_bytes for entry in self._entries.values())
        assert kept_bytes <= self.budget.used_bytes <= self.budget.total_bytes

    def _set_idle(self, entry: HostEntry) -> None:
        self._idle_bytes += entry.blob.num_bytes
        self._rank(entry)

    def _rank(self, entry: HostEntry) -> None:
        num_bytes = entry.blob.num_bytes
        self._idle.put(entry.blob.revision, worth(entry.uses, entry.load_seconds, num_bytes))

    def _forget(self, revision: str) -> HostEntry:
        """Of one that was idle."""
        entry = self._entries.pop(revision)
        self._idle_bytes -= entry.blob.num_bytes
        self.budget.release(entry.blob.num_bytes)
        for name in entry.names:
            del self._revisions[name][revision]
            if not self._revisions[name]:
                del self._revisions[name]
        return entry

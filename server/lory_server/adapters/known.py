"""What is known of adapters' names: the latest revision, when last asked for, why last refused.

For lists, and for the line that tells a replacement; bounded, the longest unused forgotten first.
It belongs to the engine's thread. It must not know files, tickets or requests.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from lory_server.adapters.device import DeviceTier
from lory_server.adapters.host import HostTier
from lory_server.adapters.journal import Journal
from lory_server.adapters.pins import Pins
from lory_server.messages import AdapterEntry, RevisionEntry
from lory_server.recipes import MERGED

MAX_NAMES = 65_536
MAX_MERGES = 1024
"""Of them: a merge's name is its recipe, some kilobytes, and any request may bring another."""
NAMES_A_PART = 64
"""Of a list of thousands: a part of a millisecond's work."""


@dataclass(slots=True, eq=False)
class _Known:
    revision: str = ""
    asked_s: float | None = None
    refusal: str = ""


class KnownNames:
    def __init__(
        self,
        host: HostTier,
        device: DeviceTier,
        pins: Pins,
        journal: Journal,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._host = host
        self._device = device
        self._pins = pins
        self._journal = journal
        self._clock = clock
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._merges: OrderedDict[str, _Known] = OrderedDict()

    def names(self) -> Iterable[str]:
        return (*self._known, *self._merges)

    def told_in(self, entries: dict[str, AdapterEntry]) -> Iterator[None]:
        """Put what is known into a list of those on the disk, NAMES_A_PART names at a time; and
        the merges that are in memory."""
        merges = [name for name in self._merges if self.revisions(name)]
        names = [*(name for name in self._known if name in entries), *merges]
        for start in range(0, len(names), NAMES_A_PART):
            for name in names[start : start + NAMES_A_PART]:
                entries[name] = self.entry(name)
            if start + NAMES_A_PART < len(names):
                yield

    def resolved(self, adapter_id: str, revision: str) -> str | None:
        """A name was found to stand for this revision on disk; the one it has replaced, if any."""
        known = self._of(adapter_id)
        earlier = known.revision if known.revision not in ("", revision) else None
        if earlier is not None:
            self._journal.replaced(adapter_id, earlier, revision)
        known.revision = revision
        known.refusal = ""
        return earlier

    def latest(self, adapter_id: str) -> str:
        """What a name stood for when it was last looked up; empty: nobody knows."""
        known = self._known.get(adapter_id)
        return known.revision if known else ""

    def refused(self, adapter_id: str, reason: str) -> None:
        self._of(adapter_id).refusal = reason

    def asked_for(self, adapter_id: str) -> None:
        self._of(adapter_id).asked_s = self._clock()

    def entry(self, adapter_id: str) -> AdapterEntry:
        known = self._table(adapter_id).get(adapter_id) or _Known()
        revision, asked_s = known.revision, known.asked_s
        tier = "device" if revision in self._device else "host" if revision in self._host else None
        return AdapterEntry(
            adapter_id=adapter_id,
            tier=tier or "disk",
            revision=revision,
            revisions=tuple(map(self._in_memory, self.revisions(adapter_id))),
            idle_seconds=None if asked_s is None else self._clock() - asked_s,
            refusal=known.refusal,
        )

    def revisions(self, adapter_id: str) -> tuple[str, ...]:
        """All of an adapter that are in memory: the latest may be on the device alone."""
        found = self._host.revisions(adapter_id)
        known = self._table(adapter_id).get(adapter_id)
        if known is None or known.revision in found or known.revision not in self._device:
            return found
        return (*found, known.revision)

    def _in_memory(self, revision: str) -> RevisionEntry:
        entry = self._host.entry(revision) if revision in self._host else None
        facts = entry.facts if entry else self._device.facts(revision)
        return RevisionEntry(
            revision=revision,
            tier="device" if revision in self._device else "host",
            matched=facts.matched,
            file_bytes=facts.file_bytes,
            host_bytes=entry.blob.num_bytes if entry else 0,
            device_bytes=self._device.num_bytes(revision),
            is_pinned=revision in self._pins,
            invocation_tokens=facts.invocation_tokens,
        )

    def _of(self, adapter_id: str) -> _Known:
        table = self._table(adapter_id)
        known = table.setdefault(adapter_id, _Known())
        table.move_to_end(adapter_id)
        if len(table) > (MAX_MERGES if table is self._merges else MAX_NAMES):
            table.popitem(last=False)
        return known

    def _table(self, adapter_id: str) -> OrderedDict[str, _Known]:
        return self._merges if adapter_id.startswith(MERGED) else self._known

"""Where are they now? Adapters on disk, on the host and on the device, for the engine's thread.

    resolve -> [locate] -> poll: on the host already ...............-> Resolved, held
                           poll: not there -> [load] -> poll .......-> Resolved, held
                           poll: it needs the base's numbers -> [fold] -> poll -> Resolved, held
    residency -> scheduler -> demand -> [copy] -> residency, and so on until release

A name that has been looked up before will most likely stand for the same revision: if that is on
the host it is copied to the device meanwhile, and a request need not wait a step for either.

What stands in brackets runs on other threads and hands back plain values; all state lives on the
engine's thread, and no call here waits for a disk, a copy or a lock that is held for long. It must
not know requests, plans' rows or HTTP.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from queue import Empty, SimpleQueue

import torch

from lory_server.adapters.device import DeviceTier
from lory_server.adapters.errors import AdapterCapacityError, AdapterError, RevisionNotFoundError
from lory_server.adapters.fold import BaseFolder
from lory_server.adapters.host import HostBudget, HostTier
from lory_server.adapters.jobs import (
    Folded,
    FoldJob,
    Limits,
    ListJob,
    Loaded,
    LoadJob,
    LoadKey,
    Located,
    LocateJob,
    Nameless,
    NeedsRoom,
    OnDisk,
    SurveyJob,
)
from lory_server.adapters.journal import Journal
from lory_server.adapters.known import KnownNames
from lory_server.adapters.loaders import Loaders
from lory_server.adapters.lookups import Lookups
from lory_server.adapters.manifest import Base
from lory_server.adapters.outcomes import AdapterCounts, Listed, Outcome, Resolved, ResolveFailed
from lory_server.adapters.pins import Pins
from lory_server.adapters.pool import AdapterPool
from lory_server.adapters.reader import Reader, ThreadReader
from lory_server.adapters.refusals import Refusals
from lory_server.adapters.shapes import Shapes
from lory_server.adapters.store import AdapterStore
from lory_server.adapters.walks import Walks
from lory_server.adapters.workers import JobFailed, Workers
from lory_server.messages import AdapterMove
from lory_server.plan import AdapterDemand, Residency
from lory_server.recipes import MERGED, called

NUM_LOADERS = 2
MAX_SPARES = 8
"""Threads of each kind beside these, while files on a disk that stalls hold them up."""

MAX_EXPECTED = 16
"""Of adapters whose names are being looked up, how many are loaded before that is done."""

NAMED_HERE = ("adapter_capacity", "revision_not_found")
"""Failures whose message begins with the adapter's name here, and not where it is passed on."""

MAX_TOLD = 8
"""Revisions that a message names."""

JOIN_TIMEOUT_S = 5.0


@dataclass(slots=True, eq=False)
class _Ticket:
    adapter_id: str
    revision: str


@dataclass(frozen=True, slots=True)
class _InMemory:
    """A ticket for a revision that was on the host when it was asked for."""

    ticket: int
    revision: str


@dataclass(slots=True, eq=False)
class _Load:
    """One load, and who waits for it. A load that nobody waits for any more ends all the same."""

    order: int
    tickets: list[int] = field(default_factory=list)


class AdapterCache:
    def __init__(
        self,
        store: AdapterStore,
        pool: AdapterPool,
        base: Base,
        host_bytes: int,
        folder: BaseFolder,
        *,
        num_loaders: int = NUM_LOADERS,
        on_ready: Callable[[], None] = lambda: None,
        make_reader: Callable[[Base, torch.dtype], Reader] = ThreadReader,
    ) -> None:
        """`on_ready` is called by other threads whenever `poll` or `residency` has news.

        `make_reader` makes a reader for each loader thread.
        """
        self._store = store
        self._limits = Limits(pool.dtype, pool.total_bytes, pool.full.total_bytes, pool.footprint)
        self._outcomes: SimpleQueue[object] = SimpleQueue()
        self.budget = HostBudget(host_bytes)
        self.host = HostTier(self.budget, base.sites)
        self._shapes = Shapes()
        self._journal = Journal()
        self.device = DeviceTier(pool, self.host, self._journal, on_ready)
        self.pins = Pins(self.host, self.device)
        self.known = KnownNames(self.host, self.device, self.pins, self._journal)
        self._on_ready = on_ready
        self._locators = Workers(
            "lory-adapter-locate", 1, self._outcomes, on_ready, max_spares=MAX_SPARES
        )
        self._loaders = Loaders(
            lambda: make_reader(base, pool.dtype),
            ThreadReader(base, pool.dtype),
            num_loaders,
            MAX_SPARES,
            self._outcomes,
            on_ready,
        )
        self._folder = folder
        self._folders = Workers("lory-adapter-fold", 1, self._outcomes, on_ready)
        self._tickets: dict[int, _Ticket] = {}
        self._expected: dict[int, str] = {}
        """What tickets for the device will most likely come to, until that is known."""
        self._lookups = Lookups(self._look)
        self._loads: dict[LoadKey, _Load] = {}
        self._waiting_for_room: list[NeedsRoom] = []
        self._num_loads = 0
        self._refusals = Refusals()
        self._walks = Walks(lambda calls: self._loaders.submit(ListJob(store, calls)))
        self._listing: tuple[OnDisk, Iterator[None]] | None = None
        self._loaders.submit(SurveyJob(store))

    # -- requests ---------------------------------------------------------------------------

    def resolve(
        self, ticket: int, adapter_id: str, revision: str = "", *, for_device: bool = True
    ) -> None:
        """Ask for an adapter as it is on disk now, or for a revision of it, on disk or still in
        memory; `poll` answers. `for_device`: whoever asks will demand it there."""
        assert ticket not in self._tickets, f"ticket {ticket} is in use"
        self._tickets[ticket] = _Ticket(adapter_id, revision)
        found = self.host.find(adapter_id, revision) if revision else None
        expected = found if revision else self.known.latest(adapter_id)
        if for_device and expected:
            self._expected[ticket] = expected
        if found is not None:
            self._outcomes.put(_InMemory(ticket, found))
        else:
            self._lookups.ask(ticket, adapter_id)

    def cancel(self, ticket: int) -> None:
        """Forget a ticket that `poll` has not answered; without effect on others."""
        self._tickets.pop(ticket, None)
        self._expected.pop(ticket, None)

    def poll(self) -> list[Outcome]:
        """What has come of tickets and calls since the last time."""
        answers: list[Outcome] = []
        while True:
            try:
                outcome = self._outcomes.get_nowait()
            except Empty:
                break
            answers.extend(self._handle(outcome))
        if self._listing is not None:
            answers.extend(self._list_more(*self._listing))
        self._grant_room()
        self._locators.relieve()
        self._loaders.relieve()
        return answers

    def release(self, revision: str) -> None:
        """End one hold."""
        self.host.release(revision)

    def pin(self, revision: str) -> None:
        """Keep a revision that is on the host there, and on the device once it is resident.

        Raises AdapterCapacityError where nothing would be left for others.
        """
        self.pins.add(revision, max((w.num_bytes for w in self._waiting_for_room), default=0))

    def unpin(self, revision: str) -> None:
        self.pins.remove(revision)

    def let_go(self, revision: str) -> bool:
        """Evict a revision from device and host, unless somebody holds it; whether it is gone."""
        if revision in self.host and self.host.entry(revision).holds:
            return False
        self.device.drop(revision)
        if entry := self.host.drop(revision):
            blob = entry.blob
            self._journal.evicted("host", entry.adapter_id, revision, blob.num_bytes, 0.0)
        return True

    # -- the device -------------------------------------------------------------------------

    def residency(self) -> Residency:
        return self.device.residency()

    def demand(self, demand: AdapterDemand) -> None:
        """Start the loads that fit; last those of adapters that are still being looked up."""
        expected = dict.fromkeys(islice(self._expected.values(), MAX_EXPECTED))
        known = (*demand.in_use, *demand.wanted)
        more = tuple(r for r in expected if r in self.host and r not in known)
        self.device.demand(replace(demand, wanted=(*demand.wanted, *more)) if more else demand)

    # -- reports ----------------------------------------------------------------------------

    def counts(self) -> AdapterCounts:
        return AdapterCounts(
            disk=self._walks.count(),
            host=len(self.host),
            device=len(self.device),
            host_bytes=self.budget.used_bytes,
            device_bytes=self.device.used_bytes,
            pins_host=len(self.device.pinned),
            pins_device=sum(revision in self.device for revision in self.device.pinned),
        )

    def drain_moves(self) -> list[AdapterMove]:
        return self._journal.drain()

    def request_list(self, call_id: int) -> None:
        """Ask for all adapters and their tiers; `poll` answers with `Listed`."""
        self._walks.ask(call_id)

    def wait_until_ready(self) -> None:
        """Return when the first load need not wait for a reader to start; call it before any."""
        self._loaders.wait_until_ready()

    def close(self) -> None:
        """Stop the threads; those in the middle of a read end on their own."""
        workers = (self._locators, self._loaders, self._folders, self.device)
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.join(JOIN_TIMEOUT_S)
        self._loaders.close()

    # -- what came of jobs ------------------------------------------------------------------

    def _handle(self, outcome: object) -> Iterator[Outcome]:
        if isinstance(outcome, Located):
            yield from self._on_located(outcome)
        elif isinstance(outcome, _InMemory):
            yield from self._on_found(outcome)
        elif isinstance(outcome, Loaded):
            yield from self._on_loaded(outcome)
        elif isinstance(outcome, Folded):
            self.budget.release(outcome.freed_bytes)
            yield from self._on_ready_for_the_device(outcome.loaded)
        elif isinstance(outcome, NeedsRoom):
            yield from self._on_full(outcome)
        elif isinstance(outcome, OnDisk):
            self._on_walked(outcome)
        elif isinstance(outcome, Nameless):
            self._journal.skipped(outcome.folders)
        else:
            assert isinstance(outcome, JobFailed)
            yield from self._on_failed(outcome)

    def _on_found(self, found: _InMemory) -> Iterator[Outcome]:
        self._expected.pop(found.ticket, None)
        ticket = self._tickets.get(found.ticket)
        if ticket is None:
            return
        if found.revision in self.host:
            yield self._resolved(found.ticket, found.revision)
        else:
            self._lookups.ask(found.ticket, ticket.adapter_id)

    def _look(self, tickets: tuple[int, ...], adapter_id: str) -> None:
        self._locators.submit(LocateJob(self._store, tickets, adapter_id, self._lookups.ended))

    def _end_look(self, tickets: tuple[int, ...]) -> list[int]:
        """Those who still wait for it; nothing is guessed for them any more."""
        for ticket in tickets:
            self._expected.pop(ticket, None)
        return [ticket for ticket in tickets if ticket in self._tickets]

    def _on_located(self, located: Located) -> Iterator[Outcome]:
        tickets = self._end_look(located.tickets)
        if not tickets:
            return
        revision = self._store.revision_of(located.signature)
        if revision is not None and revision in self.host:
            yield from [self._on_disk(ticket, revision) for ticket in tickets]
            return
        key = LoadKey(located.adapter_id, located.signature)
        refusal = self._refusals.find(key)
        if refusal is not None:
            yield from [self._failed(ticket, refusal) for ticket in tickets]
            return
        if key not in self._loads:
            self._num_loads += 1
            self._loads[key] = _Load(self._num_loads)
            self._submit_load(key)
        self._loads[key].tickets.extend(tickets)

    def _on_loaded(self, loaded: Loaded) -> Iterator[Outcome]:
        """Others load meanwhile: folding has a thread of its own."""
        blob = loaded.blob
        if blob.manifest.needs_base and blob.revision not in self.host:
            self._folders.submit(FoldJob(self._folder, self._limits, loaded))
        else:
            yield from self._on_ready_for_the_device(loaded)

    def _on_ready_for_the_device(self, loaded: Loaded) -> Iterator[Outcome]:
        revision, blob = loaded.blob.revision, loaded.blob
        self.host.put(loaded.key.adapter_id, blob, loaded.seconds, loaded.footprint)
        # Whether or not anybody still waits: unload and drop find it by its name.
        self.host.name(revision, loaded.key.adapter_id)
        if loaded.is_settled:
            self._store.remember(loaded.signature, revision)
        self._journal.loaded(
            "host", loaded.key.adapter_id, revision, blob.num_bytes, loaded.seconds
        )
        for ticket in self._end_load(loaded.key):
            yield self._on_disk(ticket, revision)

    def _on_full(self, full: NeedsRoom) -> Iterator[Outcome]:
        """A load waits for room, unless a pin that came beside it has taken that for good."""
        try:
            self._limits.check_host(full.num_bytes, self.budget)
        except AdapterCapacityError as error:
            for ticket in self._end_load(full.key):
                yield self._failed(ticket, error)
            return
        self._waiting_for_room.append(full)
        self._waiting_for_room.sort(key=lambda waiting: self._loads[waiting.key].order)
        self.budget.hold_back(True)

    def _on_walked(self, found: OnDisk) -> None:
        self._walks.found(len(found.entries))
        if found.call_ids:
            self._listing = (found, self.known.told_in(found.entries))
        else:
            self._walks.ended()

    def _list_more(self, found: OnDisk, parts: Iterator[None]) -> Iterator[Listed]:
        """A list of thousands is made in parts, a turn each, and a step passes between them."""
        for _ in parts:
            self._on_ready()
            return
        self._listing = None
        entries = tuple(found.entries.values())
        yield from (Listed(call_id, entries) for call_id in found.call_ids)
        self._walks.ended()

    def _on_failed(self, failed: JobFailed) -> Iterator[Outcome]:
        job, error = failed.job, failed.error
        self._tell(failed)
        if isinstance(job, LocateJob):
            yield from [self._failed(ticket, error) for ticket in self._end_look(job.tickets)]
        elif isinstance(job, LoadJob):
            yield from self._end_in_failure(job.key, error)
        elif isinstance(job, FoldJob):
            self.budget.release(job.loaded.blob.num_bytes)
            yield from self._end_in_failure(job.loaded.key, error)
        elif isinstance(job, ListJob):
            yield from (Listed(call_id, ()) for call_id in job.call_ids)
            self._walks.ended()

    def _end_in_failure(self, key: LoadKey, error: Exception) -> Iterator[ResolveFailed]:
        self._refusals.remember(key, error)
        for ticket in self._end_load(key):
            yield self._failed(ticket, error)

    def _tell(self, failed: JobFailed) -> None:
        """Each failure has its line and its count; a name that stands for nothing is no failure."""
        job, error = failed.job, failed.error
        if not isinstance(error, AdapterError):
            self._journal.broke(job, error)
        if not isinstance(job, LocateJob | LoadJob | FoldJob):
            return
        if not isinstance(error, AdapterError):
            self._journal.failed(job.adapter_id)
        elif error.code != "adapter_not_found":
            self._journal.refused(job.adapter_id, error)
            self.known.refused(job.adapter_id, str(error))

    def _end_load(self, key: LoadKey) -> list[int]:
        return [ticket for ticket in self._loads.pop(key).tickets if ticket in self._tickets]

    def _on_disk(self, ticket: int, revision: str) -> Outcome:
        """What a name stands for now is on the host; whether it is what was asked for."""
        asked = self._tickets[ticket]
        self.host.name(revision, asked.adapter_id)
        replaced = self.known.resolved(asked.adapter_id, revision)
        if replaced is not None:
            self.host.replaced(replaced, revision)
            self.device.replaced(replaced)
        if revision.startswith(asked.revision):
            return self._resolved(ticket, revision, is_latest=True)
        earlier = self.host.find(asked.adapter_id, asked.revision)
        if earlier is not None:
            return self._resolved(ticket, earlier)
        others = [one for one in self.known.revisions(asked.adapter_id) if one != revision]
        also = f"; in memory are also {', '.join(others[-MAX_TOLD:])}" if others else ""
        reason = (
            f"is revision {revision} on disk, and {asked.revision} is not in memory any more{also}"
        )
        return self._failed(ticket, RevisionNotFoundError(reason))

    def _resolved(self, ticket: int, revision: str, is_latest: bool = False) -> Outcome:
        entry = self.host.entry(revision)
        footprint = entry.footprint
        try:
            self.pins.check_room_beside(revision, footprint.num_bytes, footprint.full_bytes)
        except AdapterCapacityError as error:
            return self._failed(ticket, error)
        asked = self._tickets.pop(ticket)
        self.host.use(revision)
        self.known.asked_for(asked.adapter_id)
        return Resolved(
            ticket=ticket,
            adapter_id=asked.adapter_id,
            revision=revision,
            is_latest=is_latest,
            num_bytes=footprint.num_bytes,
            full_bytes=footprint.full_bytes,
            has_own_head=entry.blob.manifest.has_own_head,
            token_params=entry.blob.manifest.token_params,
            head_params=entry.blob.manifest.head_params,
            invocation_tokens=entry.facts.invocation_tokens,
            manner=entry.blob.manner,
            vocab_size=entry.blob.manifest.vocab_size,
        )

    def _failed(self, ticket: int, error: Exception) -> ResolveFailed:
        adapter_id = self._tickets.pop(ticket).adapter_id
        if isinstance(error, AdapterError):
            is_named = error.code in NAMED_HERE and not error.source
            about = f"adapter {called(adapter_id)!r} " if is_named else ""
            return ResolveFailed(ticket, adapter_id, error.code, f"{about}{error}", error.source)
        message = f"adapter {called(adapter_id)!r} could not be loaded; the engine's log says why"
        return ResolveFailed(ticket, adapter_id, "internal", message)

    # -- room on the host -------------------------------------------------------------------

    def _submit_load(self, key: LoadKey, reserved_bytes: int = 0) -> None:
        loaders = self._loaders
        lane = loaders.merges if key.adapter_id.startswith(MERGED) else loaders.plain
        readers = (lane.free, lane.spare)
        lane.workers.submit(
            LoadJob(
                self._store,
                *readers,
                self._limits,
                self.budget,
                self._shapes,
                key,
                reserved_bytes,
            )
        )

    def _grant_room(self) -> None:
        """Loads that found the budget taken, first come, first served, as holds end."""
        while self._waiting_for_room:
            head = self._waiting_for_room[0]
            is_wanted = any(ticket in self._tickets for ticket in self._loads[head.key].tickets)
            if is_wanted and not self._reserve(head.num_bytes):
                return
            del self._waiting_for_room[0]
            if is_wanted:
                self._submit_load(head.key, head.num_bytes)
            else:
                del self._loads[head.key]
        self.budget.hold_back(False)

    def _reserve(self, num_bytes: int) -> bool:
        started_s = time.monotonic()
        for entry in self.host.make_room(num_bytes):
            blob, seconds = entry.blob, time.monotonic() - started_s
            self._journal.evicted("host", entry.adapter_id, blob.revision, blob.num_bytes, seconds)
        return self.budget.try_reserve(num_bytes, is_waiter=True)

"""Orders about adapters from sources: fetched or found here first, then given to the engine.

A pinned one is held on the disk, too, and its pin moves to what is fetched or uploaded after it. A
replacement is loaded before anybody is served it. It must not know HTTP, or whose adapters they
are.
"""

import logging
from collections.abc import Iterable

import msgspec

from lory_router.engine import EngineClient, Unavailable
from lory_router.names import Target
from lory_router.sources.flight import Flights
from lory_router.sources.reference import Reference, covers, is_from_source, reference_of
from lory_router.sources.service import Sources
from lory_router.sources.upload import Upload
from lory_server.messages import FETCHED, AdapterEntry, Failure, OrderDone, OrderKind

log = logging.getLogger(__name__)

NOT_HERE = Failure(code="adapter_not_found", message="nothing of it is here")
MAX_CHANGES = 3
"""Of what a name stands for, while it is pinned."""


class SourcedOrders:
    def __init__(self, engine: EngineClient, sources: Sources) -> None:
        self._engine = engine
        self._sources = sources
        self._pinned: dict[Target, str] = {}
        """Engine names, each of them held on the disk."""
        self._moves: Flights[str, None] = Flights()

    async def close(self) -> None:
        await self._moves.close()

    # -- a caller's orders ------------------------------------------------------------------

    async def order(
        self, kind: OrderKind, reference: Reference, revision: str = "", token: str = ""
    ) -> OrderDone:
        """As `EngineClient.order`. Raises an ApiError, too, for an adapter that cannot be had."""
        match kind:
            case "find" | "load":
                async with self._sources.using(reference, token) as engine_name:
                    return await self.tell(kind, reference, engine_name, revision)
            case "pin":
                return await self._pin_newest(reference, revision, token)
            case "unpin":
                return await self._unpin(reference, revision)
            case "unload" | "drop":
                return await self._let_go(kind, reference, revision)

    async def replace(self, upload: Upload) -> OrderDone:
        """Load what is sent, let it take the place of what had its name, and let go of that, when
        the last request that holds it has ended."""
        reference, uploads = upload.reference, self._sources.uploads
        async with uploads.staged(upload) as staged:
            done = await self.tell("load", reference, FETCHED + staged.folder)
            if done.failure is not None:
                return done
            # Equal bytes are one revision to the engine, which the new one needs.
            entries = self._sources.entries_of(reference)
            others = (entry for entry in entries if entry.origin.revision != staged.revision)
            before = [FETCHED + entry.folder for entry in others]
            await uploads.adopt(staged)
            await self._move_pin(reference)
            for engine_name in before:
                await self._engine.order("unload", engine_name)
        return done

    # -- pins -------------------------------------------------------------------------------

    def hold_pinned(self, pins: Iterable[Target]) -> None:
        """Keep on the disk what was pinned before the start; `restore` loads it."""
        for pin in pins:
            if is_from_source(pin.adapter_id):
                engine_name = self._sources.hold_kept(reference_of(pin.adapter_id))
                if engine_name:
                    self._pinned[pin] = engine_name

    async def restore(self, pin: Target) -> OrderDone:
        """Pin again, in an engine that knows nothing, what was pinned; no caller asks, and no
        token is at hand, so what is here is taken as it is."""
        reference = reference_of(pin.adapter_id)
        kept = self._sources.hold_kept(reference)
        engine_name = kept or await self._sources.acquire(reference)
        return await self._pin(reference, engine_name, pin.revision)

    def used(self, reference: Reference, engine_name: str) -> None:
        """A request uses it: if it is the newest, a pin of its name that keeps another moves."""
        kept, newest = self._pinned.get(Target(reference.name)), self._sources.latest(reference)
        is_newest = newest is not None and FETCHED + newest.folder == engine_name
        if is_newest and kept not in (None, engine_name):
            self._moves.begin(reference.name, lambda: self._move_pin(reference))

    async def _move_pin(self, reference: Reference) -> None:
        """To what was fetched or uploaded last under its name."""
        if Target(reference.name) not in self._pinned:
            return
        engine_name = self._sources.hold_kept(reference)
        if not engine_name:
            return
        try:
            done = await self._pin(reference, engine_name, is_move=True)
        except Unavailable:
            return  # the next engine is told of pins when it comes up
        if done.failure not in (None, NOT_HERE):
            text = "adapter %r is not pinned at its new revision: %s"
            log.warning(text, reference.name, done.failure.message)

    async def _pin_newest(self, reference: Reference, revision: str, token: str) -> OrderDone:
        """Again, if that was replaced meanwhile."""
        done = _not_here()
        for _ in range(MAX_CHANGES):
            engine_name = await self._sources.acquire(reference, token)
            done = await self._pin(reference, engine_name, revision)
            if done.failure is not NOT_HERE or self._sources.latest(reference) is None:
                break
        return done

    async def _pin(
        self, reference: Reference, engine_name: str, revision: str = "", is_move: bool = False
    ) -> OrderDone:
        """`engine_name` is held: for the pin, or let go of again. NOT_HERE: while it was loaded it
        was taken away, or the pin that was to move was."""
        is_kept = False
        try:
            done = await self.tell("pin", reference, engine_name, revision)
            if done.failure is not None:
                return done
            key = Target(reference.name, done.revision if revision else "")
            is_here = self._sources.is_here(engine_name)
            if not is_here or (is_move and key not in self._pinned):
                await self._engine.order("unpin" if is_here else "drop", engine_name, key.revision)
                return _not_here()
            before, self._pinned[key] = self._pinned.get(key, ""), engine_name
            is_kept = True
        finally:
            if not is_kept:
                self._sources.release(engine_name)
        if before:
            self._sources.release(before)
        if before not in ("", engine_name):
            await self._engine.order("unpin", before, key.revision)
        return done

    async def _unpin(self, reference: Reference, revision: str) -> OrderDone:
        """Without a revision the pin of the name alone, as the engine does."""
        for pin in sorted(self._pinned):
            is_named = pin.adapter_id == reference.name and bool(pin.revision) == bool(revision)
            if is_named and pin.revision.startswith(revision):
                engine_name = self._pinned.pop(pin)
                self._sources.release(engine_name)
                return await self.tell("unpin", reference, engine_name, pin.revision)
        return await self._first("unpin", reference, revision)

    # -- what is in memory ------------------------------------------------------------------

    async def _let_go(self, kind: OrderKind, reference: Reference, revision: str) -> OrderDone:
        """Of all that is here under its name; the answer is about the newest."""
        names = [FETCHED + entry.folder for entry in self._sources.entries_of(reference)]
        if kind == "drop":
            pins = [pin for pin in self._pinned if covers(reference.name, pin.adapter_id)]
            pinned = [self._pinned.pop(pin) for pin in pins]
            for engine_name in pinned:
                self._sources.release(engine_name)
            names += pinned  # a pin that has not moved yet keeps what was replaced
        answers = [
            await self.tell(kind, reference, engine_name, revision)
            for engine_name in dict.fromkeys(names)
        ]
        refused = (done for done in answers if done.failure is not None)
        return next(refused, answers[0] if answers else _not_here())

    async def _first(self, kind: OrderKind, reference: Reference, revision: str) -> OrderDone:
        entry = self._sources.latest(reference)
        if entry is None:
            return _not_here()
        return await self.tell(kind, reference, FETCHED + entry.folder, revision)

    async def tell(
        self, kind: OrderKind, reference: Reference, engine_name: str, revision: str = ""
    ) -> OrderDone:
        """The engine's answer, under the name that callers know."""
        done = await self._engine.order(kind, engine_name, revision)
        entry, failure = done.entry, done.failure
        return msgspec.structs.replace(
            done,
            entry=entry and renamed(entry, reference.name),
            failure=failure and renamed_failure(failure, engine_name, reference.name),
        )


def renamed(entry: AdapterEntry, name: str) -> AdapterEntry:
    refusal = entry.refusal.replace(entry.adapter_id, name)
    return msgspec.structs.replace(entry, adapter_id=name, refusal=refusal)


def renamed_failure(failure: Failure, engine_name: str, name: str) -> Failure:
    source = name if failure.source == engine_name else failure.source
    message = failure.message.replace(engine_name, name)
    return msgspec.structs.replace(failure, message=message, source=source)


def _not_here() -> OrderDone:
    return OrderDone(call_id=0, entry=None, failure=NOT_HERE)

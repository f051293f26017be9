"""An engine whose adapters may come from anywhere: what a request names is at hand when it starts.

It is an `EngineClient` before another one. Waiting for a download happens in `submit`, so that a
request that leaves, or whose deadline comes, leaves nothing behind. It must not know how adapters
are fetched, nor HTTP.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec

from lory_router.engine import (
    EngineClient,
    EngineStream,
    SequenceRequest,
    StreamEvent,
    Unavailable,
)
from lory_router.sourced_orders import SourcedOrders, renamed, renamed_failure
from lory_router.sources.reference import Reference
from lory_router.sources.service import Sources
from lory_server.messages import (
    FETCHED,
    AdapterEntry,
    CancelReason,
    EngineInfo,
    Finished,
    OrderDone,
    OrderKind,
)
from lory_server.recipes import MergeSource


class SourcedEngine:
    def __init__(self, engine: EngineClient, sources: Sources) -> None:
        self._engine = engine
        self.sources = sources
        self.orders = SourcedOrders(engine, sources)

    async def close(self) -> None:
        await self.orders.close()
        await self.sources.close()

    @property
    def info(self) -> EngineInfo | None:
        return self._engine.info

    def is_ready(self) -> bool:
        return self._engine.is_ready()

    def is_draining(self) -> bool:
        return self._engine.is_draining()

    async def submit(self, request: SequenceRequest) -> EngineStream:
        """Raises an ApiError, too, for an adapter that cannot be had."""
        held: dict[str, str] = {}
        try:
            wanted = request.references or (request.source,)
            names = [await self._acquire(one, request.token, held) for one in wanted]
            stream = await self._engine.submit(_of_fetched(request, names))
        except BaseException:
            for engine_name in held:
                self.sources.release(engine_name)
            raise
        for reference, engine_name in zip(wanted, names, strict=True):
            if reference is not None:
                self.orders.used(reference, engine_name)
        return _HoldingStream(stream, self.sources, held) if held else stream

    async def _acquire(self, source: Reference | None, token: str, held: dict[str, str]) -> str:
        """The engine's name for it, which `held` notes once; empty for a local adapter."""
        if source is None:
            return ""
        engine_name = await self.sources.acquire(source, token)
        if engine_name in held:
            self.sources.release(engine_name)
        held[engine_name] = source.name
        return engine_name

    async def order(self, kind: OrderKind, adapter_id: str, revision: str = "") -> OrderDone:
        """Of local adapters; `orders` takes those of others."""
        return await self._engine.order(kind, adapter_id, revision)

    async def drop(self, reference: Reference) -> None:
        """Nobody new gets it; what requests hold stays until they end."""
        try:
            await self.orders.order("drop", reference)
        except Unavailable:
            return  # an engine that is gone holds nothing, and the next one is not told of it
        finally:
            await self.sources.remove(reference)

    async def list_adapters(self) -> tuple[AdapterEntry, ...]:
        """The local ones, and those that were fetched, by their names, each once: what it has in
        memory of older bytes stands with the newest."""
        entries, all_fetched = await self._engine.list_adapters(), self.sources.listing()
        local = [entry for entry in entries if not entry.adapter_id.startswith(FETCHED)]
        told = {entry.adapter_id: entry for entry in entries}
        shown: dict[str, AdapterEntry] = {}
        for fetched in sorted(all_fetched, key=lambda one: one.is_latest):
            entry = told.get(fetched.engine_name)
            if entry is not None:
                newer = renamed(entry, fetched.name)
                older = shown.get(fetched.name)
                shown[fetched.name] = _with_older(newer, older) if older else newer
        latest = {fetched.name for fetched in all_fetched if fetched.is_latest}
        return (*local, *(shown[name] for name in sorted(shown) if name in latest))


def _with_older(entry: AdapterEntry, older: AdapterEntry) -> AdapterEntry:
    return msgspec.structs.replace(
        entry,
        revisions=(*older.revisions, *entry.revisions),
        num_requests=older.num_requests + entry.num_requests,
    )


def _of_fetched(request: SequenceRequest, names: Sequence[str]) -> SequenceRequest:
    """The same of what was fetched under these names."""
    recipe = request.recipe
    if not request.references or recipe is None:
        return replace(request, adapter_id=names[0] or request.adapter_id)
    sources = tuple(
        MergeSource(name, source.weight, source.revision) if name else source
        for name, source in zip(names, recipe.sources, strict=True)
    )
    return replace(request, recipe=msgspec.structs.replace(recipe, sources=sources))


class _HoldingStream:
    """A stream that holds its adapters on disk until it ends or is cancelled."""

    def __init__(self, stream: EngineStream, sources: Sources, held: Mapping[str, str]) -> None:
        """`held`: by the engine's names, those that callers know."""
        self._stream = stream
        self._sources = sources
        self._names = held
        self._is_held = True

    @property
    def adapter_revision(self) -> str:
        return self._stream.adapter_revision

    def __aiter__(self) -> "_HoldingStream":
        return self

    async def __anext__(self) -> StreamEvent:
        event = await anext(self._stream)
        if not isinstance(event, Finished):
            return event
        self._release()
        if event.failure is None:
            return event
        failure = event.failure
        for engine_name, shown_name in self._names.items():
            failure = renamed_failure(failure, engine_name, shown_name)
        return msgspec.structs.replace(event, failure=failure)

    def gather(self, num_tokens: int) -> None:
        self._stream.gather(num_tokens)

    def cancel(self, reason: CancelReason = "cancelled") -> None:
        self._stream.cancel(reason)
        self._release()

    def _release(self) -> None:
        if self._is_held:
            self._is_held = False
            for engine_name in self._names:
                self._sources.release(engine_name)

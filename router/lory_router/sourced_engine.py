"""An engine whose adapters may come from anywhere: what a request names is at hand when it starts.

It is an `EngineClient` before another one. Waiting for a download happens in `submit`, so that a
request that leaves, or whose deadline comes, leaves nothing behind. It must not know how adapters
are fetched, nor HTTP.
"""

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
        if request.source is None:
            return await self._engine.submit(request)
        engine_name = await self.sources.acquire(request.source, request.token)
        try:
            stream = await self._engine.submit(replace(request, adapter_id=engine_name))
        except BaseException:
            self.sources.release(engine_name)
            raise
        self.orders.used(request.source, engine_name)
        return _HoldingStream(stream, self.sources, engine_name, request.source.name)

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


class _HoldingStream:
    """A stream that holds its adapter on disk until it ends or is cancelled."""

    def __init__(
        self, stream: EngineStream, sources: Sources, engine_name: str, shown_name: str
    ) -> None:
        self._stream = stream
        self._sources = sources
        self._engine_name = engine_name
        self._shown_name = shown_name
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
        failure = renamed_failure(event.failure, self._engine_name, self._shown_name)
        return msgspec.structs.replace(event, failure=failure)

    def gather(self, num_tokens: int) -> None:
        self._stream.gather(num_tokens)

    def cancel(self, reason: CancelReason = "cancelled") -> None:
        self._stream.cancel(reason)
        self._release()

    def _release(self) -> None:
        if self._is_held:
            self._is_held = False
            self._sources.release(self._engine_name)

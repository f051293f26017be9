"""An engine whose adapters may come from anywhere: what a request names is at hand when it starts.

It is an `EngineClient` before another one. Waiting for a download happens in `submit`, so that a
request that leaves, or whose deadline comes, leaves nothing behind. It must not know how adapters
are fetched, nor HTTP.
"""

from dataclasses import replace

import msgspec

from lory_router.engine import EngineClient, EngineStream, SequenceRequest, StreamEvent
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
        self._sources = sources

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
        name = await self._sources.acquire(request.source, request.token)
        try:
            stream = await self._engine.submit(replace(request, adapter_id=name))
        except BaseException:
            self._sources.release(name)
            raise
        return _HoldingStream(stream, self._sources, name)

    async def order(self, kind: OrderKind, adapter_id: str, revision: str = "") -> OrderDone:
        """Of local adapters: what was fetched is held by requests alone."""
        return await self._engine.order(kind, adapter_id, revision)

    async def list_adapters(self) -> tuple[AdapterEntry, ...]:
        """The local ones, and of those that were fetched what everybody may see, newest only."""
        entries = await self._engine.list_adapters()
        fetched = self._sources.listing()
        names = {f.engine_name: f.name for f in fetched if f.is_public and f.is_latest}
        local = [entry for entry in entries if not entry.adapter_id.startswith(FETCHED)]
        shown = [
            msgspec.structs.replace(entry, adapter_id=names[entry.adapter_id])
            for entry in entries
            if entry.adapter_id in names
        ]
        return (*local, *sorted(shown, key=lambda entry: entry.adapter_id))


class _HoldingStream:
    """A stream that holds its adapter on disk until it ends or is cancelled."""

    def __init__(self, stream: EngineStream, sources: Sources, name: str) -> None:
        self._stream = stream
        self._sources = sources
        self._name = name

    @property
    def adapter_revision(self) -> str:
        return self._stream.adapter_revision

    def __aiter__(self) -> "_HoldingStream":
        return self

    async def __anext__(self) -> StreamEvent:
        event = await anext(self._stream)
        if isinstance(event, Finished):
            self._release()
        return event

    def gather(self, num_tokens: int) -> None:
        self._stream.gather(num_tokens)

    def cancel(self, reason: CancelReason = "cancelled") -> None:
        self._stream.cancel(reason)
        self._release()

    def _release(self) -> None:
        if self._name:
            self._sources.release(self._name)
            self._name = ""

"""An engine whose adapters may come from anywhere: what a request names is at hand when it starts.

It is an `EngineClient` before another one. Waiting for a download happens in `submit`, so that a
request that leaves, or whose deadline comes, leaves nothing behind. It must not know how adapters
are fetched, nor HTTP.
"""

from collections.abc import Sequence
from dataclasses import replace

import msgspec

from lory_router.engine import EngineClient, EngineStream, SequenceRequest, StreamEvent
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
        wanted = request.references or (request.source,)
        held: list[str] = []
        try:
            names = [await self._acquire(one, request.token, held) for one in wanted]
            stream = await self._engine.submit(_of_fetched(request, names))
        except BaseException:
            for name in held:
                self._sources.release(name)
            raise
        return _HoldingStream(stream, self._sources, held) if held else stream

    async def _acquire(self, source: Reference | None, token: str, held: list[str]) -> str:
        """The engine's name for it, which `held` notes; empty for a local adapter."""
        if source is None:
            return ""
        held.append(await self._sources.acquire(source, token))
        return held[-1]

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


def _of_fetched(request: SequenceRequest, names: Sequence[str]) -> SequenceRequest:
    """The same of what was fetched under these names."""
    recipe = request.recipe
    if not request.references or recipe is None:
        return replace(request, adapter_id=names[0] or request.adapter_id)
    sources = tuple(
        MergeSource(name, source.weight) if name else source
        for name, source in zip(names, recipe.sources, strict=True)
    )
    return replace(request, recipe=msgspec.structs.replace(recipe, sources=sources))


class _HoldingStream:
    """A stream that holds its adapters on disk until it ends or is cancelled."""

    def __init__(self, stream: EngineStream, sources: Sources, names: Sequence[str]) -> None:
        self._stream = stream
        self._sources = sources
        self._names = names

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
        names, self._names = self._names, ()
        for name in names:
            self._sources.release(name)

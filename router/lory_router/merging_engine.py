"""An engine that merges: what a request or a name wants merged goes to it as a recipe.

It is an `EngineClient` before another one, and behind the names: a merge that was saved comes here
under its name, one that a request asks for with its sources as the caller named them. It must not
know HTTP, or how adapters are merged.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import msgspec

from lory_router.engine import EngineClient, EngineStream, SequenceRequest, StreamEvent
from lory_router.errors import Invalid, adapter_not_found, shown
from lory_router.keys import Caller
from lory_router.registry import Registry
from lory_router.rights import Rights
from lory_router.settings import RouterSettings
from lory_router.sources.reference import Reference, is_from_source, reference_of
from lory_router.tenant_merges import TenantMerges
from lory_router.validate import check_source, token_without_source
from lory_server.messages import (
    AdapterEntry,
    CancelReason,
    EngineInfo,
    Failure,
    Finished,
    OrderDone,
    OrderKind,
)
from lory_server.recipes import MERGED, MergeSource, Recipe, merged_id

READING: tuple[OrderKind, ...] = ("find", "load", "pin")
"""Orders that bring an adapter in."""


class MergingEngine:
    def __init__(
        self, engine: EngineClient, registry: Registry, rights: Rights, settings: RouterSettings
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._rights = rights
        self._settings = settings
        self._uses = TenantMerges(settings.max_tenant_merges)

    @property
    def info(self) -> EngineInfo | None:
        return self._engine.info

    def is_ready(self) -> bool:
        return self._engine.is_ready()

    def is_draining(self) -> bool:
        return self._engine.is_draining()

    async def submit(self, request: SequenceRequest) -> EngineStream:
        if request.recipe is not None:
            return await self._submit_merge(request, request.recipe)
        if request.source is None:
            request = replace(request, recipe=self._saved(request.adapter_id))
        return await self._engine.submit(request)

    async def _submit_merge(self, request: SequenceRequest, named: Recipe) -> EngineStream:
        aimed, tenant = self._aimed(request, named), request.caller.tenant
        self._uses.begin(tenant, aimed.recipe)
        used = ExitStack()
        used.callback(self._uses.end, tenant, aimed.recipe)
        try:
            stream = await self._engine.submit(aimed)
        except BaseException:
            used.close()
            raise
        return _TellingStream(stream, names_between(aimed.recipe, named), used)

    async def list_adapters(self) -> tuple[AdapterEntry, ...]:
        """Merges under the names they were saved under; others have none."""
        entries = await self._engine.list_adapters()
        found = {e.adapter_id: e for e in entries if not e.adapter_id.startswith(MERGED)}
        known = {entry.adapter_id: entry for entry in entries}
        for name, recipe in self._registry.state.merges.items():
            nothing = AdapterEntry(adapter_id=name, tier="disk")
            entry = _called(name, known.get(merged_id(recipe), nothing))
            removed = self._registry.state.removed_source(name)
            if removed:
                entry = msgspec.structs.replace(entry, refusal=source_removed(removed))
            found[name] = entry
        return tuple(found.values())

    async def order(self, kind: OrderKind, adapter_id: str, revision: str = "") -> OrderDone:
        if kind in READING:
            self._saved(adapter_id)
        engine_name = self._registry.engine_name(adapter_id)
        done = await self._engine.order(kind, engine_name, revision)
        if done.entry is None or engine_name == adapter_id:
            return done
        return msgspec.structs.replace(done, entry=_called(adapter_id, done.entry))

    def _saved(self, adapter_id: str) -> Recipe | None:
        """The recipe saved under a name; raises the 404 of a source that was removed."""
        state = self._registry.state
        removed = state.removed_source(adapter_id)
        if removed:
            raise adapter_not_found(removed)
        return state.merges.get(adapter_id)

    def _aimed(self, request: SequenceRequest, recipe: Recipe) -> SequenceRequest:
        """At what the names of the sources stand for, to this caller."""
        sources: list[MergeSource] = []
        references: list[Reference | None] = []
        for named, reference in zip(recipe.sources, request.references, strict=True):
            source = found_source(self._rights, self._registry, request.caller, named)
            if reference is not None and source.adapter_id != named.adapter_id:
                raise adapter_not_found(named.adapter_id)
            if reference is None and is_from_source(source.adapter_id):
                reference = reference_of(source.adapter_id)
                check_source(reference, request.token, self._settings)
            sources.append(source)
            references.append(reference)
        if request.token and not any(references):
            raise token_without_source()
        _check_token_has_one_reader(request.token, references)
        recipe = msgspec.structs.replace(recipe, sources=tuple(sources))
        return replace(request, recipe=recipe, references=tuple(references))


def found_source(
    rights: Rights,
    registry: Registry,
    caller: Caller,
    source: MergeSource,
    field: str = "merged_adapters",
) -> MergeSource:
    """What the name of a merge's source, which `field` gave, stands for."""
    target = rights.find_target(caller, source.adapter_id)
    if target.adapter_id in registry.state.merges:
        raise Invalid(
            f"{shown(source.adapter_id)} is itself a merge; name what it is merged from",
            param=field,
        )
    return MergeSource(target.adapter_id, source.weight, target.revision)


def _check_token_has_one_reader(token: str, references: Sequence[Reference | None]) -> None:
    """A caller's token for one host is not for another that happens to stand beside it."""
    hosts = {
        one.place.split("/")[2] if one.kind == "web" else one.kind for one in references if one
    }
    if token and len(hosts) > 1:
        raise Invalid(
            "`api_token` is for one hub or host; the adapters merged here are of several",
            param="api_token",
        )


Names = Mapping[str, str]
"""By what the engine knows of a merge's sources, how the caller named them."""


def names_between(found: Recipe | None, named: Recipe) -> Names:
    """Of two names for one adapter the first, which is the one that a failure is of: all that the
    caller may not see has one name in the engine."""
    names: dict[str, str] = {}
    for one, other in zip(found.sources if found else (), named.sources, strict=True):
        if one.adapter_id != other.adapter_id:
            names.setdefault(one.adapter_id, other.adapter_id)
    return names


def told_as(failure: Failure, names: Names) -> Failure:
    """Of a source by the caller's name for it, so that it tells of nothing else."""
    name = names.get(failure.source)
    if name is None:
        return failure
    message = failure.message.replace(f"({failure.source!r})", f"({name!r})")
    return msgspec.structs.replace(failure, message=message, source=name)


class _TellingStream:
    """A stream whose failure names a source as its caller did; what it uses ends with it."""

    def __init__(self, stream: EngineStream, names: Names, used: ExitStack) -> None:
        self._stream = stream
        self._names = names
        self._used = used

    @property
    def adapter_revision(self) -> str:
        return self._stream.adapter_revision

    def __aiter__(self) -> "_TellingStream":
        return self

    async def __anext__(self) -> StreamEvent:
        event = await anext(self._stream)
        if not isinstance(event, Finished):
            return event
        self._used.close()
        if event.failure is None:
            return event
        return msgspec.structs.replace(event, failure=told_as(event.failure, self._names))

    def gather(self, num_tokens: int) -> None:
        self._stream.gather(num_tokens)

    def cancel(self, reason: CancelReason = "cancelled") -> None:
        self._stream.cancel(reason)
        self._used.close()


def source_removed(name: str) -> str:
    """Why a merge is not served."""
    return f"its source {name!r} was removed; serve that again, or delete the merge"


def _called(name: str, entry: AdapterEntry) -> AdapterEntry:
    return msgspec.structs.replace(entry, adapter_id=name)

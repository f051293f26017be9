"""An engine whose adapters go by the registry's names, and that is ready once it is warm.

It changes what goes to the engine behind it, and nothing of what comes back. It must not know HTTP
or how names are kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from lory_router.engine import EngineClient, EngineStream, SequenceRequest
from lory_router.errors import Invalid, RevisionNotFound, adapter_not_found, shown
from lory_router.names import REVISION_RULE, Target, split
from lory_router.registry import Registry
from lory_router.sources.reference import Reference
from lory_server.messages import AdapterEntry, EngineInfo, OrderDone, OrderKind
from lory_server.recipes import MERGED, MergeSource, Recipe, merged_id

READING: tuple[OrderKind, ...] = ("find", "load", "pin")
"""Orders that bring an adapter in."""


class NamedEngine:
    """An `engine.EngineClient` over another one."""

    def __init__(
        self, engine: EngineClient, registry: Registry, is_warm: Callable[[], bool]
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._is_warm = is_warm

    @property
    def info(self) -> EngineInfo | None:
        return self._engine.info

    def is_ready(self) -> bool:
        return self._engine.is_ready() and self._is_warm()

    def is_draining(self) -> bool:
        return self._engine.is_draining()

    async def submit(self, request: SequenceRequest) -> EngineStream:
        if request.recipe is not None:
            request = replace(request, recipe=self._found(request.recipe, request.references))
        elif request.adapter_id and request.source is None:
            target = find_target(self._registry, request.adapter_id)
            adapter_id, revision = target.adapter_id, target.revision
            recipe = self._saved(adapter_id)
            request = replace(
                request, adapter_id=adapter_id, adapter_revision=revision, recipe=recipe
            )
        return await self._engine.submit(request)

    async def list_adapters(self) -> tuple[AdapterEntry, ...]:
        """Merges under the names they were saved under; others have none."""
        entries = await self._engine.list_adapters()
        found = {e.adapter_id: e for e in entries if not e.adapter_id.startswith(MERGED)}
        known = {entry.adapter_id: entry for entry in entries}
        for name, recipe in self._registry.state.merges.items():
            entry = known.get(merged_id(recipe))
            found[name] = (
                _called(name, entry) if entry else AdapterEntry(adapter_id=name, tier="disk")
            )
        return tuple(found.values())

    async def order(self, kind: OrderKind, adapter_id: str, revision: str = "") -> OrderDone:
        recipe = self._saved(adapter_id) if kind in READING else None
        engine_name = merged_id(recipe) if recipe else self._registry.engine_name(adapter_id)
        done = await self._engine.order(kind, engine_name, revision)
        if done.entry is None or engine_name == adapter_id:
            return done
        return msgspec.structs.replace(done, entry=_called(adapter_id, done.entry))

    def _saved(self, adapter_id: str) -> Recipe | None:
        """The recipe saved under a name; raises the 404 of a source that was removed."""
        state = self._registry.state
        recipe = state.merges.get(adapter_id)
        for source in recipe.sources if recipe else ():
            if source.adapter_id in state.removed:
                raise adapter_not_found(source.adapter_id)
        return recipe

    def _found(self, recipe: Recipe, references: Sequence[Reference | None]) -> Recipe:
        """The same of what the names of its local sources stand for."""
        sources = [
            source if reference else found_source(self._registry, source)
            for source, reference in zip(recipe.sources, references, strict=True)
        ]
        return msgspec.structs.replace(recipe, sources=tuple(sources))


def found_source(
    registry: Registry, source: MergeSource, field: str = "merged_adapters"
) -> MergeSource:
    """What the name of a merge's source, which `field` gave, stands for."""
    target = find_target(registry, source.adapter_id)
    if target.adapter_id in registry.state.merges:
        raise Invalid(
            f"{shown(source.adapter_id)} is itself a merge; name what it is merged from",
            param=field,
        )
    return MergeSource(target.adapter_id, source.weight, target.revision)


def _called(name: str, entry: AdapterEntry) -> AdapterEntry:
    return msgspec.structs.replace(entry, adapter_id=name)


def find_target(registry: Registry, name: str) -> Target:
    """What a name stands for; raises the 404 of one that stands for nothing."""
    target = registry.target(name)
    if target is not None:
        return target
    adapter_id, suffix = split(name)
    if not suffix or registry.target(adapter_id) is None:
        raise adapter_not_found(name)
    raise RevisionNotFound(
        f"Adapter {shown(adapter_id)} has no alias {shown(suffix)}; GET /v1/adapters/{{id}} lists"
        f" those it has, and {REVISION_RULE} name a revision",
        param="model",
    )

"""An engine whose adapters go by the registry's names, and that is ready once it is warm.

It changes what goes to the engine behind it, and nothing of what comes back. It must not know HTTP
or how names are kept.
"""

from collections.abc import Callable
from dataclasses import replace

from lory_router.engine import EngineClient, EngineStream, SequenceRequest
from lory_router.errors import RevisionNotFound, adapter_not_found, shown
from lory_router.names import REVISION_RULE, Target, split
from lory_router.registry import Registry
from lory_server.messages import AdapterEntry, EngineInfo, OrderDone, OrderKind


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
        if request.adapter_id and request.source is None:
            target = find_target(self._registry, request.adapter_id)
            adapter_id, revision = target.adapter_id, target.revision
            request = replace(request, adapter_id=adapter_id, adapter_revision=revision)
        return await self._engine.submit(request)

    async def list_adapters(self) -> tuple[AdapterEntry, ...]:
        return await self._engine.list_adapters()

    async def order(self, kind: OrderKind, adapter_id: str, revision: str = "") -> OrderDone:
        return await self._engine.order(kind, adapter_id, revision)


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

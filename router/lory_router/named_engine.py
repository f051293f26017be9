"""An engine whose adapters go by the registry's names, and that is ready once it is warm.

It changes what goes to the engine behind it, and nothing of what comes back. It must not know HTTP
or how names are kept.
"""

from collections.abc import Callable
from dataclasses import replace

from lory_router.engine import EngineClient, EngineStream, SequenceRequest
from lory_router.errors import adapter_not_found
from lory_router.rights import Rights
from lory_router.settings import RouterSettings
from lory_router.sources.reference import is_from_source, reference_of
from lory_router.validate import check_source, token_without_source
from lory_server.messages import AdapterEntry, EngineInfo, OrderDone, OrderKind


class NamedEngine:
    """An `engine.EngineClient` over another one."""

    def __init__(
        self,
        engine: EngineClient,
        rights: Rights,
        settings: RouterSettings,
        is_warm: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._rights = rights
        self._settings = settings
        self._is_warm = is_warm

    @property
    def info(self) -> EngineInfo | None:
        return self._engine.info

    def is_ready(self) -> bool:
        return self._engine.is_ready() and self._is_warm()

    def is_draining(self) -> bool:
        return self._engine.is_draining()

    async def submit(self, request: SequenceRequest) -> EngineStream:
        return await self._engine.submit(self._aimed(request))

    async def list_adapters(self) -> tuple[AdapterEntry, ...]:
        return await self._engine.list_adapters()

    async def order(self, kind: OrderKind, adapter_id: str, revision: str = "") -> OrderDone:
        return await self._engine.order(kind, adapter_id, revision)

    def _aimed(self, request: SequenceRequest) -> SequenceRequest:
        """At what the caller's name stands for."""
        if not request.adapter_id:
            return request
        target = self._rights.find_target(request.caller, request.adapter_id)
        if request.source is not None:
            if target.adapter_id != request.adapter_id:
                raise adapter_not_found(request.adapter_id)
            return request
        source = None
        if is_from_source(target.adapter_id):
            source = reference_of(target.adapter_id)
            check_source(source, request.token, self._settings)
        elif request.token:
            raise token_without_source()
        return replace(
            request,
            adapter_id=target.adapter_id,
            adapter_revision=target.revision,
            source=source,
        )

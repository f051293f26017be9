"""What becomes of a new adapter: whose it is, and whether it can be served.

It must not know how it came about.
"""

import asyncio

from lory_router.engine import EngineClient, Unavailable
from lory_router.errors import Invalid, from_failure
from lory_router.names import Target
from lory_router.registry import Registry

RETRY_S = 1.0


class Handover:
    def __init__(self, engine: EngineClient, registry: Registry) -> None:
        self._engine = engine
        self._registry = registry

    def check_owner(self, owner: str) -> None:
        """What an owner protects must not be everybody's after a restart."""
        if owner and not self._registry.is_kept:
            raise Invalid(
                "A tenant's jobs need a server started with --registry FILE; without it their"
                " adapters would be for all after a restart"
            )

    async def claim(self, adapter_id: str, owner: str) -> None:
        """Let an adapter be its owner's alone, before it is there; without an owner it is for
        all."""
        if owner and self._registry.state.owners.get(adapter_id) != owner:
            await self._registry.register(adapter_id, Target(adapter_id), owner)

    async def check(self, adapter_id: str) -> None:
        """Bring it to the device; raises an ApiError if that cannot be. An engine that is not there
        yet, or not any more, is waited for."""
        while True:
            try:
                done = await self._engine.order("load", adapter_id)
            except Unavailable:
                await asyncio.sleep(RETRY_S)
                continue
            if done.failure is not None:
                raise from_failure(done.failure, 1, adapter_id)
            return

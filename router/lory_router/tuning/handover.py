"""What becomes of a new adapter: whose it is, and whether it can be served.

It must not know how it came about.
"""

import asyncio
import logging
from contextlib import suppress

from lory_router.engine import EngineClient, Unavailable
from lory_router.errors import Invalid, RegistryUnwritable, from_failure
from lory_router.names import Target
from lory_router.registry import Registry

log = logging.getLogger(__name__)

RETRY_S = 1.0
UNLIST_S = 3.0
"""Until no list holds any more what is gone."""
TRANSIENT = frozenset({"overloaded", "engine_died"})
"""Failures that say nothing of the adapter."""


class Handover:
    def __init__(self, engine: EngineClient, registry: Registry) -> None:
        self._engine = engine
        self._registry = registry
        self._releasing: dict[str, asyncio.Task[None]] = {}

    @property
    def is_possible(self) -> bool:
        """Whether there is an engine now to hand anything to."""
        return self._engine.is_ready()

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
        releasing = self._releasing.pop(adapter_id, None)
        if releasing is not None:
            releasing.cancel()  # it may have begun: then this is written after it
        known = self._registry.state.owners.get(adapter_id)
        if owner and (releasing is not None or known != owner):
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
            if done.failure is not None and done.failure.code in TRANSIENT:
                await asyncio.sleep(RETRY_S)
                continue
            if done.failure is not None:
                raise from_failure(done.failure, 1, adapter_id)
            return

    def release(self, adapter_id: str) -> None:
        """Forget a name whose adapter is gone, so that its owner has it to give. Not at once: while
        a list still holds it, it must be nobody else's."""
        if adapter_id in self._registry.state.owners and adapter_id not in self._releasing:
            self._releasing[adapter_id] = asyncio.create_task(self._forget(adapter_id))

    async def _forget(self, adapter_id: str) -> None:
        with suppress(Unavailable):  # an engine that is gone holds nothing
            await self._engine.order("drop", adapter_id)
        await asyncio.sleep(UNLIST_S)
        try:
            await self._registry.clear(adapter_id)
        except RegistryUnwritable as error:
            log.warning("the name %r is kept: %s", adapter_id, error.message)
        self._releasing.pop(adapter_id, None)

    async def close(self) -> None:
        """What is not forgotten by now is kept."""
        tasks = tuple(self._releasing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

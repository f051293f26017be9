"""What is brought into memory before the server says that it is ready: pins, and who was asked for.

Done again for every engine that is started. It must not know HTTP or how adapters are read.
"""

import asyncio
import logging
from collections.abc import Sequence

from lory_router.config import StartError
from lory_router.engine import EngineClient, Unavailable
from lory_router.errors import ApiError, SourceUnavailable
from lory_router.merging_engine import source_removed
from lory_router.names import Target
from lory_router.registry import Registry
from lory_router.sourced_orders import SourcedOrders
from lory_router.sources.reference import BadReferenceError, is_from_source, reference_of
from lory_server.messages import OrderDone, OrderKind

AT_ONCE = 8

log = logging.getLogger("lory")


class WarmUp:
    def __init__(
        self,
        engine: EngineClient,
        registry: Registry,
        names: Sequence[str],
        fetched: SourcedOrders | None = None,
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._names = names
        self._fetched = fetched
        self._task: asyncio.Task[list[str]] | None = None
        self._room = asyncio.Semaphore(AT_ONCE)

    def begin(self) -> None:
        """An engine has come up."""
        if self._task is not None:
            self._task.cancel()
        self._task = asyncio.ensure_future(self._run())

    def is_done(self) -> bool:
        return self._task is not None and self._task.done()

    async def check(self) -> None:
        """Wait until it is done; raises StartError if what was asked for cannot be loaded."""
        task = None
        while task is not self._task:
            task = self._task
            if task is not None:
                await asyncio.wait((task,))
        if task is not None and not task.cancelled() and (failures := task.result()):
            raise StartError(f"--warm-up: {failures[0]}")

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> list[str]:
        """Why adapters that were asked for are not there; pins that fail are told in the log."""
        pins = sorted(self._registry.state.pins)
        failed = await asyncio.gather(*(self._bring("pin", pin) for pin in pins))
        for pin, reason in zip(pins, failed, strict=True):
            if reason:
                log.warning("pinned adapter %r is not loaded: %s", pin.adapter_id, reason)
        found = await asyncio.gather(*map(self._load, self._names))
        return [reason for reason in found if reason]

    async def _load(self, name: str) -> str:
        target = self._registry.target(name)
        if target is None:
            return f"no adapter is called {name!r}"
        return await self._bring("load", target)

    async def _bring(self, kind: OrderKind, target: Target) -> str:
        """Empty, or why not. An engine that ends meanwhile is followed by another one."""
        adapter_id = target.adapter_id
        removed = self._registry.state.removed_source(adapter_id)
        if removed:
            return f"adapter {adapter_id!r}: {source_removed(removed)}"
        async with self._room:
            try:
                done = await self._order(kind, target)
            except Unavailable as error:
                return f"adapter {adapter_id!r}: {error}" if error.reason == "loading" else ""
            except (ApiError, BadReferenceError) as error:
                return f"adapter {adapter_id!r}: {error.message}"
        if done.failure is None:
            return ""
        named = adapter_id in done.failure.message
        return done.failure.message if named else f"adapter {adapter_id!r}: {done.failure.message}"

    async def _order(self, kind: OrderKind, target: Target) -> OrderDone:
        adapter_id, revision = target.adapter_id, target.revision
        if not is_from_source(adapter_id):
            engine_name = self._registry.engine_name(adapter_id)
            return await self._engine.order(kind, engine_name, revision)
        if self._fetched is None:
            raise SourceUnavailable("nothing is fetched without --adapter-cache")
        if kind == "pin":
            return await self._fetched.restore(target)
        return await self._fetched.order(kind, reference_of(adapter_id), revision)

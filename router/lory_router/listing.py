"""The engine's adapters, asked for once a second however many callers ask.

It must not know how a list is shown.
"""

import asyncio
import time
from collections.abc import Callable

from lory_router.engine import EngineClient
from lory_server.messages import AdapterEntry

LISTING_S = 1.0
"""How old a list of adapters may be: making one reads the whole adapters folder."""

Entries = tuple[AdapterEntry, ...]


class Listing:
    def __init__(self, engine: EngineClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._clock = clock
        self._asking: asyncio.Future[Entries] | None = None
        self._good_until = 0.0
        self.listed_at = 0.0
        """When the entries were told."""

    async def read(self) -> Entries:
        if self._asking is None or (self._asking.done() and self._clock() > self._good_until):
            self._asking = asyncio.ensure_future(self._ask())
        return await asyncio.shield(self._asking)

    def expire(self) -> None:
        """Something was changed: the next reader asks again."""
        self._asking = None

    async def find(self, adapter_id: str) -> AdapterEntry | None:
        entries = await self.read()
        return next((entry for entry in entries if entry.adapter_id == adapter_id), None)

    async def _ask(self) -> Entries:
        entries = await self._engine.list_adapters()
        now = self._clock()
        self._good_until, self.listed_at = now + LISTING_S, now
        return entries

"""The 404 of an adapter with the name that its caller may have meant, of those that it sees.

Whether what was named is another's or nobody's, the hint is the same. It must not know routes, nor
how a reply is sent.
"""

import asyncio

from lory_router.catalogue import Catalogue
from lory_router.engine import Unavailable
from lory_router.errors import AdapterNotFound, ApiError, adapter_not_found
from lory_router.intake_openai import model_of
from lory_router.keys import Caller
from lory_router.listing import Entries
from lory_router.nearest import nearest
from lory_router.registry import State
from lory_router.settings import RouterSettings

LIST_WAIT_S = 0.5
"""For the names; without them there is no hint."""


class Hints:
    def __init__(self, catalogue: Catalogue, settings: RouterSettings) -> None:
        self._catalogue = catalogue
        self._settings = settings

    async def told(self, error: ApiError, caller: Caller) -> ApiError:
        """The error, or one that says more; never the same one changed: others may hold it."""
        if not isinstance(error, AdapterNotFound) or not error.missing:
            return error
        try:
            async with asyncio.timeout(LIST_WAIT_S):
                entries, state = await self._catalogue.read()
        except (TimeoutError, Unavailable):
            return error
        near = await asyncio.to_thread(self._near, error.missing, caller, entries, state)
        return adapter_not_found(error.missing, near) if near else error

    def _near(self, missing: str, caller: Caller, entries: Entries, state: State) -> str:
        named = self._catalogue.named(caller, entries, state)
        names = (model_of(entry.adapter_id, self._settings) for entry in named)
        near = nearest(missing, names)
        return "" if near == missing else near

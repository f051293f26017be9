"""Is there such a revision? Of names like `support@1f3a9c`, that nobody has registered.

In: who asks, the name, and what it stands for. Out: the whole digest, or a 404 that tells which
revisions and aliases there are. What has not been read is read for that: nobody knows its digest
before. It must not know HTTP.
"""

import asyncio
from collections.abc import Iterable
from itertools import islice

from lory_router.engine import EngineClient
from lory_router.errors import RevisionNotFound, TimedOut, shown
from lory_router.keys import Caller
from lory_router.listing import Listing
from lory_router.names import Target
from lory_router.registry import Registry
from lory_router.rights import MAX_TOLD, Rights
from lory_router.sources.reference import is_from_source
from lory_server.messages import AdapterEntry

READ_WAIT_S = 5.0
"""How long an adapter may take to be read for that."""


class Revisions:
    def __init__(
        self, engine: EngineClient, listing: Listing, registry: Registry, rights: Rights
    ) -> None:
        self._engine = engine
        self._listing = listing
        self._registry = registry
        self._rights = rights

    async def check(self, caller: Caller, name: str, target: Target) -> str:
        """Of an adapter that is there. What was registered is a name, whatever became of its bytes:
        that is told as it is kept, and so is a source's."""
        adapter_id, wanted = target.adapter_id, target.revision
        if not wanted or name in self._registry.state.names or is_from_source(adapter_id):
            return wanted
        found = _matching(await self._listing.find(adapter_id), wanted)
        if not found:
            found = await self._read(caller, target)
        return found

    async def _read(self, caller: Caller, target: Target) -> str:
        """What it is on the disk now."""
        adapter_id, wanted = target.adapter_id, target.revision
        try:
            async with asyncio.timeout(READ_WAIT_S):
                done = await self._engine.order("find", adapter_id, wanted)
        except TimeoutError as error:
            text = f"adapter {shown(adapter_id)} could not be read in time; try later"
            raise TimedOut(text) from error
        self._listing.expire()
        if done.failure is None or done.failure.code != "revision_not_found":
            return done.revision
        entry = await self._listing.find(adapter_id)
        raise RevisionNotFound(
            f"Adapter {shown(adapter_id)} has no revision {shown(wanted)}"
            + _told("; there is", _known(entry))
            + _told("; aliases are", self._rights.aliases(caller, adapter_id)),
            param="model",
        )


def _known(entry: AdapterEntry | None) -> list[str]:
    """The newest first."""
    if entry is None:
        return []
    told = [entry.revision, *(one.revision for one in reversed(entry.revisions))]
    return [revision for revision in dict.fromkeys(told) if revision]


def _matching(entry: AdapterEntry | None, wanted: str) -> str:
    return next((known for known in _known(entry) if known.startswith(wanted)), "")


def _told(before: str, names: Iterable[str]) -> str:
    told = ", ".join(islice(names, MAX_TOLD))
    return f"{before} {told}" if told else ""

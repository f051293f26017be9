"""What adapters there are, as one caller sees them: whose they are, where, and what else they are
called.

It must not know HTTP or how anything is changed.
"""

import asyncio
import time
from collections.abc import Sequence

import msgspec

from lory_router.errors import adapter_not_found
from lory_router.keys import Caller
from lory_router.listing import Entries, Listing
from lory_router.registry import Registry, State
from lory_router.revisions import Revisions
from lory_router.rights import Rights
from lory_router.schemas_adapters import (
    AdapterListReply,
    AdapterReply,
    adapter_reply,
    arriving_reply,
    fetching_reply,
)
from lory_router.sources.fetching import Progress
from lory_router.sources.service import Sources
from lory_server.messages import AdapterEntry


class Catalogue:
    def __init__(
        self,
        listing: Listing,
        registry: Registry,
        rights: Rights,
        revisions: Revisions,
        sources: Sources | None,
    ) -> None:
        self._listing = listing
        self._registry = registry
        self._rights = rights
        self._revisions = revisions
        self._sources = sources

    async def list(self, caller: Caller) -> AdapterListReply:
        entries = await self._listing.read()
        age_s = time.monotonic() - self._listing.listed_at
        return await asyncio.to_thread(
            self._list_reply, caller, entries, self._registry.state, self._arriving(caller), age_s
        )

    async def get(self, caller: Caller, name: str) -> AdapterReply:
        target = self._rights.find_target(caller, name)
        adapter_id = target.adapter_id
        entry = await self._listing.find(adapter_id)
        arriving = self._arriving(caller).get(adapter_id)
        if entry is not None and self._rights.lists(caller, adapter_id):
            await self._revisions.check(caller, name, target)
            age_s = time.monotonic() - self._listing.listed_at
            further = self._registry.state.names_by_adapter()
            return self._reply(caller, entry, further.get(adapter_id, {}), arriving, age_s)
        if arriving is None:
            raise adapter_not_found(name)
        return arriving_reply(arriving)

    async def read(self) -> tuple[Entries, State]:
        """What every view is made of: others whenever something has changed."""
        return await self._listing.read(), self._registry.state

    async def find(self, caller: Caller, name: str) -> AdapterEntry | None:
        """One of `named`, or a revision of one."""
        target = self._rights.find_target(caller, name)
        entry = await self._listing.find(target.adapter_id)
        if entry is None or not self._rights.lists(caller, target.adapter_id):
            return None
        return _as_named(name, entry, await self._revisions.check(caller, name, target))

    def named(self, caller: Caller, entries: Entries, state: State) -> Sequence[AdapterEntry]:
        """The adapters that a caller is served, and each again under its further names."""
        served = {entry.adapter_id: entry for entry in self._served(caller, entries, state)}
        for name, target in state.names.items():
            entry = served.get(target.adapter_id)
            if entry and name != target.adapter_id and self._rights.sees(caller, name):
                served[name] = _as_named(name, entry, target.revision)
        return list(served.values())

    def _served(self, caller: Caller, entries: Entries, state: State) -> Sequence[AdapterEntry]:
        return [
            entry
            for entry in entries
            if not state.is_removed(entry.adapter_id)
            and self._rights.lists(caller, entry.adapter_id)
        ]

    def _list_reply(
        self,
        caller: Caller,
        entries: Entries,
        state: State,
        arriving: dict[str, Progress],
        age_s: float,
    ) -> AdapterListReply:
        further = state.names_by_adapter()
        data = [
            self._reply(
                caller,
                entry,
                further.get(entry.adapter_id, {}),
                arriving.pop(entry.adapter_id, None),
                age_s,
            )
            for entry in self._served(caller, entries, state)
        ]
        data += [arriving_reply(progress) for progress in arriving.values()]
        removed = (name for name in state.removed if self._rights.sees(caller, name))
        return AdapterListReply(data=tuple(data), removed=tuple(sorted(removed)))

    def _reply(
        self,
        caller: Caller,
        entry: AdapterEntry,
        further: dict[str, str],
        arriving: Progress | None,
        age_s: float,
    ) -> AdapterReply:
        names = self._rights.names_of(caller, further)
        owner, recipe = (
            self._rights.owner(entry.adapter_id),
            self._registry.state.merges.get(entry.adapter_id),
        )
        reply = adapter_reply(entry, names, age_s, owner, recipe)
        if arriving is None:
            return reply
        return msgspec.structs.replace(reply, fetching=fetching_reply(arriving))

    def _arriving(self, caller: Caller) -> dict[str, Progress]:
        """Downloads under way; one that a token began is for admins to see."""
        downloads = self._sources.downloads() if self._sources else ()
        return {d.reference.name: d for d in downloads if d.is_public or caller.sees_all}


def _as_named(name: str, entry: AdapterEntry, revision: str) -> AdapterEntry:
    if not revision or revision == entry.revision:
        return msgspec.structs.replace(entry, adapter_id=name)
    tier = next((one.tier for one in entry.revisions if one.revision == revision), "disk")
    return msgspec.structs.replace(entry, adapter_id=name, revision=revision, tier=tier)

"""Merges that have a name: made by POST /v1/adapters/merge, kept as recipes in the registry.

What is kept is how it is merged, not its numbers: it is merged anew from its sources whenever it is
loaded, and follows them when they are replaced. It must not know HTTP or the arithmetic.
"""

import asyncio

import msgspec

from lory_router.engine import EngineClient
from lory_router.errors import Conflict, Invalid, from_failure, shown
from lory_router.keys import Caller
from lory_router.listing import Listing
from lory_router.merging import check_saved
from lory_router.merging_engine import found_source, names_between, told_as
from lory_router.names import check_new_name, split
from lory_router.registry import Registry
from lory_router.rights import Rights
from lory_router.schemas_adapters import AdapterReply, MergeBody, adapter_reply
from lory_router.settings import RouterSettings
from lory_router.sources.reference import is_from_source
from lory_server.recipes import MergeSource, Recipe, merged_id


class Merges:
    def __init__(
        self,
        engine: EngineClient,
        registry: Registry,
        rights: Rights,
        listing: Listing,
        settings: RouterSettings,
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._rights = rights
        self._listing = listing
        self._settings = settings
        self._saving = asyncio.Lock()

    async def save(self, caller: Caller, wish: MergeBody) -> tuple[AdapterReply, bool]:
        """Merge, and let the name stand for it; one that cannot be merged is refused. And whether
        the name is new. What others than admins save is their tenant's."""
        self._check_name(caller, wish.name)
        owner = self._rights.check_owner(caller, None)
        named = check_saved(wish, self._settings)
        recipe = self._found(caller, named)
        await self._check_free(caller, recipe)
        done = await self._engine.order("find", merged_id(recipe))
        if done.failure is not None:
            failure = told_as(done.failure, names_between(recipe, named))
            raise from_failure(failure, self._settings.retry_after_s, wish.name)
        assert done.entry is not None
        async with self._saving:
            is_new = await self._check_free(caller, recipe)
            if is_new:
                await self._registry.save_merge(recipe, owner)
        self._listing.expire()
        entry = msgspec.structs.replace(done.entry, adapter_id=wish.name)
        names = self._registry.state.names_by_adapter().get(wish.name, {})
        told = self._rights.names_of(caller, names)
        return adapter_reply(entry, told, 0.0, self._rights.owner(wish.name), recipe), is_new

    def _check_name(self, caller: Caller, name: str) -> None:
        check_new_name("name", name, self._settings.model_names)
        if name != split(name)[0]:
            raise Invalid("`name`: an alias cannot be a merge; leave out the '@'", param="name")
        self._rights.check_gives(caller, "name", name)
        if not (caller.is_admin or self._registry.is_kept):
            raise Invalid(
                "`name`: start the server with --registry FILE; without it a tenant's merge would"
                " be gone after a restart",
                param="name",
            )

    def _found(self, caller: Caller, recipe: Recipe) -> Recipe:
        """Sources that were named by an alias or a revision are kept at those bytes."""
        sources = tuple(self._found_source(caller, source) for source in recipe.sources)
        return msgspec.structs.replace(recipe, sources=sources)

    def _found_source(self, caller: Caller, source: MergeSource) -> MergeSource:
        found = found_source(self._rights, self._registry, caller, source, "adapters")
        if is_from_source(found.adapter_id):
            raise Invalid(
                f"{shown(source.adapter_id)} comes from a source; a saved merge takes adapters of"
                " the adapters folder alone",
                param="adapters",
            )
        return found

    async def _check_free(self, caller: Caller, recipe: Recipe) -> bool:
        """False: the name stands for the same already."""
        name, state = recipe.name, self._registry.state
        if name in state.merges:
            self._rights.check_owns(caller, name)
            if state.merges[name] == recipe:
                return False
            raise Conflict(
                f"{shown(name)} is another merge; delete it first, or take another name",
                param="name",
            )
        self._listing.expire()
        is_taken = name in state.names or state.is_removed(name)
        if is_taken or await self._listing.find(name) is not None:
            raise Conflict(f"{shown(name)} is taken; take another name", param="name")
        return True

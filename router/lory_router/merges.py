"""Merges that have a name: made by POST /v1/adapters/merge, kept as recipes in the registry.

What is kept is how it is merged, not its numbers: it is merged anew from its sources whenever it is
loaded, and follows them when they are replaced. It must not know HTTP or the arithmetic.
"""

import asyncio

import msgspec

from lory_router.engine import EngineClient
from lory_router.errors import Conflict, Invalid, from_failure, shown
from lory_router.listing import Listing
from lory_router.merging import check_saved
from lory_router.named_engine import found_source
from lory_router.names import check_new_name, split
from lory_router.registry import Registry
from lory_router.schemas_adapters import AdapterReply, MergeBody, adapter_reply
from lory_router.settings import RouterSettings
from lory_server.recipes import Recipe, merged_id


class Merges:
    def __init__(
        self, engine: EngineClient, registry: Registry, listing: Listing, settings: RouterSettings
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._listing = listing
        self._settings = settings
        self._saving = asyncio.Lock()

    async def save(self, wish: MergeBody) -> tuple[AdapterReply, bool]:
        """Merge, and let the name stand for it; one that cannot be merged is refused. And whether
        the name is new."""
        check_new_name("name", wish.name, self._settings.model_names)
        if wish.name != split(wish.name)[0]:
            raise Invalid("`name`: an alias cannot be a merge; leave out the '@'", param="name")
        recipe = self._found(check_saved(wish, self._settings))
        await self._check_free(recipe)
        done = await self._engine.order("find", merged_id(recipe))
        if done.failure is not None:
            raise from_failure(done.failure, self._settings.retry_after_s, wish.name)
        assert done.entry is not None
        async with self._saving:
            is_new = await self._check_free(recipe)
            if is_new:
                await self._registry.save_merge(recipe)
        self._listing.expire()
        entry = msgspec.structs.replace(done.entry, adapter_id=wish.name)
        names = self._registry.state.names_by_adapter().get(wish.name, {})
        return adapter_reply(entry, names, 0.0, recipe), is_new

    def _found(self, recipe: Recipe) -> Recipe:
        """Sources that were named by an alias or a revision are kept at those bytes."""
        sources = tuple(
            found_source(self._registry, source, "adapters") for source in recipe.sources
        )
        return msgspec.structs.replace(recipe, sources=sources)

    async def _check_free(self, recipe: Recipe) -> bool:
        """False: the name stands for the same already."""
        name, state = recipe.name, self._registry.state
        if name in state.merges:
            if state.merges[name] == recipe:
                return False
            raise Conflict(
                f"{shown(name)} is another merge; delete it first, or take another name",
                param="name",
            )
        self._listing.expire()
        is_taken = name in state.names or name in state.removed
        if is_taken or await self._listing.find(name) is not None:
            raise Conflict(f"{shown(name)} is taken; take another name", param="name")
        return True

"""What can be done with adapters while they are served: an operator's wishes, carried out.

In: names and wishes. Out: adapters as they are afterwards, or the refusal. What the engine keeps in
memory is ordered from it, what outlives it is written to the registry. It must not know HTTP.
"""

import asyncio
import time
from typing import Literal

from lory_router.engine import EngineClient, Unavailable
from lory_router.errors import (
    Conflict,
    Invalid,
    adapter_not_found,
    from_failure,
    shown,
)
from lory_router.listing import Entries, Listing
from lory_router.named_engine import find_target
from lory_router.names import Target, check_new_name, check_revision, split
from lory_router.registry import Registry, State
from lory_router.schemas_adapters import AdapterListReply, AdapterReply, adapter_reply
from lory_router.settings import RouterSettings
from lory_server.messages import AdapterEntry, OrderDone, OrderKind


class Lifecycle:
    def __init__(
        self, engine: EngineClient, registry: Registry, listing: Listing, settings: RouterSettings
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._listing = listing
        self._settings = settings

    # -- looking ----------------------------------------------------------------------------

    async def list(self) -> AdapterListReply:
        entries = await self._listing.read()
        age_s = time.monotonic() - self._listing.listed_at
        return await asyncio.to_thread(_list_reply, entries, self._registry.state, age_s)

    async def get(self, name: str) -> AdapterReply:
        target = find_target(self._registry, name)
        entry = await self._listing.find(target.adapter_id)
        if entry is None:
            raise adapter_not_found(name)
        return self._reply(entry, time.monotonic() - self._listing.listed_at)

    # -- what is in memory ------------------------------------------------------------------

    async def load(self, name: str) -> AdapterReply:
        done = await self._order("load", name)
        return self._after(name, done)

    async def unload(self, name: str) -> AdapterReply:
        done = await self._order("unload", name)
        await self._check_known(name, done)
        return self._after(name, done)

    async def pin(self, name: str) -> AdapterReply:
        target = find_target(self._registry, name)
        done = await self._order("pin", name)
        adapter_id = target.adapter_id
        if adapter_id in self._registry.state.removed:
            await self._engine.order("drop", adapter_id)
            raise adapter_not_found(name)
        await self._registry.pin(Target(adapter_id, done.revision if target.revision else ""))
        return self._after(name, done)

    async def unpin(self, name: str) -> AdapterReply:
        target = find_target(self._registry, name)
        pins = self._registry.state.pins_of(target.adapter_id, target.revision)
        if pins:
            await self._registry.unpin(pins)
        done = await self._order("unpin", name)
        if not pins:
            await self._check_known(name, done)
        return self._after(name, done)

    # -- names ------------------------------------------------------------------------------

    def is_registered(self, name: str) -> bool:
        return name in self._registry.state.names

    async def register(
        self,
        name: str,
        adapter_id: str | None,
        revision: str | None = None,
        *,
        kind: Literal["find", "load"] = "find",
        field: str = "name",
    ) -> tuple[AdapterReply, bool]:
        """Let a name, which `field` gave, stand for an adapter that can be read, or serve again one
        that was removed. And whether the name is new."""
        check_new_name(field, name, self._settings.model_names)
        _check_local(adapter_id or name)
        check_revision("revision", revision or "")
        plain, alias = split(name)
        target = self._registered_target(name, adapter_id or plain)
        is_own = name == target.adapter_id
        if not is_own and not alias:
            await self._check_free(name, field)
        wanted = revision or target.revision
        done = await self._engine.order(kind, target.adapter_id, wanted)
        entry = self._check(done, adapter_id or plain)
        fixed = done.revision if alias or wanted else ""
        if is_own and fixed:
            raise Invalid("`revision`: a revision needs another name, as name@alias", param=field)
        is_new = not self.is_registered(name)
        await self._registry.register(name, Target(target.adapter_id, fixed))
        self._listing.expire()
        return self._reply(entry, 0.0), is_new

    async def remove(self, name: str) -> None:
        """Forget a name; an adapter of that name is not served any more, and let go of when the
        last request that holds it has ended. Its files stay where they are."""
        _check_local(name)
        registered = self._registry.state.names.get(name)
        if registered is not None and registered.adapter_id != name:
            await self._registry.forget(name)
        elif name != split(name)[0]:
            find_target(self._registry, name)
            raise Invalid(
                "A revision cannot be removed by itself; unload it, or remove the adapter",
                param="adapter_id",
            )
        else:
            await self._remove_adapter(name)
        self._listing.expire()

    async def unload_and_remove(self, name: str) -> None:
        """Unless it is pinned under another name, it is let go of, too."""
        target = find_target(self._registry, name)
        await self.remove(name)
        await self._engine.order("unload", target.adapter_id, target.revision)

    async def _remove_adapter(self, adapter_id: str) -> None:
        find_target(self._registry, adapter_id)
        self._listing.expire()
        if await self._listing.find(adapter_id) is None:
            raise adapter_not_found(adapter_id)
        engine_name = self._registry.engine_name(adapter_id)
        await self._registry.remove(adapter_id)
        try:
            await self._engine.order("drop", engine_name)
        except Unavailable:
            return  # an engine that is gone holds nothing, and the next one is not told of it

    def _registered_target(self, name: str, adapter_id: str) -> Target:
        """What `name` is to stand for; an adapter that was removed only if it is its own name."""
        if name == adapter_id:
            return Target(adapter_id)
        return find_target(self._registry, adapter_id)

    async def _check_free(self, name: str, field: str) -> None:
        self._listing.expire()
        if await self._listing.find(name) is not None:
            raise Conflict(
                f"An adapter in the folder is called {shown(name)}; take another name, or an alias"
                f" as {name}@alias",
                param=field,
            )

    # -- orders -----------------------------------------------------------------------------

    async def _check_known(self, name: str, done: OrderDone) -> None:
        """404 for what is not in the folder, and was never in memory."""
        target, entry = find_target(self._registry, name), done.entry
        is_known = entry is not None and entry.revision
        if not is_known and await self._listing.find(target.adapter_id) is None:
            raise adapter_not_found(name)

    async def _order(self, kind: OrderKind, name: str) -> OrderDone:
        _check_local(name)
        target = find_target(self._registry, name)
        done = await self._engine.order(kind, target.adapter_id, target.revision)
        self._listing.expire()
        self._check(done, name)
        return done

    def _check(self, done: OrderDone, name: str) -> AdapterEntry:
        if done.failure is not None:
            raise from_failure(done.failure, self._settings.retry_after_s, name)
        assert done.entry is not None
        return done.entry

    def _after(self, name: str, done: OrderDone) -> AdapterReply:
        return self._reply(self._check(done, name), 0.0)

    def _reply(self, entry: AdapterEntry, age_s: float) -> AdapterReply:
        state = self._registry.state
        names = state.names_by_adapter().get(entry.adapter_id, {})
        return adapter_reply(entry, names, age_s, state.merges.get(entry.adapter_id))


def _check_local(name: str) -> None:
    """Names of adapters from elsewhere begin with their source and a colon."""
    if ":" in name:
        raise Invalid(
            f"{shown(name)} comes from a source and is fetched when it is asked for; adapters of"
            " the adapters folder alone can be loaded, pinned, named and removed",
            param="adapter_id",
        )


def _list_reply(entries: Entries, state: State, age_s: float) -> AdapterListReply:
    names = state.names_by_adapter()
    served = [entry for entry in entries if entry.adapter_id not in state.removed]
    return AdapterListReply(
        data=tuple(
            adapter_reply(e, names.get(e.adapter_id, {}), age_s, state.merges.get(e.adapter_id))
            for e in served
        ),
        removed=tuple(sorted(state.removed)),
    )

"""What can be done with adapters while they are served: a caller's wishes, carried out.

In: who asks, names and wishes. Out: adapters as they are afterwards, or the refusal. What the
engine keeps in memory is ordered from it, what outlives it is written to the registry. It must not
know HTTP.
"""

import logging
from dataclasses import dataclass, replace
from typing import Literal

from lory_router.engine import EngineClient, Unavailable
from lory_router.errors import (
    ApiError,
    Conflict,
    Invalid,
    RegistryUnwritable,
    adapter_not_found,
    from_failure,
    shown,
)
from lory_router.keys import Caller
from lory_router.listing import Listing
from lory_router.names import Target, check_new_name, check_revision, split
from lory_router.registry import Registry
from lory_router.revisions import Revisions
from lory_router.rights import Rights
from lory_router.schemas_adapters import AdapterReply, adapter_reply
from lory_router.settings import RouterSettings
from lory_router.sourced_engine import SourcedEngine
from lory_router.sources.reference import Reference, is_from_source, reference_of
from lory_router.validate import check_source, token_without_source
from lory_server.messages import AdapterEntry, OrderDone, OrderKind

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Naming:
    """A wish for a name, or for one to stand for something else."""

    name: str
    adapter_id: str | None = None
    """None: the part before the `@`, or the name itself."""
    revision: str = ""
    owner: str | None = None
    token: str = ""
    field: str = "name"
    """Which one gave the name."""


class Lifecycle:
    def __init__(
        self,
        engine: EngineClient,
        registry: Registry,
        rights: Rights,
        listing: Listing,
        revisions: Revisions,
        settings: RouterSettings,
        sourced: SourcedEngine | None = None,
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._rights = rights
        self._listing = listing
        self._revisions = revisions
        self._settings = settings
        self._sourced = sourced

    # -- what is in memory ------------------------------------------------------------------

    async def load(self, caller: Caller, name: str, token: str = "") -> AdapterReply:
        target = await self._owned_target(caller, name)
        return self._after(caller, name, await self._order("load", target, token))

    async def unload(self, caller: Caller, name: str, token: str = "") -> AdapterReply:
        target = await self._owned_target(caller, name)
        await self._revisions.check(caller, name, target)
        done = await self._order("unload", target, token)
        await self._check_known(name, target, done)
        return self._after(caller, name, done)

    async def pin(self, caller: Caller, name: str, token: str = "") -> AdapterReply:
        target = await self._pins_target(caller, name)
        done = await self._order("pin", target, token)
        reply = self._after(caller, name, done)
        if self._registry.state.is_removed(target.adapter_id):
            await self._order("drop", target)
            raise adapter_not_found(name)
        await self._keep_pin(replace(target, revision=done.revision if target.revision else ""))
        return reply

    async def _keep_pin(self, pin: Target) -> None:
        """One that cannot be written down is none."""
        is_new = pin not in self._registry.state.pins
        try:
            await self._registry.pin(pin)
        except RegistryUnwritable:
            if is_new:
                await self._order("unpin", pin)
            raise

    async def unpin(self, caller: Caller, name: str, token: str = "") -> AdapterReply:
        target = await self._pins_target(caller, name)
        pins = self._registry.state.pins_of(target.adapter_id, target.revision)
        if pins:
            await self._registry.unpin(pins)
        else:
            await self._revisions.check(caller, name, target)
        done = await self._order("unpin", target, token)
        if not pins:
            await self._check_known(name, target, done)
        return self._after(caller, name, done)

    # -- names ------------------------------------------------------------------------------

    def is_registered(self, caller: Caller, name: str) -> bool:
        return self._rights.sees(caller, name) and name in self._registry.state.names

    async def register(
        self, caller: Caller, naming: Naming, kind: Literal["find", "load"] = "find"
    ) -> tuple[AdapterReply, bool]:
        """Let a name stand for an adapter that can be read, or serve again one that was removed.
        And whether the name is new."""
        name, field = naming.name, naming.field
        self._check_naming(caller, naming)
        owner = self._rights.check_owner(caller, naming.owner)
        plain, alias = split(name)
        adapter_id = naming.adapter_id or plain
        target = self._registered_target(caller, name, adapter_id)
        is_own = name == target.adapter_id
        if is_own:
            self._check_own(naming, owner)
        elif not alias:
            await self._check_free(caller, name, field)
        if alias:
            target = await self._fixed(target, naming.token)
        wanted = naming.revision or target.revision
        done = await self._order(kind, replace(target, revision=wanted), naming.token)
        entry = self._check(done, adapter_id)
        fixed = done.revision if alias or wanted else ""
        if is_own and fixed:
            raise Invalid("`revision`: a revision needs another name, as name@alias", param=field)
        if not is_own and self._registry.state.is_removed(target.adapter_id):
            raise adapter_not_found(adapter_id)
        is_new = name not in self._registry.state.names
        was_removed = self._registry.state.is_removed(name)
        await self._registry.register(name, replace(target, revision=fixed), owner)
        self._listing.expire()
        if was_removed:
            await self._pin_merges_of(name)
        return self._reply(caller, entry), is_new

    async def remove(self, caller: Caller, name: str) -> None:
        """Forget a name; an adapter of that name is not served any more, and let go of when the
        last request that holds it has ended. A local one's files stay where they are. Who saved a
        merge forgets it, too, when a source has become another's."""
        state = self._registry.state
        is_own_merge = name in state.merges and self._rights.owner(name) == caller.tenant
        target = Target(name) if is_own_merge else self._rights.find_target(caller, name)
        registered = state.names.get(name)
        if self.is_registered(caller, name) and registered and registered.adapter_id != name:
            self._rights.check_owns(caller, name)
            await self._registry.forget(name)
        elif name != split(name)[0]:
            is_there = await self._revisions.check(caller, name, target)
            if not is_there and await self._listing.find(target.adapter_id) is None:
                raise adapter_not_found(name)
            raise Invalid(
                "A revision cannot be removed by itself; unload it, or remove the adapter",
                param="adapter_id",
            )
        else:
            await self._remove_adapter(caller, name, target)
        self._listing.expire()

    async def unload_and_remove(self, caller: Caller, name: str) -> None:
        """Unless it is pinned under another name, it is let go of, too."""
        target = self._rights.find_target(caller, name)
        may_unload = caller.is_admin or self._rights.owner(target.adapter_id) == caller.tenant
        await self.remove(caller, name)
        if may_unload:
            await self._order("unload", target)

    def _check_naming(self, caller: Caller, naming: Naming) -> None:
        name = naming.name
        if is_from_source(name):
            reference_of(name)
            if naming.adapter_id not in (None, name):
                raise Invalid(f"{shown(name)} is a source's and names itself", param=naming.field)
            self._rights.check_admin(caller, "Serving a source's adapter again")
        else:
            check_new_name(naming.field, name, self._settings.model_names)
            self._rights.check_gives(caller, naming.field, name)
        check_revision("revision", naming.revision)

    def _check_own(self, naming: Naming, owner: str | None) -> None:
        """What an owner protects must not be everybody's after a restart; and with one branch the
        others, removed with it, do not come back."""
        name = naming.name
        whole = [one for one in self._registry.state.removals_of(name) if "@" not in one]
        if whole and "@" in name:
            raise Conflict(
                f"{shown(name)} was removed as {shown(whole[0])}; serve that again",
                param=naming.field,
            )
        if not owner:
            return
        if is_from_source(naming.name):
            raise Invalid("`owner`: who may read it is its source's to say", param="owner")
        if not self._registry.is_kept:
            raise Invalid(
                "`owner`: start the server with --registry FILE; without it the adapter would be"
                " for all after a restart",
                param="owner",
            )

    def _registered_target(self, caller: Caller, name: str, adapter_id: str) -> Target:
        """What `name` is to stand for; an adapter that was removed only if it is its own name."""
        if name != adapter_id:
            return self._rights.find_target(caller, adapter_id)
        if not caller.is_admin:
            self._rights.check_owns(caller, name)
        return Target(adapter_id)

    async def _fixed(self, target: Target, token: str) -> Target:
        """An alias of a hub's adapter is of the commit, which can be fetched again."""
        if self._sourced is None or not is_from_source(target.adapter_id):
            return target
        reference = self._reference(target.adapter_id, token)
        fixed = await self._sourced.sources.fixed(reference, token)
        return replace(target, adapter_id=fixed.name)

    async def _check_free(self, caller: Caller, name: str, field: str) -> None:
        self._listing.expire()
        is_taken = name in self._registry.state.merges  # by who may give this name, seen or not
        if self._rights.sees(caller, name) and not is_taken:
            is_taken = await self._listing.find(name) is not None
        if is_taken:
            raise Conflict(
                f"An adapter is called {shown(name)}; take another name, or an alias"
                f" as {name}@alias",
                param=field,
            )

    async def _remove_adapter(self, caller: Caller, name: str, target: Target) -> None:
        self._listing.expire()
        reference = reference_of(name) if is_from_source(name) else None
        if not await self._is_here(caller, target, reference):
            raise adapter_not_found(name)
        self._rights.check_owns(caller, name)
        engine_name = self._registry.engine_name(target.adapter_id)
        is_upload = reference is not None and reference.kind == "upload"
        if is_upload or name in self._registry.state.merges:
            await self._registry.clear(name)
        else:
            await self._registry.remove(name)
        if reference is not None and self._sourced is not None:
            await self._sourced.drop(reference)
            return
        try:
            for one in (engine_name, *self._registry.state.merges_of(name)):
                await self._engine.order("drop", one)
        except Unavailable:
            return  # an engine that is gone holds nothing, and the next one is not told of it

    async def _pin_merges_of(self, name: str) -> None:
        """What was let go of when one of its sources was removed is there again."""
        state = self._registry.state
        for pin in sorted(state.pins):
            if pin.adapter_id not in state.merges_of(name) or state.removed_source(pin.adapter_id):
                continue
            try:
                self._check(await self._order("pin", pin), pin.adapter_id)
            except (ApiError, Unavailable) as error:
                log.warning("pinned merge %r is not loaded: %s", pin.adapter_id, error.message)

    async def _is_here(self, caller: Caller, target: Target, reference: Reference | None) -> bool:
        """What the caller would not find in a list is not."""
        if reference is None:
            return await self._listing.find(target.adapter_id) is not None
        if self._sourced is None or reference.name != target.adapter_id:
            return False
        entries = self._sourced.sources.entries_of(reference)
        return any(caller.is_admin or self._rights.lists(caller, e.origin.name) for e in entries)

    # -- orders -----------------------------------------------------------------------------

    async def _owned_target(self, caller: Caller, name: str) -> Target:
        """What a name stands for, if the caller owns it; what is not there is told as such."""
        target = await self._known_target(caller, name)
        self._rights.check_owns(caller, target.adapter_id)
        return target

    async def _pins_target(self, caller: Caller, name: str) -> Target:
        """Pins take memory from all tenants."""
        target = await self._known_target(caller, name)
        self._rights.check_admin(caller, "Pinning")
        return target

    async def _known_target(self, caller: Caller, name: str) -> Target:
        """What a name stands for; of who may not do everything only what is in its lists, so that
        a refusal tells of nothing else."""
        target = self._rights.find_target(caller, name)
        if caller.is_admin:
            return target
        is_here = await self._listing.find(target.adapter_id) is not None
        if not is_here or not self._rights.lists(caller, target.adapter_id):
            raise adapter_not_found(name)
        return target

    async def _check_known(self, name: str, target: Target, done: OrderDone) -> None:
        """404 for what is not in the folder, and was never in memory."""
        entry = done.entry
        is_known = entry is not None and entry.revision
        if not is_known and await self._listing.find(target.adapter_id) is None:
            raise adapter_not_found(name)

    async def _order(self, kind: OrderKind, target: Target, token: str = "") -> OrderDone:
        adapter_id, revision = target.adapter_id, target.revision
        self._listing.expire()
        if is_from_source(adapter_id):
            reference = self._reference(adapter_id, token)
            assert self._sourced is not None
            return await self._sourced.orders.order(kind, reference, revision, token)
        if token:
            raise token_without_source()
        return await self._engine.order(kind, adapter_id, revision)

    def _reference(self, adapter_id: str, token: str) -> Reference:
        reference = reference_of(adapter_id)
        check_source(reference, token, self._settings)
        return reference

    def _check(self, done: OrderDone, name: str) -> AdapterEntry:
        if done.failure is not None:
            raise from_failure(done.failure, self._settings.retry_after_s, name)
        assert done.entry is not None
        return done.entry

    def _after(self, caller: Caller, name: str, done: OrderDone) -> AdapterReply:
        self._listing.expire()
        return self._reply(caller, self._check(done, name))

    def _reply(self, caller: Caller, entry: AdapterEntry) -> AdapterReply:
        state, owner = self._registry.state, self._rights.owner(entry.adapter_id)
        names = state.names_by_adapter().get(entry.adapter_id, {})
        recipe = state.merges.get(entry.adapter_id)
        return adapter_reply(entry, self._rights.names_of(caller, names), 0.0, owner, recipe)

"""Who may name, see and change which adapter, by its owner.

    without an owner   for all to name; admins change it
    with one           for its tenant and admins, to name and to change; to others it is not there

Tenants other than admins give names that begin with their own, `acme/...`, so that a name that is
taken tells nobody of another's. Uploads keep their owner beside their files, all else is in the
registry. It must not know HTTP or the engine.
"""

import secrets
from collections.abc import Mapping

from lory_router.errors import (
    Conflict,
    Forbidden,
    Invalid,
    RevisionNotFound,
    adapter_not_found,
    shown,
)
from lory_router.keys import TENANT_RULE, Caller, is_tenant
from lory_router.names import REVISION_RULE, Target, split
from lory_router.registry import Registry
from lory_router.sources.reference import UPLOAD, Reference, is_from_source
from lory_router.sources.service import Sources

MAX_NAMES = 1000
"""That a tenant may give."""
MAX_TOLD = 8
"""Aliases that a message names."""


class Rights:
    def __init__(self, registry: Registry, sources: Sources | None = None) -> None:
        self._registry = registry
        self._sources = sources
        self._absent = f"absent-{secrets.token_hex(16)}"
        """What the engine is asked for in place of what a caller may not see: it looks for it as
        it does for any name that is not there."""

    # -- whose is it ------------------------------------------------------------------------

    def owner(self, name: str) -> str:
        """The tenant, or empty."""
        if name.startswith(UPLOAD):
            return self._sources.uploads_owner(name) if self._sources else ""
        return self._registry.state.owners.get(name, "")

    def sees(self, caller: Caller, name: str) -> bool:
        """A name that leads to what the caller does not see is not there either, nor is a merge of
        such."""
        if caller.is_admin:
            return True
        state = self._registry.state
        target = state.names.get(name)
        names = {name, target.adapter_id} if target else {name}
        for merge in names & state.merges.keys():
            names = names | {source.adapter_id for source in state.merges[merge].sources}
        return all(self.owner(one) in ("", caller.tenant) for one in names)

    def lists(self, caller: Caller, adapter_id: str) -> bool:
        """What a token was needed for is in nobody's list but a known admin's."""
        if not self.sees(caller, adapter_id):
            return False
        if caller.sees_all or not is_from_source(adapter_id):
            return True
        return self._sources is not None and self._sources.is_public(adapter_id)

    def names_of(self, caller: Caller, names: Mapping[str, str]) -> dict[str, str]:
        """Those of an adapter's further names that a caller sees."""
        return {name: told for name, told in names.items() if self.sees(caller, name)}

    def aliases(self, caller: Caller, adapter_id: str) -> list[str]:
        """Names that stand for it, or begin with it and an `@`, as far as a caller sees them."""
        return sorted(
            name
            for name, target in self._registry.state.names.items()
            if adapter_id in (target.adapter_id, split(name)[0])
            and name != adapter_id
            and self.sees(caller, name)
        )

    # -- what does it stand for -------------------------------------------------------------

    def find_target(self, caller: Caller, name: str) -> Target:
        """What a name stands for, to this caller; raises the 404 of one that stands for nothing.

        What the caller may not see stands for an adapter that is not there.
        """
        target = self._target(caller, name)
        if target is not None:
            return target
        adapter_id, suffix = split(name)
        if not (adapter_id and suffix) or self._target(caller, adapter_id) is None:
            raise adapter_not_found(name)
        aliases = self.aliases(caller, adapter_id)[:MAX_TOLD]
        raise RevisionNotFound(
            f"Adapter {shown(adapter_id)} has no alias {shown(suffix)}; it has"
            f" {', '.join(aliases) or 'none'}, and {REVISION_RULE} name a revision",
            param="model",
        )

    def _target(self, caller: Caller, name: str) -> Target | None:
        def sees(other: str) -> bool:
            return self.sees(caller, other)

        target = self._registry.target(name, sees)
        if target is None or sees(target.adapter_id):
            return target
        return Target(self._absent, target.revision)

    # -- what may be done -------------------------------------------------------------------

    def check_owns(self, caller: Caller, name: str) -> None:
        """Of what the caller sees."""
        if not caller.is_admin and self.owner(name) != caller.tenant:
            raise Forbidden(f"{shown(name)} is not tenant {caller.tenant}'s to change")

    def check_gives(self, caller: Caller, field: str, name: str) -> None:
        """Whether the caller may give that name, which may be taken."""
        if caller.is_admin or self.owner(name) == caller.tenant:
            return
        adapter_id, alias = split(name)
        if not (alias and self.owner(adapter_id) == caller.tenant):
            _check_begins(caller, field, name)
        if self.owner(name) or name in self._registry.state.names:
            self.check_owns(caller, name)
            return
        owners = self._registry.state.owners.values()
        if sum(owner == caller.tenant for owner in owners) >= MAX_NAMES:
            raise Conflict(f"tenant {caller.tenant} has {MAX_NAMES} names; forget one", param=field)

    def check_sends(self, caller: Caller, upload: Reference, is_here: bool) -> None:
        """Whether the caller may upload under that name, which may be taken."""
        if caller.is_admin or self.owner(upload.name) == caller.tenant:
            return
        _check_begins(caller, "id", upload.place)
        if is_here:
            self.check_owns(caller, upload.name)

    def check_owner(self, caller: Caller, owner: str | None) -> str | None:
        """The owner of what is given a name; None: the one it has. Others than admins own what
        they give."""
        if caller.is_admin:
            if owner and not is_tenant(owner):
                raise Invalid(f"`owner` must be a tenant: {TENANT_RULE}", param="owner")
            return owner
        if owner not in (None, caller.tenant):
            raise Forbidden(f"`owner` can only be {caller.tenant}, your tenant", param="owner")
        return caller.tenant

    def check_admin(self, caller: Caller, deed: str) -> None:
        if not caller.is_admin:
            raise Forbidden(f"{deed} is for admins")


def _check_begins(caller: Caller, field: str, name: str) -> None:
    """The same answer whether or not the name is taken."""
    if not name.startswith(f"{caller.tenant}/"):
        raise Forbidden(
            f"`{field}`: names that tenant {caller.tenant} gives begin with {caller.tenant}/",
            param=field,
        )

"""What operators have decided about adapters, kept over a restart: names, pins, owners, removals.

    names      support@prod -> (support, 1f3a9c...), helpdesk -> (support, whichever it has)
    pins       (support, whichever it has), (support, 1f3a9c...)
    owners     support -> acme: for that tenant alone; without an owner it is for all
    removed    adapters that lie in the folder, or at a source, and are not served
    merges     blend -> how it is merged, whenever it is loaded

In memory, and written through to SQLite: reading never waits, a change is there once it is on the
disk. One server a file. It must not know HTTP, the engine, or which adapters there are.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from lory_router.errors import RegistryUnwritable
from lory_router.names import Target, is_revision, split
from lory_router.registry_file import RegistryError, damaged, identity_of, open_registry
from lory_router.sources.reference import covers
from lory_server.messages import FETCHED
from lory_server.recipes import MERGED, Recipe, merged_id

Statement = tuple[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class State:
    """All that is kept."""

    names: Mapping[str, Target]
    pins: frozenset[Target]
    removed: frozenset[str]
    owners: Mapping[str, str]
    """Of names and of adapters, by name: the tenant."""
    merges: Mapping[str, Recipe]

    def names_by_adapter(self) -> dict[str, dict[str, str]]:
        """Further names of each adapter that has any, each with the revision it stands for."""
        found: dict[str, dict[str, str]] = {}
        for name, target in self.names.items():
            if name != target.adapter_id:
                found.setdefault(target.adapter_id, {})[name] = target.revision
        return found

    def pins_of(self, adapter_id: str, revision: str = "") -> list[Target]:
        """All, or those at a revision that begins so."""
        found = [pin for pin in self.pins if pin.adapter_id == adapter_id]
        return sorted(pin for pin in found if pin.revision.startswith(revision))

    def is_removed(self, adapter_id: str) -> bool:
        """A hub's adapter is, too, if it was removed without a branch or tag."""
        if adapter_id in self.removed or ":" not in adapter_id:
            return adapter_id in self.removed
        return bool(self.removals_of(adapter_id))

    def removals_of(self, adapter_id: str) -> list[str]:
        """Under which names it was removed."""
        return sorted(removed for removed in self.removed if covers(removed, adapter_id))

    def removed_source(self, name: str) -> str:
        """Of a merge that cannot be served for that; empty for what can, and what is no merge."""
        recipe = self.merges.get(name)
        sources = (source.adapter_id for source in recipe.sources) if recipe else ()
        return next(filter(self.is_removed, sources), "")

    def merges_of(self, adapter_id: str) -> list[str]:
        """Those that have it as a source."""
        return [
            name
            for name, recipe in self.merges.items()
            if any(source.adapter_id == adapter_id for source in recipe.sources)
        ]


def everything(_name: str) -> bool:
    """What who may see all sees."""
    return True


Change = Callable[[State], Sequence[Statement]]
"""What to write, of what is known."""


class Registry:
    """All of it. Belongs to the event loop; only writes leave it."""

    def __init__(self, path: str = "") -> None:
        """Opens or makes the file; without a path nothing outlives the server. Raises
        RegistryError."""
        self.is_kept = bool(path)
        """Whether it outlives the server."""
        self._connection = open_registry(path)
        self._path, self._identity = path, identity_of(path)
        self._lock = asyncio.Lock()
        try:
            self._state = _read(self._connection)
        except (sqlite3.Error, msgspec.MsgspecError) as error:
            self._connection.close()
            raise RegistryError(damaged(path, str(error))) from error

    @property
    def state(self) -> State:
        """Another one after every change."""
        return self._state

    def close(self) -> None:
        self._connection.close()

    # -- what others ask --------------------------------------------------------------------

    def target(self, name: str, sees: Callable[[str], bool] = everything) -> Target | None:
        """What a name stands for, whether or not it is there; None: nothing can be called so.

        A name that was registered goes before an adapter that is called so. To who does not see a
        name, it is as if it were not registered. What the engine calls merges and fetched adapters
        is nobody's to say: it would pass by owners and sources.
        """
        if name.startswith((FETCHED, MERGED)):
            return None
        names = self._state.names
        target = names.get(name) if sees(name) else None
        if target is None:
            adapter_id, suffix = split(name)
            target = names.get(adapter_id) if sees(adapter_id) else None
            target = target or Target(adapter_id)
            if name != adapter_id:
                if not is_revision(suffix):
                    return None
                target = Target(target.adapter_id, suffix)
        is_removed = self._state.is_removed(target.adapter_id) and sees(target.adapter_id)
        return None if is_removed else target

    def engine_name(self, adapter_id: str) -> str:
        """What the engine calls an adapter: of merges, the recipe."""
        recipe = self._state.merges.get(adapter_id)
        return merged_id(recipe) if recipe else adapter_id

    # -- changes ----------------------------------------------------------------------------

    async def register(self, name: str, target: Target, owner: str | None = None) -> None:
        """Let a name stand for a target; one that was removed is served again. An owner that is
        given takes the place of the one it had; an empty one leaves it without."""
        await self._decide(lambda state: _registered(state, name, target, owner))

    async def forget(self, name: str) -> None:
        tables = ("names", "owners")
        await self._write([(f"DELETE FROM {table} WHERE name = ?", (name,)) for table in tables])

    async def remove(self, adapter_id: str) -> None:
        """Serve an adapter no more, under whichever name, and forget its names and pins. It keeps
        its owner, so that it is nobody else's when it is served again."""
        note = ("INSERT OR IGNORE INTO removed VALUES (?)", (adapter_id,))
        await self._decide(lambda state: [*_without(state, adapter_id), note])

    async def clear(self, adapter_id: str) -> None:
        """Forget all that is known of an adapter, or a merge, that is no more."""
        tables = ("owners", "merges")
        forget = [(f"DELETE FROM {table} WHERE name = ?", (adapter_id,)) for table in tables]
        await self._decide(lambda state: [*_without(state, adapter_id), *forget])

    async def save_merge(self, recipe: Recipe, owner: str | None = None) -> None:
        """Let its name stand for what it makes."""
        put = "INSERT OR REPLACE INTO merges VALUES (?, ?)"
        statements: list[Statement] = [(put, (recipe.name, msgspec.json.encode(recipe).decode()))]
        if owner:
            own = "INSERT OR REPLACE INTO owners VALUES (?, ?)"
            statements.append((own, (recipe.name, owner)))
        await self._write(statements)

    async def pin(self, target: Target) -> None:
        put = "INSERT OR IGNORE INTO pins VALUES (?, ?)"
        await self._write([(put, (target.adapter_id, target.revision))])

    async def unpin(self, targets: Sequence[Target]) -> None:
        delete = "DELETE FROM pins WHERE adapter_id = ? AND revision = ?"
        await self._write([(delete, (pin.adapter_id, pin.revision)) for pin in targets])

    async def _write(self, statements: Sequence[Statement]) -> None:
        await self._decide(lambda _: statements)

    async def _decide(self, change: Change) -> None:
        """All or none, and once begun to the end, whoever asked for it has left. What is written
        follows from the state as all changes before have left it."""
        await asyncio.shield(self._change(change))

    async def _change(self, change: Change) -> None:
        async with self._lock:
            try:
                self._state = await asyncio.to_thread(self._apply, change(self._state))
            except sqlite3.Error as error:
                text = f"The registry cannot be written, so nothing was changed: {error}"
                raise RegistryUnwritable(text) from error

    def _apply(self, statements: Sequence[Statement]) -> State:
        if identity_of(self._path) != self._identity:
            raise sqlite3.OperationalError("its file was moved or replaced; start the server again")
        return _apply(self._connection, statements)


def _registered(state: State, name: str, target: Target, owner: str | None) -> list[Statement]:
    put = "INSERT OR REPLACE INTO names VALUES (?, ?, ?)"
    statements: list[Statement] = [(put, (name, target.adapter_id, target.revision))]
    if name == target.adapter_id:
        delete = "DELETE FROM removed WHERE adapter_id = ?"
        statements += [(delete, (removed,)) for removed in state.removals_of(name)]
    if owner:
        statements.append(("INSERT OR REPLACE INTO owners VALUES (?, ?)", (name, owner)))
    elif owner is not None:
        statements.append(("DELETE FROM owners WHERE name = ?", (name,)))
    return statements


def _without(state: State, adapter_id: str) -> list[Statement]:
    """Neither further names nor their owners nor pins, of a hub's adapter at any branch; the
    adapter's own owner stays."""
    targets = {target.adapter_id for target in (*state.names.values(), *state.pins)}
    statements: list[Statement] = []
    for one in {adapter_id, *(target for target in targets if covers(adapter_id, target))}:
        further = "(SELECT name FROM names WHERE adapter_id = ? AND name != adapter_id)"
        statements += [
            (f"DELETE FROM owners WHERE name IN {further}", (one,)),
            ("DELETE FROM names WHERE adapter_id = ?", (one,)),
            ("DELETE FROM pins WHERE adapter_id = ?", (one,)),
        ]
    return statements


def _read(connection: sqlite3.Connection) -> State:
    rows = connection.execute("SELECT name, adapter_id, revision FROM names ORDER BY name")
    return State(
        names={name: Target(adapter_id, revision) for name, adapter_id, revision in rows},
        pins=frozenset(
            Target(*row) for row in connection.execute("SELECT adapter_id, revision FROM pins")
        ),
        removed=frozenset(row[0] for row in connection.execute("SELECT adapter_id FROM removed")),
        owners=dict(connection.execute("SELECT name, tenant FROM owners")),
        merges={
            name: msgspec.json.decode(recipe, type=Recipe)
            for name, recipe in connection.execute("SELECT name, recipe FROM merges ORDER BY name")
        },
    )


def _apply(connection: sqlite3.Connection, statements: Sequence[Statement]) -> State:
    connection.execute("BEGIN IMMEDIATE")
    try:
        for statement, values in statements:
            connection.execute(statement, values)
        connection.execute("COMMIT")
    except sqlite3.Error:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise
    return _read(connection)

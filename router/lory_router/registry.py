"""What operators have decided about adapters, kept over a restart: names, pins, removals.

    names      support@prod -> (support, 1f3a9c...), helpdesk -> (support, whichever it has)
    pins       (support, whichever it has), (support, 1f3a9c...)
    removed    adapters that lie in the folder and are not served
    merges     blend -> how it is merged, whenever it is loaded

In memory, and written through to SQLite: reading never waits, a change is there once it is on the
disk. One server a file. It must not know HTTP, the engine, or which adapters there are.
"""

import asyncio
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lory_router.errors import RegistryUnwritable
from lory_router.names import Target, is_revision, split
from lory_server.recipes import Recipe, merged_id

SCHEMA_VERSION = 2
APPLICATION_ID = 0x4C6F7279
"""In the file's header: "Lory"."""
IN_MEMORY = ":memory:"

_SCHEMA = (
    "CREATE TABLE names (name TEXT PRIMARY KEY, adapter_id TEXT NOT NULL, revision TEXT NOT NULL)",
    "CREATE TABLE pins (adapter_id TEXT, revision TEXT, PRIMARY KEY (adapter_id, revision))",
    "CREATE TABLE removed (adapter_id TEXT PRIMARY KEY)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    "PRAGMA user_version = 1",
)
_MIGRATIONS = {
    1: ("CREATE TABLE merges (name TEXT PRIMARY KEY, recipe TEXT NOT NULL)",),
}
"""By the version that each begins with."""

Statement = tuple[str, tuple[str, ...]]


class RegistryError(Exception):
    """The file cannot be used; the message names it and the fix."""


@dataclass(frozen=True, slots=True)
class State:
    """All that is kept."""

    names: Mapping[str, Target]
    pins: frozenset[Target]
    removed: frozenset[str]
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


class Registry:
    """All of it. Belongs to the event loop; only writes leave it."""

    def __init__(self, path: str = "") -> None:
        """Opens or makes the file; without a path nothing outlives the server. Raises
        RegistryError."""
        self._connection = _open(path)
        self._lock = asyncio.Lock()
        self._state = _read(self._connection)

    @property
    def state(self) -> State:
        """Another one after every change."""
        return self._state

    def close(self) -> None:
        self._connection.close()

    # -- what others ask --------------------------------------------------------------------

    def target(self, name: str) -> Target | None:
        """What a name stands for, whether or not it is there; None: nothing can be called so.

        A name that was registered goes before an adapter that is called so.
        """
        names = self._state.names
        target = names.get(name)
        if target is None:
            adapter_id, suffix = split(name)
            target = names.get(adapter_id, Target(adapter_id))
            if name != adapter_id:
                if not is_revision(suffix):
                    return None
                target = Target(target.adapter_id, suffix)
        return None if target.adapter_id in self._state.removed else target

    def engine_name(self, adapter_id: str) -> str:
        """What the engine calls an adapter: of merges, the recipe."""
        recipe = self._state.merges.get(adapter_id)
        return merged_id(recipe) if recipe else adapter_id

    # -- changes ----------------------------------------------------------------------------

    async def register(self, name: str, target: Target) -> None:
        """Let a name stand for a target; one that was removed is served again."""
        put = "INSERT OR REPLACE INTO names VALUES (?, ?, ?)"
        statements: list[Statement] = [(put, (name, target.adapter_id, target.revision))]
        if name == target.adapter_id:
            statements.append(("DELETE FROM removed WHERE adapter_id = ?", (name,)))
        await self._write(statements)

    async def forget(self, name: str) -> None:
        await self._write([("DELETE FROM names WHERE name = ?", (name,))])

    async def save_merge(self, recipe: Recipe) -> None:
        """Let its name stand for what it makes."""
        put = "INSERT OR REPLACE INTO merges VALUES (?, ?)"
        await self._write([(put, (recipe.name, msgspec.json.encode(recipe).decode()))])

    async def remove(self, adapter_id: str) -> None:
        """Serve an adapter no more, under whichever name, and forget its names and pins; of a merge
        nothing is left."""
        of_it = " WHERE adapter_id = ?"
        statements = [f"DELETE FROM names{of_it}", f"DELETE FROM pins{of_it}"]
        if adapter_id in self._state.merges:
            statements.append("DELETE FROM merges WHERE name = ?")
        else:
            statements.append("INSERT OR IGNORE INTO removed VALUES (?)")
        await self._write([(statement, (adapter_id,)) for statement in statements])

    async def pin(self, target: Target) -> None:
        put = "INSERT OR IGNORE INTO pins VALUES (?, ?)"
        await self._write([(put, (target.adapter_id, target.revision))])

    async def unpin(self, targets: Sequence[Target]) -> None:
        delete = "DELETE FROM pins WHERE adapter_id = ? AND revision = ?"
        await self._write([(delete, (pin.adapter_id, pin.revision)) for pin in targets])

    async def _write(self, statements: Sequence[Statement]) -> None:
        """All or none, and once begun to the end, whoever asked for it has left."""
        await asyncio.shield(self._change(statements))

    async def _change(self, statements: Sequence[Statement]) -> None:
        async with self._lock:
            try:
                self._state = await asyncio.to_thread(_apply, self._connection, statements)
            except sqlite3.Error as error:
                text = f"The registry cannot be written, so nothing was changed: {error}"
                raise RegistryUnwritable(text) from error


def _read(connection: sqlite3.Connection) -> State:
    rows = connection.execute("SELECT name, adapter_id, revision FROM names ORDER BY name")
    return State(
        names={name: Target(adapter_id, revision) for name, adapter_id, revision in rows},
        pins=frozenset(
            Target(*row) for row in connection.execute("SELECT adapter_id, revision FROM pins")
        ),
        removed=frozenset(row[0] for row in connection.execute("SELECT adapter_id FROM removed")),
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


# -- opening --------------------------------------------------------------------------------


def _open(path: str) -> sqlite3.Connection:
    if path and not Path(path).absolute().parent.is_dir():
        raise RegistryError(f"{path}: its folder is not there; make it first")
    try:
        connection = sqlite3.connect(
            path or IN_MEMORY, timeout=0, isolation_level=None, check_same_thread=False
        )
        try:
            _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
    except sqlite3.OperationalError as error:
        raise RegistryError(_why_not_open(path, str(error))) from error
    except sqlite3.DatabaseError as error:
        raise RegistryError(_damaged(path, str(error))) from error
    return connection


def _prepare(connection: sqlite3.Connection, path: str) -> None:
    # Held until the end: what another server wrote would not be seen here.
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("BEGIN EXCLUSIVE")
    try:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        owner = connection.execute("PRAGMA application_id").fetchone()[0]
        is_new = not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if is_new and not version and not owner:
            for statement in _SCHEMA:
                connection.execute(statement)
            version = 1
        elif owner != APPLICATION_ID:
            raise RegistryError(f"{path}: is another program's SQLite file; name one of its own")
        elif version > SCHEMA_VERSION:
            raise RegistryError(
                f"{path}: was written by a newer Lory (schema {version}, this one knows"
                f" {SCHEMA_VERSION}); upgrade, or name another file"
            )
        for begun in range(version, SCHEMA_VERSION):
            for statement in (*_MIGRATIONS[begun], f"PRAGMA user_version = {begun + 1}"):
                connection.execute(statement)
        connection.execute("COMMIT")
    except RegistryError:
        connection.execute("ROLLBACK")
        raise
    found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise RegistryError(_damaged(path, found))


def _why_not_open(path: str, error: str) -> str:
    if "locked" in error:
        return f"{path}: another server uses it; give each a file of its own"
    return f"{path}: {error}; it must be a file that the server may write, in such a folder"


def _damaged(path: str, error: str) -> str:
    return f"{path}: is damaged or no registry ({error}); restore a copy, or move it away"

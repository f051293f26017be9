"""The registry's SQLite file: opened, locked for this server alone, brought up to this version.

A file that is damaged, not Lory's or newer is refused; an older one is changed in one transaction,
whole or not at all. It must not know what names and pins mean.
"""

import os
import sqlite3
from pathlib import Path

CHANGES: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE names (name TEXT PRIMARY KEY, adapter_id TEXT NOT NULL,"
        " revision TEXT NOT NULL)",
        "CREATE TABLE pins (adapter_id TEXT, revision TEXT, PRIMARY KEY (adapter_id, revision))",
        "CREATE TABLE removed (adapter_id TEXT PRIMARY KEY)",
    ),
    ("CREATE TABLE owners (name TEXT PRIMARY KEY, tenant TEXT NOT NULL)",),
    ("CREATE TABLE merges (name TEXT PRIMARY KEY, recipe TEXT NOT NULL)",),
)
"""What leads from each version to the next; a file of version n has had the first n. What was
released is never edited: a new version is a new entry."""
SCHEMA_VERSION = len(CHANGES)
APPLICATION_ID = 0x4C6F7279
"""In the file's header: "Lory"."""
IN_MEMORY = ":memory:"


Identity = tuple[int, int]


class RegistryError(Exception):
    """The file cannot be used; the message names it and the fix."""


def open_registry(path: str) -> sqlite3.Connection:
    """The file, made if need be; without a path one in memory. Raises RegistryError."""
    if path and not Path(path).absolute().parent.is_dir():
        raise RegistryError(f"{path}: its folder is not there; make it first")
    try:
        connection = sqlite3.connect(
            os.path.abspath(path) if path else IN_MEMORY,
            timeout=0,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
    except sqlite3.OperationalError as error:
        raise RegistryError(_why_not_open(path, str(error))) from error
    except sqlite3.DatabaseError as error:
        raise RegistryError(damaged(path, str(error))) from error
    return connection


def identity_of(path: str) -> Identity | None:
    """Another one, or none, once the file is moved, deleted or replaced."""
    try:
        found = os.stat(path) if path else None
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if found else None


def _prepare(connection: sqlite3.Connection, path: str) -> None:
    # Held until the end: what another server wrote would not be seen here.
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("BEGIN EXCLUSIVE")
    try:
        version = _version(connection, path)
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise RegistryError(damaged(path, found))
        _change(connection, version)
    except RegistryError:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _version(connection: sqlite3.Connection, path: str) -> int:
    """Of the file; 0 if it is new."""
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    owner = connection.execute("PRAGMA application_id").fetchone()[0]
    is_new = not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if is_new and not version and not owner:
        return 0
    if owner != APPLICATION_ID:
        raise RegistryError(f"{path}: is another program's SQLite file; name one of its own")
    if version > SCHEMA_VERSION:
        raise RegistryError(
            f"{path}: was written by a newer Lory (schema {version}, this one knows"
            f" {SCHEMA_VERSION}); upgrade, or name another file"
        )
    return version


def _change(connection: sqlite3.Connection, version: int) -> None:
    """Written though nothing may change, for a file that cannot be is else found out late."""
    for statements in CHANGES[version:]:
        for statement in statements:
            connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _why_not_open(path: str, error: str) -> str:
    if "locked" in error:
        return f"{path}: another server uses it; give each a file of its own"
    return f"{path}: {error}; it must be a file that the server may write, in such a folder"


def damaged(path: str, error: str) -> str:
    return f"{path}: is damaged or no registry ({error}); restore a copy, or move it away"

"""Files, jobs, events and checkpoints in one SQLite file, which outlives the server.

A statement is written to the disk before its call returns, on a thread: the event loop never waits
for it. One server a file. It must not know HTTP, or what runs.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any, TypeVar

from lory_router.errors import JobsUnwritable
from lory_router.tuning.records import (
    OPEN,
    CheckpointRecord,
    EventRecord,
    FileRecord,
    JobRecord,
)

SCHEMA_VERSION = 2
APPLICATION_ID = 0x4C6F4654
"""In the file's header: "LoFT"."""

Record = FileRecord | JobRecord | EventRecord | CheckpointRecord
T = TypeVar("T")
R = TypeVar("R", FileRecord, JobRecord, EventRecord, CheckpointRecord)

_TABLES: dict[type[Any], str] = {
    FileRecord: "files",
    JobRecord: "jobs",
    EventRecord: "events",
    CheckpointRecord: "checkpoints",
}
_OPEN_MARKS = ", ".join("?" * len(OPEN))
_SQL_TYPES = {str: "TEXT", int: "INTEGER", float: "REAL"}
_SINCE_1 = ("held_seconds", "charged_seconds", "cost")
"""Columns of jobs that schema 1 did not have."""


class TuningStoreError(Exception):
    """The file cannot be used; the message names it and the fix."""


class TuningStore:
    """Every method is one transaction."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the file; raises TuningStoreError."""
        self._connection = _open(path)
        self._lock = asyncio.Lock()

    def close(self) -> None:
        self._connection.close()

    def file_ids(self) -> frozenset[str]:
        """Of all files; only while nothing else asks yet."""
        return frozenset(row[0] for row in self._connection.execute("SELECT id FROM files"))

    async def put(self, *records: Record) -> None:
        """Add, or put in place of what has the same id."""
        await self._run(lambda db: [_put(db, record) for record in records])

    async def file(self, file_id: str) -> FileRecord | None:
        return await self._one(FileRecord, file_id)

    async def job(self, job_id: str) -> JobRecord | None:
        return await self._one(JobRecord, job_id)

    async def files(self) -> list[FileRecord]:
        """Newest first."""
        return await self._run(lambda db: _all(db, FileRecord))

    async def jobs(self) -> list[JobRecord]:
        """Newest first."""
        return await self._run(lambda db: _all(db, JobRecord))

    async def events(self, job_id: str, after: str, num: int) -> list[EventRecord] | None:
        """Newest first, at most so many of those before the event `after`, if one is named; None:
        there is no such event."""
        return await self._run(lambda db: _events(db, job_id, after, num))

    async def checkpoints(self, job_id: str) -> list[CheckpointRecord]:
        """Newest first."""
        return await self._run(lambda db: _all(db, CheckpointRecord, job_id))

    async def events_since(
        self, job_id: str, start: int, num: int
    ) -> list[tuple[int, EventRecord]]:
        """Oldest first, each with its number, at most so many of those above `start`."""
        query = (
            f"SELECT number, {_names(EventRecord)} FROM events WHERE job_id = ? AND number > ?"
            " ORDER BY number LIMIT ?"
        )
        rows = await self._run(lambda db: db.execute(query, (job_id, start, num)).fetchall())
        return [(number, EventRecord(*row)) for number, *row in rows]

    async def next_unchecked(self) -> JobRecord | None:
        """The oldest whose files nobody has looked at."""
        return await self._first("status = 'validating_files' ORDER BY number")

    async def next_job(self) -> JobRecord | None:
        """Of those that wait to run: of the tenant whose last run ended longest ago, the oldest."""
        last_run = (
            "(SELECT coalesce(max(finished_at), 0) FROM jobs AS past"
            " WHERE past.tenant = jobs.tenant AND past.trained_seconds > 0)"
        )
        return await self._first(f"status = 'queued' ORDER BY {last_run}, number")

    async def _first(self, which: str) -> JobRecord | None:
        query = f"SELECT {_names(JobRecord)} FROM jobs WHERE {which} LIMIT 1"
        row = await self._run(lambda db: db.execute(query).fetchone())
        return None if row is None else JobRecord(*row)

    async def num_open(self, tenant: str = "") -> int:
        """Jobs that are not over, of a tenant or of all."""
        query = f"SELECT count(*) FROM jobs WHERE status IN ({_OPEN_MARKS}) AND ? IN ('', tenant)"
        return await self._run(lambda db: db.execute(query, (*OPEN, tenant)).fetchone()[0])

    async def num_files(self, tenant: str) -> int:
        query = "SELECT count(*) FROM files WHERE tenant = ?"
        return await self._run(lambda db: db.execute(query, (tenant,)).fetchone()[0])

    async def num_file_bytes(self, tenant: str = "") -> int:
        """Of a tenant's files, or of all."""
        query = "SELECT coalesce(sum(num_bytes), 0) FROM files WHERE ? IN ('', tenant)"
        return await self._run(lambda db: db.execute(query, (tenant,)).fetchone()[0])

    async def surplus(self, keep: int, oldest: int, before: int) -> list[JobRecord]:
        """Of jobs that ended before `before`: those beyond the `keep` newest of each tenant, and
        those that ended before `oldest`."""
        which = "finished_at < ? AND (place > ? OR finished_at < ?)"
        return await self._over("1", which, before, keep, oldest)

    async def older_failures(self) -> list[JobRecord]:
        """All failed jobs but the newest of each tenant."""
        return await self._over("status = 'failed'", "place > 1")

    async def _over(self, among: str, which: str, *values: int) -> list[JobRecord]:
        """Jobs that are over, each of which has its `place` among its tenant's, newest first."""
        query = (
            f"SELECT {_names(JobRecord)} FROM (SELECT *, row_number() OVER"
            " (PARTITION BY tenant ORDER BY finished_at DESC, number DESC) AS place FROM jobs"
            f" WHERE status NOT IN ({_OPEN_MARKS}) AND {among}) WHERE {which} ORDER BY number"
        )
        rows = await self._run(lambda db: db.execute(query, (*OPEN, *values)).fetchall())
        return [JobRecord(*row) for row in rows]

    async def forget_job(self, job: JobRecord) -> None:
        """With its events, its checkpoints and its table."""

        def work(db: sqlite3.Connection) -> None:
            for table in ("events", "checkpoints"):
                db.execute(f"DELETE FROM {table} WHERE job_id = ?", (job.id,))
            db.execute("DELETE FROM files WHERE id = ?", (job.result_file,))
            db.execute("DELETE FROM jobs WHERE id = ?", (job.id,))

        await self._run(work)

    async def change(
        self, job_id: str, change: Callable[[JobRecord], JobRecord], *more: Record
    ) -> JobRecord:
        """Read, change and write a job as one, with what goes with the change, if it is one; the
        job after it."""

        def work(db: sqlite3.Connection) -> JobRecord:
            job = _find(db, JobRecord, job_id)
            if job is None:
                raise KeyError(job_id)
            changed = change(job)
            if changed != job:
                for record in (changed, *more):
                    _put(db, record)
            return changed

        return await self._run(work)

    async def forget(self, record: Record) -> None:
        table = _TABLES[type(record)]
        query = f"DELETE FROM {table} WHERE id = ?"
        await self._run(lambda db: db.execute(query, (record.id,)))

    async def _one(self, kind: type[R], row_id: str) -> R | None:
        return await self._run(lambda db: _find(db, kind, row_id))

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Once begun it goes to the end, whoever asked for it has left."""
        return await asyncio.shield(self._locked(work))

    async def _locked(self, work: Callable[[sqlite3.Connection], T]) -> T:
        async with self._lock:
            try:
                return await asyncio.to_thread(_in_transaction, self._connection, work)
            except sqlite3.Error as error:
                raise JobsUnwritable(f"The database of jobs cannot be used: {error}") from error


def _in_transaction(db: sqlite3.Connection, work: Callable[[sqlite3.Connection], T]) -> T:
    db.execute("BEGIN IMMEDIATE")
    try:
        found = work(db)
        db.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise
    return found


# Table and column names are those of the records above, never a caller's.


def _put(db: sqlite3.Connection, record: Record) -> None:
    values = astuple(record)
    marks = ", ".join("?" * len(values))
    table, names = _TABLES[type(record)], _names(type(record))
    updates = ", ".join(f"{f.name} = excluded.{f.name}" for f in fields(record))
    db.execute(
        f"INSERT INTO {table} ({names}) VALUES ({marks}) ON CONFLICT (id) DO UPDATE SET {updates}",
        values,
    )


def _names(kind: type[Any]) -> str:
    return ", ".join(f.name for f in fields(kind))


def _find(db: sqlite3.Connection, kind: type[R], row_id: str) -> R | None:
    query = f"SELECT {_names(kind)} FROM {_TABLES[kind]} WHERE id = ?"
    row = db.execute(query, (row_id,)).fetchone()
    return None if row is None else kind(*row)


def _all(db: sqlite3.Connection, kind: type[R], job_id: str = "") -> list[R]:
    where, values = ("WHERE job_id = ?", (job_id,)) if job_id else ("", ())
    query = f"SELECT {_names(kind)} FROM {_TABLES[kind]} {where} ORDER BY number DESC"
    return [kind(*row) for row in db.execute(query, values)]


def _events(db: sqlite3.Connection, job_id: str, after: str, num: int) -> list[EventRecord] | None:
    where, values = "job_id = ?", [job_id]
    if after:
        query = "SELECT number FROM events WHERE job_id = ? AND id = ?"
        place = db.execute(query, (job_id, after)).fetchone()
        if place is None:
            return None
        where, values = f"{where} AND number < ?", [job_id, *place]
    query = f"SELECT {_names(EventRecord)} FROM events WHERE {where} ORDER BY number DESC LIMIT ?"
    return [EventRecord(*row) for row in db.execute(query, (*values, num))]


# -- opening --------------------------------------------------------------------------------


def _open(path: Path) -> sqlite3.Connection:
    try:
        db = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            _prepare(db, path)
        except BaseException:
            db.close()
            raise
    except sqlite3.OperationalError as error:
        why = "another server uses it" if "locked" in str(error) else str(error)
        raise TuningStoreError(f"{path}: {why}; give each server a folder of its own") from error
    except sqlite3.DatabaseError as error:
        message = f"{path}: is damaged ({error}); restore a copy, or move it away"
        raise TuningStoreError(message) from error
    return db


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    # Held until the end: two servers would both run the same job.
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    db.execute("BEGIN EXCLUSIVE")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    owner = db.execute("PRAGMA application_id").fetchone()[0]
    is_new = not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if is_new:
        for statement in _schema():
            db.execute(statement)
    elif owner != APPLICATION_ID:
        raise TuningStoreError(f"{path}: is another program's file; name another folder")
    elif version == 1:
        for statement in _from_1():
            db.execute(statement)
    elif version != SCHEMA_VERSION:
        raise TuningStoreError(
            f"{path}: was written by another Lory (schema {version}, this one knows"
            f" {SCHEMA_VERSION}); upgrade, or name another folder"
        )
    db.execute("COMMIT")


def _schema() -> Sequence[str]:
    statements = [
        f"CREATE TABLE {table} (number INTEGER PRIMARY KEY AUTOINCREMENT, {_columns(kind)})"
        for kind, table in _TABLES.items()
    ]
    indexes = [
        f"CREATE INDEX {table}_job ON {table} (job_id)" for table in ("events", "checkpoints")
    ]
    pragmas = [
        f"PRAGMA application_id = {APPLICATION_ID}",
        f"PRAGMA user_version = {SCHEMA_VERSION}",
    ]
    return [*statements, *indexes, *pragmas]


def _from_1() -> Sequence[str]:
    added = [f"ALTER TABLE jobs ADD COLUMN {name} REAL NOT NULL DEFAULT 0" for name in _SINCE_1]
    return [*added, f"PRAGMA user_version = {SCHEMA_VERSION}"]


def _columns(kind: type[Any]) -> str:
    parts = [
        f"{f.name} {_SQL_TYPES.get(f.type, 'TEXT')} NOT NULL"
        + (" UNIQUE" if f.name == "id" else "")
        for f in fields(kind)
    ]
    return ", ".join(parts)

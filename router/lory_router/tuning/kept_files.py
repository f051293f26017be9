"""Files that callers send for training, kept as they came under names of ours.

It must not know HTTP beyond the body's bytes, nor what is done with a file.
"""

import asyncio
import errno
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from lory_router.errors import BodyTooLarge, DiskFull, Invalid, NotFound, shown
from lory_router.keys import Caller
from lory_router.sources.multipart import MultipartError, MultipartReader, Part
from lory_router.tuning.records import FileRecord, Purpose, new_id
from lory_router.tuning.settings import TuningSettings
from lory_router.tuning.store import TuningStore

MAX_FIELD_BYTES = 256
MAX_FILENAME = 256
SERVED_PURPOSE: Purpose = "fine-tune"
RESULTS_PURPOSE: Purpose = "fine-tune-results"
MAX_FILES = 10_000
"""Of a tenant, however small."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
NO_ROOM = "No room for more files; delete some that are not needed"


@dataclass(slots=True)
class _Arriving:
    """What has come of a body so far."""

    path: Path
    tenant: str
    purpose: bytearray = field(default_factory=bytearray)
    filename: str = ""
    num_bytes: int = 0
    part: str = ""
    seen: set[str] = field(default_factory=set)


def sees(caller: Caller, tenant: str) -> bool:
    """Whether what is a tenant's is there for a caller."""
    return caller.is_admin or caller.tenant == tenant


class KeptFiles:
    def __init__(self, store: TuningStore, settings: TuningSettings) -> None:
        self._store = store
        self._settings = settings
        self._lock = asyncio.Lock()
        self._coming: list[_Arriving] = []
        """Bodies that are still on their way, none of which waits for another."""

    def path(self, record: FileRecord) -> Path:
        return self._settings.file(record.id)

    async def take(self, tenant: str, boundary: bytes, body: AsyncIterator[bytes]) -> FileRecord:
        """Keep the file that `body` brings; raises an ApiError, and then keeps nothing."""
        file_id = new_id("file")
        arriving = _Arriving(self._settings.files / f".{file_id}.part", tenant)
        self._coming.append(arriving)
        try:
            await self._receive(arriving, MultipartReader(boundary), body)
            return await self._keep(file_id, arriving)
        except MultipartError as error:
            raise Invalid(f"the body is not multipart/form-data: {error}", param="file") from error
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise DiskFull("The disk that files are kept on is full") from error
        finally:
            self._coming = [one for one in self._coming if one is not arriving]
            arriving.path.unlink(missing_ok=True)

    async def write(
        self, tenant: str, filename: str, purpose: Purpose, content: bytes
    ) -> FileRecord:
        """A file of our own making, there once its record is put. Raises OSError, and then keeps
        nothing."""
        record = _record(new_id("file"), tenant, filename, purpose, len(content))
        try:
            await asyncio.to_thread(self.path(record).write_bytes, content)
        except OSError:
            self.path(record).unlink(missing_ok=True)
            raise
        return record

    def sweep(self) -> None:
        """What a killed server left: bodies half arrived, and files nobody knows of. Only before
        anything else is done."""
        known = self._store.file_ids()
        for path in self._settings.files.iterdir():
            if path.name.startswith(".") or path.stem not in known:
                path.unlink()

    async def find(self, caller: Caller, file_id: str, param: str | None = None) -> FileRecord:
        """One that the caller sees; raises NotFound, or Invalid if a field named it."""
        record = await self._store.file(file_id)
        if record is not None and sees(caller, record.tenant):
            return record
        message = f"No such file: {shown(file_id)}"
        raise Invalid(message, param=param) if param else NotFound(message)

    async def forget(self, record: FileRecord) -> None:
        await self._store.forget(record)
        await asyncio.to_thread(self.path(record).unlink, missing_ok=True)

    async def _keep(self, file_id: str, arriving: _Arriving) -> FileRecord:
        purpose = arriving.purpose.decode("ascii", "replace")
        if purpose != SERVED_PURPOSE:
            raise Invalid(
                f"`purpose`: must be {SERVED_PURPOSE}, not {shown(purpose)}", param="purpose"
            )
        if "file" not in arriving.seen or not arriving.num_bytes:
            raise Invalid("`file`: is required, and must not be empty", param="file")
        name = arriving.filename or "file.jsonl"
        record = _record(file_id, arriving.tenant, name, SERVED_PURPOSE, arriving.num_bytes)
        async with self._lock:
            rooms = await self._rooms(arriving.tenant)
            num_files = await self._store.num_files(arriving.tenant)
            if arriving.num_bytes > min(rooms.values()) or num_files >= MAX_FILES:
                raise DiskFull(NO_ROOM)
            await asyncio.to_thread(os.rename, arriving.path, self.path(record))
            await self._store.put(record)
        return record

    async def _rooms(self, tenant: str) -> dict[str, int]:
        """Bytes that may still be kept, by whose: everybody's under "", and the tenant's own."""
        settings = self._settings
        rooms = {"": settings.max_files_bytes - await self._store.num_file_bytes()}
        if most := settings.max_files_bytes_per_tenant:
            rooms[tenant] = most - await self._store.num_file_bytes(tenant)
        return rooms

    def _num_coming(self, tenant: str) -> int:
        """Bytes that have come of bodies on their way, of a tenant or of everybody."""
        return sum(one.num_bytes for one in self._coming if tenant in ("", one.tenant))

    async def _receive(
        self, arriving: _Arriving, reader: MultipartReader, body: AsyncIterator[bytes]
    ) -> None:
        rooms = await self._rooms(arriving.tenant)
        with await asyncio.to_thread(arriving.path.open, "wb") as out:
            async for data in body:
                pieces = _take_in(arriving, reader, data)
                if arriving.num_bytes > self._settings.max_file_bytes:
                    raise BodyTooLarge(
                        f"The file is larger than {self._settings.max_file_bytes} bytes;"
                        " --tuning-max-file is the most that is taken",
                        param="file",
                    )
                if any(self._num_coming(whose) > room for whose, room in rooms.items()):
                    raise DiskFull(NO_ROOM)
                if pieces:
                    await asyncio.to_thread(out.writelines, pieces)
        if not reader.is_whole:
            raise Invalid("the body ends in the middle", param="file")


def _take_in(arriving: _Arriving, reader: MultipartReader, data: bytes) -> list[bytes]:
    """What of `data` belongs to the file."""
    pieces: list[bytes] = []
    for event in reader.feed(data):
        if isinstance(event, Part):
            _begin(arriving, event)
        elif arriving.part == "file":
            arriving.num_bytes += len(event)
            pieces.append(event)
        else:
            arriving.purpose += event
            if len(arriving.purpose) > MAX_FIELD_BYTES:
                raise Invalid("`purpose`: is too long", param="purpose")
    return pieces


def _begin(arriving: _Arriving, part: Part) -> None:
    if part.name.startswith("expires_after"):
        raise Invalid(
            "`expires_after`: files stay until they are deleted; leave it out",
            param="expires_after",
        )
    if part.name not in ("file", "purpose"):
        raise Invalid(
            f"{shown(part.name)} is not taken; send `file` and `purpose`", param=part.name[:80]
        )
    if part.name in arriving.seen:
        raise Invalid(f"`{part.name}` comes twice", param=part.name)
    arriving.seen.add(part.name)
    arriving.part = part.name
    if part.name == "file":
        arriving.filename = part.filename[:MAX_FILENAME]


def _record(
    file_id: str, tenant: str, filename: str, purpose: Purpose, num_bytes: int
) -> FileRecord:
    """The name is only shown, never a path."""
    return FileRecord(file_id, tenant, filename, purpose, num_bytes, int(time.time()))

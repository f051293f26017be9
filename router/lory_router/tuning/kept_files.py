"""Files that callers send for training, kept as they came under names of ours.

It must not know HTTP beyond the body's bytes, nor what is done with a file.
"""

import asyncio
import errno
import os
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lory_router.errors import BodyTooLarge, DiskFull, Invalid, NotFound, shown
from lory_router.keys import Caller
from lory_router.nearest import nearest
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
MAX_HEAD = 200
"""Bytes of a file's beginning by which it is seen whether it is JSON lines."""
LONGEST_SHOWN = 40
BOM = b"\xef\xbb\xbf"


@dataclass(slots=True)
class _Arriving:
    """What has come of a body so far."""

    path: Path
    tenant: str
    purpose: bytearray = field(default_factory=bytearray)
    filename: str = ""
    num_bytes: int = 0
    head: bytes = b""
    """What it begins with, white space left out."""
    part: str = ""
    seen: set[str] = field(default_factory=set)


WAY_OUT = "delete some that are not needed: DELETE /v1/files/{id}"


@dataclass(frozen=True, slots=True)
class _Room:
    """A budget of bytes, and what is taken of it."""

    tenant: str
    """Empty: everybody's."""
    most: int
    taken: int

    def check(self, num_bytes: int) -> None:
        """Whether so many more fit; raises DiskFull naming the budget. What all have taken is for
        nobody to know."""
        if self.taken + num_bytes <= self.most:
            return
        if self.tenant:
            raise DiskFull(
                f"The files of tenant {self.tenant} may take {self.most} bytes together"
                f" (--tenant-tuning-files) and take {self.taken}; {WAY_OUT}",
                param="file",
            )
        raise DiskFull(
            f"The files of all may take {self.most} bytes together (--tuning-files); {WAY_OUT}",
            param="file",
        )


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
        ids = [one.id for one in await self._store.files() if sees(caller, one.tenant)]
        told = f"{shown(file_id)}{await meant(file_id, ids)}"
        if param:
            raise Invalid(f"`{param}`: no such file: {told}", param=param)
        raise NotFound(f"No such file: {told}")

    async def forget(self, record: FileRecord) -> None:
        await self._store.forget(record)
        await asyncio.to_thread(self.path(record).unlink, missing_ok=True)

    async def _keep(self, file_id: str, arriving: _Arriving) -> FileRecord:
        purpose = arriving.purpose.decode("ascii", "replace")
        if purpose != SERVED_PURPOSE:
            raise Invalid(
                f"`purpose`: must be {SERVED_PURPOSE}, not {shown(purpose)}", param="purpose"
            )
        _check_looks(arriving)
        name = arriving.filename or "file.jsonl"
        record = _record(file_id, arriving.tenant, name, SERVED_PURPOSE, arriving.num_bytes)
        async with self._lock:
            for room in await self._rooms(arriving.tenant):
                room.check(arriving.num_bytes)
            if await self._store.num_files(arriving.tenant) >= MAX_FILES:
                raise DiskFull(
                    f"Tenant {arriving.tenant} keeps {MAX_FILES} files, the most; {WAY_OUT}"
                )
            await asyncio.to_thread(os.rename, arriving.path, self.path(record))
            await self._store.put(record)
        return record

    async def _rooms(self, tenant: str) -> list[_Room]:
        """Everybody's, and the tenant's own."""
        settings = self._settings
        rooms = [_Room("", settings.max_files_bytes, await self._store.num_file_bytes())]
        if most := settings.max_files_bytes_per_tenant:
            rooms.append(_Room(tenant, most, await self._store.num_file_bytes(tenant)))
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
                for room in rooms:
                    room.check(self._num_coming(room.tenant))
                if pieces:
                    await asyncio.to_thread(out.writelines, pieces)
        if not reader.is_whole:
            raise Invalid("the body ends in the middle", param="file")


async def meant(missing: str, ids: Iterable[str]) -> str:
    """The end of a message that names what is not there, with the one of `ids` that it may be."""
    near = await asyncio.to_thread(nearest, missing, ids)
    return f"; did you mean {shown(near)}?" if near else ""


def _take_in(arriving: _Arriving, reader: MultipartReader, data: bytes) -> list[bytes]:
    """What of `data` belongs to the file."""
    pieces: list[bytes] = []
    for event in reader.feed(data):
        if isinstance(event, Part):
            _begin(arriving, event)
        elif arriving.part == "file":
            arriving.num_bytes += len(event)
            if len(arriving.head) < MAX_HEAD:
                more = event if arriving.head else event.lstrip()
                arriving.head += more[: MAX_HEAD - len(arriving.head)]
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


def _check_looks(arriving: _Arriving) -> None:
    """Whether it can be JSON lines at all; whether each line is a row is a job's to see."""
    if "file" not in arriving.seen or not arriving.num_bytes:
        raise Invalid("`file`: is required, and must not be empty", param="file")
    head = arriving.head.removeprefix(BOM).lstrip()
    if head.startswith(b"{"):
        return
    if not head:
        raise Invalid("`file`: holds no rows", param="file")
    text = shown(head.decode("utf-8", "replace"), LONGEST_SHOWN)
    if not arriving.filename and b"\n" not in head and arriving.num_bytes < MAX_HEAD:
        raise Invalid(
            f"`file`: is the text {text} and no file; curl sends a file's content only with an @"
            " before its name: -F file=@rows.jsonl",
            param="file",
        )
    raise Invalid(
        f'`file`: begins with {text}; give JSON lines, one object a line, as {{"messages": [...]}}',
        param="file",
    )


def _record(
    file_id: str, tenant: str, filename: str, purpose: Purpose, num_bytes: int
) -> FileRecord:
    """The name is only shown, never a path."""
    return FileRecord(file_id, tenant, filename, purpose, num_bytes, int(time.time()))

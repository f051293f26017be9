"""An adapter that a caller sends: its files in one body, kept whole or not at all.

    take     what is sent takes the place of what had that name
    staged   what is sent lies beside it, for somebody to try first, until `adopt`

It must not know HTTP beyond the body's bytes, nor what is done with the adapter.
"""

import asyncio
import hashlib
import logging
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from lory_router.errors import (
    AdapterFileTooLarge,
    AdapterInvalid,
    BodyTimeout,
    Invalid,
    shown,
)
from lory_router.sources.check import CHECKS, config_within, manifest_within, most_bytes
from lory_router.sources.disk import Arrival, DiskCache, Origin
from lory_router.sources.fetching import UNWRITABLE, OpenWriter, unwritable
from lory_router.sources.multipart import MultipartError, Part
from lory_router.sources.reference import Reference
from lory_router.sources.settings import SourceSettings
from lory_router.sources.source import CONFIG_NAME, FILE_NAMES, FURTHER_NAMES, WEIGHTS_NAME
from lory_router.sources.tenant_room import TenantRoom
from lory_router.sources.writer import FileWriter
from lory_server.adapters.errors import AdapterInvalidError
from lory_server.adapters.manner import MANIFEST_NAME
from lory_server.adapters.tokenizer_files import COMPANIONS, TOKENIZER_NAME

log = logging.getLogger(__name__)

SCOPE = ""
"""Uploads come from nowhere else."""

Files = dict[str, tuple[int, str]]
"""Bytes and sha256 of each."""
Take = Callable[[int], None]
"""Of the room that is left to who sends. Raises DiskFull."""


class BodyReader(Protocol):
    """Makes parts of a body, however it comes in pieces."""

    @property
    def is_whole(self) -> bool:
        """Whether the body has come to its end."""
        ...

    def feed(self, data: bytes) -> list[Part | bytes]:
        """What `data` completes, in order. Raises MultipartError."""
        ...


class WeightsReader:
    """A body that is the weights alone, with the configuration in their header. Where they end
    stands in the header, too."""

    is_whole = True

    def __init__(self) -> None:
        self._begun = False

    def feed(self, data: bytes) -> list[Part | bytes]:
        begun, self._begun = self._begun, True
        return [data] if begun else [Part(WEIGHTS_NAME), data]


@dataclass(frozen=True, slots=True)
class Upload:
    """What is sent, under which name and for whom."""

    reference: Reference
    reader: BodyReader
    body: AsyncIterator[bytes]
    owner: str = ""


@dataclass(frozen=True, slots=True)
class Uploaded:
    name: str
    folder: str
    revision: str
    """Of the files' bytes."""
    num_bytes: int


class Uploads:
    def __init__(
        self, disk: DiskCache, settings: SourceSettings, open_writer: OpenWriter = FileWriter
    ) -> None:
        self._disk = disk
        self._settings = settings
        self._open_writer = open_writer
        self._turns: dict[str, asyncio.Semaphore] = {}
        """Of each owner, so that none keeps another waiting."""
        self._rooms: dict[str, TenantRoom] = {}

    async def take(self, upload: Upload) -> Uploaded:
        """Keep what is sent in place of what had that name. Raises an ApiError."""
        with _told():
            done = await self._receive_in_time(upload, is_served=True)
            await self._withdraw_older(done)
        log.info("uploaded %s: revision %s, %d bytes", done.name, done.revision, done.num_bytes)
        return done

    @asynccontextmanager
    async def staged(self, upload: Upload) -> AsyncIterator[Uploaded]:
        """What is sent, kept within the block, and after it if it was adopted. Raises an
        ApiError."""
        with _told():
            done = await self._receive_in_time(upload, is_served=False)
        try:
            yield done
        finally:
            self._disk.release(done.folder)

    async def adopt(self, done: Uploaded) -> None:
        """What was staged takes the place of what had that name."""
        with _told():
            await self._disk.adopt(done.folder)
            await self._withdraw_older(done)

    async def _withdraw_older(self, done: Uploaded) -> None:
        for entry in self._disk.older(SCOPE, done.name):
            await self._disk.withdraw(entry.folder)

    async def _receive_in_time(self, upload: Upload, is_served: bool) -> Uploaded:
        """What is not served yet is held."""
        at_once = asyncio.Semaphore(self._settings.max_downloads)
        turn = self._turns.setdefault(upload.owner, at_once)
        async with asyncio.timeout(self._settings.download_timeout_s), turn:
            return await self._receive(upload, is_served)

    async def _receive(self, upload: Upload, is_served: bool) -> Uploaded:
        name, owner = upload.reference.name, upload.owner
        room = self._rooms.setdefault(owner, TenantRoom(self._most_bytes(owner)))
        with room.begun(name, self._kept_bytes(owner)) as coming:
            done = await self._receive_within(upload, partial(room.take, coming), is_served)
            coming.is_kept = True
            return done

    async def _receive_within(self, upload: Upload, take: Take, is_served: bool) -> Uploaded:
        async with self._disk.arriving() as arrival:
            files = await self._receive_files(arrival, upload, take)
            revision = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:40]
            now = time.time()
            origin = Origin(
                kind="upload",
                scope=SCOPE,
                name=upload.reference.name,
                revision=revision,
                is_removed=not is_served,
                is_public=True,
                owner=upload.owner,
                fetched_at=now,
                files=files,
            )
            folder = upload.reference.folder(f"{now!r} {arrival.path.name}", revision)
            if not is_served:
                self._disk.hold(folder)
            try:
                await self._disk.publish(arrival, folder, origin)
            except BaseException:
                if not is_served:
                    self._disk.release(folder)
                raise
        num_bytes = sum(size for size, _ in files.values())
        return Uploaded(upload.reference.name, folder, revision, num_bytes)

    async def _receive_files(self, arrival: Arrival, upload: Upload, take: Take) -> Files:
        with ExitStack() as opened:
            writers: dict[str, FileWriter] = {}

            def begin(name: str) -> None:
                writer = self._open_writer(arrival.path / name, CHECKS[name])
                writers[name] = opened.enter_context(writer)

            async for data in self._lively(upload.body):
                for event in upload.reader.feed(data):
                    if isinstance(event, Part):
                        _check_part(event.name, writers)
                        begin(event.name)
                    else:
                        await self._write(arrival, writers, event, take)
            if isinstance(upload.reader, WeightsReader) and writers:
                within = await self._disk.threads.run(_within, writers[WEIGHTS_NAME])
                for name, data in within.items():
                    begin(name)
                    await self._write(arrival, writers, data, take)
            if not upload.reader.is_whole or not set(FILE_NAMES) <= set(writers):
                raise Invalid(f"the body must have the parts {_FILES}, whole", param="file")
            _check_companions(writers)
            return {
                name: (writer.num_bytes, await self._disk.threads.run(writer.finish))
                for name, writer in writers.items()
            }

    def _most_bytes(self, owner: str) -> int:
        return self._settings.tenant_bytes if owner else sys.maxsize

    def _kept_bytes(self, owner: str) -> Counter[str]:
        """What the tenant has, by name. What is nobody's has no bound but the disk's."""
        kept: Counter[str] = Counter()
        for entry in self._disk.entries() if owner else ():
            if entry.origin.owner == owner:
                kept[entry.origin.name] += entry.num_bytes
        return kept

    async def _write(
        self, arrival: Arrival, writers: dict[str, FileWriter], data: bytes, take: Take
    ) -> None:
        name, writer = next(reversed(writers.items()))
        most = most_bytes(name, self._settings.max_adapter_bytes)
        if writer.num_bytes + len(data) > most:
            raise AdapterFileTooLarge(
                f"{name} is larger than {most} bytes; --max-adapter-size is the most that is taken",
                param="file",
            )
        take(len(data))
        await arrival.cover(arrival.num_bytes + len(data))
        await self._disk.threads.run(writer.append, data, None)

    async def _lively(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The body, as long as it comes, and not too slowly: who sends takes the room of others."""
        stall_s, began, num_bytes = self._settings.stall_s, time.monotonic(), 0
        while True:
            async with asyncio.timeout(stall_s):
                data = await anext(body, None)
            if data is None:
                return
            yield data
            num_bytes += len(data)
            seconds = time.monotonic() - began
            if seconds >= stall_s:
                if num_bytes < self._settings.min_bytes_per_s * seconds:
                    raise TimeoutError
                began, num_bytes = time.monotonic(), 0


def _within(writer: FileWriter) -> dict[str, bytes]:
    """The files that stand in the header of weights that have been written."""
    if not writer.num_bytes:
        raise Invalid("the body is empty; send the weights in safetensors", param="file")
    manifest = manifest_within(writer.fd)
    more = {} if manifest is None else {MANIFEST_NAME: manifest}
    return {CONFIG_NAME: config_within(writer.fd), **more}


@contextmanager
def _told() -> Iterator[None]:
    """What goes wrong, in callers' words."""
    try:
        yield
    except TimeoutError as error:
        raise BodyTimeout("The upload took too long, or stopped in the middle") from error
    except AdapterInvalidError as error:
        raise AdapterInvalid(str(error), param="file") from error
    except MultipartError as error:
        raise Invalid(f"the body is not multipart/form-data: {error}", param="file") from error
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise unwritable(error) from error


_FILES = " and ".join(f"`{name}`" for name in FILE_NAMES)
_MORE = "; beside them there may be " + ", ".join(f"`{name}`" for name in FURTHER_NAMES)


def _check_part(name: str, writers: dict[str, FileWriter]) -> None:
    if name not in CHECKS:
        raise Invalid(f"{shown(name)} is no part of an upload; send {_FILES}{_MORE}", param="file")
    if name in writers:
        raise Invalid(f"`{name}` comes twice", param="file")


def _check_companions(writers: Collection[str]) -> None:
    """What stands beside a tokenizer counts beside one alone: nothing is taken and passed over."""
    alone = [name for name in COMPANIONS if name in writers and TOKENIZER_NAME not in writers]
    if alone:
        raise Invalid(f"`{alone[0]}` needs `{TOKENIZER_NAME}` beside it", param="file")

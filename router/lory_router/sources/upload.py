"""An adapter that a caller sends: its files in one body, kept whole or not at all.

    take     what is sent takes the place of what had that name
    staged   what is sent lies beside it, for somebody to try first, until `adopt`

It must not know HTTP beyond the body's bytes, nor what is done with the adapter.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from lory_router.errors import (
    AdapterFileTooLarge,
    AdapterInvalid,
    BodyTimeout,
    DiskFull,
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
from lory_router.sources.writer import FileWriter
from lory_server.adapters.errors import AdapterInvalidError
from lory_server.adapters.manner import MANIFEST_NAME
from lory_server.adapters.tokenizer_files import COMPANIONS, TOKENIZER_NAME

log = logging.getLogger(__name__)

MAX_UPLOADS = 1000
"""That a tenant may have, however small."""
SCOPE = ""
"""Uploads come from nowhere else."""

Files = dict[str, tuple[int, str]]
"""Bytes and sha256 of each."""


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
        self._rooms: dict[str, asyncio.Semaphore] = {}
        """Of each owner, so that none keeps another waiting."""

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
        room = self._rooms.setdefault(upload.owner, at_once)
        async with asyncio.timeout(self._settings.download_timeout_s), room:
            return await self._receive(upload, is_served)

    async def _receive(self, upload: Upload, is_served: bool) -> Uploaded:
        async with self._disk.arriving() as arrival:
            files = await self._receive_files(arrival, upload)
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

    async def _receive_files(self, arrival: Arrival, upload: Upload) -> Files:
        most_in_all = self._room_of(upload)
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
                        await self._write(arrival, writers, event, most_in_all)
            if isinstance(upload.reader, WeightsReader) and writers:
                within = await self._disk.threads.run(_within, writers[WEIGHTS_NAME])
                for name, data in within.items():
                    begin(name)
                    await self._write(arrival, writers, data, most_in_all)
            if not upload.reader.is_whole or not set(FILE_NAMES) <= set(writers):
                raise Invalid(f"the body must have the parts {_FILES}, whole", param="file")
            _check_companions(writers)
            return {
                name: (writer.num_bytes, await self._disk.threads.run(writer.finish))
                for name, writer in writers.items()
            }

    def _room_of(self, upload: Upload) -> int:
        """What is left to the tenant, for whom what this replaces does not count."""
        if not upload.owner:
            return self._settings.budget_bytes
        others = [
            entry.num_bytes
            for entry in self._disk.entries()
            if entry.origin.owner == upload.owner and entry.origin.name != upload.reference.name
        ]
        if len(others) >= MAX_UPLOADS:
            text = f"the tenant has {MAX_UPLOADS} uploads; take one away"
            raise DiskFull(text, param="file")
        return self._settings.tenant_bytes - sum(others)

    async def _write(
        self, arrival: Arrival, writers: dict[str, FileWriter], data: bytes, most_in_all: int
    ) -> None:
        name, writer = next(reversed(writers.items()))
        most = most_bytes(name, self._settings.max_adapter_bytes)
        if writer.num_bytes + len(data) > most:
            raise AdapterFileTooLarge(
                f"{name} is larger than {most} bytes; --max-adapter-size is the most that is taken",
                param="file",
            )
        in_all = sum(w.num_bytes for w in writers.values()) + len(data)
        if in_all > most_in_all:
            raise DiskFull(
                f"the tenant's uploads may take {self._settings.tenant_bytes} bytes together; take"
                " one away, or ask for more by --tenant-uploads-size",
                param="file",
            )
        await arrival.cover(in_all)
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

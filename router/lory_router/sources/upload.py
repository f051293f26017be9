"""An adapter that a caller sends: both files in one body, kept whole or not at all.

It must not know HTTP beyond the body's bytes, nor what is done with the adapter.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass

from lory_router.errors import AdapterFileTooLarge, AdapterInvalid, BodyTimeout, Invalid, shown
from lory_router.sources.check import CHECKS, most_bytes
from lory_router.sources.disk import Arrival, DiskCache, Origin
from lory_router.sources.fetching import FULL, OpenWriter, disk_full
from lory_router.sources.multipart import MultipartError, MultipartReader, Part
from lory_router.sources.reference import Reference
from lory_router.sources.settings import SourceSettings
from lory_router.sources.source import FILE_NAMES
from lory_router.sources.writer import FileWriter
from lory_server.adapters.errors import AdapterInvalidError

log = logging.getLogger(__name__)

SCOPE = ""
"""Uploads come from nowhere else."""


@dataclass(frozen=True, slots=True)
class Uploaded:
    name: str
    revision: str
    num_bytes: int


class Uploads:
    def __init__(
        self, disk: DiskCache, settings: SourceSettings, open_writer: OpenWriter = FileWriter
    ) -> None:
        self._disk = disk
        self._settings = settings
        self._open_writer = open_writer
        self._room = asyncio.Semaphore(settings.max_downloads)

    async def take(
        self, reference: Reference, boundary: bytes, body: AsyncIterator[bytes]
    ) -> Uploaded:
        """Keep what `body` brings in place of what had that name. Raises an ApiError."""
        try:
            async with self._room, asyncio.timeout(self._settings.download_timeout_s):
                return await self._take(reference, boundary, body)
        except TimeoutError as error:
            raise BodyTimeout("The upload took too long, or stopped in the middle") from error
        except AdapterInvalidError as error:
            raise AdapterInvalid(str(error), param="file") from error
        except MultipartError as error:
            raise Invalid(f"the body is not multipart/form-data: {error}", param="file") from error
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise disk_full() from error

    async def _take(
        self, reference: Reference, boundary: bytes, body: AsyncIterator[bytes]
    ) -> Uploaded:
        async with self._disk.arriving() as arrival:
            files = await self._receive(arrival, MultipartReader(boundary), body)
            revision = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:40]
            now = time.time()
            origin = Origin(
                kind="upload",
                scope=SCOPE,
                name=reference.name,
                revision=revision,
                is_public=True,
                fetched_at=now,
                files=files,
            )
            await self._disk.publish(arrival, reference.folder(repr(now), revision), origin)
        for entry in self._disk.older(SCOPE, reference.name):
            await self._disk.withdraw(entry.folder)
        num_bytes = sum(size for size, _ in files.values())
        log.info("uploaded %s: revision %s, %d bytes", reference.name, revision[:12], num_bytes)
        return Uploaded(reference.name, revision, num_bytes)

    async def _receive(
        self, arrival: Arrival, reader: MultipartReader, body: AsyncIterator[bytes]
    ) -> dict[str, tuple[int, str]]:
        """Bytes and sha256 of each file."""
        with ExitStack() as opened:
            writers: dict[str, FileWriter] = {}
            async for data in self._lively(body):
                for event in reader.feed(data):
                    if isinstance(event, Part):
                        _check_part(event.name, writers)
                        path = arrival.path / event.name
                        writer = self._open_writer(path, CHECKS[event.name])
                        writers[event.name] = opened.enter_context(writer)
                    else:
                        await self._write(arrival, writers, event)
            if not reader.is_whole or set(writers) != set(FILE_NAMES):
                raise Invalid(f"the body must have the parts {_FILES}, whole", param="file")
            return {
                name: (writer.num_bytes, await self._disk.threads.run(writer.finish))
                for name, writer in writers.items()
            }

    async def _write(self, arrival: Arrival, writers: dict[str, FileWriter], data: bytes) -> None:
        name, writer = next(reversed(writers.items()))
        most = most_bytes(name, self._settings.max_adapter_bytes)
        if writer.num_bytes + len(data) > most:
            raise AdapterFileTooLarge(
                f"{name} is larger than {most} bytes; --max-adapter-size is the most that is taken",
                param="file",
            )
        await arrival.cover(sum(w.num_bytes for w in writers.values()) + len(data))
        await self._disk.threads.run(writer.append, data, None)

    async def _lively(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The body, as long as something comes."""
        while True:
            async with asyncio.timeout(self._settings.stall_s):
                data = await anext(body, None)
            if data is None:
                return
            yield data


_FILES = " and ".join(f"`{name}`" for name in FILE_NAMES)


def _check_part(name: str, writers: dict[str, FileWriter]) -> None:
    if name not in CHECKS:
        raise Invalid(f"{shown(name)} is no part of an upload; send {_FILES}", param="file")
    if name in writers:
        raise Invalid(f"`{name}` comes twice", param="file")

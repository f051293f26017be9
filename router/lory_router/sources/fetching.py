"""One adapter from its source into the disk cache: all its files, whole, or nothing.

It must not know callers, rights or who waits.
"""

import errno
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lory_router.errors import DiskFull
from lory_router.sources.access import patiently
from lory_router.sources.check import CHECKS, FileCheck, most_bytes
from lory_router.sources.disk import Arrival, DiskCache, Origin
from lory_router.sources.download import Download, Pace
from lory_router.sources.reference import Reference
from lory_router.sources.settings import SourceSettings
from lory_router.sources.source import Files, RemoteFile, Source
from lory_router.sources.writer import FileWriter

PROGRESS_S = 10.0
"""Between lines in the log about one download."""

UNWRITABLE = {
    errno.ENOSPC: "is full",
    errno.EDQUOT: "is full",
    errno.EROFS: "is read-only",
}

log = logging.getLogger(__name__)

OpenWriter = Callable[[Path, FileCheck], FileWriter]


@dataclass(slots=True)
class Progress:
    """How far one adapter has come; all files together."""

    reference: Reference
    started: float
    """By the monotonic clock."""
    is_public: bool = True
    """Whether who began it brought no token."""
    num_bytes: int = 0
    total_bytes: int | None = None
    told: float = 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


class Fetcher:
    def __init__(
        self, disk: DiskCache, settings: SourceSettings, open_writer: OpenWriter = FileWriter
    ) -> None:
        self._disk = disk
        self._settings = settings
        self._open_writer = open_writer

    async def fetch(
        self, source: Source, progress: Progress, folder: str, revision: str, token: str
    ) -> None:
        """Put that revision into `folder` of the cache. Raises an ApiError, or Changed."""
        reference = progress.reference
        files = await patiently(
            lambda: source.files(reference, revision, token), reference, self._settings.stall_s
        )
        sizes = [file.num_bytes for file in files]
        progress.total_bytes = None if None in sizes else sum(size or 0 for size in sizes)
        log.info("fetching %s at %s: %s", reference.name, revision[:12], _amount(progress))
        try:
            await self._write(source, files, progress, folder, revision, is_public=not token)
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            raise unwritable(error) from error
        text, names = "fetched %s in %.1f s: %s; %s", ", ".join(file.name for file in files)
        log.info(text, reference.name, progress.seconds, _amount(progress), names)

    async def _write(
        self,
        source: Source,
        files: Files,
        progress: Progress,
        folder: str,
        revision: str,
        is_public: bool,
    ) -> None:
        found: dict[str, tuple[int, str]] = {}
        async with self._disk.arriving() as arrival:
            for file in files:
                found[file.name] = await self._file(source, file, arrival, progress)
            origin = Origin(
                kind=progress.reference.kind,
                scope=source.scope,
                name=progress.reference.name,
                revision=revision,
                is_public=is_public,
                fetched_at=time.time(),
                files=found,
            )
            await self._disk.publish(arrival, folder, origin)

    async def _file(
        self, source: Source, file: RemoteFile, arrival: Arrival, progress: Progress
    ) -> tuple[int, str]:
        settings, before = self._settings, arrival.num_bytes
        done = progress.num_bytes
        pace = Pace(
            most_bytes=most_bytes(file.name, settings.max_adapter_bytes),
            stall_s=settings.stall_s,
            min_bytes_per_s=settings.min_bytes_per_s,
            retry_pause_s=settings.retry_pause_s,
        )

        async def told(num_bytes: int, total_bytes: int | None) -> None:
            await arrival.cover(before + max(num_bytes, total_bytes or 0))
            progress.num_bytes = done + num_bytes
            _tell(progress)

        with self._open_writer(arrival.path / file.name, CHECKS[file.name]) as writer:
            download = Download(file, writer, source.client, self._disk.threads, pace, told)
            digest = await download.run()
            return writer.num_bytes, digest


def unwritable(error: OSError) -> DiskFull:
    return DiskFull(f"The disk that adapters are kept on {UNWRITABLE[error.errno or 0]}")


def _tell(progress: Progress) -> None:
    if progress.seconds - progress.told >= PROGRESS_S:
        progress.told = progress.seconds
        name, seconds = progress.reference.name, progress.seconds
        log.info("fetching %s for %.0f s: %s", name, seconds, _amount(progress))


def _amount(progress: Progress) -> str:
    total = "" if progress.total_bytes is None else f" of {progress.total_bytes / 2**20:.1f}"
    return f"{progress.num_bytes / 2**20:.1f}{total} MiB"

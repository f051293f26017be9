"""Adapters from sources, for whoever names one: checked, fetched once, held while in use.

    acquire: may this caller read it, which revision -> here already? -> else one download for all
    release: it may be removed again, when room is needed

It must not know HTTP routes, engines or dialects.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from lory_router.errors import (
    AdapterNotFound,
    ApiError,
    SourceUnavailable,
    TimedOut,
    adapter_not_found,
)
from lory_router.sources.access import Access, again
from lory_router.sources.client import Changed, Refused, SourceClient
from lory_router.sources.disk import DiskCache, Entry
from lory_router.sources.fetching import Fetcher, OpenWriter, Progress
from lory_router.sources.flight import Flights
from lory_router.sources.folder import FolderSource
from lory_router.sources.hub import HubSource
from lory_router.sources.lanes import Lane, Lanes
from lory_router.sources.memory import Memory
from lory_router.sources.reference import Reference, SourceKind, covers, reference_of
from lory_router.sources.s3 import S3Place
from lory_router.sources.settings import SourceSettings
from lory_router.sources.source import Source
from lory_router.sources.upload import SCOPE, Uploads
from lory_router.sources.web import WebPlace
from lory_router.sources.writer import FileWriter
from lory_server.messages import FETCHED

FAILURE_S = 3.0
"""How long a download that failed is not tried again."""
MAX_FAILURES = 4096
TOLD_S = 60.0
"""Between lines in the log about one adapter that is served unchecked."""
MAX_NAMES = 65_536
MAX_CHANGES = 3
"""Lookups for one request, while what it names changes under it."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Fetched:
    """An adapter in the disk cache, as lists show it."""

    name: str
    kind: str
    engine_name: str
    revision: str
    num_bytes: int
    is_public: bool
    """Whether it may be shown to everybody."""
    is_latest: bool
    """Whether nothing newer was fetched under its name."""
    last_used: float
    """Unix time."""


@dataclass(slots=True)
class FetchCounts:
    """Since start."""

    fetched: int = 0
    failed: int = 0
    num_bytes: int = 0


class Sources:
    def __init__(self, settings: SourceSettings, open_writer: OpenWriter = FileWriter) -> None:
        """Opens the disk cache. Raises CacheFolderError."""
        self.settings = settings
        self.disk = DiskCache(settings.folder, settings.budget_bytes)
        self.counts = FetchCounts()
        self._sources = _sources(settings)
        self._access = Access(settings.recheck_s, settings.stall_s)
        self._lanes = Lanes(settings.max_downloads, settings.max_waiting)
        self._fetcher = Fetcher(self.disk, settings, open_writer)
        self.uploads = Uploads(self.disk, settings, open_writer)
        self._flights: Flights[str, None] = Flights()
        self._failures: Memory[str, ApiError] = Memory(MAX_FAILURES)
        self._told: Memory[Reference, bool] = Memory(MAX_FAILURES)
        self._progress: dict[str, Progress] = {}
        self._names: Memory[str, str] = Memory(MAX_NAMES)
        for entry in self.disk.entries():
            self._names.put(entry.folder, entry.origin.name, math.inf)

    async def close(self) -> None:
        await self._access.close()
        await self._flights.close()
        for source in self._sources.values():
            await source.client.close()
        self.disk.close()

    # -- using ------------------------------------------------------------------------------

    @asynccontextmanager
    async def using(self, reference: Reference, token: str = "") -> AsyncIterator[str]:
        """The engine's name for it, which is good within the block."""
        engine_name = await self.acquire(reference, token)
        try:
            yield engine_name
        finally:
            self.release(engine_name)

    async def acquire(self, reference: Reference, token: str = "") -> str:
        """The engine's name for what `reference` stands for now, good until `release`.

        Raises an ApiError. Who is cancelled while waiting cancels nobody else.
        """
        try:
            async with asyncio.timeout(self.settings.wait_timeout_s):
                return FETCHED + await self._hold(reference, token)
        except TimeoutError as error:
            seconds = self.settings.wait_timeout_s
            text = f"{reference.name} was not fetched within {seconds:g} s; ask again later"
            raise TimedOut(text) from error

    def release(self, engine_name: str) -> None:
        self.disk.release(engine_name.removeprefix(FETCHED))

    def hold_kept(self, reference: Reference) -> str:
        """The engine's name for what was fetched last, nobody's rights asked; good until `release`.
        Empty if there is none. For what the server itself keeps, and never for a caller."""
        entry = self.latest(reference)
        if entry is None:
            return ""
        self.disk.hold(entry.folder)
        return FETCHED + entry.folder

    def is_here(self, engine_name: str) -> bool:
        """Whether it is on the disk, and was not taken away since it was held."""
        entry = self.disk.entry(engine_name.removeprefix(FETCHED))
        return entry is not None and not entry.origin.is_removed

    async def fixed(self, reference: Reference, token: str) -> Reference:
        """The same at the commit that it stands for now, where the source has such a thing."""
        if reference.kind != "hub":
            return reference
        found = await self._found(reference, token)
        revision = found if isinstance(found, str) else found.origin.revision
        return replace(reference, revision=revision)

    async def remove(self, reference: Reference) -> None:
        """Nobody new gets what is here of it, at any branch if none is named; those that hold it
        finish."""
        for entry in self.entries_of(reference):
            await self.disk.withdraw(entry.folder)

    async def _hold(self, reference: Reference, token: str) -> str:
        if reference.kind == "upload":
            folder = self._uploaded(reference)
            self.disk.hold(folder)
            self._names.put(folder, reference.name, math.inf)
            return folder
        for _ in range(MAX_CHANGES):
            found = await self._found(reference, token)
            if isinstance(found, Entry):
                self.disk.hold(found.folder)
                return found.folder
            folder = reference.folder(self._scope(reference.kind), found)
            self.disk.hold(folder)
            try:
                if not self.disk.has(folder):
                    await self._fetch(reference, folder, found, token)
                return folder
            except Changed:
                self.disk.release(folder)
                self._access.forget(reference, token)
            except BaseException:
                self.disk.release(folder)
                raise
        raise SourceUnavailable(
            f"{reference.name} changes while it is fetched, or is refused after all; try later"
        )

    # -- which revision ---------------------------------------------------------------------

    async def _found(self, reference: Reference, token: str) -> str | Entry:
        """The revision; or, where its source cannot be asked, what was fetched last."""
        source = self._sources[reference.kind]
        lane = self._lane(source, reference)
        if self.settings.is_offline:
            return self._offline(source, reference)
        known = self._access.known(reference, token)
        if known is not None:
            return known
        with lane.waiting():
            return await self._looked_up(source, reference, token)

    async def _looked_up(self, source: Source, reference: Reference, token: str) -> str | Entry:
        try:
            revision = await self._access.revision(source, reference, token)
        except SourceUnavailable as error:
            kept = self._kept(source, reference)
            if kept is None:
                raise
            if self._told.get(reference) is None:
                self._told.put(reference, True, TOLD_S)
                log.warning("%s; served as it was fetched before", error.message)
            return kept
        except AdapterNotFound:
            if not token:
                await self.disk.set_public(source.scope, reference.name, False)
            raise
        if not token:
            await self.disk.set_public(source.scope, reference.name, True)
        return revision

    def _offline(self, source: Source, reference: Reference) -> Entry:
        kept = self._kept(source, reference)
        if kept is None:
            raise SourceUnavailable(
                f"{reference.name} cannot be fetched or checked: this server is offline"
            )
        return kept

    def _kept(self, source: Source, reference: Reference) -> Entry | None:
        """What was fetched last, if it is for all and here; or the same under another name."""
        kept = self.disk.latest(source.scope, reference.name)
        if kept is None:
            return self._same(reference)
        return kept if kept.origin.is_public and self.disk.has(kept.folder) else None

    def _same(self, reference: Reference) -> Entry | None:
        """What was fetched under another name for the same, if all that is here of it may be read
        by everybody."""
        here = self.entries_of(replace(reference, revision=""))
        if not all(entry.origin.is_public for entry in here):
            return None
        same = (
            e for e in here if reference.is_also(reference_of(e.origin.name), e.origin.revision)
        )
        found = next(same, None)
        return found if found is not None and self.disk.has(found.folder) else None

    def _uploaded(self, reference: Reference) -> str:
        entry = self.disk.latest(SCOPE, reference.name)
        if entry is None or not self.disk.has(entry.folder):
            raise adapter_not_found(reference.name)
        return entry.folder

    # -- fetching ---------------------------------------------------------------------------

    def _lane(self, source: Source, reference: Reference) -> Lane:
        return self._lanes.lane(source.lane(reference))

    async def _fetch(self, reference: Reference, folder: str, revision: str, token: str) -> None:
        failure = self._failures.get(folder)
        if failure is not None:
            raise again(failure)
        source = self._sources[reference.kind]
        lane = self._lane(source, reference)
        with lane.waiting():
            await self._flights.join(
                folder,
                lambda: self._download(source, lane, reference, folder, revision, token),
            )

    async def _download(
        self,
        source: Source,
        lane: Lane,
        reference: Reference,
        folder: str,
        revision: str,
        token: str,
    ) -> None:
        """For all who wait; held, so that it is there when they come to take it."""
        progress = self._progress[folder] = Progress(reference, time.monotonic(), not token)
        self.disk.hold(folder)
        try:
            async with lane.downloads, asyncio.timeout(self.settings.download_timeout_s):
                await self._fetcher.fetch(source, progress, folder, revision, token)
        except (Refused, AdapterNotFound) as error:
            raise Changed from error  # the rights of who began it may not be those of who waits
        except TimeoutError as error:
            raise self._failed(folder, progress, _too_long(progress)) from error
        except ApiError as error:
            raise self._failed(folder, progress, error) from error
        else:
            self._names.put(folder, reference.name, math.inf)
            self.counts.fetched += 1
            self.counts.num_bytes += progress.num_bytes
        finally:
            self.disk.release(folder)
            del self._progress[folder]

    def _failed(self, folder: str, progress: Progress, error: ApiError) -> ApiError:
        """What is told of `error`, under the adapter's name; logged, counted, kept for a moment."""
        name = progress.reference.name
        about = "" if name in error.message else f"{name}: "
        message = about + error.message
        told = type(error)(message, param=error.param, retry_after_s=error.retry_after_s)
        log.warning("not fetched, %.1f s: %s", progress.seconds, message)
        self._failures.put(folder, told, FAILURE_S)
        self.counts.failed += 1
        return told

    # -- what is here ----------------------------------------------------------------------

    def latest(self, reference: Reference) -> Entry | None:
        """What was fetched or uploaded last under that name."""
        return self.disk.latest(self._scope(reference.kind), reference.name)

    def entries_of(self, reference: Reference) -> list[Entry]:
        """All that is here of it, and at all its branches if none is named; newest first."""
        scope, name = self._scope(reference.kind), reference.name
        found = [
            entry
            for entry in self.disk.entries()
            if entry.origin.scope == scope
            and covers(name, entry.origin.name)
            and not entry.origin.is_removed
        ]
        return sorted(found, key=lambda entry: entry.origin.fetched_at, reverse=True)

    def is_public(self, name: str) -> bool:
        """Whether everybody may know of it."""
        entry = self.latest(reference_of(name))
        return entry is not None and entry.origin.is_public

    def uploads_owner(self, name: str) -> str:
        """The tenant that an upload is for alone; empty if it is for all, or not there."""
        entry = self.disk.latest(SCOPE, name)
        return entry.origin.owner if entry else ""

    def _scope(self, kind: SourceKind) -> str:
        return SCOPE if kind == "upload" else self._sources[kind].scope

    def downloads(self) -> tuple[Progress, ...]:
        """Those under way, or waiting for their turn."""
        return tuple(self._progress.values())

    def listing(self) -> tuple[Fetched, ...]:
        return tuple(
            Fetched(
                name=entry.origin.name,
                kind=entry.origin.kind,
                engine_name=FETCHED + entry.folder,
                revision=entry.origin.revision,
                num_bytes=entry.num_bytes,
                is_public=entry.origin.is_public,
                is_latest=self.disk.latest(entry.origin.scope, entry.origin.name) == entry,
                last_used=entry.last_used,
            )
            for entry in self.disk.entries()
        )

    def name_of(self, engine_name: str) -> str:
        """What callers call it, removed or not; a local adapter's name is its own."""
        folder = engine_name.removeprefix(FETCHED)
        if folder == engine_name:
            return engine_name
        entry = self.disk.entry(folder)
        return entry.origin.name if entry else self._names.get(folder) or engine_name


def _too_long(progress: Progress) -> SourceUnavailable:
    return SourceUnavailable(
        f"not fetched within {progress.seconds:.0f} s, {progress.num_bytes} bytes have come;"
        " --download-timeout is the longest"
    )


def _sources(settings: SourceSettings) -> Mapping[SourceKind, Source]:
    hub, s3, web = (SourceClient(settings.stall_s) for _ in range(3))
    return {
        "hub": HubSource(settings.hub, hub),
        "s3": FolderSource(S3Place(settings.s3), s3),
        "web": FolderSource(WebPlace(settings.web_hosts), web),
    }

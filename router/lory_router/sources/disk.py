"""The disk cache: whole adapters in folders of their own, within a budget, and nothing half.

    FOLDER/lory-adapters   a marker, locked while a server uses the folder
    FOLDER/arriving/*      being written or removed; emptied at start
    FOLDER/held/NAME/      its files and origin.json; renamed into place when all are synced

The least recently used go first, and none that somebody holds. It must not know sources, requests
or what the files mean. All calls are made on the event loop; what waits for the disk runs in
threads.
"""

import asyncio
import fcntl
import itertools
import os
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from lory_router.errors import AdapterFileTooLarge, DiskFull
from lory_router.sources.settings import HELD
from lory_router.sources.source import FILE_NAMES, FURTHER_NAMES
from lory_router.sources.threads import DiskThreads

MARKER = "lory-adapters"
ARRIVING = "arriving"
ORIGIN = "origin.json"

TOUCH_S = 60.0
"""How old the time of the last use on disk may be."""


class CacheFolderError(Exception):
    """The folder cannot be used; the message is one line with the fix."""


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Where an entry came from; what a restarted server knows of it."""

    version: int = 1
    kind: str
    scope: str
    """Which hub or store."""
    name: str
    """The reference's name."""
    revision: str
    is_removed: bool = False
    """Taken away while somebody holds it, or not yet served; gone with the last who holds it, or
    at the next start."""
    is_public: bool
    """Whether who brings no token may read it, when this was last asked."""
    owner: str = ""
    """Of an upload: the tenant that it is for alone; empty: it is for all."""
    fetched_at: float
    """Unix time."""
    files: dict[str, tuple[int, str]]
    """Bytes and sha256 of each."""


@dataclass(frozen=True, slots=True)
class Entry:
    folder: str
    origin: Origin
    last_used: float
    """Unix time."""

    @property
    def num_bytes(self) -> int:
        return sum(size for size, _ in self.origin.files.values())


class Arrival:
    """A folder being filled, and the part of the budget that it has taken."""

    def __init__(self, disk: "DiskCache", path: Path) -> None:
        self._disk = disk
        self.path = path
        self.num_bytes = 0

    async def cover(self, num_bytes: int) -> None:
        """Take so much of the budget in all. Raises an ApiError if it cannot be had."""
        more = num_bytes - self.num_bytes
        if more > 0:
            await self._disk.make_room(more)
            self.num_bytes += more
            self._disk.arriving_bytes += more


class DiskCache:
    def __init__(self, folder: Path, budget_bytes: int) -> None:
        """Opens `folder`, removing what was left half. Raises CacheFolderError."""
        self._root = folder
        self.threads = DiskThreads()
        self._budget_bytes = budget_bytes
        self._holds: Counter[str] = Counter()
        self._numbers = itertools.count()
        self._noting = asyncio.Lock()
        self.arriving_bytes = 0
        self._lock_fd = _claim(folder)
        for stale in (folder / ARRIVING).iterdir():
            _delete(stale)
        self._entries: dict[str, Entry] = {}
        self._held_bytes = 0
        self._latest: dict[tuple[str, str], str] = {}
        for entry in sorted(_whole_entries(folder / HELD), key=lambda e: e.origin.fetched_at):
            self._find(entry)

    def _find(self, entry: Entry) -> None:
        """Later ones take the place of earlier ones. What an upload replaced was to go when the
        server ended, and can be asked for by no name."""
        name = (entry.origin.scope, entry.origin.name)
        before = self._entries.get(self._latest.get(name, ""))
        if before is not None and before.origin.kind == "upload":
            self._drop(before)
            _delete(self._root / HELD / before.folder)
        self._entries[entry.folder] = entry
        self._held_bytes += entry.num_bytes
        self._latest[name] = entry.folder

    def close(self) -> None:
        self.threads.close()
        os.close(self._lock_fd)

    # -- looking ----------------------------------------------------------------------------

    def has(self, folder: str) -> bool:
        """Whether it is here; one that somebody has deleted by hand is not."""
        entry = self._entries.get(folder)
        if entry is not None and not (self._root / HELD / folder / ORIGIN).is_file():
            self._drop(entry)
            return False
        return entry is not None

    def entry(self, folder: str) -> Entry | None:
        return self._entries.get(folder)

    def latest(self, scope: str, name: str) -> Entry | None:
        """What was fetched last under that name."""
        return self._entries.get(self._latest.get((scope, name), ""))

    def older(self, scope: str, name: str) -> tuple[Entry, ...]:
        """What else is here under that name, and not taken away."""
        latest = self._latest.get((scope, name))
        return tuple(
            entry
            for entry in self._entries.values()
            if (entry.origin.scope, entry.origin.name) == (scope, name)
            and not (entry.folder == latest or entry.origin.is_removed)
        )

    def entries(self) -> tuple[Entry, ...]:
        return tuple(self._entries.values())

    @property
    def num_bytes(self) -> int:
        return self.arriving_bytes + self._held_bytes

    # -- using ------------------------------------------------------------------------------

    def hold(self, folder: str) -> None:
        """It will not be removed before as many `release`s; it need not be here yet."""
        self._holds[folder] += 1
        entry = self._entries.get(folder)
        if entry is not None:
            self._touch(entry)

    def release(self, folder: str) -> None:
        self._holds[folder] -= 1
        if self._holds[folder]:
            return
        del self._holds[folder]
        entry = self._entries.get(folder)
        if entry is not None and entry.origin.is_removed:
            self.threads.begin(_delete, self._set_aside(folder))

    async def adopt(self, folder: str) -> None:
        """What was published unserved, and is held, is what its name stands for from now on."""
        assert folder in self._holds
        await self._note(folder, is_removed=False)
        origin = self._entries[folder].origin
        self._latest[origin.scope, origin.name] = folder

    async def withdraw(self, folder: str) -> None:
        """Nobody new gets it; its bytes go when nobody holds it any more."""
        entry = self._entries.get(folder)
        if entry is None:
            return
        self._forget_latest(entry)
        if folder not in self._holds:
            await self.remove(folder)
            return
        self._change(folder, is_removed=True)
        await self._note(folder)

    def is_held(self, folder: str) -> bool:
        return folder in self._holds

    def _touch(self, entry: Entry) -> None:
        now = time.time()
        self._entries[entry.folder] = replace(entry, last_used=now)
        if now - entry.last_used > TOUCH_S:
            with suppress(OSError):  # a disk that takes no notes still has the bytes
                os.utime(self._root / HELD / entry.folder / ORIGIN, (now, now))

    async def set_public(self, scope: str, name: str, is_public: bool) -> None:
        """Note what was learnt of the entry fetched last under that name."""
        entry = self.latest(scope, name)
        if entry is None or entry.origin.is_public == is_public:
            return
        self._change(entry.folder, is_public=is_public)
        await self._note(entry.folder)

    def _change(self, folder: str, **facts: bool) -> None:
        entry = self._entries[folder]
        origin = msgspec.structs.replace(entry.origin, **facts)
        self._entries[folder] = replace(entry, origin=origin)

    async def _note(self, folder: str, **facts: bool) -> None:
        """Write down what is known of an entry, and `facts`, which are known once they are
        written. One at a time: two would write to one file."""
        async with self._noting:
            entry = self._entries.get(folder)
            if entry is None:
                return
            origin = msgspec.structs.replace(entry.origin, **facts)
            self.hold(folder)
            try:
                await self.threads.run(_rewrite, self._root / HELD / folder, origin)
                self._change(folder, **facts)
            finally:
                self.release(folder)

    # -- filling ----------------------------------------------------------------------------

    @asynccontextmanager
    async def arriving(self) -> AsyncIterator[Arrival]:
        """A new folder to write to. What is not published before the end is removed."""
        path = self._root / ARRIVING / f"{next(self._numbers)}"
        path.mkdir()
        arrival = Arrival(self, path)
        try:
            yield arrival
        finally:
            self.arriving_bytes -= arrival.num_bytes
            await self.threads.run(shutil.rmtree, path, ignore_errors=True)

    async def publish(self, arrival: Arrival, folder: str, origin: Origin) -> None:
        """Put what arrived in its place; its files must be synced. With `is_removed` nobody is
        served it before `adopt`."""
        target = self._root / HELD / folder
        try:
            await self.threads.run(_settle, arrival.path, target, origin)
        finally:
            if target.is_dir():
                self._entries[folder] = Entry(folder, origin, time.time())
                self._held_bytes += self._entries[folder].num_bytes
                if not origin.is_removed:
                    self._latest[origin.scope, origin.name] = folder

    async def make_room(self, num_bytes: int) -> None:
        """Remove entries until so many bytes more are within the budget."""
        if num_bytes > self._budget_bytes:
            raise AdapterFileTooLarge(
                f"the adapter is larger than the whole disk cache of {self._budget_bytes} bytes;"
                " raise --adapter-cache-size",
                param="model",
            )
        while self.num_bytes + num_bytes > self._budget_bytes:
            oldest = min(self._removable(), key=lambda e: e.last_used, default=None)
            if oldest is None:
                raise DiskFull(
                    "The disk cache is full of adapters in use; try again later, or raise"
                    " --adapter-cache-size",
                    retry_after_s=10,
                )
            await self.remove(oldest.folder)

    def _removable(self) -> Iterator[Entry]:
        """An upload cannot be fetched again, so it stays until it is taken away."""
        entries = (e for e in self._entries.values() if e.folder not in self._holds)
        return (e for e in entries if e.origin.kind != "upload" or e.origin.is_removed)

    async def remove(self, folder: str) -> None:
        """Take an entry away at once; its bytes go in a thread."""
        await self.threads.run(_delete, self._set_aside(folder))

    def _set_aside(self, folder: str) -> Path:
        """Nobody finds it any more; where it is to be deleted, if nobody did so by hand."""
        gone = self._root / ARRIVING / f"gone-{next(self._numbers)}"
        with suppress(FileNotFoundError):
            os.rename(self._root / HELD / folder, gone)
        self._drop(self._entries[folder])
        return gone

    def _drop(self, entry: Entry) -> None:
        del self._entries[entry.folder]
        self._held_bytes -= entry.num_bytes
        self._forget_latest(entry)

    def _forget_latest(self, entry: Entry) -> None:
        key = (entry.origin.scope, entry.origin.name)
        if self._latest.get(key) == entry.folder:
            del self._latest[key]


# -- on the disk ----------------------------------------------------------------------------


def _claim(folder: Path) -> int:
    """The marker's file, locked; the folder and its parts are made if need be."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # there may be private ones in it
        if any(folder.iterdir()) and not (folder / MARKER).is_file():
            raise CacheFolderError(f"{folder} holds other files; name an empty or a new folder")
        fd = os.open(folder / MARKER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise CacheFolderError(f"{folder} cannot be used: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for part in (ARRIVING, HELD):
            (folder / part).mkdir(exist_ok=True)
    except BlockingIOError as error:
        os.close(fd)
        raise CacheFolderError(f"{folder} is used by another server; name another") from error
    except OSError as error:
        os.close(fd)
        raise CacheFolderError(f"{folder} cannot be used: {error.strerror}") from error
    return fd


def _whole_entries(held: Path) -> Iterator[Entry]:
    """Those whose files are there at full length; anything else is removed."""
    for path in sorted(held.iterdir()):
        entry = _read_entry(path)
        if entry is None:
            _delete(path)
        else:
            yield entry


def _read_entry(path: Path) -> Entry | None:
    try:
        origin = msgspec.json.decode((path / ORIGIN).read_bytes(), type=Origin)
        names = (*FILE_NAMES, *(name for name in FURTHER_NAMES if name in origin.files))
        sizes = {name: (path / name).stat().st_size for name in names}
        used = (path / ORIGIN).stat().st_mtime
    except (OSError, msgspec.DecodeError):
        return None
    known = {name: size for name, (size, _) in origin.files.items()}
    is_good = sizes == known and origin.version == 1 and not origin.is_removed
    return Entry(path.name, origin, used) if is_good else None


def _settle(arrived: Path, target: Path, origin: Origin) -> None:
    _write_synced(arrived / ORIGIN, msgspec.json.encode(origin))
    _sync_folder(arrived)
    os.rename(arrived, target)
    _sync_folder(target.parent)


def _delete(path: Path) -> None:
    """A folder, or what somebody else has put there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _rewrite(folder: Path, origin: Origin) -> None:
    fresh = folder / f"{ORIGIN}.new"
    _write_synced(fresh, msgspec.json.encode(origin))
    os.rename(fresh, folder / ORIGIN)
    _sync_folder(folder)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

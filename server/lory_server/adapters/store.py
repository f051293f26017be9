"""Which bytes? Adapter folders under a root, found by name at the time of each request.

In: a caller's string. Out: two open files that lie inside the root, and a signature that changes
when they do. A name is never used as a path before it has been checked; no link leads out of the
root. It must not know what the files mean.
"""

import errno
import hashlib
import os
import re
import stat
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from lory_server.adapters.config import CONFIG_NAME
from lory_server.adapters.errors import AdapterInvalidError, AdapterNotFoundError
from lory_server.adapters.header import WEIGHTS_NAME
from lory_server.adapters.manner import MANIFEST_NAME
from lory_server.adapters.tokenizer_files import COMPANIONS, TOKENIZER_NAME
from lory_server.messages import FETCHED

MAX_LISTED = 100_000
MAX_REMEMBERED = 65_536
MAX_TRIES = 3
MAX_SURVEYED_DEPTH = 3
SETTLED_NS = 100_000_000
"""A file changed less than this before it was read may change again within one clock tick."""

_SEGMENT = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_ADAPTER_ID = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})?")
_FOLDER_NAME = re.compile(_SEGMENT)
_OF_THE_FOLDER = frozenset({errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG})
"""What a folder can be blamed for; anything else (no more open files, a broken disk) is ours."""

NAME_RULE = "names are one or two parts of letters, digits, '.', '_' and '-', joined by '/'"
_NUM_FACTS = 5
"""Of each file, in a signature."""
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.ckpt")

Signature = tuple[int, ...]
NO_MARK: Signature = ()


class OpenFiles(Protocol):
    """What an adapter is read from."""

    @property
    def config_fd(self) -> int: ...

    @property
    def weights_fd(self) -> int: ...

    @property
    def manifest_fd(self) -> int | None: ...

    @property
    def tokenizer_fds(self) -> Mapping[str, int]: ...


class Closing(ABC):
    """What is closed at the end of a `with` block."""

    __slots__ = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class AdapterFiles(Closing):
    """The files of an adapter, open for reading; use it in a `with` block."""

    adapter_id: str
    config_fd: int
    weights_fd: int
    manifest_fd: int | None
    """None: it has no manifest."""
    signature: Signature
    """Device, inode, size, mtime and ctime of each file; and what tells a fetched one's name from
    others, for that never stands for other bytes."""
    located_ns: int
    tokenizer_fds: Mapping[str, int] = field(default_factory=dict)
    """By name; empty: it has no tokenizer."""

    def close(self) -> None:
        for fd in self._descriptors:
            if fd is not None:
                os.close(fd)

    @property
    def _descriptors(self) -> tuple[int | None, ...]:
        named = self.tokenizer_fds.values()
        return (self.config_fd, self.weights_fd, self.manifest_fd, *named)

    def check_unchanged(self) -> None:
        """Raise if a file was written to since it was located, so that no mixture is served."""
        facts = _signature(*self._descriptors)
        if facts != self.signature[: len(facts)]:
            raise changed_error()

    @property
    def is_settled(self) -> bool:
        """False if the signature may fail to show a change made just after it was taken."""
        if len(self.signature) % _NUM_FACTS:
            return True
        changed_ns = max(self.signature[_NUM_FACTS - 1 :: _NUM_FACTS])
        return self.located_ns - changed_ns > SETTLED_NS


@dataclass(frozen=True, slots=True)
class TokenizerOnDisk(Closing):
    """Open files of a tokenizer; use it in a `with` block."""

    descriptors: Mapping[str, int]
    """By name; empty: there is none."""

    def close(self) -> None:
        for fd in self.descriptors.values():
            os.close(fd)


class AdapterStore:
    """`locate` and `list_ids` may be called by any thread; the digests belong to one."""

    def __init__(self, root: Path | None, fetched: Path | None = None) -> None:
        """Without a root there are no adapters but those below `fetched`, whose names begin with
        FETCHED."""
        self.root = root
        self.fetched = fetched
        self._revisions: OrderedDict[Signature, str] = OrderedDict()

    def locate(self, adapter_id: str) -> AdapterFiles:
        """Open an adapter's files; raises AdapterNotFoundError or AdapterInvalidError.

        An OSError is not the adapter's fault, and says nothing about it.
        """
        folder, name = self._place(adapter_id)
        mark = NO_MARK
        if name != adapter_id:
            mark = (int.from_bytes(hashlib.sha256(name.encode()).digest()),)
        if folder is None:
            raise AdapterNotFoundError("no adapters are served; start with an adapters folder")
        if not _ADAPTER_ID.fullmatch(name):
            raise AdapterNotFoundError(f"no adapter {adapter_id[:100]!r}: {NAME_RULE}")
        root = os.path.realpath(folder)
        for _ in range(MAX_TRIES):
            files = self._open(root, name, mark)
            try:
                if _is_still_there(root, files):
                    return files
            except OSError:
                files.close()
                raise
            files.close()
        raise changed_error()

    def _place(self, adapter_id: str) -> tuple[Path | None, str]:
        """The root it is below, and what it is called there."""
        if self.fetched is not None and adapter_id.startswith(FETCHED):
            return self.fetched, adapter_id.removeprefix(FETCHED)
        return self.root, adapter_id

    def _open(self, root: str, adapter_id: str, mark: Signature) -> AdapterFiles:
        with ExitStack() as opened:
            config_fd = self._open_config(root, adapter_id)
            opened.callback(os.close, config_fd)
            weights_fd = self._open_weights(root, adapter_id)
            opened.callback(os.close, weights_fd)
            manifest_fd = _open_inside(root, adapter_id, MANIFEST_NAME)
            if manifest_fd is not None:
                opened.callback(os.close, manifest_fd)
            tokenizer_fds = _open_tokenizer(root, adapter_id, opened)
            fds = (config_fd, weights_fd, manifest_fd, *tokenizer_fds.values())
            signature = (*_signature(*fds), *mark)
            opened.pop_all()
        return AdapterFiles(
            adapter_id,
            config_fd,
            weights_fd,
            manifest_fd,
            signature,
            time.time_ns(),
            tokenizer_fds,
        )

    def locate_tokenizer(self, adapter_id: str) -> "TokenizerOnDisk":
        """The same of its tokenizer alone, for which no weights are opened."""
        folder, name = self._place(adapter_id)
        if folder is None or not _ADAPTER_ID.fullmatch(name):
            return TokenizerOnDisk({})
        with ExitStack() as opened:
            descriptors = _open_tokenizer(os.path.realpath(folder), name, opened)
            opened.pop_all()
        return TokenizerOnDisk(descriptors)

    def _open_config(self, root: str, adapter_id: str) -> int:
        config_fd = _open_inside(root, adapter_id, CONFIG_NAME)
        if config_fd is None:
            raise AdapterNotFoundError(f"no adapter {adapter_id!r} in the adapters folder")
        return config_fd

    def _open_weights(self, root: str, adapter_id: str) -> int:
        weights_fd = _open_inside(root, adapter_id, WEIGHTS_NAME)
        if weights_fd is not None:
            return weights_fd
        for name in _PICKLES:
            if os.path.lexists(os.path.join(root, adapter_id, name)):
                raise AdapterInvalidError(
                    f"{name} is a pickle, and pickles are never read; save the adapter again with"
                    " save_pretrained(..., safe_serialization=True)"
                )
        if os.path.lexists(os.path.join(root, adapter_id, f"{WEIGHTS_NAME}.index.json")):
            raise AdapterInvalidError(
                f"the weights are in shards, which {WEIGHTS_NAME}.index.json lists; save them in"
                " one file: safetensors.torch.load_file each into one dict, and save_file that"
            )
        raise AdapterInvalidError(f"{WEIGHTS_NAME} is missing")

    def revision_of(self, signature: Signature) -> str | None:
        """The digest of files with this signature, if they have been read before."""
        revision = self._revisions.get(signature)
        if revision is not None:
            self._revisions.move_to_end(signature)
        return revision

    def remember(self, signature: Signature, revision: str) -> None:
        self._revisions[signature] = revision
        if len(self._revisions) > MAX_REMEMBERED:
            self._revisions.popitem(last=False)

    def list_ids(self) -> tuple[str, ...]:
        """Names of the folders, one and two levels deep, that hold a configuration; and of those
        that were fetched."""
        fetched = () if self.fetched is None else _fetched_ids(os.path.realpath(self.fetched))
        return (*self._local_ids(), *sorted(fetched))

    def _local_ids(self) -> tuple[str, ...]:
        if self.root is None:
            return ()
        root = os.path.realpath(self.root)
        found: list[str] = []
        for name in _folders(root, root):
            if _has_config(os.path.join(root, name)):
                found.append(name)
            if _may_hold_folders(os.path.join(root, name)):
                nested = (f"{name}/{leaf}" for leaf in _folders(root, os.path.join(root, name)))
                found.extend(n for n in nested if _has_config(f"{root}/{n}"))
            if len(found) >= MAX_LISTED:
                break
        return tuple(sorted(found[:MAX_LISTED]))

    def list_nameless(self) -> tuple[str, ...]:
        """Folders that hold a configuration, and that no name leads to: too deep, or misspelt.

        Hidden ones are meant to be, and what lies within an adapter belongs to it.
        """
        return () if self.root is None else tuple(sorted(_nameless(os.path.realpath(self.root))))


def _open_tokenizer(root: str, adapter_id: str, opened: ExitStack) -> dict[str, int]:
    """Companions count beside a tokenizer alone, so most adapters cost one look."""
    found: dict[str, int] = {}
    for name in (TOKENIZER_NAME, *COMPANIONS):
        fd = _open_inside(root, adapter_id, name)
        if fd is not None:
            opened.callback(os.close, fd)
            found[name] = fd
        if TOKENIZER_NAME not in found:
            break
    return found


def _fetched_ids(root: str) -> Iterator[str]:
    names = islice(_folders(root, root), MAX_LISTED)
    return (FETCHED + name for name in names if _has_config(os.path.join(root, name)))


def _is_still_there(root: str, files: AdapterFiles) -> bool:
    """Whether the name still leads to this configuration, now that the weights are open too.

    If not, the folder was replaced between the two, and they may be of different versions.
    """
    try:
        again_fd = _open_inside(root, files.adapter_id, CONFIG_NAME)
    except AdapterInvalidError:
        return False
    if again_fd is None:
        return False
    try:
        return os.path.sameopenfile(again_fd, files.config_fd)
    finally:
        os.close(again_fd)


def changed_error() -> AdapterInvalidError:
    return AdapterInvalidError(
        "changed while it was read; write a new version to another folder and rename it into place"
    )


def _open_inside(root: str, adapter_id: str, name: str) -> int | None:
    """A regular file under `root`, or None if there is none.

    Links are resolved first, and the resolved path, which has none, is walked from the root
    without following any: a link swapped in between is an error, not a way out.
    """
    try:
        real = os.path.realpath(os.path.join(root, adapter_id, name))
        if not _is_inside(root, real):
            raise AdapterInvalidError(
                f"{name} is reached by a link that leaves the adapters folder; copy the files"
                " instead"
            )
        return _open_regular(root, os.path.relpath(real, root).split(os.sep))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except _NotRegularError:
        raise AdapterInvalidError(f"{name} is not a regular file") from None
    except OSError as error:
        if error.errno not in _OF_THE_FOLDER:
            raise
        raise AdapterInvalidError(f"{name} cannot be read ({os.strerror(error.errno)})") from None


class _NotRegularError(Exception):
    pass


def _open_regular(root: str, parts: list[str]) -> int:
    folder_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            inner_fd = os.open(part, flags, dir_fd=folder_fd)
            os.close(folder_fd)
            folder_fd = inner_fd
        _check_regular(os.stat(parts[-1], dir_fd=folder_fd, follow_symlinks=False))
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        fd = os.open(parts[-1], flags, dir_fd=folder_fd)
    finally:
        os.close(folder_fd)
    try:
        _check_regular(os.fstat(fd))
    except _NotRegularError:
        os.close(fd)
        raise
    return fd


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _NotRegularError


def _signature(*fds: int | None) -> Signature:
    """Of the files that there are."""
    fields: list[int] = []
    for fd in fds:
        if fd is None:
            continue
        s = os.fstat(fd)
        fields += (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
    return tuple(fields)


def _folders(root: str, folder: str) -> Iterator[str]:
    """Names of the folders in `folder`; links are followed only inside `root`."""
    for entry in _folder_entries(folder):
        if not _FOLDER_NAME.fullmatch(entry.name):
            continue
        # What is no link lies where it is listed: of thousands, few need a look at the disk.
        if not entry.is_symlink() or _is_inside(root, os.path.realpath(entry.path)):
            yield entry.name


def _nameless(root: str, above: str = "", depth: int = 1) -> Iterator[str]:
    for entry in _folder_entries(os.path.join(root, above)):
        inner = f"{above}{entry.name}"
        folder = os.path.join(root, inner)
        if entry.name.startswith(".") or entry.is_symlink():
            continue
        if _has_config(folder):
            if not _ADAPTER_ID.fullmatch(inner):
                yield inner
        elif depth < MAX_SURVEYED_DEPTH:
            yield from _nameless(root, inner + "/", depth + 1)


def _folder_entries(folder: str) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if _is_folder(entry)]
    except OSError:
        return []  # it was removed or closed to us since it was seen: nothing to list


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link to itself, or to where we may not look; the others are listed


def _may_hold_folders(folder: str) -> bool:
    """Most adapters hold none, and most file systems count them among a folder's links: the others
    say 1. So a look into each of thousands is spared."""
    try:
        return os.stat(folder).st_nlink != 2
    except OSError:
        return False  # it was removed since it was seen


def _has_config(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, CONFIG_NAME))


def _is_inside(root: str, path: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)

"""A file being written aside: appended to, digested and judged on the way, synced at the end.

Every call may wait for a disk, so they are made from threads. It must not know where bytes come
from.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from lory_router.sources.check import FileCheck

Write = Callable[[int, memoryview], int]


class FileWriter:
    """Use it in a `with` block; without `finish` the file is not whole."""

    def __init__(self, path: Path, check: FileCheck, write: Write = os.write) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._check = check
        self._write = write
        self._digest = hashlib.sha256()
        self._is_judged = False
        self.num_bytes = 0

    def __enter__(self) -> "FileWriter":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    @property
    def fd(self) -> int:
        """To read what was written."""
        return self._fd

    def append(self, data: bytes, total_bytes: int | None) -> None:
        """Raises AdapterInvalidError as soon as the file cannot be what it should."""
        left = memoryview(data)
        while left:
            left = left[self._write(self._fd, left) :]
        self._digest.update(data)
        self.num_bytes += len(data)
        if not self._is_judged:
            self._is_judged = self._check.beginning(self._fd, self.num_bytes, total_bytes)

    def restart(self) -> None:
        """Forget what was written."""
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self._digest = hashlib.sha256()
        self._is_judged = False
        self.num_bytes = 0

    def finish(self) -> str:
        """Judge the whole, and sync it; its sha256."""
        self._check.whole(self._fd, self.num_bytes)
        os.fsync(self._fd)
        return self._digest.hexdigest()

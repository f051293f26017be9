"""What a load asks of an adapter's open files: first its manifest, then its numbers.

Files of several adapters make one that is merged from them.

Two readers do the same: one on the calling thread, one in a process of its own (reader_process),
because reading in threads beside the step takes the interpreter from it. A reader serves one load
at a time. It must not know names, budgets or tiers.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import torch

from lory_server.adapters.blob import AdapterBlob, read_blob
from lory_server.adapters.format import read_manifest
from lory_server.adapters.manifest import AdapterManifest, Base
from lory_server.adapters.merge import merged_blob, read_plan
from lory_server.adapters.merge_plan import MergePlan
from lory_server.adapters.merge_sources import Files, SourceFiles


class ReaderEndedError(RuntimeError):
    """A reader's process is gone, or might as well be; the next load starts another."""

    def __init__(self, cause: str) -> None:
        super().__init__(f"the process that reads adapters was lost: {cause}")


class Reader(Protocol):
    def begin(self) -> None:
        """Start what has not: no load is said to have taken that long."""
        ...

    def wait_until_ready(self) -> None:
        """Return when a load would not wait for the reader itself to start."""
        ...

    def manifest(self, files: Files) -> AdapterManifest:
        """Everything but the numbers; raises AdapterError."""
        ...

    def blob(self, files: Files, manifest: AdapterManifest) -> AdapterBlob:
        """The numbers of the files whose `manifest` was asked for last; AdapterError."""
        ...

    def close(self) -> None: ...


class ThreadReader:
    """Reads on the thread that asks, or on several that ask at once."""

    def __init__(self, base: Base, dtype: torch.dtype) -> None:
        self._base = base
        self._dtype = dtype

    def begin(self) -> None:
        """There is nothing to start."""

    def wait_until_ready(self) -> None:
        """There is nothing to wait for."""

    def manifest(self, files: Files) -> AdapterManifest:
        if isinstance(files, SourceFiles):
            return self._plan(files).manifest
        return read_manifest(files.config_fd, files.weights_fd, self._base, files.tokenizer_fds)

    def blob(self, files: Files, manifest: AdapterManifest) -> AdapterBlob:
        if isinstance(files, SourceFiles):
            weights_fds = [source.weights_fd for source in files.sources]
            return merged_blob(weights_fds, self._plan(files), self._dtype)
        return read_blob(files.weights_fd, manifest, self._dtype)

    def _plan(self, files: SourceFiles) -> MergePlan:
        return read_plan(files.recipe, files.sources, self._base)

    def close(self) -> None:
        """Nothing to end."""


class LateReader:
    """Is made when it is first asked for something."""

    def __init__(self, make: Callable[[], Reader]) -> None:
        self._make = make
        self._reader: Reader | None = None

    def begin(self) -> None:
        if self._reader is None:
            self._reader = self._make()
            with suppress(ReaderEndedError):
                self._reader.wait_until_ready()

    def wait_until_ready(self) -> None:
        """What has not begun is not waited for."""

    def manifest(self, files: Files) -> AdapterManifest:
        self.begin()
        assert self._reader is not None
        return self._reader.manifest(files)

    def blob(self, files: Files, manifest: AdapterManifest) -> AdapterBlob:
        assert self._reader is not None, "a manifest comes before its numbers"
        return self._reader.blob(files, manifest)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()

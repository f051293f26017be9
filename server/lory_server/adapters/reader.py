"""What a load asks of an adapter's open files: first its manifest, then its numbers.

Two readers do the same: one on the calling thread, one in a process of its own (reader_process),
because reading in threads beside the step takes the interpreter from it. A reader serves one load
at a time. It must not know names, budgets or tiers.
"""

from typing import Protocol

import torch

from lory_server.adapters.blob import AdapterBlob, read_blob
from lory_server.adapters.format import read_manifest
from lory_server.adapters.manifest import AdapterManifest, Base
from lory_server.adapters.store import AdapterFiles


class Reader(Protocol):
    def wait_until_ready(self) -> None:
        """Return when a load would not wait for the reader itself to start."""
        ...

    def manifest(self, files: AdapterFiles) -> AdapterManifest:
        """Everything but the numbers; raises AdapterInvalidError."""
        ...

    def blob(self, files: AdapterFiles, manifest: AdapterManifest) -> AdapterBlob:
        """The numbers of the files whose `manifest` was asked for last; AdapterInvalidError."""
        ...

    def close(self) -> None: ...


class ThreadReader:
    """Reads on the thread that asks."""

    def __init__(self, base: Base, dtype: torch.dtype) -> None:
        self._base = base
        self._dtype = dtype

    def wait_until_ready(self) -> None:
        """There is nothing to start."""

    def manifest(self, files: AdapterFiles) -> AdapterManifest:
        return read_manifest(files.config_fd, files.weights_fd, self._base)

    def blob(self, files: AdapterFiles, manifest: AdapterManifest) -> AdapterBlob:
        return read_blob(files.weights_fd, manifest, self._dtype)

    def close(self) -> None:
        """Nothing to end."""

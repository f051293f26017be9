"""A process that reads adapters, and the reader that asks it.

    python -m lory_server.adapters.reader_process --fd N      N: an inherited socket to the engine

Open files go over, a manifest comes back; then a piece of shared memory goes over and the numbers
are written into it. Reading on the engine's threads instead takes the interpreter from the step a
hundred times a load, and makes the step wait for a thread of low priority. It must not know names,
budgets or tiers; it opens no file by itself.
"""

import argparse
import logging
import mmap
import os
import socket
import subprocess
import sys
from typing import TypeVar

import msgspec
import torch

from lory_server.adapters.blob import AdapterBlob, new_blob, read_numbers
from lory_server.adapters.errors import AdapterInvalidError
from lory_server.adapters.format import AdapterManifest, Base, read_manifest
from lory_server.adapters.store import AdapterFiles
from lory_server.lifeline import die_with_parent

READER_NICENESS = 10
MAX_FRAME_BYTES = 64 * 1024 * 1024
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}

_log = logging.getLogger(__name__)

Reply = TypeVar("Reply")


class Begin(msgspec.Struct, frozen=True):
    base: Base
    dtype: str


class Look(msgspec.Struct, frozen=True, tag=True):
    """With the descriptors of configuration and weights."""


class Read(msgspec.Struct, frozen=True, tag=True):
    """The files looked at last, with the descriptor of the memory to write."""


class Looked(msgspec.Struct, frozen=True):
    manifest: AdapterManifest | None
    invalid: str = ""


class ReadDone(msgspec.Struct, frozen=True):
    revision: str
    invalid: str = ""


class ReaderEndedError(RuntimeError):
    """The reader's process is gone."""


class _Wire:
    """Frames of msgpack, four bytes of length before each, and descriptors beside them."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, message: msgspec.Struct, descriptors: tuple[int, ...] = ()) -> None:
        payload = msgspec.msgpack.encode(message)
        length = len(payload).to_bytes(4, "big")
        socket.send_fds(self._connection, [length], descriptors)
        self._connection.sendall(payload)

    def receive(self, num_descriptors: int) -> tuple[bytes, list[int]]:
        """The next frame; an empty one at the end of the stream."""
        length, descriptors, _, _ = socket.recv_fds(self._connection, 4, num_descriptors)
        if length:
            length += self._rest(4 - len(length))
        num_bytes = int.from_bytes(length, "big")
        if num_bytes > MAX_FRAME_BYTES:
            raise ReaderEndedError(f"a frame of {num_bytes} bytes")
        return self._rest(num_bytes), descriptors

    def _rest(self, num_bytes: int) -> bytes:
        parts: list[bytes] = []
        while num_bytes:
            part = self._connection.recv(num_bytes)
            if not part:
                raise ReaderEndedError("the stream ended within a frame")
            parts.append(part)
            num_bytes -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        self._connection.close()


class ProcessReader:
    """Asks a process of its own, which starts at once and again when it was lost."""

    def __init__(self, base: Base, dtype: torch.dtype) -> None:
        self._begin = Begin(base, str(dtype))
        self._dtype = dtype
        self._start()

    def manifest(self, files: AdapterFiles) -> AdapterManifest:
        try:
            return self._look(files)
        except (ReaderEndedError, OSError):
            self._restart()
            return self._look(files)

    def blob(self, files: AdapterFiles, manifest: AdapterManifest) -> AdapterBlob:
        try:
            return self._read(manifest)
        except (ReaderEndedError, OSError):
            self._restart()
            self._look(files)
            return self._read(manifest)

    def close(self) -> None:
        """At once: there is nothing in that process that could be lost."""
        self._wire.close()
        self._process.kill()
        self._process.wait()

    def _restart(self) -> None:
        _log.warning("the process that reads adapters was lost; another one starts")
        self.close()
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, "--fd", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
            )
        os.setpriority(os.PRIO_PROCESS, self._process.pid, READER_NICENESS)
        self._wire = _Wire(ours)
        self._wire.send(self._begin)

    def _look(self, files: AdapterFiles) -> AdapterManifest:
        looked = self._ask(Look(), (files.config_fd, files.weights_fd), Looked)
        if looked.manifest is None:
            raise AdapterInvalidError(looked.invalid)
        return looked.manifest

    def _read(self, manifest: AdapterManifest) -> AdapterBlob:
        num_bytes = manifest.num_bytes(self._dtype.itemsize)
        memory = os.memfd_create("lory-adapter", os.MFD_CLOEXEC)
        try:
            os.ftruncate(memory, num_bytes)
            done = self._ask(Read(), (memory,), ReadDone)
            if done.invalid:
                raise AdapterInvalidError(done.invalid)
            shared = mmap.mmap(memory, num_bytes)
        finally:
            os.close(memory)
        return new_blob(done.revision, manifest, torch.frombuffer(shared, dtype=self._dtype))

    def _ask(
        self, message: msgspec.Struct, descriptors: tuple[int, ...], reply: type[Reply]
    ) -> Reply:
        self._wire.send(message, descriptors)
        payload, _ = self._wire.receive(0)
        if not payload:
            raise ReaderEndedError("the process that reads adapters ended")
        return msgspec.msgpack.decode(payload, type=reply)


# -- in the process -------------------------------------------------------------------------------


def can_read_apart() -> bool:
    """Whether this system has the shared memory it takes (Linux)."""
    return hasattr(os, "memfd_create")


def main() -> int:
    parser = argparse.ArgumentParser(prog="lory_server.adapters.reader_process")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the engine")
    die_with_parent()
    torch.set_num_threads(1)
    serve(_Wire(socket.socket(fileno=parser.parse_args().fd)))
    return 0


def serve(wire: _Wire) -> None:
    """Until the engine closes its end."""
    payload, _ = wire.receive(0)
    begin = msgspec.msgpack.decode(payload, type=Begin)
    looked = _LookedAt(begin.base, _DTYPES[begin.dtype])
    decoder = msgspec.msgpack.Decoder(Look | Read)
    while True:
        payload, descriptors = wire.receive(2)
        if not payload:
            return
        if isinstance(decoder.decode(payload), Look):
            wire.send(looked.look(descriptors))
        else:
            wire.send(looked.read(descriptors[0]))


class _LookedAt:
    """The files of the load under way."""

    def __init__(self, base: Base, dtype: torch.dtype) -> None:
        self._base = base
        self._dtype = dtype
        self._files: list[int] = []
        self._manifest: AdapterManifest | None = None

    def look(self, files: list[int]) -> Looked:
        for descriptor in self._files:
            os.close(descriptor)
        self._files, self._manifest = files, None
        try:
            self._manifest = read_manifest(files[0], files[1], self._base)
        except AdapterInvalidError as error:
            return Looked(None, str(error))
        return Looked(self._manifest)

    def read(self, memory: int) -> ReadDone:
        manifest = self._manifest
        assert manifest is not None, "Look comes before Read"
        try:
            with mmap.mmap(memory, 0) as shared:
                data = torch.frombuffer(shared, dtype=self._dtype)
                try:
                    return ReadDone(read_numbers(self._files[0], self._files[1], manifest, data))
                except AdapterInvalidError as error:
                    return ReadDone("", str(error))
                finally:
                    del data
        finally:
            os.close(memory)


if __name__ == "__main__":
    raise SystemExit(main())

"""A process that reads adapters, and the reader that asks it.

    python -m lory_server.adapters.reader_process --fd N      N: an inherited socket to the engine

Open files go over, a manifest comes back; then the weights go over with a piece of shared memory,
and the numbers are written to it. Reading on the engine's threads instead takes the interpreter
from the step a hundred times a load. The process has low priority, as no thread of the engine can
have. It must not know names, budgets or tiers; it opens no file by itself, and keeps none.
"""

import argparse
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import torch
from torch import Tensor

from lory_server import low_priority
from lory_server.adapters.blob import AdapterBlob, new_blob, read_numbers
from lory_server.adapters.config import CONFIG_NAME
from lory_server.adapters.errors import AdapterError, error_of
from lory_server.adapters.format import read_manifest
from lory_server.adapters.header import WEIGHTS_NAME
from lory_server.adapters.manifest import AdapterManifest, Base
from lory_server.adapters.manner import MANIFEST_NAME
from lory_server.adapters.merge import merge_numbers, read_plan
from lory_server.adapters.merge_plan import MergePlan
from lory_server.adapters.merge_sources import Files, SourceFiles
from lory_server.adapters.reader import ReaderEndedError
from lory_server.adapters.store import OpenFiles, changed_error
from lory_server.adapters.tokenizer_files import COMPANIONS
from lory_server.giving_way import giving_way
from lory_server.lifeline import die_with_parent
from lory_server.messages import FailureCode
from lory_server.recipes import MAX_SOURCES, Recipe

ANSWER_TIMEOUT_S = 60.0
"""A reader silent for longer (stopped, stuck on a disk) is replaced; numbers have more time:"""

SLOWEST_BYTES_PER_S = 4 * 1024 * 1024
MAX_SCRATCH_BYTES = 64 * 1024 * 1024
"""Kept by a reader between adapters."""
WRITE_BYTES = 64 * 1024
MAX_FILES = 4 + len(COMPANIONS)
"""Of one adapter. Those of all sources of a merge go over at once; the system takes 253."""

MAX_FRAME_BYTES = 64 * 1024 * 1024
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}

_log = logging.getLogger(__name__)


class Begin(msgspec.Struct, frozen=True):
    base: Base
    dtype: str


class Look(msgspec.Struct, frozen=True, tag=True):
    """With the descriptors of configuration and weights, and of FURTHER files, of one adapter or of
    each source of a merge in turn."""

    further: tuple[tuple[str, ...], ...]
    """Names of those that each has."""
    recipe: Recipe | None = None
    """None: of one adapter, as it is."""


class Read(msgspec.Struct, frozen=True, tag=True):
    """Of what was looked at last, with the descriptors of weights and, last, of the memory to
    write."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Comes once, before anything was asked."""


class Looked(msgspec.Struct, frozen=True, tag=True):
    manifest: AdapterManifest


class ReadDone(msgspec.Struct, frozen=True, tag=True):
    revision: str


class Invalid(msgspec.Struct, frozen=True, tag=True):
    """The adapter is refused."""

    reason: str
    code: FailureCode
    source: str
    """Of a merge, the adapter to blame."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The system refused, for no fault of the adapter."""

    errno: int
    reason: str


Reply = Ready | Looked | ReadDone | Invalid | Failed
Expected = TypeVar("Expected", Ready, Looked, ReadDone)


class _Wire:
    """Frames of msgpack, four bytes of length before each, and descriptors beside them.

    A wire that fails is of no more use, whatever the cause: all are ReaderEndedError.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, message: msgspec.Struct, descriptors: tuple[int, ...] = ()) -> None:
        payload = msgspec.msgpack.encode(message)
        length = len(payload).to_bytes(4, "big")
        try:
            socket.send_fds(self._connection, [length], descriptors)
            self._connection.sendall(payload)
        except OSError as error:
            raise ReaderEndedError(str(error)) from error

    def receive(self, num_descriptors: int = 0) -> tuple[bytes, list[int]]:
        """The next frame; an empty one at the end of the stream."""
        try:
            return self._receive(num_descriptors)
        except OSError as error:
            raise ReaderEndedError(str(error)) from error

    def _receive(self, num_descriptors: int) -> tuple[bytes, list[int]]:
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

    def set_timeout(self, timeout_s: float) -> None:
        """For each part of a frame that comes or goes."""
        self._connection.settimeout(timeout_s)

    def close(self) -> None:
        self._connection.close()


class ProcessReader:
    """Asks a process of its own, which starts at once and again when it was lost."""

    def __init__(self, base: Base, dtype: torch.dtype) -> None:
        self._begin = Begin(base, str(dtype))
        self._dtype = dtype
        self._is_closed = False
        self._start()

    def begin(self) -> None:
        """It has begun."""

    def wait_until_ready(self) -> None:
        """The process has imported what it needs, and it knows the base; ReaderEndedError."""
        if not self._is_ready:
            self._answer(Ready)
            self._is_ready = True

    def manifest(self, files: Files) -> AdapterManifest:
        try:
            return self._look(files)
        except ReaderEndedError as error:
            self._restart(error)
            return self._look(files)

    def blob(self, files: Files, manifest: AdapterManifest) -> AdapterBlob:
        try:
            return self._read(files, manifest)
        except ReaderEndedError as error:
            self._restart(error)
            if self._look(files) != manifest:
                raise changed_error() from error
            return self._read(files, manifest)

    def close(self) -> None:
        """At once: there is nothing in that process that could be lost."""
        self._is_closed = True
        self._end()

    def _end(self) -> None:
        self._wire.close()
        self._process.kill()
        self._process.wait()

    def _restart(self, cause: ReaderEndedError) -> None:
        if self._is_closed:
            raise cause
        # As text: whoever keeps the record would keep the frames, and the blob that is read next.
        _log.warning("%s; another one starts", str(cause))
        self._end()
        self._start()

    def _start(self) -> None:
        self._is_ready = False
        ours, theirs = socket.socketpair()
        self._wire = _Wire(ours)
        self._wire.set_timeout(ANSWER_TIMEOUT_S)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, "--fd", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        low_priority.lower(self._process.pid)
        self._wire.send(self._begin)

    def _look(self, files: Files) -> AdapterManifest:
        is_merge = isinstance(files, SourceFiles)
        opened = [_by_name(one) for one in (files.sources if is_merge else (files,))]
        further = tuple(tuple(one)[2:] for one in opened)
        descriptors = tuple(descriptor for one in opened for descriptor in one.values())
        command = Look(further, files.recipe if is_merge else None)
        return self._ask(command, descriptors, Looked, ANSWER_TIMEOUT_S).manifest

    def _read(self, files: Files, manifest: AdapterManifest) -> AdapterBlob:
        memory = os.memfd_create("lory-adapter", os.MFD_CLOEXEC)
        try:
            os.ftruncate(memory, manifest.num_bytes(self._dtype.itemsize))
            patience_s = ANSWER_TIMEOUT_S + manifest.file_bytes / SLOWEST_BYTES_PER_S
            sources = files.sources if isinstance(files, SourceFiles) else (files,)
            descriptors = (*(source.weights_fd for source in sources), memory)
            done = self._ask(Read(), descriptors, ReadDone, patience_s)
            return new_blob(done.revision, manifest, _mapped(memory, self._dtype))
        finally:
            os.close(memory)

    def _ask(
        self,
        message: msgspec.Struct,
        descriptors: tuple[int, ...],
        expected: type[Expected],
        timeout_s: float,
    ) -> Expected:
        self.wait_until_ready()
        self._wire.set_timeout(timeout_s)
        self._wire.send(message, descriptors)
        return self._answer(expected)

    def _answer(self, expected: type[Expected]) -> Expected:
        payload, _ = self._wire.receive()
        if not payload:
            raise ReaderEndedError("it ended")
        reply = msgspec.msgpack.decode(payload, type=Reply)
        if isinstance(reply, Invalid):
            raise error_of(reply.code, reply.reason, reply.source)
        if isinstance(reply, Failed):
            raise OSError(reply.errno, reply.reason)
        assert isinstance(reply, expected)
        return reply


def _by_name(files: OpenFiles) -> dict[str, int]:
    """Configuration and weights first."""
    found = {CONFIG_NAME: files.config_fd, WEIGHTS_NAME: files.weights_fd}
    if files.manifest_fd is not None:
        found[MANIFEST_NAME] = files.manifest_fd
    return found | dict(files.tokenizer_fds)


def _mapped(memory: int, dtype: torch.dtype) -> Tensor:
    """All of it, shared, and without a descriptor: Python's mmap would keep one as long as the
    mapping lives, an open file for each adapter on the host."""
    numel = os.fstat(memory).st_size // dtype.itemsize
    return torch.from_file(f"/proc/self/fd/{memory}", shared=True, size=numel, dtype=dtype)


# -- in the process -------------------------------------------------------------------------------


def can_read_apart() -> bool:
    """Whether this system has the shared memory it takes (Linux)."""
    return hasattr(os, "memfd_create")


def main() -> int:
    parser = argparse.ArgumentParser(prog="lory_server.adapters.reader_process")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the engine")
    die_with_parent()
    torch.set_num_threads(1)
    try:
        serve(_Wire(socket.socket(fileno=parser.parse_args().fd)))
    except ReaderEndedError:
        return 1  # the engine is gone in the middle of a frame: nobody is left to be told
    return 0


def serve(wire: _Wire) -> None:
    """Until the engine closes its end, be it before the first word."""
    payload, _ = wire.receive()
    if not payload:
        return
    begin = msgspec.msgpack.decode(payload, type=Begin)
    work = _Work(begin.base, _DTYPES[begin.dtype])
    decoder = msgspec.msgpack.Decoder(Look | Read)
    wire.send(Ready())
    while True:
        payload, descriptors = wire.receive(MAX_FILES * MAX_SOURCES)
        if not payload:
            return
        wire.send(work.do(decoder.decode(payload), descriptors))


@dataclass(frozen=True, slots=True)
class _Received:
    """Files as `_by_name` sent them."""

    config_fd: int
    weights_fd: int
    manifest_fd: int | None
    tokenizer_fds: dict[str, int]


def _received(further: tuple[str, ...], descriptors: Iterator[int]) -> _Received:
    config_fd, weights_fd = next(descriptors), next(descriptors)
    others = dict(zip(further, descriptors, strict=False))
    return _Received(config_fd, weights_fd, others.pop(MANIFEST_NAME, None), others)


def _write(memory: int, data: Tensor) -> None:
    """Whole pages written are never cleared first, as pages are that a mapping touches. A piece at
    a time: nobody gives way within a system call."""
    rest = data.view(torch.uint8).numpy().data
    while rest:
        rest = rest[os.write(memory, rest[:WRITE_BYTES]) :]


class _Work:
    """Two steps for each adapter; what is open for one is closed when it ends."""

    def __init__(self, base: Base, dtype: torch.dtype) -> None:
        self._base = base
        self._dtype = dtype
        self._looked: AdapterManifest | MergePlan | None = None
        self._kept = torch.empty(0, dtype=dtype)

    def do(self, command: Look | Read, descriptors: list[int]) -> Reply:
        try:
            with giving_way():
                if isinstance(command, Look):
                    return self._look(command, descriptors)
                return self._read(*descriptors)
        except AdapterError as error:
            return Invalid(str(error), error.code, error.source)
        except OSError as error:
            return Failed(error.errno or 0, error.strerror or str(error))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _look(self, command: Look, descriptors: list[int]) -> Looked:
        rest = iter(descriptors)
        opened = [_received(names, rest) for names in command.further]
        if command.recipe is None:
            (one,) = opened
            self._looked = manifest = read_manifest(
                one.config_fd, one.weights_fd, self._base, one.tokenizer_fds
            )
            return Looked(manifest)
        self._looked = plan = read_plan(command.recipe, opened, self._base)
        return Looked(plan.manifest)

    def _read(self, *descriptors: int) -> ReadDone:
        *weights_fds, memory = descriptors
        looked = self._looked
        assert looked is not None, "Look comes before Read"
        if isinstance(looked, MergePlan):
            data = self._scratch(looked.manifest.num_bytes(self._dtype.itemsize))
            revision = merge_numbers(weights_fds, looked, data)
        else:
            data = self._scratch(looked.num_bytes(self._dtype.itemsize))
            revision = read_numbers(weights_fds[0], looked, data)
        _write(memory, data)
        return ReadDone(revision)

    def _scratch(self, num_bytes: int) -> Tensor:
        """Zeros. The same memory each time: touching what the kernel has yet to clear was a third
        of a read, and a kernel that clears gives way to nobody."""
        numel = num_bytes // self._dtype.itemsize
        if num_bytes > MAX_SCRATCH_BYTES:
            return torch.zeros(numel, dtype=self._dtype)
        if numel > self._kept.numel():
            self._kept = torch.empty(numel, dtype=self._dtype)
        return self._kept[:numel].zero_()


if __name__ == "__main__":
    raise SystemExit(main())

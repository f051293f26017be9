"""One file from a source to a writer: bounded, resumed where it broke, checked against its promise.

    ask -> [bytes -> writer]* -> cut or silent? -> ask for the rest -> ... -> length, sha256

It must not know what an adapter is, or where its files will lie.
"""

import asyncio
import random
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

import httpx

from lory_router.errors import AdapterFileTooLarge, AdapterInvalid, SourceUnavailable
from lory_router.sources.client import Changed, Interrupted, SourceClient
from lory_router.sources.source import RemoteFile, size_of
from lory_router.sources.threads import DiskThreads
from lory_router.sources.writer import FileWriter
from lory_server.adapters.errors import AdapterInvalidError

MAX_IDLE_TRIES = 3
"""In a row that brought no byte."""
MAX_TRIES = 40
LONGEST_PAUSE_S = 5.0

_RANGE = re.compile(r"bytes (?P<first>[0-9]{1,18})-[0-9]{1,18}/(?P<total>[0-9]{1,18}|\*)")


@dataclass(frozen=True, slots=True)
class Pace:
    """What counts as too much and as too slow."""

    most_bytes: int
    stall_s: float
    min_bytes_per_s: float
    retry_pause_s: float


Told = Callable[[int, int | None], Awaitable[None]]
"""Told of a file's bytes so far, and in the end if known, before more are written."""


@dataclass(frozen=True, slots=True)
class Download:
    """One file to be fetched, and all that is needed for it."""

    file: RemoteFile
    writer: FileWriter
    client: SourceClient
    threads: DiskThreads
    pace: Pace
    told: Told

    async def run(self) -> str:
        """All of the file; its sha256. Raises an ApiError, or Changed."""
        try:
            await self._receive_all()
            return await self._finish()
        except AdapterInvalidError as error:
            raise AdapterInvalid(str(error), param="model") from error

    async def _receive_all(self) -> None:
        started, num_idle = time.monotonic(), 0
        for num_tries in range(1, MAX_TRIES + 1):
            before = self.writer.num_bytes
            try:
                await self._receive()
                return
            except Interrupted as error:
                num_idle = 1 if self.writer.num_bytes > before else num_idle + 1
                if num_tries == MAX_TRIES or num_idle >= MAX_IDLE_TRIES:
                    raise self._gave_up(started, error) from error
            pause_s = self.pace.retry_pause_s * 2 ** (num_idle - 1) * random.uniform(0.5, 1.5)
            await asyncio.sleep(min(pause_s, LONGEST_PAUSE_S))

    def _gave_up(self, started: float, error: Exception) -> SourceUnavailable:
        seconds, num_bytes = time.monotonic() - started, self.writer.num_bytes
        text = (
            f"{self.file.name} could not be fetched: {error}; {num_bytes} bytes in {seconds:.1f} s"
        )
        return SourceUnavailable(text, retry_after_s=5)

    async def _receive(self) -> None:
        """What is left of the file, in one request."""
        file, writer = self.file, self.writer
        if not file.is_resumable:
            writer.restart()
        ask = replace(file.ask, headers=file.conditions(writer.num_bytes))
        async with self.client.get(ask) as response:
            total = _begin(response, file, writer)
            self._check_size(total or 0)
            async with aclosing(_pieces(response, self.pace)) as pieces:
                async for data in pieces:
                    num_bytes = writer.num_bytes + len(data)
                    self._check_size(num_bytes)
                    await self.told(num_bytes, total)
                    await self.threads.run(writer.append, data, total)
        if total is not None and writer.num_bytes < total:
            raise Interrupted(f"it ended {total - writer.num_bytes} bytes before its end")

    def _check_size(self, num_bytes: int) -> None:
        most = self.pace.most_bytes
        if num_bytes > most:
            raise AdapterFileTooLarge(
                f"{self.file.name} is larger than {most} bytes; --max-adapter-size is the most that"
                " is fetched",
                param="model",
            )

    async def _finish(self) -> str:
        file, num_bytes = self.file, self.writer.num_bytes
        if file.num_bytes is not None and num_bytes != file.num_bytes:
            raise SourceUnavailable(
                f"{file.name}: its source told of {file.num_bytes} bytes and sent {num_bytes}"
            )
        digest = await self.threads.run(self.writer.finish)
        if file.sha256 and digest != file.sha256:
            raise SourceUnavailable(
                f"{file.name}: its source tells the sha256 {file.sha256}, what it sent has {digest}"
            )
        return digest


def _begin(response: httpx.Response, file: RemoteFile, writer: FileWriter) -> int | None:
    """Make the writer stand where the response begins; the file's bytes in the end, if told."""
    _check_same(response, file)
    if response.status_code == 206:
        found = _RANGE.fullmatch(response.headers.get("content-range", ""))
        if found is None or int(found["first"]) != writer.num_bytes:
            writer.restart()
            raise Interrupted("it sent another range than was asked for")
        return None if found["total"] == "*" else int(found["total"])
    writer.restart()
    if response.status_code == 416:
        raise Interrupted("it has no such range")
    return size_of(response.headers.get("content-length", ""))


def _check_same(response: httpx.Response, file: RemoteFile) -> None:
    etag = response.headers.get("etag", "")
    comparable = file.validator.startswith('"') and etag.startswith('"')
    if comparable and etag != file.validator and not file.is_pinned:
        raise Changed


async def _pieces(response: httpx.Response, pace: Pace) -> AsyncGenerator[bytes, None]:
    """The body as it comes, as long as it does not come too slowly."""
    began, num_bytes = time.monotonic(), 0
    async for data in response.aiter_raw():
        yield data
        num_bytes += len(data)
        seconds = time.monotonic() - began
        if seconds >= pace.stall_s:
            if num_bytes < pace.min_bytes_per_s * seconds:
                raise Interrupted(f"it sent {num_bytes} bytes in {seconds:.1f} s, and has stalled")
            began, num_bytes = time.monotonic(), 0

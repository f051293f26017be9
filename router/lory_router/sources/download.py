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
from lory_router.sources.source import RemoteFile
from lory_router.sources.threads import in_thread
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


async def download(
    file: RemoteFile, writer: FileWriter, client: SourceClient, pace: Pace, told: Told
) -> str:
    """All of `file`; its sha256. Raises an ApiError, or Changed."""
    started, num_idle = time.monotonic(), 0
    for _ in range(MAX_TRIES):
        before = writer.num_bytes
        try:
            await _receive(file, writer, client, pace, told)
            break
        except Interrupted as error:
            num_idle = 1 if writer.num_bytes > before else num_idle + 1
            if num_idle >= MAX_IDLE_TRIES:
                raise _gave_up(file, writer, started, error) from error
        except AdapterInvalidError as error:
            raise AdapterInvalid(str(error), param="model") from error
        pause_s = pace.retry_pause_s * 2 ** (num_idle - 1) * random.uniform(0.5, 1.5)
        await asyncio.sleep(min(pause_s, LONGEST_PAUSE_S))
    else:
        raise _gave_up(file, writer, started, Interrupted(f"cut {MAX_TRIES} times"))
    return await _finish(file, writer)


def _gave_up(
    file: RemoteFile, writer: FileWriter, started: float, error: Exception
) -> SourceUnavailable:
    seconds = time.monotonic() - started
    text = f"{file.name} could not be fetched: {error}; {writer.num_bytes} bytes in {seconds:.1f} s"
    return SourceUnavailable(text, retry_after_s=5)


async def _finish(file: RemoteFile, writer: FileWriter) -> str:
    if file.num_bytes is not None and writer.num_bytes != file.num_bytes:
        raise SourceUnavailable(
            f"{file.name}: its source told of {file.num_bytes} bytes and sent {writer.num_bytes}"
        )
    try:
        digest = await in_thread(writer.finish)
    except AdapterInvalidError as error:
        raise AdapterInvalid(str(error), param="model") from error
    if file.sha256 and digest != file.sha256:
        raise SourceUnavailable(
            f"{file.name}: its source tells the sha256 {file.sha256}, what it sent has {digest}"
        )
    return digest


async def _receive(
    file: RemoteFile, writer: FileWriter, client: SourceClient, pace: Pace, told: Told
) -> None:
    """What is left of the file, in one request."""
    if not file.is_resumable:
        writer.restart()
    ask = replace(file.ask, headers=file.conditions(writer.num_bytes))
    async with client.get(ask) as response:
        total = _begin(response, file, writer)
        if total is not None and total > pace.most_bytes:
            raise _too_large(file, pace)
        async with aclosing(_pieces(response, pace)) as pieces:
            async for data in pieces:
                if writer.num_bytes + len(data) > pace.most_bytes:
                    raise _too_large(file, pace)
                await told(writer.num_bytes + len(data), total)
                await in_thread(writer.append, data, total)
    if total is not None and writer.num_bytes < total:
        raise Interrupted(f"it ended {total - writer.num_bytes} bytes before its end")


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
    length = response.headers.get("content-length", "")
    return int(length) if length.isdigit() and len(length) < 19 else None


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


def _too_large(file: RemoteFile, pace: Pace) -> AdapterFileTooLarge:
    return AdapterFileTooLarge(
        f"{file.name} is larger than {pace.most_bytes} bytes; --max-adapter-size is the most that"
        " is fetched",
        param="model",
    )

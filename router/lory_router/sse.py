"""Server-sent events: chunks of bytes to one streamed reply, with status, keep-alives and an end.

It must not know what the events say.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

import msgspec

from lory_router.engine import Unavailable
from lory_router.errors import ApiError, ClientGone, Dialect, InternalError, from_unavailable
from lory_router.exchange import Exchange, Headers, end_task

KEEP_ALIVE = b":\n\n"
DONE = b"data: [DONE]\n\n"
PREFIX: dict[Dialect, bytes] = {"lorax": b"data:", "openai": b"data: "}
EVENT_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

_encode = msgspec.json.Encoder().encode


def event(value: object, dialect: Dialect) -> bytes:
    return PREFIX[dialect] + _encode(value) + b"\n\n"


Opened = tuple[AsyncGenerator[bytes, None], Headers]
"""What a stream says, and its headers."""


async def reply_events(exchange: Exchange, opened: Callable[[], Awaitable[Opened]]) -> None:
    """Stream what is `opened`, which may take as long as an adapter is on its way. What fails
    before the first chunk, or before the headers must go, is raised while the reply still can have
    its own status; later failures become one last event. Headers that are not known when they must
    go are left out."""
    headers: dict[str, str] = {}
    async with aclosing(_chunks(opened, headers)) as chunks:
        first = asyncio.ensure_future(anext(chunks))
        try:
            await asyncio.wait((first,), timeout=exchange.settings.first_token_header_wait_s)
            if first.done():
                first.result()
            await exchange.start(200, "text/event-stream", {**EVENT_HEADERS, **headers})
            await _Writer(exchange).run(first, chunks)
        finally:
            await end_task(first)


async def _chunks(
    opened: Callable[[], Awaitable[Opened]], headers: dict[str, str]
) -> AsyncGenerator[bytes, None]:
    said, known = await opened()
    headers.update(known)
    async with aclosing(said):
        async for chunk in said:
            yield chunk


class _Writer:
    """The body of a reply that has begun."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._lock = asyncio.Lock()
        self._wrote_at = time.monotonic()

    async def run(
        self, first: "asyncio.Future[bytes]", chunks: AsyncGenerator[bytes, None]
    ) -> None:
        if not first.done():
            await self._write(KEEP_ALIVE)
        comments = asyncio.ensure_future(self._keep_alive())
        try:
            await self._write(await first)
            async for chunk in chunks:
                await self._write(chunk)
        except ClientGone:
            raise
        except Exception as error:
            await end_task(comments)
            await self._write_error(error)
            raise
        finally:
            await end_task(comments)
        await self._exchange.write(b"", more=False)

    async def _write(self, chunk: bytes) -> None:
        async with self._lock:
            await self._exchange.write(chunk, more=True)
            self._wrote_at = time.monotonic()

    async def _keep_alive(self) -> None:
        silence_s = self._exchange.settings.keepalive_s
        while True:
            left_s = silence_s - (time.monotonic() - self._wrote_at)
            if left_s > 0:
                await asyncio.sleep(left_s)
            else:
                await self._write(KEEP_ALIVE)

    async def _write_error(self, error: Exception) -> None:
        told = shown_error(error)
        body = event(told.body_for(self._exchange.dialect), self._exchange.dialect)
        await self._write(body)
        await self._exchange.write(b"", more=False)


def shown_error(error: Exception) -> ApiError:
    """What the caller is told; of our own bugs no more than that there is one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Unavailable):
        return from_unavailable(error)
    return InternalError("Internal error; the server's log has the details")

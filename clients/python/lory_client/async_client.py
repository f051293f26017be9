"""`AsyncClient`: the same calls as `Client`, for asyncio (or another loop, given its `sleep`).

Safe to share between tasks of one loop. This module must not know JSON, routes or which errors
there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from datetime import datetime, timezone
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar

import httpx

from . import replies, wire
from .adapters import AsyncAdapters
from .errors import LoryError, UnavailableError
from .retry import RetryPolicy
from .streams import StreamReader
from .transport import Endpoint, Timeout, build_request, head_of, httpx_errors, stream_errors
from .types import (
    ChatCompletion,
    ChatDelta,
    ChatMessage,
    ChatParameters,
    GenerateParameters,
    Generation,
    Model,
    Prompt,
    ServerInfo,
    TextToken,
    Token,
)

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

Item = TypeVar("Item")
Result = TypeVar("Result")

_NO_RETRIES = RetryPolicy(max_retries=0)


class AsyncStream(Generic[Item, Result]):
    """An iterator over a reply as it comes. The request is sent at the first `next`.

    The connection is closed at the end, at `aclose`, on leaving an `async with` block, and when a
    loop that was left early drops the stream; the server then stops generating.
    """

    def __init__(
        self, send: Callable[[], Awaitable[httpx.Response]], reader: StreamReader[Item, Result]
    ) -> None:
        self._reader = reader
        # The generator must not know this object: a cycle would delay the closing.
        self._items = _read(send, reader)

    def __aiter__(self) -> AsyncIterator[Item]:
        return self

    async def __anext__(self) -> Item:
        return await self._items.__anext__()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._items.aclose()

    @property
    def request_id(self) -> str | None:
        """The reply's `x-request-id`; None before the first item."""
        return self._reader.request_id


class AsyncGenerationStream(AsyncStream[Token, Generation]):
    """Tokens as they are generated; `generation` once they have all come."""

    @property
    def generation(self) -> Generation:
        return self._reader.result()


class AsyncChatStream(AsyncStream[ChatDelta, ChatCompletion]):
    """Pieces of a chat as they are generated; `completion` once they have all come."""

    @property
    def completion(self) -> ChatCompletion:
        return self._reader.result()


class AsyncClient:
    """A Lory server, as awaitable calls. Close it, or use it in an `async with` block."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8080",
        api_key: str | None = None,
        timeout: Timeout = 60.0,
        max_retries: int = 2,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`timeout` is in seconds and bounds each wait for bytes, not the whole answer.

        `transport` and `sleep` are how tests, proxies and other schedulers take part.
        """
        endpoint = Endpoint.parse(base_url, api_key, timeout)
        self._retry = RetryPolicy(max_retries)
        self._sleep = sleep
        self._http = httpx.AsyncClient(
            base_url=endpoint.base_url,
            headers=endpoint.headers,
            timeout=endpoint.timeout,
            transport=transport,
        )
        self.adapters = AsyncAdapters(self._send)
        """What is served and kept in memory, for operators."""

    # -- generation --

    async def generate(
        self,
        prompt: Prompt,
        adapter_id: str | None = None,
        *,
        timeout: Timeout | None = None,
        **parameters: Unpack[GenerateParameters],
    ) -> Generation:
        """Continue `prompt` with an adapter, or with the base if none is named."""
        return await self._send(wire.generate(prompt, adapter_id, parameters), timeout)

    def generate_stream(
        self,
        prompt: Prompt,
        adapter_id: str | None = None,
        *,
        timeout: Timeout | None = None,
        **parameters: Unpack[GenerateParameters],
    ) -> AsyncGenerationStream:
        """The same, token by token."""
        call = wire.generate_stream(prompt, adapter_id, parameters)
        send = partial(self._open, call, timeout, self._retry)
        return AsyncGenerationStream(send, StreamReader(call.assemble))

    async def chat(
        self,
        messages: Iterable[ChatMessage],
        adapter_id: str | None = None,
        *,
        timeout: Timeout | None = None,
        **parameters: Unpack[ChatParameters],
    ) -> ChatCompletion:
        """Answer a conversation, put into words by the server's chat template."""
        return await self._send(wire.chat(messages, adapter_id, parameters), timeout)

    def chat_stream(
        self,
        messages: Iterable[ChatMessage],
        adapter_id: str | None = None,
        *,
        timeout: Timeout | None = None,
        **parameters: Unpack[ChatParameters],
    ) -> AsyncChatStream:
        """The same, piece by piece."""
        call = wire.chat_stream(messages, adapter_id, parameters)
        send = partial(self._open, call, timeout, self._retry)
        return AsyncChatStream(send, StreamReader(call.assemble))

    # -- the server --

    async def models(self) -> tuple[Model, ...]:
        """The base and the adapters that this caller may name."""
        return await self._send(wire.models())

    async def health(self) -> bool:
        """Whether the server takes requests; raises if nothing answers at all."""
        try:
            return await self._send(wire.health(), retry=_NO_RETRIES)
        except UnavailableError:
            return False

    async def info(self) -> ServerInfo:
        return await self._send(wire.info())

    async def tokenize(
        self, text: str, add_special_tokens: bool = True, *, adapter_id: str | None = None
    ) -> tuple[TextToken, ...]:
        return await self._send(wire.tokenize(text, add_special_tokens, adapter_id))

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    # -- sending --

    async def _send(
        self,
        call: wire.Call[Result],
        timeout: Timeout | None = None,
        retry: RetryPolicy | None = None,
    ) -> Result:
        response = await self._open(call, timeout, retry or self._retry)
        with httpx_errors():
            async with _closing(response):
                body = await response.aread()
        head = head_of(response)
        with replies.named(head):
            return call.parse(head, body)

    async def _open(
        self, call: wire.AnyCall, timeout: Timeout | None, retry: RetryPolicy
    ) -> httpx.Response:
        """A reply whose status is a success and whose body is still to be read."""
        attempt = 0
        while True:
            try:
                return await self._attempt(call, timeout)
            except LoryError as error:
                delay_s = retry.delay_s(attempt, error)
                if delay_s is None:
                    raise
            await self._sleep(delay_s)
            attempt += 1

    async def _attempt(self, call: wire.AnyCall, timeout: Timeout | None) -> httpx.Response:
        with httpx_errors():
            response = await self._http.send(build_request(self._http, call, timeout), stream=True)
            if response.is_success:
                return response
            async with _closing(response):
                body = await response.aread()
        raise replies.status_error(head_of(response), body, datetime.now(timezone.utc))


async def _read(
    send: Callable[[], Awaitable[httpx.Response]], reader: StreamReader[Item, Result]
) -> AsyncGenerator[Item, None]:
    response = await send()
    async with _closing(response):
        reader.start(head_of(response))
        with stream_errors(reader):
            async for chunk in response.aiter_bytes():
                for item in reader.feed(chunk):
                    yield item
        reader.result()


@asynccontextmanager
async def _closing(response: httpx.Response) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await response.aclose()

"""`Client`: blocking calls. It sends what `wire` builds, waits, and hands replies back to it.

Safe to share between threads. This module must not know JSON, routes or which errors there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from datetime import datetime, timezone
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar

import httpx

from . import replies, wire
from .adapters import Adapters
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


class Stream(Generic[Item, Result]):
    """An iterator over a reply as it comes. The request is sent at the first `next`.

    The connection is closed at the end, at `close`, on leaving a `with` block, and when a loop
    that was left early drops the stream; the server then stops generating.
    """

    def __init__(
        self, send: Callable[[], httpx.Response], reader: StreamReader[Item, Result]
    ) -> None:
        self._reader = reader
        # The generator must not know this object: a cycle would delay the closing.
        self._items = _read(send, reader)

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        return next(self._items)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._items.close()

    @property
    def request_id(self) -> str | None:
        """The reply's `x-request-id`; None before the first item."""
        return self._reader.request_id


class GenerationStream(Stream[Token, Generation]):
    """Tokens as they are generated; `generation` once they have all come."""

    @property
    def generation(self) -> Generation:
        return self._reader.result()


class ChatStream(Stream[ChatDelta, ChatCompletion]):
    """Pieces of a chat as they are generated; `completion` once they have all come."""

    @property
    def completion(self) -> ChatCompletion:
        return self._reader.result()


class Client:
    """A Lory server, as blocking calls. Close it, or use it in a `with` block."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8080",
        api_key: str | None = None,
        timeout: Timeout = 60.0,
        max_retries: int = 2,
        *,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`timeout` is in seconds and bounds each wait for bytes, not the whole answer.

        `transport` and `sleep` are how tests, proxies and other schedulers take part.
        """
        endpoint = Endpoint.parse(base_url, api_key, timeout)
        self._retry = RetryPolicy(max_retries)
        self._sleep = sleep
        self._http = httpx.Client(
            base_url=endpoint.base_url,
            headers=endpoint.headers,
            timeout=endpoint.timeout,
            transport=transport,
        )
        self.adapters = Adapters(self._send)
        """What is served and kept in memory, for operators."""

    # -- generation --

    def generate(
        self,
        prompt: Prompt,
        adapter_id: str | None = None,
        *,
        timeout: Timeout | None = None,
        **parameters: Unpack[GenerateParameters],
    ) -> Generation:
        """Continue `prompt` with an adapter, or with the base if none is named."""
        return self._send(wire.generate(prompt, adapter_id, parameters), timeout)

    def generate_stream(
        self,
        prompt: Prompt,
        adapter_id: str | None = None,
        *,
        timeout: Timeout | None = None,
        **parameters: Unpack[GenerateParameters],
    ) -> GenerationStream:
        """The same, token by token."""
        call = wire.generate_stream(prompt, adapter_id, parameters)
        send = partial(self._open, call, timeout, self._retry)
        return GenerationStream(send, StreamReader(call.assemble))

    def chat(
        self,
        messages: Iterable[ChatMessage],
        adapter_id: str | None = None,
        *,
        timeout: Timeout | None = None,
        **parameters: Unpack[ChatParameters],
    ) -> ChatCompletion:
        """Answer a conversation, put into words by the server's chat template."""
        return self._send(wire.chat(messages, adapter_id, parameters), timeout)

    def chat_stream(
        self,
        messages: Iterable[ChatMessage],
        adapter_id: str | None = None,
        *,
        timeout: Timeout | None = None,
        **parameters: Unpack[ChatParameters],
    ) -> ChatStream:
        """The same, piece by piece."""
        call = wire.chat_stream(messages, adapter_id, parameters)
        send = partial(self._open, call, timeout, self._retry)
        return ChatStream(send, StreamReader(call.assemble))

    # -- the server --

    def models(self) -> tuple[Model, ...]:
        """The base and the adapters that this caller may name."""
        return self._send(wire.models())

    def health(self) -> bool:
        """Whether the server takes requests; raises if nothing answers at all."""
        try:
            return self._send(wire.health(), retry=_NO_RETRIES)
        except UnavailableError:
            return False

    def info(self) -> ServerInfo:
        return self._send(wire.info())

    def tokenize(
        self, text: str, add_special_tokens: bool = True, *, adapter_id: str | None = None
    ) -> tuple[TextToken, ...]:
        return self._send(wire.tokenize(text, add_special_tokens, adapter_id))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- sending --

    def _send(
        self,
        call: wire.Call[Result],
        timeout: Timeout | None = None,
        retry: RetryPolicy | None = None,
    ) -> Result:
        response = self._open(call, timeout, retry or self._retry)
        with closing(response), httpx_errors():
            body = response.read()
        head = head_of(response)
        with replies.named(head):
            return call.parse(head, body)

    def _open(
        self, call: wire.AnyCall, timeout: Timeout | None, retry: RetryPolicy
    ) -> httpx.Response:
        """A reply whose status is a success and whose body is still to be read."""
        attempt = 0
        while True:
            try:
                return self._attempt(call, timeout)
            except LoryError as error:
                delay_s = retry.delay_s(attempt, error)
                if delay_s is None:
                    raise
            self._sleep(delay_s)
            attempt += 1

    def _attempt(self, call: wire.AnyCall, timeout: Timeout | None) -> httpx.Response:
        with httpx_errors():
            response = self._http.send(build_request(self._http, call, timeout), stream=True)
            if response.is_success:
                return response
            with closing(response):
                body = response.read()
        raise replies.status_error(head_of(response), body, datetime.now(timezone.utc))


def _read(
    send: Callable[[], httpx.Response], reader: StreamReader[Item, Result]
) -> Generator[Item, None, None]:
    response = send()
    with closing(response):
        reader.start(head_of(response))
        with stream_errors(reader):
            for chunk in response.iter_bytes():
                yield from reader.feed(chunk)
        reader.result()

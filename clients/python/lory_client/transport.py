"""What both clients share about httpx: its options, its errors, and the head of a reply.

Nothing here sends or waits. This module must not know what a body means.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Union

import httpx

from .errors import ConnectionFailedError, IncompleteStreamError, ProtocolError, ReplyTimeoutError
from .replies import Head
from .streams import StreamReader
from .wire import AnyCall

Timeout = Union[float, httpx.Timeout]

MAX_CONNECT_S = 5.0

# The request was never sent: to send it again cannot generate anything twice.
_UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


@dataclass(frozen=True)
class Endpoint:
    """Where the server is, and how to speak to it."""

    base_url: httpx.URL
    headers: dict[str, str]
    timeout: httpx.Timeout

    @classmethod
    def parse(cls, base_url: str, api_key: str | None, timeout: Timeout) -> Endpoint:
        url = httpx.URL(base_url)
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"base_url should be like http://127.0.0.1:8080, got {base_url!r}")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        return cls(url, headers, as_httpx_timeout(timeout))


def as_httpx_timeout(timeout: Timeout) -> httpx.Timeout:
    """Seconds bound each wait for bytes; a server that does not accept is given up sooner."""
    if isinstance(timeout, httpx.Timeout):
        return timeout
    return httpx.Timeout(timeout, connect=min(timeout, MAX_CONNECT_S))


def build_request(
    http: httpx.Client | httpx.AsyncClient, call: AnyCall, timeout: Timeout | None
) -> httpx.Request:
    options: dict[str, Any] = {} if timeout is None else {"timeout": as_httpx_timeout(timeout)}
    headers = {} if call.body is None else {"content-type": call.content_type}
    return http.build_request(call.method, call.path, content=call.body, headers=headers, **options)


def head_of(response: httpx.Response) -> Head:
    return Head(response.status_code, dict(response.headers))


@contextmanager
def httpx_errors() -> Iterator[None]:
    """Turns what httpx raises inside into this package's errors."""
    try:
        yield
    except httpx.DecodingError as error:
        raise ProtocolError(f"the reply's content encoding is broken: {error}") from error
    except httpx.TransportError as error:
        raise _connection_error(error) from error


@contextmanager
def stream_errors(reader: StreamReader[Any, Any]) -> Iterator[None]:
    """The same once a stream has begun: a connection that breaks leaves an incomplete stream."""
    try:
        with httpx_errors():
            yield
    except ConnectionFailedError as error:
        if reader.is_complete:
            return
        error.request_id = reader.request_id
        if isinstance(error, ReplyTimeoutError):
            raise
        message = f"the stream broke off before its final event: {error.message}"
        raise IncompleteStreamError(message, request_id=reader.request_id) from error


def _connection_error(error: httpx.TransportError) -> ConnectionFailedError:
    server = error.request.url.netloc.decode("ascii")
    retryable = isinstance(error, _UNSENT)
    if isinstance(error, httpx.TimeoutException):
        what = "connection" if retryable else "reply"
        return ReplyTimeoutError(f"no {what} from {server} in time", retryable=retryable)
    reason = str(error) or type(error).__name__
    return ConnectionFailedError(f"no reply from {server}: {reason}", retryable=retryable)

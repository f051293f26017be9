"""One HTTP connection and the server of all: uvicorn's, with the bounds that a public door needs.

A header has seconds to arrive, a reader who stalls is cut off, bytes pipelined behind a request
never hide that its client has left, nobody has the event loop for long at a time, and a connection
too many is told so. What is not HTTP is refused in JSON.

The end of a client's bytes is taken as the end of the client: TCP does not tell who has only
finished sending from who has left. It must not know routes, requests or what replies say.
"""

import asyncio
import contextlib
import socket
import struct
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import h11
import msgspec
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from lory_router.errors import ApiError, BadHttp, HeaderTooLarge, TooManyConnections
from lory_router.exchange import error_headers
from lory_router.framing import (
    MAX_HEADER_BYTES,
    MAX_HEADER_FIELDS,
    MIN_MEAN_CHUNK_BYTES,
    BoundedHttp,
    ChunksTooSmall,
)

BACKLOG = 128
BODY_READ_BYTES = 16 * 1024
FRAMES_READ_BYTES = 2 * 1024
"""Of each connection in a turn of the loop: less of headers and chunks, each of which takes some
7 us. asyncio's own 256 KiB are a third of a second of the smallest chunks."""
MAX_PIPELINED_BYTES = 64 * 1024
"""Read ahead of a running request, so that the end of its connection is seen behind them."""
FLUSH_GRACE_S = 2.0
"""How long replies that have ended may take to leave when the server stops."""
RETRY_AFTER_S = 2
AT_ONCE = struct.pack("ii", 1, 0)
"""Linger on, for no time: closing resets."""


class _Deadline:
    """Does something unless stopped in time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, action: Callable[[], None]) -> None:
        self._loop = loop
        self._action = action
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_set(self) -> bool:
        return self._timer is not None

    def start(self, timeout_s: float) -> None:
        self.stop()
        self._timer = self._loop.call_later(timeout_s, self._action)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Connection(H11Protocol, asyncio.BufferedProtocol):
    """One client's connection; `limit_concurrency` is the most of them."""

    header_timeout_s = 10.0
    """From connecting, or from the first byte of a later request, to the end of its header."""
    send_timeout_s = 30.0
    """How long a client may leave a full buffer unread."""
    linger_s = 30.0
    """How long the last bytes of a closed connection may take to leave."""
    refused_s = 2.0
    """How long a refused client may go on sending: closed at once, it might never see why."""
    keep_alive_s = 5
    """How long a connection may be idle between requests."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = BoundedHttp()
        self._most, self.limit_concurrency = self.limit_concurrency, None
        self._inner_app: ASGIApp = self.app  # type: ignore[assignment]
        self.app = self._answer  # type: ignore[assignment]
        self._arrival = _Deadline(self.loop, self._hang_up)
        self._departure = _Deadline(self.loop, self.cut)
        self._incoming = bytearray()
        self._is_refused = False

    def _hang_up(self) -> None:
        self.transport.abort()

    def cut(self) -> None:
        """End the connection now; the kernel does not keep what is unsent either."""
        accepted = self.transport.get_extra_info("socket")
        if not self.transport.is_closing() or self.transport.get_write_buffer_size():
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
        self.transport.abort()

    # -- requests come in -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._most is not None and len(self.connections) > self._most:
            told = TooManyConnections("Too many connections are open", retry_after_s=RETRY_AFTER_S)
            self._tell(told)
            self.transport.close()
            self._linger()
        else:
            self._arrival.start(self.header_timeout_s)

    def get_buffer(self, sizehint: int) -> bytearray:
        plain = self.conn.is_in_plain_body
        self._incoming = bytearray(BODY_READ_BYTES if plain else FRAMES_READ_BYTES)
        return self._incoming

    def buffer_updated(self, nbytes: int) -> None:
        data, self._incoming = self._incoming, bytearray()
        self.data_received(bytes(memoryview(data)[:nbytes]))

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        super().data_received(data)
        if self._is_refused:
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._arrival.stop()
            self._read_ahead()
        elif not self._arrival.is_set:
            self._arrival.start(self.header_timeout_s)

    def _read_ahead(self) -> None:
        """uvicorn stops reading at a pipelined request, and would not see the client leave."""
        if self.flow.read_paused and not self.cycle.more_body:
            if len(self.conn.trailing_data[0]) > MAX_PIPELINED_BYTES:
                self.cut()
            else:
                self.flow.resume_reading()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A reply that stays unfinished, its request cancelled or given up, ends the connection."""
        cycle = self.cycle
        with contextlib.suppress(asyncio.CancelledError):
            await self._inner_app(scope, receive, send)
        if cycle.response_started and not cycle.response_complete:
            self.cut()
            cycle.disconnected = True

    def send_400_response(self, msg: str) -> None:
        """What uvicorn does about a request that is not HTTP, told as all errors are."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.cut()
            return
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.waiting_for_100_continue = False
            self.cycle.message_event.set()
        self._tell(_told(sys.exception()))
        self._is_refused = True
        self.transport.write_eof()
        self.flow.resume_reading()
        self._arrival.start(self.refused_s)

    def eof_received(self) -> None:
        self.transport.close()
        self._linger()

    def _tell(self, error: ApiError) -> None:
        body = msgspec.json.encode(error.body_for("lorax"))
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            "x-request-id": uuid.uuid4().hex,
            **error_headers(error),
        }
        response = h11.Response(
            status_code=error.status,
            headers=list(headers.items()),
            reason=STATUS_PHRASES[error.status],
        )
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")

    # -- replies go out ---------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._departure.start(self.send_timeout_s)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._departure.stop()
        self._linger()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._linger()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._linger()

    def shutdown(self) -> None:
        """The server stops: running replies may end, what has not even arrived may not."""
        super().shutdown()
        if self.cycle is not None and self.cycle.more_body and not self.cycle.response_started:
            self.cut()
        self._linger()

    def _linger(self) -> None:
        if self.transport.is_closing() and not self._departure.is_set:
            self._departure.start(self.linger_s)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._arrival.stop()
        self._departure.stop()


def _told(error: BaseException | None) -> ApiError:
    if isinstance(error, ChunksTooSmall):
        least = f"{MIN_MEAN_CHUNK_BYTES} bytes on average"
        return BadHttp(f"The body's chunks are too small; send {least}, or a Content-Length")
    if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
        most = f"{MAX_HEADER_BYTES} bytes and {MAX_HEADER_FIELDS} fields"
        return HeaderTooLarge(f"The request's header is too large; send at most {most}")
    return BadHttp("The request is not valid HTTP/1.1")


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers; once told to end it waits for nobody for long."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: Any = None) -> None:
        cutting = asyncio.get_running_loop().call_later(FLUSH_GRACE_S, self._cut_all)
        await super().shutdown(sockets)
        cutting.cancel()

    def _cut_all(self) -> None:
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.cut()


def http_server(
    app: ASGIApp, max_connections: int, protocol: type[Connection] = Connection
) -> HttpServer:
    """The server of `app`, to be run on a listening socket."""
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        limit_concurrency=max_connections,
        timeout_keep_alive=protocol.keep_alive_s,
        timeout_graceful_shutdown=int(2 * FLUSH_GRACE_S),
    )
    return HttpServer(config)

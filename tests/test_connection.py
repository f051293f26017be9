"""Connections of strangers: slow, silent, too many, gone, or not speaking HTTP."""

import asyncio
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from lory_router.connection import (
    BODY_READ_BYTES,
    FRAMES_READ_BYTES,
    MAX_PIPELINED_BYTES,
    Connection,
)
from scripted_engine import Answer, Front, wait_until

GENERATE = {"inputs": "ab"}
ENDLESS = Answer(b"x", repeats=True, ends=False, delay_s=0.01, hangs=True)
SILENT = Answer(b"", ends=False, hangs=True)
HALF_HEADER = b"POST /generate HTTP/1.1\r\nhost: x\r\nx-a"
HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


class Impatient(Connection):
    header_timeout_s = 0.3
    send_timeout_s = 0.3
    linger_s = 0.3
    keep_alive_s = 1


def serving(app: ASGIApp) -> Front:
    """A front whose application does something else."""
    front = Front()
    front.app = app
    return front


async def start_reply(send: Send, *headers: tuple[bytes, bytes]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": list(headers)})


async def write(send: Send, body: bytes, more: bool = False) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


def errors_in(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.ERROR]


def spied(made: list[Connection], kind: type[Connection] = Connection) -> type[Connection]:
    """`kind`, whose connections are added to `made`."""

    class Spied(kind):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            made.append(self)

    return Spied


@contextmanager
def connection(url: str) -> Iterator[socket.socket]:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as wire:
        yield wire


def post(path: str, body: Any, *more: str) -> bytes:
    content = json.dumps(body).encode()
    lines = (f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(content)}", *more)
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def read_to_end(wire: socket.socket) -> bytes:
    parts: list[bytes] = []
    try:
        while part := wire.recv(1 << 16):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


def sends_on(wire: socket.socket) -> bool:
    try:
        wire.sendall(b"more")
    except ConnectionError:
        return False
    return True


def read_404(wire: socket.socket) -> None:
    data = b""
    while b'"not_found"}' not in data:
        data += wire.recv(4096)
    assert data.startswith(b"HTTP/1.1 404")


def reply_of(data: bytes) -> tuple[int, dict[str, str], Any]:
    head, _, body = data.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return int(status.split()[1]), headers, json.loads(body)


# -- headers that do not come ---------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", HALF_HEADER, b"G"])
def test_a_connection_without_a_whole_header_is_closed_in_time(sent: bytes):
    with Front().served(Impatient) as url, connection(url) as wire:
        start = time.monotonic()
        wire.sendall(sent)
        assert read_to_end(wire) == b""
        assert 0.2 < time.monotonic() - start < 2


def test_a_header_that_dribbles_has_no_longer():
    with Front().served(Impatient) as url, connection(url) as wire:
        start = time.monotonic()
        wire.settimeout(0.05)
        wire.sendall(HALF_HEADER)
        while True:
            wire.sendall(b"b")
            try:
                assert wire.recv(1) == b""
                break
            except TimeoutError:
                assert time.monotonic() - start < 2
            except ConnectionError:
                break


def test_half_a_second_header_is_closed_in_time():
    with Front().served(Impatient) as url, connection(url) as wire:
        wire.sendall(HEALTH)
        assert wire.recv(4096).startswith(b"HTTP/1.1 200")
        start = time.monotonic()
        wire.sendall(HALF_HEADER)
        assert read_to_end(wire) == b""
        assert time.monotonic() - start < 2


def test_a_body_that_dribbles_behind_its_reply_is_closed_in_time():
    with Front().served(Impatient) as url, connection(url) as wire:
        wire.sendall(b"POST /nothing HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n")
        read_404(wire)
        start = time.monotonic()
        wire.sendall(b"a")
        assert read_to_end(wire) == b""
        assert time.monotonic() - start < 2


def test_a_body_and_an_answer_may_take_longer_than_a_header():
    front = Front(Answer(b"a", delay_s=0.5))
    with front.served(Impatient) as url, connection(url) as wire:
        request = post("/generate", GENERATE, "connection: close")
        wire.sendall(request[:-3])
        time.sleep(0.5)
        wire.sendall(request[-3:])
        assert reply_of(read_to_end(wire))[0] == 200


def test_an_idle_connection_is_closed_in_time():
    with Front().served(Impatient) as url, connection(url) as wire:
        wire.sendall(HEALTH)
        start = time.monotonic()
        assert read_to_end(wire).startswith(b"HTTP/1.1 200")
        assert time.monotonic() - start < 3


def test_no_stranger_has_longer_than_half_a_minute_for_anything():
    given = (
        Connection.header_timeout_s,
        Connection.send_timeout_s,
        Connection.linger_s,
        Connection.refused_s,
        Connection.keep_alive_s,
    )
    assert max(given) <= 30


# -- the event loop is everybody's ----------------------------------------------------------


def test_a_turn_of_the_loop_reads_little_of_a_body_and_less_of_what_is_parsed():
    """A read of 256 KiB was a third of a second of one-byte chunks."""
    sizes: list[int] = []

    class Spied(Connection):
        def data_received(self, data: bytes) -> None:
            sizes.append(len(data))
            super().data_received(data)

    def largest(url: str, data: bytes) -> int:
        sizes.clear()
        with connection(url) as wire:
            wire.sendall(data)
            wire.recv(1)
        return max(sizes)

    long = {"inputs": "a" * 500_000}
    head, _, body = post("/generate", long, "connection: close").partition(b"\r\n\r\n")
    framing = f"content-length: {len(body)}".encode()
    chunked = head.replace(framing, b"transfer-encoding: chunked") + b"\r\n\r\n"
    with Front().served(Spied) as url:
        assert largest(url, head + b"\r\n\r\n" + body) <= BODY_READ_BYTES
        assert (
            largest(url, chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
            <= FRAMES_READ_BYTES
        )


def test_a_flood_of_tiny_chunks_is_refused_and_its_sender_told():
    front = Front()
    with front.served() as url, connection(url) as wire:
        wire.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(100):
            wire.sendall(b"1\r\n \r\n" * 100)
        wire.shutdown(socket.SHUT_WR)
        status, _, reply = reply_of(read_to_end(wire))
        assert (status, reply["error_type"]) == (400, "bad_http")
        assert "chunks are too small" in reply["error"]
    assert not front.engine.streams


def test_a_body_nobody_reads_is_not_taken_in():
    made: list[Connection] = []

    async def wait(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.5)
        await start_reply(send)
        await write(send, b"")

    with serving(wait).served(spied(made)) as url, connection(url) as wire:
        wire.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
        wire.sendall(b"a" * 1_000_000)
        wait_until(lambda: bool(made and made[0].cycle and made[0].cycle.body))
        time.sleep(0.2)
        assert len(made[0].cycle.body) <= 64 * 1024 + BODY_READ_BYTES
        assert wire.recv(4096).startswith(b"HTTP/1.1 200")


# -- pipelined bytes ------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
@pytest.mark.parametrize("pause_s", [0.0, 0.1])
def test_bytes_behind_a_request_do_not_hide_that_its_client_left(path: str, pause_s: float):
    front = Front(SILENT)
    with front.served() as url:
        with connection(url) as wire:
            wire.sendall(post(path, GENERATE))
            time.sleep(pause_s)
            wire.sendall(HEALTH + HALF_HEADER)
            wait_until(lambda: bool(front.engine.streams))
        wait_until(lambda: bool(front.engine.streams[0].cancels), timeout_s=2)
        wait_until(lambda: bool(front.ledger.records), timeout_s=2)
    assert front.ledger.records[0].outcome == "cancelled"


def test_who_sends_too_much_behind_a_request_is_cut_off():
    front = Front(SILENT)
    with front.served() as url, connection(url) as wire:
        wire.sendall(post("/generate", GENERATE))
        wire.sendall(HEALTH + b"x" * (2 * MAX_PIPELINED_BYTES))
        assert read_to_end(wire) == b""
        wait_until(lambda: bool(front.ledger.records), timeout_s=2)
    assert front.ledger.records[0].outcome == "cancelled"


def test_pipelined_requests_are_answered_in_order():
    front = Front(Answer(b"a", delay_s=0.1), Answer(b"b"))
    with front.served() as url, connection(url) as wire:
        last = post("/generate", GENERATE, "connection: close")
        wire.sendall(post("/generate", GENERATE) + HEALTH + last)
        replies = read_to_end(wire)
    assert replies.count(b"HTTP/1.1 200") == 3
    assert replies.index(b'"a"') < replies.index(b'"b"')


# -- too many -------------------------------------------------------------------------------


def test_a_connection_too_many_is_told_so_and_there_is_room_again():
    with Front().served(max_connections=2) as url:
        with connection(url), connection(url) as second, connection(url) as third:
            second.sendall(HEALTH)
            assert second.recv(4096).startswith(b"HTTP/1.1 200")
            status, headers, reply = reply_of(read_to_end(third))
            assert (status, reply["error_type"]) == (503, "too_many_connections")
            assert (headers["retry-after"], headers["connection"]) == ("2", "close")

        def is_served() -> bool:
            with connection(url) as wire:
                wire.sendall(HEALTH)
                return wire.recv(4096).startswith(b"HTTP/1.1 200")

        wait_until(is_served)


def test_no_more_connections_are_held_than_open_files_allow():
    script = (
        "import resource as r\n"
        "from lory_router.listener import SPARE_FILES, room_for_connections\n"
        "r.setrlimit(r.RLIMIT_NOFILE, (100, SPARE_FILES + 30))\n"
        "print(room_for_connections(20), room_for_connections(50))\n"
        "print(r.getrlimit(r.RLIMIT_NOFILE)[0] - SPARE_FILES)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout.split() == [b"20", b"30", b"30"]
    assert b"at most 30 connections instead of 50; raise ulimit -n" in done.stderr


# -- readers --------------------------------------------------------------------------------


def flooding() -> Front:
    flood = Answer(b"x" * 1024, repeats=True, ends=False, batch=256, delay_s=0.001, hangs=True)
    front = Front(flood)
    assert front.engine.info is not None
    front.engine.info = msgspec.structs.replace(front.engine.info, max_model_len=10_000_000)
    return front


def test_a_client_that_stops_reading_is_cut_off_and_its_socket_with_it(
    caplog: pytest.LogCaptureFixture,
):
    front = flooding()
    with front.served(Impatient) as url, connection(url) as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.sendall(post("/generate_stream", GENERATE))
        wait_until(lambda: bool(front.ledger.records), timeout_s=10)
        wire.settimeout(2)
        assert not read_to_end(wire).endswith(b"0\r\n\r\n")
    assert front.engine.streams[0].cancels == ["cancelled"]
    assert front.ledger.records[0].outcome == "cancelled"
    assert not errors_in(caplog)


def test_a_stopping_server_waits_for_neither_a_stuck_reader_nor_half_a_body(
    caplog: pytest.LogCaptureFixture,
):
    front = flooding()
    with front.served() as url, connection(url) as reader, connection(url) as sender:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.sendall(post("/generate_stream", GENERATE))
        sender.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{")
        wait_until(lambda: len(front.ledger.started) == 2)
        time.sleep(0.3)
        start = time.monotonic()
        front.stop()
        assert read_to_end(sender) == b""
        assert time.monotonic() - start < 1
        wait_until(lambda: len(front.ledger.records) == 2)
        assert time.monotonic() - start < 3.5
    assert {record.outcome for record in front.ledger.records} == {"cancelled"}
    assert not errors_in(caplog)


async def fill(made: list[Connection], send: Send) -> None:
    """Write until something is left that the client has no room for."""
    while not made[0].transport.get_write_buffer_size():
        await write(send, b"a" * 4096, more=True)


def test_the_rest_of_a_closed_connection_that_nobody_reads_is_dropped_in_time():
    made: list[Connection] = []

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await start_reply(send, (b"connection", b"close"))
        await fill(made, send)
        await write(send, b"end")

    with serving(answer).served(spied(made, Impatient)) as url, connection(url) as wire:
        wire.sendall(HEALTH)
        wait_until(lambda: bool(made) and made[0].transport.is_closing())
        assert made[0].transport.get_write_buffer_size()
        wait_until(lambda: not made[0].transport.get_write_buffer_size(), timeout_s=2)
        assert not read_to_end(wire).endswith(b"0\r\n\r\n")


def test_a_client_that_left_bytes_unread_is_noticed_in_time():
    made: list[Connection] = []
    is_noticed = threading.Event()

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await start_reply(send)
        await fill(made, send)
        while (await receive())["type"] != "http.disconnect":
            pass
        is_noticed.set()

    with serving(answer).served(spied(made, Impatient)) as url, connection(url) as wire:
        wire.sendall(HEALTH)
        wait_until(lambda: bool(made) and made[0].transport.get_write_buffer_size() > 0)
        wire.shutdown(socket.SHUT_WR)
        assert is_noticed.wait(2)


def test_a_reply_that_stays_unfinished_ends_its_connection(caplog: pytest.LogCaptureFixture):
    """A client that waits for the rest would do so for ever."""

    async def give_up(scope: Scope, receive: Receive, send: Send) -> None:
        await start_reply(send)
        await write(send, b"the half of", more=True)

    with serving(give_up).served() as url, connection(url) as wire:
        wire.sendall(HEALTH)
        assert not read_to_end(wire).endswith(b"0\r\n\r\n")
    assert not errors_in(caplog)


def test_a_reply_that_has_begun_may_end_though_its_request_has_not():
    async def early(scope: Scope, receive: Receive, send: Send) -> None:
        await start_reply(send)
        await write(send, b"begun", more=True)
        await asyncio.sleep(0.4)
        await write(send, b" and ended")

    front = serving(early)
    with front.served() as url, connection(url) as wire:
        wire.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{")
        data = wire.recv(4096)
        front.stop()
        assert (data + read_to_end(wire)).endswith(b" and ended\r\n0\r\n\r\n")


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_client_that_ends_its_side_has_left(path: str):
    """The end of its bytes looks the same from one that has gone, whose tokens nobody reads."""
    front = Front(SILENT)
    with front.served() as url, connection(url) as wire:
        wire.sendall(post(path, GENERATE))
        wait_until(lambda: bool(front.engine.streams))
        wire.shutdown(socket.SHUT_WR)
        assert read_to_end(wire) == b""
        wait_until(lambda: bool(front.ledger.records), timeout_s=1)
    assert front.engine.streams[0].cancels == ["cancelled"]
    assert front.ledger.records[0].outcome == "cancelled"


# -- what is not HTTP -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "status", "kind"),
    [
        (b"what?\r\n\r\n", 400, "bad_http"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "bad_http"),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", 400, "bad_http"),
        (b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"a" * 100_000, 431, "header_too_large"),
        (post("/generate", GENERATE, "transfer-encoding: chunked"), 400, "bad_http"),
    ],
    ids=["no request line", "no host", "negative length", "large header", "two lengths"],
)
def test_what_is_not_http_is_refused_as_all_errors_are(data: bytes, status: int, kind: str):
    front = Front()
    with front.served() as url, connection(url) as wire:
        wire.sendall(data)
        told, headers, reply = reply_of(read_to_end(wire))
    assert (told, reply["error_type"], set(reply)) == (status, kind, {"error", "error_type"})
    assert (headers["content-type"], headers["connection"]) == ("application/json", "close")
    assert len(headers["x-request-id"]) == 32
    assert not front.engine.streams


def test_a_bad_chunk_in_the_middle_of_an_answer_ends_only_that_connection(
    caplog: pytest.LogCaptureFixture,
):
    """A reply that had begun was followed by a second status line, which h11 refuses with a
    traceback."""
    with Front(ENDLESS).served() as url, connection(url) as wire:
        wire.sendall(b"POST /nothing HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        read_404(wire)
        wire.sendall(b"zz\r\nbroken\r\n")
        assert read_to_end(wire) == b""
    assert not errors_in(caplog)


@pytest.mark.parametrize(
    "parts",
    [
        [b"x-a: " + b"a" * 60_000 + b"\r\n\r\n"],
        [b"x-a: ", *[b"a" * 15_000] * 4, b"\r\n\r\n"],
        [b"a: b\r\n" * 9000 + b"\r\n"],
        [b"a: b\r\n" * 101 + b"\r\n"],
    ],
    ids=["at one go", "in parts", "thousands of fields", "a field too many"],
)
def test_a_header_too_large_is_told_so_however_it_is_sent(parts: list[bytes]):
    """In one packet it was served, and in several its sender saw a broken pipe."""
    with Front().served() as url, connection(url) as wire:
        wire.sendall(b"GET /health HTTP/1.1\r\n")
        for part in (b"host: x\r\n", *parts):
            wire.sendall(part)
            time.sleep(0.05)
        status, _, reply = reply_of(read_to_end(wire))
    assert (status, reply["error_type"]) == (431, "header_too_large")
    assert "at most 16384 bytes and 100 fields" in reply["error"]


CHUNKED = b"POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
BAD_CHUNK = b"zz\r\n"


@pytest.mark.parametrize("sent", [b"what?\r\n\r\n", CHUNKED + BAD_CHUNK])
def test_a_refused_client_may_go_on_sending_for_a_while_and_no_longer(sent: bytes):
    class Strict(Connection):
        refused_s = 1.0

    with Front().served(Strict) as url, connection(url) as wire:
        start = time.monotonic()
        wire.sendall(sent)
        assert reply_of(read_to_end(wire))[0] == 400
        assert time.monotonic() - start < 0.8
        while sends_on(wire):
            assert time.monotonic() - start < 3
            time.sleep(0.02)
        assert time.monotonic() - start > 0.8


def test_a_refused_client_that_leaves_is_forgotten_though_nobody_read_its_body():
    made: list[Connection] = []

    async def wait(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.2)

    with serving(wait).served(spied(made)) as url:
        with connection(url) as wire:
            wait_until(lambda: bool(made))
            body = b"10001\r\n" + b"a" * 0x10001 + b"\r\n"
            feed, data = made[0].data_received, CHUNKED + body + BAD_CHUNK
            made[0].loop.call_soon_threadsafe(feed, data)
            assert reply_of(read_to_end(wire))[0] == 400
        wait_until(made[0].transport.is_closing, timeout_s=1)


def test_a_bad_chunk_of_a_request_wakes_who_reads_it():
    front = Front()
    with front.served() as url, connection(url) as wire:
        wire.sendall(CHUNKED)
        wait_until(lambda: bool(front.ledger.started))
        time.sleep(0.1)
        wire.sendall(BAD_CHUNK)
        wait_until(lambda: bool(front.ledger.records), timeout_s=1)
        assert reply_of(read_to_end(wire))[0] == 400
    assert front.ledger.records[0].outcome == "cancelled"


def test_a_refused_client_is_not_asked_to_continue(caplog: pytest.LogCaptureFixture):
    front = Front()
    with front.served() as url, connection(url) as wire:
        wire.sendall(CHUNKED[:-2] + b"expect: 100-continue\r\n\r\n" + BAD_CHUNK)
        assert reply_of(read_to_end(wire))[0] == 400
    assert front.ledger.records[0].outcome == "cancelled"
    assert not errors_in(caplog)


def test_peers_that_vanish_are_noticed_by_the_kernel():
    if sys.platform != "linux":
        pytest.skip("TCP_USER_TIMEOUT is Linux's")
    from lory_router.listener import listen

    with listen("127.0.0.1", 0) as listener, socket.socket() as client:
        client.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30

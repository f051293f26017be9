"""The engine's end of the socket: frames in order, whole, whatever the router's pace."""

import socket
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from lory_server.channel import Channel
from lory_server.messages import Fatal

NUM_EVENTS = 300
TEXT = "x" * 20_000
"""Together far more than the socket holds."""


@pytest.fixture
def router() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    channel = Channel(ours, lambda: None)
    # Not the thread that reads: it ends the process when the other end is closed.
    channel._writer.start()
    with ours, theirs:
        yield channel, theirs


def read_exactly(connection: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        parts += connection.recv(count - len(parts))
    return bytes(parts)


def read_event(connection: socket.socket) -> Fatal:
    length = int.from_bytes(read_exactly(connection, 4), "big")
    return msgspec.msgpack.decode(read_exactly(connection, length), type=Fatal)


def test_frames_arrive_whole_and_in_order_though_the_router_reads_late(
    router: tuple[Channel, socket.socket],
) -> None:
    channel, theirs = router
    began_s = time.monotonic()
    for number in range(NUM_EVENTS):
        channel.send(Fatal(message=f"{number} {TEXT}"))
    assert time.monotonic() - began_s < 5
    for number in range(NUM_EVENTS):
        assert read_event(theirs).message == f"{number} {TEXT}"
    channel.send(Fatal(message="last"))
    assert read_event(theirs).message == "last"


def test_flush_waits_for_the_wire_and_no_longer_than_told(
    router: tuple[Channel, socket.socket],
) -> None:
    channel, theirs = router
    channel.send(Fatal(message="short"))
    channel.flush(timeout_s=0)
    assert read_event(theirs).message == "short"
    for _ in range(NUM_EVENTS):
        channel.send(Fatal(message=TEXT))
    began_s = time.monotonic()
    channel.flush(timeout_s=0.2)
    assert time.monotonic() - began_s >= 0.2
    reader = threading.Thread(target=lambda: [read_event(theirs) for _ in range(NUM_EVENTS)])
    reader.start()
    channel.flush(timeout_s=30)
    reader.join(30)
    assert not reader.is_alive()


def test_what_the_socket_takes_is_sent_by_the_caller(
    router: tuple[Channel, socket.socket],
) -> None:
    channel, theirs = router
    theirs.setblocking(False)
    channel.send(Fatal(message="now"))
    assert theirs.recv(4) != b""

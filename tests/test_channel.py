"""The engine's end of the socket: frames in order, whole, whatever the router's pace."""

import socket
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from lory_server import channel as channels
from lory_server.channel import EXIT_BAD_FRAME, EXIT_ROUTER_GONE, EXIT_ROUTER_STUCK, Channel
from lory_server.messages import MAX_FRAME_BYTES, Fatal

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


class ProcessEnded(BaseException):
    """Stands for the end of the process; its argument is the exit code."""


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(code: int) -> None:
        raise ProcessEnded(code)

    monkeypatch.setattr(channels.os, "_exit", end)


def frame(payload: bytes, length: int | None = None) -> bytes:
    return (len(payload) if length is None else length).to_bytes(4, "big") + payload


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (b"", EXIT_ROUTER_GONE),
        (frame(b"abc", length=100), EXIT_ROUTER_GONE),
        (frame(b"", length=MAX_FRAME_BYTES + 1), EXIT_BAD_FRAME),
        (frame(b"\xc1"), EXIT_BAD_FRAME),
        (frame(msgspec.msgpack.encode({"type": "Dance"})), EXIT_BAD_FRAME),
    ],
    ids=["nothing", "half a frame", "a frame too large", "no msgpack", "no command"],
)
@pytest.mark.usefixtures("ends")
def test_a_router_that_is_gone_or_not_understood_ends_the_process(said: bytes, code: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(said)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(ProcessEnded) as ended:
            Channel(ours, lambda: None)._read_all()
    assert ended.value.args == (code,)


@pytest.mark.usefixtures("ends")
def test_a_router_that_reads_too_slowly_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "MAX_QUEUED_EVENTS", 2)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(ours, lambda: None)
        channel.send(Fatal(message=TEXT * NUM_EVENTS))
        channel.send(Fatal(message="waits behind it"))
        with pytest.raises(ProcessEnded) as ended:
            channel.send(Fatal(message="one too many"))
    assert ended.value.args == (EXIT_ROUTER_STUCK,)


@pytest.mark.usefixtures("ends")
def test_a_router_that_left_ends_the_process_at_the_next_event() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, pytest.raises(ProcessEnded) as ended:
        Channel(ours, lambda: None).send(Fatal(message="too late"))
    assert ended.value.args == (EXIT_ROUTER_GONE,)

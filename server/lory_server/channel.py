"""The engine's end of the socket to its router: frames in, frames out.

A frame is a 4-byte big-endian length and one msgpack message. Reading, and waiting for a router
that reads slowly, never happen on the thread that steps; but what the socket takes at once is
written by it, because another thread would first have to be woken and find a core. Nothing is
dropped in silence: when the router reads too slowly for `MAX_QUEUED_EVENTS`, or is gone, the
process ends, and the router sees that.
"""

import logging
import os
import queue
import socket
import threading
from collections import deque
from collections.abc import Callable

import msgspec

from lory_server.messages import MAX_FRAME_BYTES, Command, EngineOptions, Event

MAX_QUEUED_EVENTS = 10_000
EXIT_ROUTER_GONE = 0
EXIT_ROUTER_STUCK = 75
EXIT_BAD_FRAME = 76

log = logging.getLogger("lory.channel")


class Channel:
    def __init__(self, connection: socket.socket, wake: Callable[[], None]) -> None:
        self._connection = connection
        self._wake = wake
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Command)
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._unsent: deque[bytes] = deque()
        self._unsent_changed = threading.Condition()
        self._reader = threading.Thread(target=self._read_all, name="lory-commands", daemon=True)
        self._writer = threading.Thread(target=self._write_all, name="lory-events", daemon=True)

    def read_options(self) -> EngineOptions:
        """The first message, before the threads start."""
        options = self._read_one()
        if not isinstance(options, EngineOptions):
            raise ValueError(f"expected EngineOptions first, got {type(options).__name__}")
        return options

    def start(self) -> None:
        self._reader.start()
        self._writer.start()

    def commands(self) -> list[Command]:
        """All that have arrived; never waits."""
        commands: list[Command] = []
        while not self._commands.empty():
            commands.append(self._commands.get_nowait())
        return commands

    def send(self, event: Event) -> None:
        payload = self._encoder.encode(event)
        frame = len(payload).to_bytes(4, "big") + payload
        with self._unsent_changed:
            if not self._unsent:
                frame = frame[self._write_now(frame) :]
            if frame:
                if len(self._unsent) >= MAX_QUEUED_EVENTS:
                    os._exit(EXIT_ROUTER_STUCK)
                self._unsent.append(frame)
                self._unsent_changed.notify_all()

    def flush(self, timeout_s: float) -> None:
        """Waits until what was sent is on the wire, for the last words of a dying engine."""
        with self._unsent_changed:
            self._unsent_changed.wait_for(lambda: not self._unsent, timeout_s)

    def _read_all(self) -> None:
        while True:
            try:
                command = self._read_one()
            except (msgspec.MsgspecError, ValueError) as error:
                log.error("the router does not speak this protocol: %s", error)
                os._exit(EXIT_BAD_FRAME)  # deaf is worse than dead: the router sees the end
            if command is None:
                os._exit(EXIT_ROUTER_GONE)  # nobody is left to serve; the step need not finish
            self._commands.put(command)
            self._wake()

    def _read_one(self) -> Command | None:
        header = self._read_exactly(4)
        if header is None:
            return None
        length = int.from_bytes(header, "big")
        if length > MAX_FRAME_BYTES:
            raise ValueError(f"frame of {length} bytes, at most {MAX_FRAME_BYTES} are allowed")
        payload = self._read_exactly(length)
        return None if payload is None else self._decoder.decode(payload)

    def _read_exactly(self, count: int) -> bytes | None:
        parts: list[bytes] = []
        while count:
            try:
                part = self._connection.recv(min(count, 1 << 20))
            except ConnectionError:
                return None
            if not part:
                return None
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def _write_now(self, frame: bytes) -> int:
        """As many bytes as the socket takes without waiting."""
        try:
            return self._connection.send(frame, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except ConnectionError:
            os._exit(EXIT_ROUTER_GONE)

    def _write_all(self) -> None:
        """What the socket did not take at once, frame after frame."""
        while True:
            with self._unsent_changed:
                self._unsent_changed.wait_for(lambda: self._unsent)
            try:
                self._connection.sendall(self._unsent[0])
            except ConnectionError:
                os._exit(EXIT_ROUTER_GONE)
            with self._unsent_changed:
                self._unsent.popleft()
                self._unsent_changed.notify_all()

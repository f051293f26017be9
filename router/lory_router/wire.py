"""Frames on the byte stream to an engine: a 4-byte length, then one msgpack message.

It turns bytes into messages and back. It must not know sockets, processes or what messages mean.
"""

import struct

import msgspec

from lory_server.messages import MAX_FRAME_BYTES, Command, Event

HEADER = struct.Struct(">I")

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Event)


class WireError(ValueError):
    """The bytes are not the protocol's; the connection cannot go on."""


def encode_frame(command: Command) -> bytes:
    """One command as it goes over the wire."""
    body = _encoder.encode(command)
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"a message of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return HEADER.pack(len(body)) + body


class EventDecoder:
    """Cuts a stream of bytes into events, whatever the pieces it arrives in."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Event]:
        """Add bytes; return the events they complete, in order."""
        self._buffer += data
        events: list[Event] = []
        start = 0
        while (end := self._frame_end(start)) is not None:
            events.append(_decode(memoryview(self._buffer)[start + HEADER.size : end]))
            start = end
        del self._buffer[:start]
        return events

    def _frame_end(self, start: int) -> int | None:
        if len(self._buffer) - start < HEADER.size:
            return None
        (length,) = HEADER.unpack_from(self._buffer, start)
        if length > MAX_FRAME_BYTES:
            raise WireError(f"the engine announced a message of {length} bytes; not our protocol")
        end = start + HEADER.size + length
        return end if end <= len(self._buffer) else None


def _decode(body: memoryview) -> Event:
    try:
        return _decoder.decode(body)
    except msgspec.DecodeError as error:
        raise WireError(f"the engine sent what is not a message: {error}") from error
    finally:
        body.release()

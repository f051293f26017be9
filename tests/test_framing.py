"""What the framing of a request may cost: the same bounds however its bytes are split."""

import itertools

import h11
import pytest

from lory_router.framing import (
    FREE_CHUNKS,
    MAX_HEADER_BYTES,
    MAX_HEADER_FIELDS,
    MIN_MEAN_CHUNK_BYTES,
    BoundedHttp,
    ChunksTooSmall,
    LinesTooLarge,
)

CHUNKED = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


def read(*parts: bytes) -> list[h11.Event]:
    """The events of a client's bytes, as they come."""
    reader, events = BoundedHttp(), []
    for part in parts:
        reader.receive_data(part)
        while isinstance(event := reader.next_event(), h11.Event):
            events.append(event)
    return events


def split(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def header(num_bytes: int) -> bytes:
    start, end = b"GET / HTTP/1.1\r\nhost: x\r\na: ", b"\r\n\r\n"
    return start + b"a" * (num_bytes - len(start) - len(end)) + end


def fields(num: int) -> bytes:
    return b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a:\r\n" * (num - 1) + b"\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


SPLITS = pytest.mark.parametrize("size", [7, 1000, 10**6])


@SPLITS
def test_a_header_has_the_same_limits_however_it_is_split(size: int):
    for allowed in (header(MAX_HEADER_BYTES), fields(MAX_HEADER_FIELDS)):
        assert isinstance(read(*split(allowed, size))[0], h11.Request)
    for refused in (header(MAX_HEADER_BYTES + 1), fields(MAX_HEADER_FIELDS + 1)):
        with pytest.raises(LinesTooLarge) as told:
            read(*split(refused, size))
        assert told.value.error_status_hint == 431


@SPLITS
def test_a_trailer_has_the_limits_of_a_header(size: int):
    start = CHUNKED + chunk(b"body") + b"000;a=b\r\n"
    allowed = start + b"a:\r\n" * (MAX_HEADER_FIELDS - 1) + b"\r\n"
    *_, body, end = read(*split(allowed, size))
    assert isinstance(body, h11.Data)
    assert isinstance(end, h11.EndOfMessage)
    with pytest.raises(LinesTooLarge):
        read(*split(start + b"a:\r\n" * (MAX_HEADER_FIELDS + 2) + b"\r\n", size))


def test_what_follows_an_empty_trailer_is_not_counted_with_it():
    next_one = fields(MAX_HEADER_FIELDS)
    reader = BoundedHttp()
    reader.receive_data(CHUNKED + chunk(b"a") + b"0\r\n")
    while reader.next_event() is not h11.NEED_DATA:
        pass
    reader.receive_data(b"\r\n" + next_one + next_one)
    assert isinstance(reader.next_event(), h11.EndOfMessage)


@SPLITS
@pytest.mark.parametrize("framing", ["chunked", "content-length"])
def test_a_body_may_look_like_a_trailer(size: int, framing: str):
    body = b"0\r\n" + b"a:\r\n" * (2 * MAX_HEADER_FIELDS) + b"\r\n"
    sized = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    data = sized + body if framing == "content-length" else CHUNKED + chunk(body) + b"0\r\n\r\n"
    got = [bytes(event.data) for event in read(*split(data, size)) if isinstance(event, h11.Data)]
    assert b"".join(got) == body


def test_tiny_chunks_are_free_only_in_small_numbers():
    tiny = chunk(b"a")
    read(CHUNKED, tiny * FREE_CHUNKS)
    with pytest.raises(ChunksTooSmall):
        read(CHUNKED, tiny * 2 * FREE_CHUNKS)
    with pytest.raises(ChunksTooSmall):
        read(CHUNKED, *itertools.repeat(tiny, 2 * FREE_CHUNKS))


def test_chunks_of_an_ordinary_size_are_unlimited_in_number():
    ordinary = chunk(b"a" * MIN_MEAN_CHUNK_BYTES)
    assert len(read(CHUNKED, ordinary * 5000)) == 5001


def test_each_request_of_a_connection_has_chunks_of_its_own():
    reader = BoundedHttp()
    for _ in range(3):
        reader.receive_data(CHUNKED + chunk(b"a") * FREE_CHUNKS + b"0\r\n\r\n")
        while not isinstance(reader.next_event(), h11.EndOfMessage):
            pass
        reader.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
        reader.send(h11.EndOfMessage())
        reader.start_next_cycle()

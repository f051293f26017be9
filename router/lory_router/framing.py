"""HTTP/1.1 as h11 reads it, bounded in what its framing may cost.

h11 limits only what is incomplete: a header that comes at one go may have any size and thousands
of fields, and a body any number of chunks, each some microseconds of the event loop. It must not
know connections or replies.
"""

import re

import h11

MAX_HEADER_BYTES = 16 * 1024
"""Of the lines from a request's first to the empty one; of a trailer too."""
MAX_HEADER_FIELDS = 100
FREE_CHUNKS = 64
MIN_MEAN_CHUNK_BYTES = 16
"""Of a body's chunks beyond the free ones; smaller ones take longer to frame than to read."""

MAX_LINES = 1 + MAX_HEADER_FIELDS + 1
"""The request's own before the fields, the empty one behind them."""
BLANK_LINE = re.compile(rb"^\r?\n", re.MULTILINE)
LAST_CHUNK = re.compile(rb"[\r\n]*0+(?:;[^\r\n]*)?[ \t]*\r\n")


class LinesTooLarge(h11.RemoteProtocolError):
    """A header or a trailer is."""


class ChunksTooSmall(h11.RemoteProtocolError):
    """There is hardly anything between the frames."""


class BoundedHttp(h11.Connection):
    """The server's side. What is above a bound is refused before it is parsed."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEADER_BYTES)
        self._num_chunks = 0
        self._num_body_bytes = 0
        self._is_chunked = False
        self._at_chunk = False
        self._in_trailer = False

    @property
    def is_in_plain_body(self) -> bool:
        """Whether what comes next is a body without frames, which costs little however much."""
        return self.their_state is h11.SEND_BODY and not self._is_chunked

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        start = self._start_of_lines()
        if start is not None:
            _check_lines(self.trailing_data[0], start)
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._num_chunks = self._num_body_bytes = 0
            self._is_chunked = any(name == b"transfer-encoding" for name, _ in event.headers)
            self._at_chunk = self._is_chunked
        elif isinstance(event, h11.Data):
            self._count(event)
        elif isinstance(event, h11.EndOfMessage):
            self._at_chunk = self._in_trailer = False
        return event

    def _start_of_lines(self) -> int | None:
        """Where lines begin that h11 parses at one go, if such come next."""
        if self.their_state is h11.IDLE or self._in_trailer:
            return 0
        last = LAST_CHUNK.match(self.trailing_data[0]) if self._at_chunk else None
        if last is None:
            return None
        self._at_chunk, self._in_trailer = False, True
        return last.end()

    def _count(self, data: h11.Data) -> None:
        self._at_chunk = data.chunk_end
        self._num_chunks += data.chunk_start
        self._num_body_bytes += len(data.data)
        if self._num_chunks > FREE_CHUNKS + self._num_body_bytes // MIN_MEAN_CHUNK_BYTES:
            raise ChunksTooSmall(f"{self._num_chunks} chunks, {self._num_body_bytes} bytes")


def _check_lines(unread: bytes, start: int) -> None:
    blank = BLANK_LINE.search(unread, start)
    end = blank.end() if blank else len(unread)
    num_lines = unread.count(b"\n", start, end)
    if end - start > MAX_HEADER_BYTES or num_lines > MAX_LINES:
        raise LinesTooLarge(f"{end - start} bytes, {num_lines} lines", error_status_hint=431)

"""A very light HTTP client for load: it notes when bytes arrive and reads them after the run.

The generator shares the machine with the server it measures, so nothing is decoded while requests
run: each goes over a connection of its own, closed by the server, and its reply is kept as (time,
bytes) pairs until `read_reply` makes sense of them. It must not know what is asked for.
"""

import asyncio
import re
import ssl
import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from urllib.parse import urlsplit

READ_BYTES = 1 << 16
HEAD_END = b"\r\n\r\n"
_EVENT = re.compile(rb"(.*?)\r?\n\r?\n", re.DOTALL)


class ReplyError(Exception):
    """A reply that is none: cut short, refused, or an error; the message says which."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go."""

    host: str
    port: int
    tls: ssl.SSLContext | None
    path_prefix: str
    api_key: str = field(repr=False)

    @classmethod
    def of(cls, url: str, api_key: str = "") -> "Target":
        """`http://host:port/prefix`; ValueError if it is not one."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--url {url!r}: write it like http://127.0.0.1:8080")
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        port = parts.port or (443 if tls else 80)
        return cls(parts.hostname, port, tls, parts.path.rstrip("/"), api_key)

    def post(self, path: str, body: bytes) -> bytes:
        """The bytes of one POST request."""
        lines = [
            f"POST {self.path_prefix}{path} HTTP/1.1",
            f"Host: {self.host}:{self.port}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Connection: close",
        ]
        if self.api_key:
            lines.append(f"Authorization: Bearer {self.api_key}")
        return "\r\n".join(lines).encode("latin-1") + HEAD_END + body


@dataclass(slots=True)
class Exchange:
    """One request as it went; times are of `time.perf_counter`."""

    began_s: float = field(default_factory=time.perf_counter)
    """Before its connection was opened."""
    ended_s: float = 0.0
    arrivals: list[tuple[float, bytes]] = field(default_factory=list)
    failure: str = ""
    """Why it has no whole reply; empty if it has one."""


async def exchange(
    target: Target, request: bytes, timeout_s: float, watched: Exchange | None = None
) -> Exchange:
    """Send one request and collect its reply until the server closes; never raises for it.

    `watched` is filled and returned, for whoever wants to see the reply come.
    """
    done = watched or Exchange()
    try:
        async with asyncio.timeout(timeout_s):
            await _collect(target, request, done.arrivals)
    except TimeoutError:
        done.failure = f"no whole reply within {timeout_s:g} s"
    except OSError as error:
        done.failure = f"{type(error).__name__}: {error}"
    done.ended_s = time.perf_counter()
    return done


async def _collect(target: Target, request: bytes, arrivals: list[tuple[float, bytes]]) -> None:
    reader, writer = await asyncio.open_connection(target.host, target.port, ssl=target.tls)
    try:
        writer.write(request)
        while piece := await reader.read(READ_BYTES):
            arrivals.append((time.perf_counter(), piece))
    finally:
        writer.close()


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply, and when each part of its body came."""

    status: int
    body: bytes
    _piece_starts: tuple[int, ...]
    """Where in the body each piece of it begins ..."""
    _raw_starts: tuple[int, ...]
    """... and where in the raw bytes."""
    _raw_ends: tuple[int, ...]
    """How many raw bytes there were after each arrival."""
    _times_s: tuple[float, ...]

    def arrived_s(self, offset: int) -> float:
        """When the body's byte `offset` came."""
        piece = bisect_left(self._piece_starts, offset + 1) - 1
        raw = self._raw_starts[piece] + offset - self._piece_starts[piece]
        return self._times_s[bisect_left(self._raw_ends, raw + 1)]

    def events(self) -> Iterator[tuple[float, bytes]]:
        """(arrival, data) of each server-sent event; comments are left out."""
        for found in _EVENT.finditer(self.body):
            lines = found.group(1).splitlines()
            data = [line[5:].strip() for line in lines if line.startswith(b"data:")]
            if data:
                yield self.arrived_s(found.end() - 1), b"\n".join(data)


def read_reply(done: Exchange) -> Reply:
    """Raises ReplyError for anything but a whole HTTP reply, whatever its status."""
    if done.failure:
        raise ReplyError(done.failure)
    raw = b"".join(piece for _, piece in done.arrivals)
    head, separator, _ = raw.partition(HEAD_END)
    if not separator:
        raise ReplyError("the server closed the connection before it replied")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in map(_split_header, lines)}
    start = len(head) + len(HEAD_END)
    if "chunked" in headers.get("transfer-encoding", "").lower():
        pieces = list(_chunks(raw, start))
    else:
        pieces = [_whole(raw, start, headers.get("content-length"))]
    lengths = [end - begin for begin, end in pieces]
    return Reply(
        status=_status(first),
        body=b"".join(raw[begin:end] for begin, end in pieces),
        _piece_starts=tuple(accumulate(lengths[:-1], initial=0)),
        _raw_starts=tuple(begin for begin, _ in pieces),
        _raw_ends=tuple(accumulate(len(piece) for _, piece in done.arrivals)),
        _times_s=tuple(at_s for at_s, _ in done.arrivals),
    )


def _split_header(line: str) -> tuple[str, str, str]:
    return line.partition(":")


def _status(line: str) -> int:
    words = line.split()
    if len(words) < 2 or not words[0].startswith("HTTP/") or not words[1].isdecimal():
        raise ReplyError(f"not an HTTP reply: {line[:80]!r}")
    return int(words[1])


def _chunks(raw: bytes, start: int) -> Iterator[tuple[int, int]]:
    """Where in `raw` the chunks of a chunked body lie."""
    while True:
        line_end = raw.find(b"\r\n", start)
        if line_end < 0:
            raise ReplyError("the reply was cut short")
        begin = line_end + 2
        size = int(raw[start:line_end].partition(b";")[0], 16)
        if begin + size + 2 > len(raw):
            raise ReplyError("the reply was cut short")
        if size == 0:
            return
        yield begin, begin + size
        start = begin + size + 2


def _whole(raw: bytes, start: int, content_length: str | None) -> tuple[int, int]:
    """Where in `raw` a plain body lies."""
    end = len(raw) if content_length is None else start + int(content_length)
    if end > len(raw):
        raise ReplyError("the reply was cut short")
    return start, end

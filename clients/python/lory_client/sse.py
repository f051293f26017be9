"""Server-sent events: bytes in, in pieces of any size; whole events out.

Follows the WHATWG event-stream grammar: LF, CRLF or CR ends a line, a blank line ends an event,
`data` lines of one event are joined by LF, a line that starts with a colon is a comment (the
server's keep-alive). An event not yet ended when the bytes end is no event.
This module must not know JSON, Lory or HTTP.
"""

from __future__ import annotations

import re

_LINE_END = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"


class SSEDecoder:
    """Feed it bytes as they come; each call returns the `data` of the events they completed."""

    def __init__(self) -> None:
        self._tail = b""
        self._after_cr = False
        self._at_start = True
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[str]:
        events = (self._end_line(line) for line in self._lines(chunk))
        return [data for data in events if data is not None]

    def _lines(self, chunk: bytes) -> list[bytes]:
        """Lines completed by `chunk`. A CR ends its line at once; an LF right after it is its."""
        if not chunk:
            return []
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
            self._after_cr = False
            if not chunk:
                return []
        self._after_cr = chunk.endswith(b"\r")
        *lines, self._tail = _LINE_END.split(self._tail + chunk)
        return lines

    def _end_line(self, line: bytes) -> str | None:
        if self._at_start:
            self._at_start = False
            line = line[len(_BOM) :] if line.startswith(_BOM) else line
        if not line:
            return self._end_event()
        name, _, value = line.partition(b":")
        if name == b"data":
            text = value.decode("utf-8", errors="replace")
            self._data.append(text[1:] if text.startswith(" ") else text)
        return None

    def _end_event(self) -> str | None:
        if not self._data:
            return None
        data = "\n".join(self._data)
        self._data.clear()
        return data

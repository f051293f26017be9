"""multipart/form-data as it comes: bytes in, parts out, no part ever held as a whole.

Strict: no text before the first part or after a boundary, names in plain quotes. It must not know
what the parts are for.
"""

import re
from dataclasses import dataclass

MAX_HEADER_BYTES = 4096

_BOUNDARY = re.compile(r'multipart/form-data\s*;\s*boundary=(?:"(?P<q>[^"]+)"|(?P<b>[^\s;"]+))')
_BOUNDARY_CHARS = re.compile(r"[A-Za-z0-9'()+_,./:=? -]{1,70}")
_NAME = re.compile(
    rb'^content-disposition:\s*form-data\s*;(?:.*;)?\s*name="([^"\r\n]*)"', re.I | re.M
)


class MultipartError(ValueError):
    """The body is not what its header says."""


@dataclass(frozen=True, slots=True)
class Part:
    """One begins."""

    name: str
    filename: str = ""
    """As the sender calls it; to be shown, never to be opened."""


_FILENAME = re.compile(
    rb'^content-disposition:\s*form-data\s*;.*;\s*filename="([^"\r\n]*)"', re.I | re.M
)


def boundary_of(content_type: str) -> bytes | None:
    """Of a multipart/form-data body; None for any other."""
    found = _BOUNDARY.match(content_type)
    text = (found["q"] or found["b"]) if found else ""
    return text.encode() if _BOUNDARY_CHARS.fullmatch(text) else None


class MultipartReader:
    """Fed with pieces of any size; gives the same parts whatever the pieces."""

    def __init__(self, boundary: bytes) -> None:
        self._delimiter = b"\r\n--" + boundary
        self._held = bytearray(b"\r\n")  # so that the first boundary is like the others
        self._next = self._at_start
        self.is_whole = False

    def feed(self, data: bytes) -> list[Part | bytes]:
        """What `data` completes, in order. Raises MultipartError."""
        self._held += data
        found: list[Part | bytes] = []
        while (event := self._next()) is not None:
            if event:
                found.append(event)
        return found

    def _at_start(self) -> Part | bytes | None:
        num = min(len(self._held), len(self._delimiter))
        if self._held[:num] != self._delimiter[:num]:
            raise MultipartError("the body does not begin with its boundary")
        return self._at_boundary() if num == len(self._delimiter) else None

    def _at_boundary(self) -> Part | bytes | None:
        after = len(self._delimiter)
        mark = bytes(self._held[after : after + 2])
        if len(mark) < 2:
            self._next = self._at_boundary
            return None
        if mark not in (b"\r\n", b"--"):
            raise MultipartError("a boundary is followed by other text")
        del self._held[: after + 2]
        self.is_whole = mark == b"--"
        self._next = self._behind if self.is_whole else self._in_header
        return self._next()

    def _in_header(self) -> Part | bytes | None:
        end = self._held.find(b"\r\n\r\n", 0, MAX_HEADER_BYTES)
        if end < 0:
            if len(self._held) >= MAX_HEADER_BYTES:
                raise MultipartError(f"a part's header has more than {MAX_HEADER_BYTES} bytes")
            return None
        header = bytes(self._held[:end])
        named, filed = _NAME.search(header), _FILENAME.search(header)
        if named is None:
            raise MultipartError("a part has no name")
        del self._held[: end + 4]
        self._next = self._in_body
        filename = filed[1].decode("utf-8", "replace") if filed else ""
        return Part(named[1].decode("ascii", "replace"), filename)

    def _in_body(self) -> Part | bytes | None:
        end = self._held.find(self._delimiter)
        if end == 0:
            return self._at_boundary()
        sure = end if end > 0 else len(self._held) - len(self._delimiter) + 1
        if sure <= 0:
            return None
        data = bytes(self._held[:sure])
        del self._held[:sure]
        return data

    def _behind(self) -> Part | bytes | None:
        self._held.clear()
        return None

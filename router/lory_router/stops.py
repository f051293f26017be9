"""Stop strings, searched in text that arrives in pieces.

It must not know tokens or requests.
"""

from collections.abc import Sequence


class StopFinder:
    """Finds the earliest stop string in a growing text, across the borders of its pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._longest = max((len(stop) for stop in stops), default=0)
        self._tail = ""
        self._length = 0

    def push(self, piece: str) -> int | None:
        """Where in the whole text the first stop string begins, or None."""
        if not self._longest:
            self._length += len(piece)
            return None
        text = self._tail + piece
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        start_of_text = self._length - len(self._tail)
        self._length += len(piece)
        self._tail = text[max(0, len(text) - self._longest + 1) :]
        return start_of_text + min(starts) if starts else None

    @property
    def safe_length(self) -> int:
        """How much of the text cannot be the beginning of a stop string any more."""
        return self._length - self._open_suffix()

    def _open_suffix(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for start, char in enumerate(self._tail):
            if char in self._first_chars and self._begins_stop(self._tail[start:]):
                return len(self._tail) - start
        return 0

    def _begins_stop(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stops)

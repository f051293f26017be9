"""Walks over the adapters' folders: one at a time, shared by all who asked before it began.

So that no number of calls keeps loaders from loading. It belongs to the engine's thread. It must
not know what a walk finds but how many.
"""

import time
from collections.abc import Callable

COUNT_INTERVAL_S = 10.0

CallIds = tuple[int, ...]


class Walks:
    def __init__(
        self, start: Callable[[CallIds], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`start` begins a walk for some calls; `ended` must follow it."""
        self._start = start
        self._clock = clock
        self._calls: list[int] = []
        self._is_walking = False
        self._num_found = 0
        self._counted_s = float("-inf")

    def ask(self, call_id: int) -> None:
        self._calls.append(call_id)
        self._walk()

    def count(self) -> int:
        """How many there were at the last look, at most COUNT_INTERVAL_S and a walk ago."""
        if self._clock() - self._counted_s > COUNT_INTERVAL_S:
            self._walk()
        return self._num_found

    def found(self, number: int) -> None:
        self._num_found = number

    def ended(self) -> None:
        """Those who asked meanwhile share the next."""
        self._is_walking = False
        self._counted_s = self._clock()
        if self._calls:
            self._walk()

    def _walk(self) -> None:
        if not self._is_walking:
            self._is_walking = True
            calls = tuple(self._calls)
            self._calls.clear()
            self._start(calls)

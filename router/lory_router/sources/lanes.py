"""How much of the server one source may take: downloads at once, and requests that wait for it.

A source that is slow fills its own lane and no other. It must not know what is fetched.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from lory_router.errors import SourceUnavailable


class Lane:
    def __init__(self, name: str, max_downloads: int, max_waiting: int) -> None:
        self._name = name
        self._max_waiting = max_waiting
        self._num_waiting = 0
        self.downloads = asyncio.Semaphore(max_downloads)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        if self._num_waiting >= self._max_waiting:
            text = f"{self._num_waiting} requests wait for adapters from {self._name}; try later"
            raise SourceUnavailable(text, retry_after_s=5)
        self._num_waiting += 1
        try:
            yield
        finally:
            self._num_waiting -= 1


class Lanes:
    def __init__(self, max_downloads: int, max_waiting: int) -> None:
        self._bounds = (max_downloads, max_waiting)
        self._lanes: dict[str, Lane] = {}

    def lane(self, name: str) -> Lane:
        if name not in self._lanes:
            self._lanes[name] = Lane(name, *self._bounds)
        return self._lanes[name]

"""One piece of work for any number of waiters. It must not know what the work is.

Who leaves takes only itself away: the work goes on for the others, and to its end even when all
have left, so that asking again finds it done.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")

log = logging.getLogger(__name__)


class Flights(Generic[K, V]):
    """Work under way, by key."""

    def __init__(self) -> None:
        self._tasks: dict[K, asyncio.Task[V]] = {}

    def __contains__(self, key: K) -> bool:
        return key in self._tasks

    async def join(self, key: K, start: Callable[[], Coroutine[Any, Any, V]]) -> V:
        """What the work under `key` comes to; `start` is called if there is none."""
        return await asyncio.shield(self.begin(key, start))

    def begin(self, key: K, start: Callable[[], Coroutine[Any, Any, V]]) -> "asyncio.Task[V]":
        """The work under `key`, begun if there is none; nobody need wait for it."""
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.get_running_loop().create_task(start())
            task.add_done_callback(lambda done: self._land(key, done))
        return task

    def _land(self, key: K, task: "asyncio.Task[V]") -> None:
        del self._tasks[key]
        if not task.cancelled() and task.exception() is not None:
            log.debug("%r failed: %s", key, task.exception())

    async def close(self) -> None:
        """Cancel all work, and wait until it has cleaned up."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

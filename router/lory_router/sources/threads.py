"""Work that waits for a disk, in threads of its own, none of which is ever left behind.

Of its own, so that a slow disk keeps nobody from tokenizing. It must not know what the work is.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
V = TypeVar("V")

NUM_THREADS = 4


class DiskThreads:
    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="lory-disk")

    async def run(self, work: Callable[P, V], *args: P.args, **kwargs: P.kwargs) -> V:
        """What `work` returns. Who is cancelled waits for the thread all the same: what it writes
        to may be closed and removed after that."""
        loop = asyncio.get_running_loop()
        done = loop.run_in_executor(self._pool, partial(work, *args, **kwargs))
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            await asyncio.wait((done,))
            raise

    def begin(self, work: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Work that nobody waits for, and that fails in silence."""
        self._pool.submit(partial(work, *args, **kwargs))

    def close(self) -> None:
        self._pool.shutdown()

"""Work that waits for a disk, in a thread that is never left behind.

It must not know what the work is.
"""

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
V = TypeVar("V")


async def in_thread(work: Callable[P, V], *args: P.args, **kwargs: P.kwargs) -> V:
    """`asyncio.to_thread`, whose caller when cancelled waits for the thread: what it writes to may
    be closed and removed after that."""
    task = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        raise

"""A new adapter, tried: it is brought to the device, or the reason why it cannot be is told.

It must not know how it came about.
"""

import asyncio

from lory_router.engine import EngineClient, Unavailable
from lory_router.errors import from_failure
from lory_router.tuning.runner import CheckServed

RETRY_S = 1.0


def served_by(engine: EngineClient) -> CheckServed:
    """An engine that is not there yet, or not any more, is waited for."""

    async def check(adapter_id: str) -> None:
        while True:
            try:
                done = await engine.order("load", adapter_id)
            except Unavailable:
                await asyncio.sleep(RETRY_S)
                continue
            if done.failure is not None:
                raise from_failure(done.failure, 1, adapter_id)
            return

    return check

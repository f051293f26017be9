"""A body too large to be held: read piece by piece, and read on where it is refused.

It must not know what it brings.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect, Request

from lory_router.errors import ClientGone

DISCARD_S = 2.0
MAX_DISCARDED_BYTES = 64 * 2**20


async def body_of(request: Request) -> AsyncIterator[bytes]:
    try:
        async for data in request.stream():
            yield data
    except ClientDisconnect as error:
        raise ClientGone("The client left while sending") from error


async def discard(body: AsyncIterator[bytes]) -> None:
    """Who is still sending may not read the refusal before having sent for a while."""
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_S):
            async for data in body:
                size += len(data)
                if size > MAX_DISCARDED_BYTES:
                    return

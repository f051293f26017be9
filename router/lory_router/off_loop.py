"""Replies of many tokens are made in a thread, so that other streams go on meanwhile.

It must not know what a reply says.
"""

import asyncio
from collections.abc import Callable

import msgspec

MOST_ON_LOOP = 2048
"""Tokens and alternatives: some two milliseconds. A thread costs others a tenth of one."""


async def encoded(make: Callable[[], object], num_entries: int) -> msgspec.Raw:
    """What `make` makes of so many tokens and alternatives, as JSON."""
    if num_entries <= MOST_ON_LOOP:
        return _encoded(make)
    return await asyncio.to_thread(_encoded, make)


def _encoded(make: Callable[[], object]) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(make()))

"""Texts to token ids: short texts at once, long ones in a thread, off the event loop.

It must not know where the text came from or limits in tokens.
"""

import asyncio

from lory_router.settings import RouterSettings
from lory_router.text import TextModel


async def encode(
    model: TextModel, text: str, settings: RouterSettings, add_special_tokens: bool = True
) -> tuple[int, ...]:
    if len(text) <= settings.offload_chars:
        return model.encode(text, add_special_tokens)
    return await asyncio.to_thread(model.encode, text, add_special_tokens)


async def locate(
    model: TextModel, text: str, settings: RouterSettings, add_special_tokens: bool = True
) -> list[tuple[int, int, int]]:
    if len(text) <= settings.offload_chars:
        return model.locate(text, add_special_tokens)
    return await asyncio.to_thread(model.locate, text, add_special_tokens)

"""Texts to token ids: short texts at once, long ones one after the other, off the event loop.

A tokenizer takes some hundred bytes of memory a token while it works. A text that cannot fit the
context whatever its tokens is refused before that, and long texts never meet there, so that a
flood of large bodies does not take the machine's memory. It must not know where a text came from.
"""

import asyncio

from lory_router.errors import ContextTooLong
from lory_router.settings import RouterSettings
from lory_router.text import TextModel

SLACK = 4
"""How much longer than its longest token a tokenizer may make a token, by dropping white space."""


async def encode(
    model: TextModel, text: str, settings: RouterSettings, add_special_tokens: bool = True
) -> tuple[int, ...]:
    if len(text) <= settings.offload_chars:
        return model.encode(text, add_special_tokens)
    async with model.long_texts:
        return await asyncio.to_thread(model.encode, text, add_special_tokens)


async def locate(
    model: TextModel, text: str, settings: RouterSettings, add_special_tokens: bool = True
) -> list[tuple[int, int, int]]:
    if len(text) <= settings.offload_chars:
        return model.locate(text, add_special_tokens)
    async with model.long_texts:
        return await asyncio.to_thread(model.locate, text, add_special_tokens)


def check_length(name: str, text: str, model: TextModel, max_tokens: int) -> None:
    """Refuses what is beyond `max_tokens` by its number of characters alone."""
    most_chars = max_tokens * (model.longest_token + 1) * SLACK
    if len(text) > most_chars:
        raise ContextTooLong(
            f"`{name}` must have at most {max_tokens} tokens. Given: {len(text)} characters",
            param=name,
        )

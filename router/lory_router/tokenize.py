"""Texts to token ids: short texts at once, long ones one after the other, off the event loop.

A tokenizer takes some hundred bytes of memory a token while it works. A text that cannot fit the
context whatever its tokens is refused before that, of a text that is to be truncated only the end
is looked at, and long texts never meet there, so that a flood of large bodies does not take the
machine's memory. It must not know where a text came from.
"""

import asyncio

from lory_router.errors import ContextTooLong, Invalid
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


async def encode_end(
    model: TextModel, text: str, settings: RouterSettings, num_tokens: int, special: bool = True
) -> tuple[tuple[int, ...], bool]:
    """The last `num_tokens` tokens of `text`, and whether there are more before them.

    Looks no further back than it must: only a cut within one very long word can show.
    """
    num_chars = _most_chars(model, num_tokens)
    while True:
        ids = await encode(model, text[-num_chars:], settings, special)
        if len(ids) > num_tokens or num_chars >= len(text):
            return ids[-num_tokens:], len(ids) > num_tokens
        num_chars *= 2


async def locate(
    model: TextModel, text: str, settings: RouterSettings, add_special_tokens: bool = True
) -> list[tuple[int, int, int]]:
    most = settings.max_tokenize_bytes
    if len(text) > most or len(text.encode()) > most:
        raise Invalid(f"`inputs` must have at most {most} bytes; send it in parts", param="inputs")
    if len(text) <= settings.offload_chars:
        return model.locate(text, add_special_tokens)
    async with model.long_texts:
        return await asyncio.to_thread(model.locate, text, add_special_tokens)


def check_length(name: str, text: str, model: TextModel, max_tokens: int) -> None:
    """Refuses what is beyond `max_tokens` by its number of characters alone."""
    if len(text) > _most_chars(model, max_tokens):
        raise ContextTooLong(
            f"`{name}` must have at most {max_tokens} tokens. Given: {len(text)} characters",
            param=name,
        )


def _most_chars(model: TextModel, num_tokens: int) -> int:
    return num_tokens * (model.longest_token + 1) * SLACK

"""POST /tokenize of messages: what the chat template makes of them, and the tokens of that.

All that a template takes may be in them, tools and calls too: nothing is answered, so nothing has
to be understood. It must not know adapters or HTTP.
"""

import asyncio
from typing import Any

import msgspec

from lory_router.chat_template import PromptTemplate, TemplateError
from lory_router.errors import ContextTooLong, Invalid
from lory_router.schemas_lorax import TokenizeBody
from lory_router.settings import RouterSettings
from lory_router.text import TextModel
from lory_router.tokenize import check_length, encode


class ChatTokens(msgspec.Struct, frozen=True, kw_only=True):
    prompt: str
    tokens: list[int]
    count: int


def check_form(wish: TokenizeBody) -> None:
    """A text, or messages and what is theirs alone."""
    if wish.inputs is None and wish.messages is None:
        raise Invalid("`inputs` is required: a text; or `messages` in its place", param="inputs")
    if wish.messages is None:
        _refuse(wish, ("tools", "add_generation_prompt"), "is for `messages`")
        return
    _refuse(wish, ("inputs",), "and `messages`: give one of them")
    if wish.add_special_tokens:
        raise Invalid(
            "`add_special_tokens` is for `inputs`: a chat template names its special tokens itself",
            param="add_special_tokens",
        )
    for index, message in enumerate(wish.messages):
        if not isinstance(message.get("role"), str):
            raise Invalid(
                f"`messages[{index}].role` is required: a text", param=f"messages[{index}].role"
            )


def _refuse(wish: TokenizeBody, names: tuple[str, ...], reason: str) -> None:
    for name in names:
        if getattr(wish, name) is not None:
            raise Invalid(f"`{name}` {reason}", param=name)


async def chat_tokens(
    wish: TokenizeBody, text: TextModel, settings: RouterSettings, max_tokens: int
) -> ChatTokens:
    """Of at most `max_tokens`."""
    if text.chat_template is None:
        raise Invalid("`messages`: there is no chat template here; send `inputs`", param="messages")
    prompt = await asyncio.to_thread(_rendered, wish, text.chat_template)
    check_length("messages", prompt, text, max_tokens)
    ids = await encode(text, prompt, settings, add_special_tokens=False)
    if len(ids) > max_tokens:
        raise ContextTooLong(
            f"`messages` must have at most {max_tokens} tokens. Given: {len(ids)}", param="messages"
        )
    return ChatTokens(prompt=prompt, tokens=list(ids), count=len(ids))


def _rendered(wish: TokenizeBody, template: PromptTemplate) -> str:
    options: dict[str, Any] = {
        "tools": wish.tools or None,
        "add_generation_prompt": wish.add_generation_prompt is not False,
    }
    try:
        return template.render(wish.messages or (), options)
    except TemplateError as error:
        raise Invalid(f"chat template: {error}", param="messages") from error

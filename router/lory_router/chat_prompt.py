"""Chat messages to the text of a prompt, by the adapter's own template or the base's.

It must not know tokens, limits or how an answer is framed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lory_router.asking import Template, made_of_chat
from lory_router.bodies import read_struct, refuse_unknown_inside
from lory_router.chat_template import RESERVED_NAMES, PromptTemplate, TemplateError
from lory_router.errors import Invalid, shown
from lory_router.schemas_openai import ChatBody, ChatMessage, ChatMessages, Json, TextPart
from lory_server.messages import Manner

ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    text: str
    template: Template
    """Whose made it."""
    has_specials: bool
    """It names its special tokens itself, as what the base's chat template makes does."""


def chat_prompt(
    body: ChatBody, chat_template: PromptTemplate | None, manner: Manner, adapter_id: str
) -> ChatPrompt:
    """To be called off the event loop, for there may be many messages."""
    messages = chat_messages(body.messages)
    if manner.template:
        if body.chat_template_kwargs:
            raise Invalid(
                "`chat_template_kwargs` is for the base's chat template, and the adapter has a"
                " template of its own; leave it out",
                param="chat_template_kwargs",
            )
        text = made_of_chat(messages, manner, adapter_id)
        if manner.is_chat:
            text = _rendered([{"role": "user", "content": text}], body, chat_template)
        return ChatPrompt(text, "adapter", manner.is_chat)
    return ChatPrompt(_rendered(messages, body, chat_template), "base", True)


def _rendered(messages: Sequence[Json], body: ChatBody, template: PromptTemplate | None) -> str:
    if template is None:
        raise Invalid("this base has no chat template; use /v1/completions", param="messages")
    try:
        return template.render(messages, _template_options(body))
    except TemplateError as error:
        raise Invalid(f"chat template: {error}", param="messages") from error


def _template_options(body: ChatBody) -> Json:
    options = body.chat_template_kwargs or {}
    for name in options:
        if name in RESERVED_NAMES or not name.isidentifier():
            raise Invalid(
                f"`chat_template_kwargs` may not set {shown(name)}", param="chat_template_kwargs"
            )
    return options


def chat_messages(values: Sequence[Json]) -> list[Json]:
    if not values:
        raise Invalid("`messages` must hold at least one message", param="messages")
    for index, value in enumerate(values):
        refuse_unknown_inside(value, ChatMessage, f"messages[{index}]")
    read = read_struct({"messages": values}, ChatMessages).messages
    return [_message(message, f"messages[{index}]") for index, message in enumerate(read)]


def _message(message: ChatMessage, path: str) -> Json:
    """One message for the template."""
    if message.role not in ROLES:
        raise Invalid(f"`{path}.role` must be one of {', '.join(ROLES)}", param=f"{path}.role")
    role = "system" if message.role == "developer" else message.role
    read: Json = {"role": role, "content": _content(message, path)}
    if message.name is not None:
        read["name"] = message.name
    return read


def _content(message: ChatMessage, path: str) -> str:
    if message.content is None:
        raise Invalid(f"`{path}.content` is required", param=f"{path}.content")
    if isinstance(message.content, str):
        return message.content
    parts = enumerate(message.content)
    return "\n".join([_part(part, f"{path}.content[{index}]") for index, part in parts])


def _part(part: Json, path: str) -> str:
    text = part.get("text")
    if part.get("type") != "text" or not isinstance(text, str):
        raise Invalid(f'`{path}`: only {{"type": "text", "text": ...}} is supported', param=path)
    refuse_unknown_inside(part, TextPart, path)
    return text

"""A request filled in by its adapter's manner: what it says itself comes first.

    the request > the adapter's defaults > the server's > the route's own

Stop texts add up. It must not know HTTP, or where manners come from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import msgspec

from lory_router import validate
from lory_router.errors import Invalid, shown
from lory_router.keys import Caller
from lory_router.manners import Manners
from lory_router.merging import MergeNamed
from lory_router.schemas_lorax import Parameters
from lory_router.schemas_openai import CommonBody
from lory_router.settings import RouterSettings
from lory_router.text import TextModel
from lory_router.validate import Named
from lory_server.adapters.manner import render
from lory_server.messages import NO_MANNER, EngineInfo, Manner


@dataclass(frozen=True, slots=True)
class Context:
    """What a request is checked against."""

    info: EngineInfo
    settings: RouterSettings
    text: TextModel
    manners: Manners
    caller: Caller
    manner: Manner = NO_MANNER
    """Of the adapter that it names, once that is known, and so is its tokenizer then."""

    @property
    def num_tokens(self) -> int:
        """Of the vocabulary that the request is in."""
        return self.manner.vocab_size or self.info.vocab_size


async def asked_in_manner(context: Context, named: Named | MergeNamed) -> Context:
    """With the manner and the tokenizer of what a request names; raises an ApiError."""
    manner = await context.manners.of(named, context.caller)
    text = await context.manners.text(named, context.caller, manner)
    return replace(context, manner=manner, text=text)


def check_token_ids(name: str, token_ids: Sequence[int], context: Context) -> None:
    whose = "adapter" if context.manner.vocab_size else "base"
    validate.check_token_ids(name, token_ids, context.num_tokens, whose)


Template = Literal["adapter", "base", "none"]
"""Whose made the prompt: the adapter's own, the base's for chats, or nobody's."""

SHARED = ("temperature", "top_k", "top_p", "typical_p", "repetition_penalty")
WHEN_GREEDY = ("repetition_penalty",)

W = TypeVar("W", bound=Parameters | CommonBody)


def filled_in(wish: W, manner: Manner) -> W:
    """With the defaults of the adapter where it names nothing, but for the answer's length: that
    depends on the prompt."""
    names = WHEN_GREEDY if _is_greedy(wish) else SHARED
    found = {name: getattr(manner.defaults, name) for name in names if getattr(wish, name) is None}
    given = {name: value for name, value in found.items() if value is not None}
    if isinstance(wish, Parameters) and wish.do_sample and given.get("temperature") == 0:
        del given["temperature"]
    return msgspec.structs.replace(wish, **given)


def _is_greedy(wish: Parameters | CommonBody) -> bool:
    """Whether it says that nothing is to be drawn."""
    return wish.temperature == 0 or (isinstance(wish, Parameters) and wish.do_sample is False)


def all_stops(own: Sequence[str], manner: Manner) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*own, *manner.stop)))


def end_ids(manner: Manner, text: TextModel, info: EngineInfo) -> tuple[int, ...]:
    """The tokens that the adapter learned to end with, where the base ends with others."""
    own = text.special_tokens.get("eos_token", "") if manner.tokenizer else ""
    found = [text.tokenizer.token_to_id(name) for name in (manner.eos_token, own) if name]
    return tuple(dict.fromkeys(i for i in found if i is not None and i not in info.eos_token_ids))


def made_of_fields(values: Mapping[str, str], manner: Manner, adapter_id: str) -> str:
    """The prompt that the adapter was trained on, of the fields of its template."""
    who = f"adapter {shown(adapter_id)}" if adapter_id else "the base"
    if not manner.template:
        raise Invalid(f"`inputs`: {who} has no template; send the prompt as text", param="inputs")
    listed = ", ".join(manner.fields)
    for name in manner.fields:
        if name not in values:
            raise Invalid(f"`inputs.{name}` is required by {who}", param=f"inputs.{name}")
    for name in values:
        if name not in manner.fields:
            raise Invalid(
                f"`inputs`: {who} has no field {shown(name)}; its template has {listed}",
                param=f"inputs.{name[:80]}",
            )
    return render(manner.template, values)


def made_of_chat(messages: Sequence[Mapping[str, object]], manner: Manner, adapter_id: str) -> str:
    """The prompt of the last message, which must be the user's. Earlier turns are passed over: the
    adapter was trained on single questions."""
    who = f"adapter {shown(adapter_id)}"
    if len(manner.fields) != 1:
        raise Invalid(
            f"{who} takes the fields {', '.join(manner.fields)}, and a chat fills one alone; send"
            ' {"inputs": {...}} with all of them to /generate',
            param="messages",
        )
    if messages[-1]["role"] != "user":
        raise Invalid(
            f"`messages`: {who} answers the user's message, send it last", param="messages"
        )
    if any(message["role"] == "system" for message in messages):
        raise Invalid(
            f"`messages`: the template of {who} has no place for a system message; leave it out",
            param="messages",
        )
    return render(manner.template, {manner.fields[0]: str(messages[-1]["content"])})

"""Who is asked, and how: the base, the base with instructions and examples, each adapter.

    base         the adapter's template, filled in, without the adapter
    prompt_only  an instruction and examples before it; as text, or as a chat
    adapter      its fields, which the server puts into the adapter's template

In: rows. Out: request bodies, and what an answer's text is. It must not know metrics.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lory_trainer.data_rows import Message
from lory_trainer.evaluation.errors import EvaluationError
from lory_trainer.evaluation.facts import AdapterFacts
from lory_trainer.evaluation.options import BASE, PROMPT_ONLY
from lory_trainer.evaluation.rows import Row, is_plain
from lory_trainer.evaluation.server import Json, Reply
from lory_trainer.template import render, template_fields

BETWEEN_EXAMPLES = "\n\n"

Kind = Literal["base", "prompt_only", "adapter"]


@dataclass(frozen=True, slots=True)
class Prompting:
    """What prompt_only says before each row."""

    instruction: str = ""
    shots: tuple[Row, ...] = ()
    is_chat: bool = False


@dataclass(frozen=True, slots=True)
class Variant:
    name: str
    kind: Kind
    model: str
    """The base's name or the adapter's."""
    template: str
    """That of its prompts; the server has the same if `sends_fields`."""
    sends_fields: bool = False
    prompting: Prompting = Prompting()
    stop: tuple[str, ...] = ()
    """Texts at which its answers end, those that the server knows of included."""
    is_chat: bool = False
    """Its prompts are a user's message; the server makes a chat of it."""
    prefix: str = ""
    """What its answers begin with, and wanted ones do not."""

    def prompt(self, row: Row) -> str:
        """As text; of a chat, its last message, and all before the answer of a conversation."""
        if row.messages:
            return row.values["messages"]
        return render(self.template, row.fields(template_fields(self.template)))


@dataclass(frozen=True, slots=True)
class Sampling:
    """How all variants draw their answers."""

    seed: int
    max_new_tokens: int
    is_greedy: bool
    """False: as the adapter's own defaults say."""


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    is_cut: bool
    """It reached max_new_tokens."""
    num_prompt_tokens: int
    num_tokens: int
    seconds: float
    revision: str


def base_variant(model: str, like: Variant) -> Variant:
    """Asked as the adapter `like` is, and ended where its answers end."""
    return Variant(
        BASE,
        "base",
        model,
        like.template,
        stop=like.stop,
        is_chat=like.is_chat,
        prefix=like.prefix,
    )


def prompt_only_variant(
    model: str, like: Variant, prompting: Prompting, wanted: Sequence[str]
) -> Variant:
    """Ended where the next example would begin, unless `wanted` answers look so themselves."""
    is_open = prompting.is_chat or any(BETWEEN_EXAMPLES in answer for answer in wanted)
    return Variant(
        PROMPT_ONLY,
        "prompt_only",
        model,
        like.template,
        prompting=prompting,
        stop=() if is_open else (BETWEEN_EXAMPLES,),
        prefix=like.prefix,
    )


def adapter_variant(facts: AdapterFacts, template: str, *, is_conversation: bool) -> Variant:
    """`template` is for an adapter that has none on the server; conversations need none."""
    if not (facts.template or template or is_conversation):
        raise EvaluationError(
            f"adapter {facts.adapter_id!r} has no template on the server; give the one it was"
            " trained with by --template"
        )
    return Variant(
        facts.adapter_id,
        "adapter",
        facts.adapter_id,
        facts.template or template,
        sends_fields=bool(facts.template),
        stop=facts.stop,
        is_chat=facts.is_chat or is_conversation,
        prefix=facts.completion_prefix,
    )


def is_through_template(variant: Variant, row: Row) -> bool:
    """Whether the base's chat template, or one that the adapter brings, makes the prompt."""
    return not variant.sends_fields if row.messages else variant.is_chat


def is_said_in_ids(variant: Variant, row: Row) -> bool:
    """Rows that chats take no part of: with tools, calls, results of calls."""
    return bool(row.messages) and not (is_plain(asked_messages(variant, row)) and not row.tools)


def request(
    variant: Variant, row: Row, sampling: Sampling, prompt_ids: Sequence[int] = ()
) -> tuple[str, Json]:
    """Path and body. `prompt_ids`: of a row that is said in ids."""
    if prompt_ids:
        return "/v1/completions", {"prompt": [prompt_ids], **_openai_body(variant, sampling)}
    if variant.prompting.is_chat or row.messages:
        messages = asked_messages(variant, row)
        return "/v1/chat/completions", {"messages": messages, **_openai_body(variant, sampling)}
    parameters: Json = {
        "max_new_tokens": sampling.max_new_tokens,
        "seed": sampling.seed,
        "details": True,
    }
    if sampling.is_greedy or variant.kind != "adapter":
        parameters["do_sample"] = False
    if variant.kind == "adapter":
        parameters["adapter_id"] = variant.model
    elif variant.stop:  # an adapter's own are the server's to add
        parameters["stop"] = list(variant.stop)
    if variant.is_chat and not variant.sends_fields:
        parameters["apply_chat_template"] = True
    return "/generate", {"inputs": _inputs(variant, row), "parameters": parameters}


def read_answer(variant: Variant, row: Row, reply: Reply) -> Answer:
    found = _openai_answer(reply) if "choices" in reply.body else _plain_answer(variant, reply)
    text = found.text.removeprefix(row.opening).removeprefix(variant.prefix)
    return replace(found, text=text)


def _inputs(variant: Variant, row: Row) -> str | dict[str, str]:
    if variant.sends_fields:
        return row.fields(template_fields(variant.template))
    if variant.kind != "prompt_only":
        return variant.prompt(row)
    prompting = variant.prompting
    before = variant.prefix
    examples = (f"{variant.prompt(shot)}{before}{shot.wanted}" for shot in prompting.shots)
    parts = (prompting.instruction, *examples, variant.prompt(row))
    return BETWEEN_EXAMPLES.join(part for part in parts if part)


def _openai_body(variant: Variant, sampling: Sampling) -> Json:
    body: Json = {
        "model": variant.model,
        "max_tokens": sampling.max_new_tokens,
        "seed": sampling.seed,
    }
    if sampling.is_greedy or variant.kind != "adapter":
        body["temperature"] = 0
    if variant.kind != "adapter" and variant.stop:
        body["stop"] = list(variant.stop)
    return body


def asked_messages(variant: Variant, row: Row) -> list[Message]:
    """Examples and instruction before it."""
    messages: list[Message] = []
    for shot in variant.prompting.shots:
        messages += [one for one in asked_of(variant, shot) if one["role"] != "system"]
        messages.append(shot.said or _answer(shot.wanted))
    return _instructed(variant, messages, asked_of(variant, row))


def asked_of(variant: Variant, row: Row) -> Sequence[Message]:
    return row.messages or [{"role": "user", "content": variant.prompt(row)}]


def said_of(variant: Variant, row: Row) -> Message:
    return row.said or _answer(variant.prefix + row.wanted)


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _instructed(
    variant: Variant, shown: Sequence[Message], asked: Sequence[Message]
) -> list[Message]:
    """As they are; where more is said there is one system message, before all: the instruction,
    then the conversation's own."""
    if not (shown or variant.prompting.instruction):
        return list(asked)
    own = [one["content"] for one in asked if one["role"] == "system"]
    said = [text for text in (variant.prompting.instruction, *own) if text]
    system = [{"role": "system", "content": BETWEEN_EXAMPLES.join(said)}] if said else []
    return [*system, *shown, *(one for one in asked if one["role"] != "system")]


def _plain_answer(variant: Variant, reply: Reply) -> Answer:
    details, text = reply.body["details"], reply.body["generated_text"]
    if details["finish_reason"] == "stop_sequence":
        text = _before_stop(text, variant.stop)
    return Answer(
        text,
        is_cut=details["finish_reason"] == "length",
        num_prompt_tokens=details["prompt_tokens"],
        num_tokens=details["generated_tokens"],
        seconds=reply.seconds,
        revision=reply.headers.get("x-adapter-revision", ""),
    )


def _before_stop(text: str, stops: Sequence[str]) -> str:
    """LoRAX's answers hold the text that ended them."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def _openai_answer(reply: Reply) -> Answer:
    choice, usage = reply.body["choices"][0], reply.body["usage"]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return Answer(
        text or "",
        is_cut=choice["finish_reason"] == "length",
        num_prompt_tokens=usage["prompt_tokens"],
        num_tokens=usage["completion_tokens"],
        seconds=reply.seconds,
        revision=reply.headers.get("x-adapter-revision", ""),
    )

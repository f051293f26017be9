"""Who is asked, and how: the base, the base with instructions and examples, each adapter.

    base         the adapter's template, filled in, without the adapter
    prompt_only  an instruction and examples before it; as text, or as a chat
    adapter      its fields, which the server puts into the adapter's template

In: rows. Out: request bodies, and what an answer's text is. It must not know metrics.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lory_trainer.evaluation.errors import EvaluationError
from lory_trainer.evaluation.facts import AdapterFacts
from lory_trainer.evaluation.rows import Row
from lory_trainer.evaluation.server import Json, Reply
from lory_trainer.template import render, template_fields

BASE = "base"
PROMPT_ONLY = "prompt_only"
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


def request(variant: Variant, row: Row, sampling: Sampling) -> tuple[str, Json]:
    """Path and body."""
    if variant.prompting.is_chat or row.messages:
        return "/v1/chat/completions", _chat_body(variant, row, sampling)
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


def read_answer(variant: Variant, reply: Reply) -> Answer:
    return _chat_answer(reply) if "choices" in reply.body else _plain_answer(variant, reply)


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


def _chat_body(variant: Variant, row: Row, sampling: Sampling) -> Json:
    messages: list[Mapping[str, str]] = []
    for shot in variant.prompting.shots:
        messages += [one for one in _asked(variant, shot) if one["role"] != "system"]
        messages.append({"role": "assistant", "content": shot.wanted})
    body: Json = {
        "model": variant.model,
        "messages": _instructed(variant, messages, _asked(variant, row)),
        "max_tokens": sampling.max_new_tokens,
        "seed": sampling.seed,
    }
    if sampling.is_greedy or variant.kind != "adapter":
        body["temperature"] = 0
    if variant.kind != "adapter" and variant.stop:
        body["stop"] = list(variant.stop)
    return body


def _asked(variant: Variant, row: Row) -> Sequence[Mapping[str, str]]:
    return row.messages or [{"role": "user", "content": variant.prompt(row)}]


def _instructed(
    variant: Variant, shown: Sequence[Mapping[str, str]], asked: Sequence[Mapping[str, str]]
) -> list[Mapping[str, str]]:
    """There is one system message, before all: the instruction, then the conversation's own."""
    own = [one["content"] for one in asked if one["role"] == "system"]
    said = [text for text in (variant.prompting.instruction, *own) if text]
    system = [{"role": "system", "content": BETWEEN_EXAMPLES.join(said)}] if said else []
    return [*system, *shown, *(one for one in asked if one["role"] != "system")]


def _plain_answer(variant: Variant, reply: Reply) -> Answer:
    details, text = reply.body["details"], reply.body["generated_text"]
    if details["finish_reason"] == "stop_sequence":
        text = _before_stop(text, variant.stop)
    return Answer(
        text.removeprefix(variant.prefix),
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


def _chat_answer(reply: Reply) -> Answer:
    choice, usage = reply.body["choices"][0], reply.body["usage"]
    return Answer(
        choice["message"]["content"] or "",
        is_cut=choice["finish_reason"] == "length",
        num_prompt_tokens=usage["prompt_tokens"],
        num_tokens=usage["completion_tokens"],
        seconds=reply.seconds,
        revision=reply.headers.get("x-adapter-revision", ""),
    )

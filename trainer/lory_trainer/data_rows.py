"""Rows to samples: what is asked, what is answered, whichever columns they lie in.

A sample is a prompt and its answer, a conversation, a pair of answers of which one is better, or a
text. This module must not know tokenizers.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from typing import Any, Literal

from lory_trainer.config import TrainOptions
from lory_trainer.data_files import CONVERSATIONS, RawRow
from lory_trainer.errors import DataError
from lory_trainer.template import render, template_fields

Message = dict[str, Any]

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

USUAL_COLUMNS: tuple[tuple[str, str], ...] = (
    ("{text}", "completion"),
    ("{prompt}", "completion"),
    ("{prompt}", "response"),
    (ALPACA_WITH_INPUT, "output"),
    (ALPACA, "output"),
    ("{question}", "answer"),
)
"""Templates and answer columns that rows are recognised by, in this order."""
SPEAKERS = {"human": "user", "gpt": "assistant", "developer": "system"}
"""Other names of roles; the server takes a developer for the system, too."""

MARK = "an answer like no other"
"""Said in an answer's place, to see what a chat template writes around it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How every row of a run is read."""

    kind: Literal["columns", "messages", "text", "pair"]
    template: str | None = None
    completion: str = ""
    prefix: str = ""
    chat: bool = False
    """Through the base's chat template."""
    chosen: str = ""
    rejected: str = ""

    @property
    def fields(self) -> tuple[str, ...]:
        return template_fields(self.template) if self.template is not None else ()


@dataclass(frozen=True, slots=True)
class Sample:
    """What one row says. A prompt is text, or the messages before the answer."""

    place: str
    prompt: str | tuple[Message, ...]
    answer: str
    """Empty for conversations, whose answers are the assistant's messages."""
    rejected: str | None = None
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def text(self) -> str:
        """All of it, to compare rows by."""
        prompt = self.prompt if isinstance(self.prompt, str) else _messages_text(self.prompt)
        return "\n".join((prompt, self.answer, self.rejected or ""))

    @property
    def prompt_text(self) -> str:
        if isinstance(self.prompt, str):
            return self.prompt
        asked = self.prompt
        if not self.answer and asked and asked[-1]["role"] == "assistant":
            asked = asked[:-1]
        return _messages_text(asked)

    @property
    def answer_text(self) -> str:
        if self.answer or isinstance(self.prompt, str):
            return self.answer
        last = [m for m in self.prompt if m["role"] == "assistant"][-1:]
        return _messages_text(last)


def _messages_text(messages: Sequence[Message]) -> str:
    return "\n".join(text_of(m.get("content")) or json.dumps(m, default=str) for m in messages)


def filled_columns(rows: Iterable[RawRow]) -> set[str]:
    """Those that at least one row fills."""
    return {name for row in rows for name, value in row.values.items() if value is not None}


def plan_rows(options: TrainOptions, rows: Sequence[RawRow]) -> Plan:
    """Decides by the options, and by the rows' columns where they leave it open."""
    first, columns = rows[0], filled_columns(rows)
    if options.method == "pretrain":
        return _text_plan(options, columns, first)
    if options.method == "dpo":
        return _pair_plan(options, columns, first)
    is_asked_in_messages = isinstance(first.values.get("prompt"), list)
    if options.template is None and (is_asked_in_messages or columns & CONVERSATIONS):
        if options.completion_prefix:
            raise DataError("completion_prefix: is for columns; these rows are messages")
        return Plan("messages", completion=options.completion or "completion", chat=True)
    template, completion = _template(options, columns, first)
    return Plan("columns", template, completion, options.completion_prefix, options.chat)


def _text_plan(options: TrainOptions, columns: set[str], first: RawRow) -> Plan:
    template = options.template or ("{text}" if "text" in columns else None)
    if template is None:
        raise DataError(
            f"data: {first.place}: no column `text`; give a template such as "
            f"`{{{min(columns, default='column')}}}`"
        )
    return Plan("text", template)


def _pair_plan(options: TrainOptions, columns: set[str], first: RawRow) -> Plan:
    if {"input", "preferred_output", "non_preferred_output"} <= columns:
        return Plan("pair", chat=True, chosen="preferred_output", rejected="non_preferred_output")
    lacking = {options.chosen, options.rejected} - columns
    if lacking:
        raise DataError(
            f"data: {first.place}: no column {', '.join(sorted(lacking))}; found: "
            f"{', '.join(sorted(columns))}"
        )
    template = options.template
    if template is None and isinstance(first.values.get(options.chosen), list):
        return Plan("pair", chat=True, chosen=options.chosen, rejected=options.rejected)
    if template is None:
        usual = [t for t in ("{prompt}", "{question}", "{text}") if t[1:-1] in columns]
        if not usual:
            raise DataError(f"data: {first.place}: no column `prompt`; give a template")
        template = usual[0]
    return Plan(
        "pair",
        template,
        prefix=options.completion_prefix,
        chat=options.chat or isinstance(first.values.get("prompt"), list),
        chosen=options.chosen,
        rejected=options.rejected,
    )


def _template(options: TrainOptions, columns: set[str], first: RawRow) -> tuple[str, str]:
    for template, completion in USUAL_COLUMNS:
        answer = options.completion or completion
        if options.template is not None:
            if options.completion is None and completion not in columns:
                continue
            return options.template, answer
        if answer in columns and set(template_fields(template)) <= columns - {answer}:
            return template, answer
    found = ", ".join(sorted(columns)) or "nothing"
    raise DataError(
        f"data: {first.place}: the columns say neither what is asked nor what is answered; "
        f"give template and completion (found: {found})"
    )


def make_sample(row: RawRow, plan: Plan) -> Sample:
    """One row, read by the plan; raises DataError naming its place and column."""
    match plan.kind:
        case "text":
            return Sample(row.place, "", _prompt(row, plan))
        case "messages":
            return _conversation(row, plan)
        case "pair":
            return _pair(row, plan)
        case _:
            answer = plan.prefix + column(row, plan.completion)
            return Sample(row.place, _prompt(row, plan), answer)


def _prompt(row: RawRow, plan: Plan) -> str:
    values = {name: column(row, name, may_be_null=True) for name in plan.fields}
    return render(plan.template or "", values)


def column(row: RawRow, name: str, *, may_be_null: bool = False) -> str:
    """Its text, as it is learned."""
    if name not in row.values:
        found = ", ".join(row.values) or "nothing"
        raise DataError(f"data: {row.place}: no column `{name}`; found: {found}")
    value = row.values[name]
    if value is None and may_be_null:
        return ""
    text = text_of(value)
    if text is None:
        raise DataError(f"data: {row.place}: column `{name}` must hold text; {_fault(value)}")
    return text


def text_of(value: Any) -> str | None:
    """Text as it is; numbers, truth, lists and objects as JSON writes them; None if there is no
    telling."""
    if isinstance(value, str):
        return value if _is_whole(value) else None
    if value is None or isinstance(value, bytes):
        return None
    if isinstance(value, date | time | Decimal):
        return str(value)
    try:
        return json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        return None


def _is_whole(text: str) -> bool:
    """JSON's escapes can write half of a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fault(value: Any) -> str:
    if isinstance(value, str):
        return "it holds half of a character (a lone surrogate)"
    if isinstance(value, bytes):
        return "it holds bytes"
    if value is None:
        return "it is null"
    return "it holds a number that is none (NaN, infinity)"


def _conversation(row: RawRow, plan: Plan) -> Sample:
    said = row.values.get("messages", row.values.get("conversations"))
    if said is None and "prompt" not in row.values:
        found = ", ".join(row.values) or "nothing"
        raise DataError(f"data: {row.place}: no messages, which other rows have; found: {found}")
    messages = _messages(said, row.place) if said is not None else _asked_then_said(row, plan)
    if not any(m["role"] == "assistant" for m in messages):
        raise DataError(f"data: {row.place}: no message of the assistant's; nothing to learn")
    return Sample(row.place, messages, "", tools=_tools(row))


def _asked_then_said(row: RawRow, plan: Plan) -> tuple[Message, ...]:
    """A prompt of messages, and the completion's messages after them."""
    answer = row.values.get(plan.completion)
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    return (*_messages(row.values.get("prompt"), row.place), *_messages(answer, row.place))


def _pair(row: RawRow, plan: Plan) -> Sample:
    chosen, rejected = row.values.get(plan.chosen), row.values.get(plan.rejected)
    if plan.template is not None and not isinstance(row.values.get("prompt"), list):
        better = plan.prefix + column(row, plan.chosen)
        worse = plan.prefix + column(row, plan.rejected)
        return Sample(row.place, _prompt(row, plan), better, worse)
    before, better = _asked_and_answered(chosen, row)
    other, worse = _asked_and_answered(rejected, row)
    if before != other:
        raise DataError(f"data: {row.place}: the two answers are to different conversations")
    return Sample(row.place, _asked(row, before), better, worse, tools=_tools(row))


def _asked(row: RawRow, before: tuple[Message, ...]) -> tuple[Message, ...]:
    """`before`: what stands before both answers in their own messages, if anything."""
    asked = row.values.get("input", row.values.get("prompt"))
    if isinstance(asked, Mapping):
        asked = asked.get("messages")
    if isinstance(asked, str):
        if before:
            return before
        asked = [{"role": "user", "content": asked}]
    if asked is None and before:
        return before
    prompt = _messages(asked, row.place)
    if before not in ((), prompt):
        raise DataError(f"data: {row.place}: its answers begin with another conversation")
    return prompt


def _asked_and_answered(value: Any, row: RawRow) -> tuple[tuple[Message, ...], str]:
    """Messages that end in the assistant's text; text alone is the answer."""
    if isinstance(value, str):
        return (), value
    messages = _messages(value, row.place)
    last = messages[-1]
    if last["role"] != "assistant" or not isinstance(last.get("content"), str):
        raise DataError(f"data: {row.place}: an answer must end in a text of the assistant's")
    return messages[:-1], last["content"]


def _tools(row: RawRow) -> tuple[dict[str, Any], ...]:
    source = row.values.get("input")
    tools = row.values.get("tools") or (source.get("tools") if isinstance(source, dict) else None)
    if isinstance(tools, str):
        tools = _json_value(tools)
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"data: {row.place}: tools must be a list of objects")
    return tuple(tools)


def _json_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _messages(value: Any, place: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f'data: {place}: expected messages: [{{"role": ..., "content": ...}}]')
    return tuple(_message(item, place) for item in value)


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, dict):
        raise DataError(f"data: {place}: a message must be an object")
    message = {name: value for name, value in item.items() if value is not None}
    if "from" in message and "value" in message:
        message = {"role": message["from"], "content": message["value"]}
    role = message.get("role")
    if not isinstance(role, str) or not ("content" in message or "tool_calls" in message):
        raise DataError(f"data: {place}: a message needs a role, and content or tool_calls")
    message["role"] = SPEAKERS.get(role, role)
    if message.get("weight", 1) not in (0, 1):
        raise DataError(f"data: {place}: a message's weight is 0 or 1")
    if "content" in message:
        message["content"] = _content(message["content"], place)
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], place)
    return message


def _content(value: Any, place: str) -> str:
    """Parts of text are joined as the server joins them."""
    parts = value if isinstance(value, list) else [{"type": "text", "text": value}]
    texts = [_part(part, place) for part in parts]
    return "\n".join(texts)


def _part(part: Any, place: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise DataError(
            f'data: {place}: a message\'s content must be text, or parts {{"type": "text", '
            '"text": ...}'
        )
    if not _is_whole(text):
        raise DataError(f"data: {place}: a message's content: {_fault(text)}")
    return text


def _tool_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise DataError(f"data: {place}: tool_calls must be a list")
    return [_tool_call(call, place) for call in calls]


def _tool_call(call: Any, place: str) -> dict[str, Any]:
    """Templates expect arguments as an object; OpenAI's rows hold them as JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise DataError(f"data: {place}: a tool call needs a function")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json_value(arguments)
    if not isinstance(arguments, dict):
        raise DataError(f"data: {place}: a tool call's arguments must be an object, or its JSON")
    return {**call, "function": {**function, "arguments": arguments}}

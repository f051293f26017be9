"""Held-out rows: columns of text of which one is the answer that is wanted, or conversations that
end in it.

In: what the trainer reads, read as it reads it. It must not know prompts, metrics or servers.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from lory_trainer.data_files import CONVERSATIONS, RawRow, data_digest
from lory_trainer.data_files import read_data as read_parts
from lory_trainer.data_rows import Message, Plan, column, make_sample, text_of
from lory_trainer.errors import DataError
from lory_trainer.evaluation.errors import EvaluationError

ANSWERS = ("completion", "response", "output", "answer", "chosen")
"""Columns of the wanted answer, in this order, unless one is named."""
OF_PAIRS = {"input", "preferred_output", "non_preferred_output"}
"""OpenAI's."""
CHAT_ROLES = ("system", "developer", "user", "assistant")
CHAT_KEYS = {"role", "content", "name"}


@dataclass(frozen=True, slots=True)
class Row:
    place: str
    """File and line, for messages."""
    values: Mapping[str, str]
    """Every column of text but the answer."""
    wanted: str
    messages: tuple[Message, ...] = ()
    """Of a conversation: those before the answer."""
    tools: tuple[dict[str, Any], ...] = ()
    said: Message | None = None
    """Of a conversation: the answer's message."""
    opening: str = ""
    """What a chat template begins the answer with, and the wanted one lacks."""
    learned: str | None = None
    """The answer as it is learned, special tokens and all; unset: the wanted one."""

    def fields(self, names: Sequence[str]) -> dict[str, str]:
        """The columns a template names."""
        for name in names:
            if name not in self.values:
                raise EvaluationError(
                    f"{self.place}: no text in the column `{name}`, which the template names;"
                    f" there are {', '.join(self.values) or 'none'}"
                )
        return {name: self.values[name] for name in names}


@dataclass(frozen=True, slots=True)
class DataSet:
    name: str
    """The file's, without its folder."""
    sha256: str
    rows: tuple[Row, ...]


def read_data(
    path: Path, completion: str | None, num_rows: int | None = None, fields: Sequence[str] = ()
) -> DataSet:
    """The first `num_rows` rows, or all; raises EvaluationError naming the line. Rows that have
    all `fields`, which a template names, are columns."""
    if not path.exists():
        raise EvaluationError(f"there is no file {path}")
    try:
        rows = tuple(_row(raw, completion, fields) for raw in _held_out(path))
    except DataError as error:
        raise EvaluationError(str(error).removeprefix("data: ")) from error
    if any(bool(row.messages) != bool(rows[0].messages) for row in rows):
        raise EvaluationError(f"{path.name} holds both conversations and columns; keep them apart")
    return DataSet(path.name, data_digest(path), rows[:num_rows])


def pick_shots(rows: Sequence[Row], num: int, held_out: Sequence[Row], seed: int) -> list[Row]:
    """Examples to show, none of which is asked for afterwards."""
    asked = {tuple(sorted(row.values.items())) for row in held_out}
    free = [row for row in rows if tuple(sorted(row.values.items())) not in asked]
    if len(free) < num:
        raise EvaluationError(
            f"{num} examples are wanted to show, and {len(free)} rows are not held out themselves;"
            " give --shots-from another file"
        )
    return Random(seed).sample(free, num)


def is_plain(messages: Iterable[Message]) -> bool:
    """Whether anybody may ask them as a chat: without calls and their results."""
    return all(m["role"] in CHAT_ROLES and m.keys() <= CHAT_KEYS for m in messages)


def _held_out(path: Path) -> Sequence[RawRow]:
    """Of a folder the part that was kept for this."""
    parts = read_parts(path)
    found = parts.test or parts.validation if path.is_dir() else parts.train
    if not found:
        raise EvaluationError(f"{path.name} keeps no test rows apart; name the file to score")
    return found


def _row(raw: RawRow, completion: str | None, fields: Sequence[str]) -> Row:
    values = raw.values
    if fields and set(fields) <= values.keys():
        return _columns(raw, completion)
    if values.keys() >= OF_PAIRS:
        return _better(raw, completion or "preferred_output")
    if values.keys() >= {"chosen", "rejected"}:
        is_chat = isinstance(values.get("prompt"), list) or isinstance(values["chosen"], list)
        return _better(raw, completion or "chosen") if is_chat else _columns(raw, completion)
    if isinstance(values.get("prompt"), list) or values.keys() & CONVERSATIONS:
        return _conversation(raw, completion or _answer_of(raw) or "completion")
    return _columns(raw, completion)


def _answer_of(raw: RawRow) -> str | None:
    return next((name for name in ANSWERS if name in raw.values), None)


def _columns(raw: RawRow, completion: str | None) -> Row:
    name = completion or _answer_of(raw)
    if name is None or name not in raw.values:
        raise EvaluationError(_no_answer(raw, name))
    texts = {
        key: column(raw, key, may_be_null=True)
        for key, value in raw.values.items()
        if key != name and (value is None or isinstance(value, str) or text_of(value) is not None)
    }
    return Row(raw.place, texts, column(raw, name))


def _no_answer(raw: RawRow, name: str | None) -> str:
    found = ", ".join(raw.values) or "nothing"
    if name is not None:
        return (
            f"{raw.place}: column `{name}` must hold the wanted answer; found: {found};"
            " --completion names another column"
        )
    if list(raw.values) == ["text"]:
        return (
            f"{raw.place}: a text alone has no answer to compare with; cut it in two, `text` that"
            " is asked and `completion` that is to follow"
        )
    return (
        f"{raw.place}: no column of the wanted answer ({', '.join(ANSWERS)}); found: {found};"
        " --completion names another"
    )


def _conversation(raw: RawRow, completion: str) -> Row:
    """Up to the last answer that is learned; what follows it is left out."""
    sample = make_sample(raw, Plan("messages", completion=completion, chat=True))
    messages = [message for message in sample.prompt if isinstance(message, dict)]
    learned = [
        place
        for place, message in enumerate(messages)
        if message["role"] == "assistant" and message.get("weight", 1)
    ]
    if not learned:
        raise EvaluationError(f"{raw.place}: every answer has weight 0; nothing to compare with")
    *asked, said = (_unweighted(message) for message in messages[: learned[-1] + 1])
    return _asked(raw, asked, said, sample.tools)


def _unweighted(message: Message) -> Message:
    return {name: value for name, value in message.items() if name != "weight"}


def _better(raw: RawRow, chosen: str) -> Row:
    """The better of two answers in messages is the wanted one."""
    rejected = "non_preferred_output" if "preferred_output" in raw.values else "rejected"
    sample = make_sample(raw, Plan("pair", chat=True, chosen=chosen, rejected=rejected))
    asked = [message for message in sample.prompt if isinstance(message, dict)]
    return _asked(raw, asked, {"role": "assistant", "content": sample.answer}, sample.tools)


def _asked(
    raw: RawRow, asked: Sequence[Message], said: Message, tools: tuple[dict[str, Any], ...]
) -> Row:
    if not asked:
        raise EvaluationError(f"{raw.place}: messages begin with the answer; nothing is asked")
    values = {"messages": "\n".join(f"{one['role']}: {_said(one)}" for one in asked)}
    if tools:
        values["tools"] = json.dumps(tools, ensure_ascii=False, default=str)
    return Row(raw.place, values, _said(said), tuple(asked), tools, said)


def _said(message: Message) -> str:
    """Its text, or its calls."""
    calls = message.get("tool_calls")
    text = message.get("content", "")
    if not calls:
        return text
    told = json.dumps([call["function"] for call in calls], ensure_ascii=False, default=str)
    return f"{text}\n{told}".strip()

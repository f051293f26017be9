"""Held-out rows: columns of text of which one is the answer that is wanted, or conversations that
end in it.

In: a JSONL file, or a JSON list. It must not know prompts, metrics or servers.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from lory_trainer.evaluation.errors import EvaluationError


@dataclass(frozen=True, slots=True)
class Row:
    place: str
    """File and line, for messages."""
    values: Mapping[str, str]
    """Every column of text but the answer."""
    wanted: str
    messages: tuple[Mapping[str, str], ...] = ()
    """Of a conversation: those before the answer."""

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


def read_data(path: Path, completion: str, num_rows: int | None = None) -> DataSet:
    """The first `num_rows` rows, or all; raises EvaluationError naming the line."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise EvaluationError(f"there is no file {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path.name} cannot be read: {error}") from error
    rows = tuple(_row(place, value, completion) for place, value in _values(path.name, text))
    if not rows:
        raise EvaluationError(f"{path.name} holds no rows")
    if any(bool(row.messages) != bool(rows[0].messages) for row in rows):
        raise EvaluationError(f"{path.name} holds both conversations and columns; keep them apart")
    return DataSet(path.name, hashlib.sha256(raw).hexdigest(), rows[:num_rows])


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


def _values(name: str, text: str) -> Iterator[tuple[str, Any]]:
    if text.lstrip().startswith("["):
        for number, value in enumerate(_parsed(name, text), start=1):
            yield f"{name} row {number}", value
        return
    # Not splitlines: text may hold other line ends than JSONL's.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{name} line {number}"
            yield place, _parsed(place, line)


def _parsed(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{place}: not JSON: {error}") from error


def _row(place: str, value: Any, completion: str) -> Row:
    if not isinstance(value, dict):
        raise EvaluationError(f'{place}: expected an object such as {{"text": "..."}}')
    if isinstance(value.get("messages"), list):
        return _conversation(place, value)
    wanted = value.get(completion)
    if not isinstance(wanted, str):
        found = ", ".join(value) or "nothing"
        raise EvaluationError(
            f"{place}: column `{completion}` must hold the wanted answer as text; found: {found};"
            " --completion names another column"
        )
    texts = {key: text for key, text in value.items() if isinstance(text, str)}
    for key, text in texts.items():
        if not _is_text(text):
            raise EvaluationError(f"{place}: column `{key}` holds half a character, a surrogate")
    texts.pop(completion)
    return Row(place, texts, wanted)


def _conversation(place: str, value: Mapping[str, Any]) -> Row:
    if value.get("tools"):
        raise EvaluationError(f"{place}: tools: conversations are asked without; leave the row out")
    *asked, last = [_message(place, message) for message in value["messages"]] or [{}]
    if not asked or last["role"] != "assistant":
        raise EvaluationError(
            f"{place}: messages must end in the answer, an assistant's, to others"
        )
    text = "\n".join(f"{message['role']}: {message['content']}" for message in asked)
    return Row(place, {"messages": text}, last["content"], tuple(asked))


def _message(place: str, message: Any) -> dict[str, str]:
    names = ("role", "content")
    if not isinstance(message, dict) or not all(isinstance(message.get(n), str) for n in names):
        raise EvaluationError(f"{place}: a message needs a role, and content that is text")
    if not _is_text(message["content"]):
        raise EvaluationError(f"{place}: a message holds half of a character (a lone surrogate)")
    return {name: message[name] for name in names}


def _is_text(text: str) -> bool:
    """Whether it can be sent and written."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

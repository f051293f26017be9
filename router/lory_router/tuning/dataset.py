"""Whether a file is what a job can be trained on: JSON lines, of the form that its method takes.

Looks at every line before anything is started, so that a caller learns at once which one is wrong.
It must not know tokenizers or training; what it lets through may still be too long.
"""

import json
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 4 * 2**20
ROLES = ("system", "developer", "user", "assistant", "tool")


class DatasetError(Exception):
    """The message names the line and what is wrong with it."""


def check_dataset(path: Path, kind: str) -> int:
    """How many rows; raises DatasetError. `kind`: supervised or dpo."""
    check = {"supervised": _check_supervised, "dpo": _check_preference}[kind]
    num_rows = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if len(line) > MAX_LINE_BYTES:
                raise DatasetError(f"line {number}: longer than {MAX_LINE_BYTES} bytes")
            if line.strip():
                check(_row(line, number), f"line {number}")
                num_rows += 1
    if not num_rows:
        raise DatasetError("holds no rows")
    return num_rows


def _row(line: bytes, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"line {number}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DatasetError(f"line {number}: is not a JSON object")
    return value


def _check_supervised(row: dict[str, Any], place: str) -> None:
    _check_messages(row.get("messages"), f"{place}: messages")
    if row["messages"][-1]["role"] != "assistant":
        raise DatasetError(
            f"{place}: the last message must be the assistant's: it is what is learnt"
        )


def _check_preference(row: dict[str, Any], place: str) -> None:
    given = row.get("input")
    if not isinstance(given, dict):
        raise DatasetError(f'{place}: expected "input": {{"messages": [...]}}')
    _check_messages(given.get("messages"), f"{place}: input.messages")
    for name in ("preferred_output", "non_preferred_output"):
        _check_messages(row.get(name), f"{place}: {name}")
        if len(row[name]) != 1 or row[name][0]["role"] != "assistant":
            raise DatasetError(f"{place}: {name} must be one message of the assistant")


def _check_messages(messages: Any, place: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise DatasetError(f'{place} must be a list of {{"role", "content"}}')
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise DatasetError(f"{place}: each needs a role, one of {', '.join(ROLES)}")
        is_call = message["role"] == "assistant" and message.get("tool_calls")
        if not isinstance(message.get("content"), str) and not is_call:
            raise DatasetError(f"{place}: each needs a content, which is text")

"""Whether a file is what a job can be trained on: JSON lines, of the form that its method takes.

Looks at every line before anything is started, so that a caller learns at once which one is wrong.
It must not know tokenizers or training; what it lets through may still be too long.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lory_router.errors import shown

MAX_LINE_BYTES = 4 * 2**20
BREATH_BYTES, BREATH_S = 64 * 2**10, 0.001
"""After so many bytes others get the interpreter for so long: streams must not notice."""
ROLES = ("system", "developer", "user", "assistant", "tool")
SUPERVISED_KEYS = frozenset({"messages", "tools", "parallel_tool_calls"})
PREFERENCE_KEYS = frozenset({"input", "preferred_output", "non_preferred_output"})
MESSAGE_KEYS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id"})


class DatasetError(Exception):
    """The message names the line and what is wrong with it."""


def check_dataset(path: Path, kind: str) -> None:
    """Raises DatasetError. `kind`: supervised or dpo."""
    check = {"supervised": _check_supervised, "dpo": _check_preference}[kind]
    has_rows, num_bytes = False, 0
    for number, line in enumerate(_lines(path), start=1):
        if len(line) > MAX_LINE_BYTES:
            raise DatasetError(f"line {number}: longer than {MAX_LINE_BYTES} bytes")
        if line.strip():
            check(_row(line, number), f"line {number}")
            has_rows = True
        num_bytes += len(line)
        if num_bytes >= BREATH_BYTES:
            num_bytes = 0
            time.sleep(BREATH_S)
    if not has_rows:
        raise DatasetError("holds no rows")


def count_rows(path: Path) -> int:
    """Of a file that has been checked."""
    return sum(1 for line in _lines(path) if line.strip())


def _lines(path: Path) -> Iterator[bytes]:
    """What has no line ends is not held as a whole."""
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            yield line


def _row(line: bytes, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"line {number}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DatasetError(f"line {number}: is not a JSON object")
    return value


def _check_keys(value: dict[str, Any], known: frozenset[str], place: str) -> None:
    """What nobody would read is refused, unless it is null."""
    given = (key for key, inner in value.items() if inner is not None)
    unknown = next((key for key in given if key not in known), None)
    if unknown is not None:
        raise DatasetError(
            f"{place}: {shown(unknown)} is not read; known are {', '.join(sorted(known))}"
        )


def _check_supervised(row: dict[str, Any], place: str) -> None:
    _check_messages(row.get("messages"), f"{place}: messages", may_weigh=True)
    _check_keys(row, SUPERVISED_KEYS, place)
    _check_tools(row, place)
    said = [message for message in row["messages"] if message["role"] == "assistant"]
    if row["messages"][-1]["role"] != "assistant":
        raise DatasetError(
            f"{place}: the last message must be the assistant's: it is what is learnt"
        )
    if all(message.get("weight") == 0 for message in said):
        raise DatasetError(f"{place}: every answer has weight 0; nothing is left to learn")


def _check_preference(row: dict[str, Any], place: str) -> None:
    given = row.get("input")
    if not isinstance(given, dict):
        raise DatasetError(f'{place}: expected "input": {{"messages": [...]}}')
    _check_keys(row, PREFERENCE_KEYS, place)
    _check_keys(given, SUPERVISED_KEYS, f"{place}: input")
    _check_messages(given.get("messages"), f"{place}: input.messages")
    _check_tools(given, f"{place}: input")
    for name in ("preferred_output", "non_preferred_output"):
        _check_messages(row.get(name), f"{place}: {name}")
        if len(row[name]) != 1 or row[name][0]["role"] != "assistant":
            raise DatasetError(f"{place}: {name} must be one message of the assistant")


def _check_tools(value: dict[str, Any], place: str) -> None:
    tools = value.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DatasetError(f"{place}: tools must be a list of objects")


def _check_messages(messages: Any, place: str, *, may_weigh: bool = False) -> None:
    """Only what is learnt as a whole conversation is weighed message by message."""
    if not isinstance(messages, list) or not messages:
        raise DatasetError(f'{place} must be a list of {{"role", "content"}}')
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise DatasetError(f"{place}: each needs a role, one of {', '.join(ROLES)}")
        is_said = message["role"] == "assistant"
        known = MESSAGE_KEYS | {"weight"} if may_weigh and is_said else MESSAGE_KEYS
        _check_keys(message, known, place)
        if message.get("weight") not in (None, 0, 1):
            raise DatasetError(f"{place}: a weight must be 0 or 1")
        is_call = is_said and message.get("tool_calls")
        if not isinstance(message.get("content"), str) and not is_call:
            raise DatasetError(f"{place}: each needs a content, which is text")

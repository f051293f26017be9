"""JSON from strangers: one object, bounded by the caller, no duplicate keys, no NaN, no deep nests,
no half characters.

It must not know what the object means.
"""

import json
from typing import Any, NoReturn

from lory_server.adapters.errors import AdapterInvalidError


def parse_object(raw: bytes, what: str) -> dict[str, Any]:
    """The object in `raw`; `what` names the source in errors."""
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        if "\\u" in text:
            # Half of a surrogate pair can be escaped, but never sent on: no message could hold it.
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise AdapterInvalidError(f"{what}: JSON is nested too deeply") from None
    except ValueError as error:
        raise AdapterInvalidError(f"{what}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise AdapterInvalidError(f"{what}: a JSON object is expected")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice[:100]!r} stands twice")
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number that JSON knows")

"""What somebody may have meant who named something that is not there.

It must not know who asks: whoever gives the names gives those that the asker may see.
"""

import difflib
import heapq
from collections.abc import Iterable
from itertools import islice

MAX_COMPARED = 5000
"""Names that are looked at; more takes too long."""
MAX_WEIGHED = 16
"""Of those so many, which share the most with what was named, are compared letter by letter."""
MAX_LENGTH = 200
LIKE_ENOUGH = 0.75
MIN_BEGINNING = 12
"""Characters from which on a beginning stands for the one name that begins so."""


def nearest(name: str, known: Iterable[str], like_enough: float = LIKE_ENOUGH) -> str:
    """The name that is most like it; empty: none is like it enough."""
    if not name or len(name) > MAX_LENGTH:
        return ""
    names = list(islice((one for one in known if len(one) <= MAX_LENGTH), MAX_COMPARED))
    begin = [one for one in names if one.startswith(name)] if len(name) >= MIN_BEGINNING else []
    if len(begin) == 1:
        return begin[0]
    folded = {one.casefold(): one for one in reversed(names)}
    likely = _likely(name.casefold(), folded)
    found = difflib.get_close_matches(name.casefold(), likely, n=1, cutoff=like_enough)
    return folded[found[0]] if found else ""


def _likely(name: str, known: Iterable[str]) -> list[str]:
    """Those that have the most pieces of the name in them."""
    size = 3 if len(name) > 5 else 2
    pieces = {name[start : start + size] for start in range(len(name) - size + 1)}

    def likeness(one: str) -> tuple[int, int]:
        return sum(map(one.__contains__, pieces)), -abs(len(one) - len(name))

    return heapq.nlargest(MAX_WEIGHED, known, key=likeness)


def nearest_path(path: str, templates: Iterable[str]) -> str:
    """Of templates such as /v1/files/{file_id}, with what the path has in the same place."""
    parts = path.split("/")
    return nearest(path, dict.fromkeys(_filled(template, parts) for template in templates))


def _filled(template: str, parts: list[str]) -> str:
    own = template.replace(":path}", "}").split("/")
    if len(own) != len(parts):
        return "/".join(own)
    pairs = zip(own, parts, strict=True)
    return "/".join(given if one.startswith("{") and given else one for one, given in pairs)

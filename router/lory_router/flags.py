"""How a setting is declared: a dataclass field with its flag's sentence, bounds and reader.

It must not know which settings there are, or where their values come from.
"""

from collections.abc import Callable
from dataclasses import field
from typing import Any, TypeVar

from lory_router.values import parse_size

T = TypeVar("T")


def flag(
    default: T,
    text: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    parse: Callable[[str], Any] | None = None,
    secret: bool = False,
) -> T:
    """A field that is a flag: its default, its one sentence, its bounds."""
    metadata = {"help": text, "at_least": at_least, "at_most": at_most, "parse": parse}
    return field(default=default, repr=not secret, metadata=metadata)


def size_flag(default: int, text: str) -> int:
    return flag(default, text, at_least=0, parse=parse_size)

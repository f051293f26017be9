"""rank_pattern and alpha_pattern: what the first pattern that matches a module's name says.

PEFT tries one after the other. Most are plain names, thousands of them for as many modules: these
are found by look-up, in time that does not grow with their number. In them a dot stands for any
character, as in every regular expression: those of equal length, with their dots in the same
places, make a shape, and a name is looked up once for each shape. It must not know what the values
mean.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from lory_server.adapters.errors import AdapterInvalidError
from lory_server.adapters.pattern import Pattern, Work

MAX_PATTERNS = 4096
MAX_EXPRESSIONS = 256
"""Of them, those that are more than names."""
SHAPE_WORK = 2

_PLAIN = re.compile(r"\^?(?:[A-Za-z0-9_.-]|\\\.)*\$?")

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class _Shape:
    width: int
    dots: tuple[int, ...]
    """Where any character may stand, written as a dot."""
    is_whole: bool
    """It begins with ^, and matches no part behind a dot."""

    def part_of(self, name: str) -> str | None:
        """What of a name patterns of this shape may match, as they would write it."""
        start = len(name) - self.width
        if start < 0 or (start and (self.is_whole or name[start - 1] != ".")):
            return None
        characters = list(name[start:])
        for at in self.dots:
            characters[at] = "."
        return "".join(characters)


@dataclass(slots=True)
class FirstMatch(Generic[V]):
    """Patterns in order, and what each says."""

    field: str
    work: Work
    _plain: dict[_Shape, dict[str, tuple[int, V]]] = dataclasses.field(default_factory=dict)
    """By shape and text."""
    _expressions: list[tuple[int, Pattern, V]] = dataclasses.field(default_factory=list)
    _found: dict[str, V | None] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, field: str, values: Mapping[str, V], work: Work) -> "FirstMatch[V]":
        """Raises AdapterInvalidError."""
        if len(values) > MAX_PATTERNS:
            raise _too_many(field, len(values), "patterns", MAX_PATTERNS)
        expressions = sum(not _PLAIN.fullmatch(text) for text in values)
        if expressions > MAX_EXPRESSIONS:
            raise _too_many(field, expressions, "regular expressions", MAX_EXPRESSIONS)
        patterns = cls(field, work)
        for order, (text, value) in enumerate(values.items()):
            if _PLAIN.fullmatch(text):
                shape, written = _shape_of(text)
                patterns._plain.setdefault(shape, {}).setdefault(written, (order, value))
            else:
                pattern = Pattern(field, text, suffix=True, work=work)
                patterns._expressions.append((order, pattern, value))
        return patterns

    def get(self, name: str) -> V | None:
        """None: none matches."""
        if name not in self._found:
            self._found[name] = self._first(name)
        return self._found[name]

    def _first(self, name: str) -> V | None:
        found = min(self._plain_ones(name), key=lambda one: one[0], default=None)
        for order, pattern, value in self._expressions:
            if found is not None and found[0] < order:
                break
            if pattern.matches(name):
                return value
        return None if found is None else found[1]

    def _plain_ones(self, name: str) -> list[tuple[int, V]]:
        found: list[tuple[int, V]] = []
        for shape, by_text in self._plain.items():
            part = shape.part_of(name)
            self._spend(SHAPE_WORK if part is None else SHAPE_WORK + len(part))
            if part is not None and part in by_text:
                found.append(by_text[part])
        return found

    def _spend(self, amount: int) -> None:
        try:
            self.work.spend(amount)
        except TimeoutError:
            raise AdapterInvalidError(
                f"adapter_config.json: {self.field} takes too long to match; list whole module"
                " names instead"
            ) from None


def _shape_of(text: str) -> tuple[_Shape, str]:
    """And the text without anchors and backslashes."""
    is_whole, rest = text.startswith("^"), text.removeprefix("^").removesuffix("$")
    pieces = re.findall(r"\\?.", rest)
    dots = tuple(at for at, piece in enumerate(pieces) if piece == ".")
    return _Shape(len(pieces), dots, is_whole), "".join(piece[-1] for piece in pieces)


def _too_many(field: str, found: int, what: str, most: int) -> AdapterInvalidError:
    return AdapterInvalidError(
        f"adapter_config.json: {field} has {found} {what}, at most {most} are read; one that names"
        " a module's end, such as q_proj, goes for every layer"
    )

"""The regular expressions of an adapter's configuration, matched as `re` would, in bounded time.

They come from strangers. `re` backtracks for as long as an expression makes it, and holds the
interpreter's lock meanwhile: one hostile expression would stop every thread. Here all ways to
match are followed at once, as a set of positions in the name, and the work is counted.

    .*\\.(q|v)_proj on "h.0.q_proj": {0} -> .* {0..10} -> \\. {2, 4} -> (q|v) {5} -> _proj {10}

It must not know what the names mean.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from lory_server.adapters.errors import AdapterInvalidError

MAX_PATTERN_CHARS = 4096
MAX_DEPTH = 32
MAX_WORK = 1_500_000
"""Some 0.2 us each, for all patterns of an adapter together; an honest one takes twenty a name."""
NODE_WORK = 2
"""For each part of a pattern that is tried."""
PARSE_WORK = 20
"""For each character of a pattern."""
CLASS_WORK = 500
"""For each set of characters that was not seen before."""
NAME_WORK = 50
"""For each name that was not seen before."""

_GROUP = re.compile(r"\((?:\?:|\?P<\w+>|(?!\?))")
_OR, _CLOSE = re.compile(r"\|"), re.compile(r"\)")
_CLASS = r"\[\^?\]?(?:\\.|[^\\\]\[&~|-]|-(?!-))*\]"
_LEAF = re.compile(_CLASS + r"|\\[dDwWsSbBAZ]|\\[^A-Za-z0-9]|[^\\()\[\]{}|*+?]")
_RUN = re.compile(r"[A-Za-z0-9_-]+(?![*+?{])")
"""Characters that stand for themselves, once each."""
_QUANTIFIER = re.compile(r"(?:[*+?]|\{(?=[\d,])(?P<low>\d{0,4})(?P<high>,\d{0,4})?\})\??")
_ANCHORS = ("^", "$", r"\b", r"\B", r"\A", r"\Z")
_CHARACTERS = re.compile(r"\.|\[.*|\\[dDwWsS]", re.DOTALL)
"""Leaves that match any of several characters."""


@dataclass(slots=True)
class Work:
    """What the patterns that share it may still cost, and what they have found out so far."""

    left: int = MAX_WORK
    names: dict[str, "_Name"] = field(default_factory=dict)
    classes: dict[str, "_Class"] = field(default_factory=dict)

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise TimeoutError

    def name(self, text: str) -> "_Name":
        name = self.names.get(text)
        if name is None:
            self.spend(NAME_WORK + len(text))
            name = self.names[text] = _Name(text, self, _places(text))
        return name

    def class_of(self, text: str) -> "_Class":
        """Raises re.error."""
        known = self.classes.get(text)
        if known is None:
            self.spend(CLASS_WORK)
            known = self.classes[text] = _Class(re.compile(text))
        return known


@dataclass(frozen=True, slots=True)
class _Name:
    """What is matched. Sets of positions are the bits of whole numbers."""

    text: str
    work: Work
    places: dict[str, int]
    """Where each character stands."""
    masks: dict[re.Pattern[str], int] = field(default_factory=dict)
    """Where anchors and sets of characters match."""

    def of_anchor(self, anchor: re.Pattern[str]) -> int:
        if anchor not in self.masks:
            self.work.spend(len(self.text))
            positions = range(len(self.text) + 1)
            self.masks[anchor] = sum(1 << at for at in positions if anchor.match(self.text, at))
        return self.masks[anchor]

    def of_class(self, characters: "_Class") -> int:
        expression = characters.expression
        if expression not in self.masks:
            self.work.spend(len(self.places))
            found = (bits for one, bits in self.places.items() if characters.has(one))
            self.masks[expression] = sum(found)
        return self.masks[expression]


@dataclass(frozen=True, slots=True)
class _Class:
    """A set of characters."""

    expression: re.Pattern[str]
    known: dict[str, bool] = field(default_factory=dict)

    def has(self, character: str) -> bool:
        if character not in self.known:
            self.known[character] = self.expression.match(character) is not None
        return self.known[character]


_Node = Callable[[_Name, int], int]
"""From the positions where it may start to those where it may end."""


class Pattern:
    """One expression; `matches(name)` says whether it matches the whole name.

    With `suffix` it may match what follows any dot of the name, as in PEFT's `get_pattern_key`.
    """

    def __init__(
        self, field: str, text: str, *, suffix: bool = False, work: Work | None = None
    ) -> None:
        self._field = field
        self._text = text
        self._work = work or Work()
        if len(text) > MAX_PATTERN_CHARS:
            raise self._invalid(f"is longer than {MAX_PATTERN_CHARS} characters")
        self._root = self._parse(rf"(.*\.)?({text})" if suffix else text)

    def matches(self, name: str) -> bool:
        try:
            ends = self._root(self._work.name(name), 1)
        except TimeoutError:
            raise self._too_long() from None
        return bool(ends >> len(name) & 1)

    def _parse(self, text: str) -> _Node:
        parser = _Parser(text, self._work)
        try:
            self._work.spend(PARSE_WORK * len(text))
            root = parser.alternatives(0)
            if parser.at != len(text):
                raise _SyntaxError
        except TimeoutError:
            raise self._too_long() from None
        except (_SyntaxError, re.error):
            raise self._invalid(f"is not supported from character {parser.at}") from None
        return root

    def _too_long(self) -> AdapterInvalidError:
        return self._invalid("takes too long to match")

    def _invalid(self, reason: str) -> AdapterInvalidError:
        shown = self._text if len(self._text) <= 80 else self._text[:77] + "..."
        return AdapterInvalidError(
            f"adapter_config.json: {self._field} {shown!r} {reason}; list module names instead"
        )


# -- parsing --------------------------------------------------------------------------------


class _SyntaxError(Exception):
    """Not a regular expression, or one with look-around, references, flags or literal braces."""


class _Parser:
    def __init__(self, text: str, work: Work) -> None:
        self.at = 0
        self._text = text
        self._work = work

    def alternatives(self, depth: int) -> _Node:
        if depth > MAX_DEPTH:
            raise _SyntaxError
        branches = [self._sequence(depth)]
        while self._take(_OR):
            branches.append(self._sequence(depth))
        return branches[0] if len(branches) == 1 else _any_of(branches)

    def _sequence(self, depth: int) -> _Node:
        items: list[_Node] = []
        while self.at < len(self._text) and self._text[self.at] not in "|)":
            run = self._take(_RUN)
            items.append(_literal(run[0]) if run else self._repeated(self._atom(depth)))
        return items[0] if len(items) == 1 else _one_after_other(items)

    def _atom(self, depth: int) -> _Node:
        if self._take(_GROUP):
            inner = self.alternatives(depth + 1)
            if not self._take(_CLOSE):
                raise _SyntaxError
            return inner
        leaf = self._take(_LEAF)
        if leaf is None:
            raise _SyntaxError
        return self._leaf(leaf[0])

    def _leaf(self, text: str) -> _Node:
        if text in _ANCHORS:
            return _anchor(re.compile(text))
        if _CHARACTERS.fullmatch(text):
            return _OneOf(self._work.class_of(text))
        return _literal(text[-1])

    def _repeated(self, node: _Node) -> _Node:
        quantifier = self._take(_QUANTIFIER)
        if quantifier is None:
            return node
        low, high = _bounds(quantifier)
        if high is not None and high < low:
            raise _SyntaxError
        return _repeat(node, low, high)

    def _take(self, expression: re.Pattern[str]) -> re.Match[str] | None:
        match = expression.match(self._text, self.at)
        if match is not None:
            self.at = match.end()
        return match


def _bounds(quantifier: re.Match[str]) -> tuple[int, int | None]:
    kind = quantifier[0][0]
    if kind != "{":
        return (1 if kind == "+" else 0), (1 if kind == "?" else None)
    low = int(quantifier["low"] or 0)
    high = quantifier["high"]
    if high is None:
        return low, low
    return low, int(high[1:]) if high[1:] else None


# -- matching -------------------------------------------------------------------------------


def _places(text: str) -> dict[str, int]:
    places: dict[str, int] = {}
    for at, character in enumerate(text):
        places[character] = places.get(character, 0) | 1 << at
    return places


def _literal(text: str) -> _Node:
    def ends(name: _Name, starts: int) -> int:
        name.work.spend(NODE_WORK + len(text) // 4)
        for character in text:
            starts = (starts & name.places.get(character, 0)) << 1
            if not starts:
                break
        return starts

    return ends


@dataclass(frozen=True, slots=True)
class _OneOf:
    characters: _Class

    def __call__(self, name: _Name, starts: int) -> int:
        name.work.spend(NODE_WORK)
        return (starts & name.of_class(self.characters)) << 1

    def any_number(self, name: _Name, starts: int) -> int:
        """Adding carries each start through the run of ones that it stands in."""
        name.work.spend(NODE_WORK)
        mask = name.of_class(self.characters)
        return (((starts & mask) + mask) ^ mask) | starts


def _anchor(expression: re.Pattern[str]) -> _Node:
    def ends(name: _Name, starts: int) -> int:
        name.work.spend(NODE_WORK)
        return starts & name.of_anchor(expression)

    return ends


def _one_after_other(items: list[_Node]) -> _Node:
    def ends(name: _Name, starts: int) -> int:
        name.work.spend(NODE_WORK)
        for item in items:
            if not starts:
                return 0
            starts = item(name, starts)
        return starts

    return ends


def _any_of(branches: list[_Node]) -> _Node:
    def ends(name: _Name, starts: int) -> int:
        name.work.spend(NODE_WORK)
        found = 0
        for branch in branches:
            found |= branch(name, starts)
        return found

    return ends


def _repeat(node: _Node, low: int, high: int | None) -> _Node:
    def ends(name: _Name, starts: int) -> int:
        # After twice the name's length and one more, a further repeat changes nothing.
        for _ in range(min(low, 2 * len(name.text) + 2)):
            if not starts:
                return 0
            starts = node(name, starts)
        if high is None and isinstance(node, _OneOf):
            return node.any_number(name, starts)
        found, fresh, repeats = starts, starts, low
        while fresh and (high is None or repeats < high):
            fresh = node(name, fresh) & ~found
            found |= fresh
            repeats += 1
        return found

    return ends

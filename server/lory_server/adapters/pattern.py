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
MAX_WORK = 4_000_000
"""Some 0.3 us each, for all patterns of an adapter together; an honest one takes a hundred a
name."""
NODE_WORK = 2
"""For each part of a pattern that is tried."""
PARSE_WORK = 10
"""For each character of a pattern."""

_PLAIN = re.compile(r"\^?(?:[A-Za-z0-9_.-]|\\\.)*\$?")
_GROUP = re.compile(r"\((?:\?:|\?P<\w+>|(?!\?))")
_CLASS = r"\[\^?\]?(?:\\.|[^\\\]\[&~|-]|-(?!-))*\]"
_LEAF = re.compile(_CLASS + r"|\\[dDwWsSbBAZ]|\\[^A-Za-z0-9]|[^\\()\[\]{}|*+?]")
_QUANTIFIER = re.compile(r"(?:[*+?]|\{(?=[\d,])(?P<low>\d{0,4})(?P<high>,\d{0,4})?\})\??")


@dataclass(slots=True)
class Work:
    """What the patterns that share it may still cost."""

    left: int = MAX_WORK

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise TimeoutError


@dataclass(slots=True)
class _Walk:
    """One name being matched. Sets of positions are the bits of whole numbers."""

    name: str
    work: Work
    leaf_masks: dict[re.Pattern[str], int] = field(default_factory=dict)

    def count(self) -> None:
        self.work.spend(NODE_WORK)

    def mask(self, leaf: re.Pattern[str]) -> int:
        """Where a leaf matches."""
        mask = self.leaf_masks.get(leaf)
        if mask is None:
            self.work.spend(1 + len(self.name) // 4)
            positions = range(len(self.name) + 1)
            mask = sum(1 << at for at in positions if leaf.match(self.name, at))
            self.leaf_masks[leaf] = mask
        return mask


_Node = Callable[[_Walk, int], int]
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
        self._spend(PARSE_WORK * len(text))
        whole = rf"(.*\.)?({text})" if suffix else text
        self._plain = re.compile(whole) if _PLAIN.fullmatch(text) else None
        self._root = _match_nothing if self._plain else self._parse(whole)

    def matches(self, name: str) -> bool:
        if self._plain is not None:
            self._spend(1)
            return self._plain.fullmatch(name) is not None
        try:
            ends = self._root(_Walk(name, self._work), 1)
        except TimeoutError:
            raise self._too_long() from None
        return bool(ends >> len(name) & 1)

    def _spend(self, amount: int) -> None:
        try:
            self._work.spend(amount)
        except TimeoutError:
            raise self._too_long() from None

    def _parse(self, text: str) -> _Node:
        parser = _Parser(text)
        try:
            root = parser.alternatives(0)
            if parser.at != len(text):
                raise _SyntaxError
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
    def __init__(self, text: str) -> None:
        self.at = 0
        self._text = text

    def alternatives(self, depth: int) -> _Node:
        if depth > MAX_DEPTH:
            raise _SyntaxError
        branches = [self._sequence(depth)]
        while self._take(re.compile(r"\|")):
            branches.append(self._sequence(depth))
        return branches[0] if len(branches) == 1 else _any_of(branches)

    def _sequence(self, depth: int) -> _Node:
        items: list[_Node] = []
        while self.at < len(self._text) and self._text[self.at] not in "|)":
            items.append(self._repeated(self._atom(depth)))
        return items[0] if len(items) == 1 else _one_after_other(items)

    def _atom(self, depth: int) -> _Node:
        if self._take(_GROUP):
            inner = self.alternatives(depth + 1)
            if not self._take(re.compile(r"\)")):
                raise _SyntaxError
            return inner
        leaf = self._take(_LEAF)
        if leaf is None:
            raise _SyntaxError
        expression = re.compile(leaf[0])
        is_anchor = leaf[0] in ("^", "$", r"\b", r"\B", r"\A", r"\Z")
        return _leaf(expression, 0 if is_anchor else 1)

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


def _match_nothing(walk: _Walk, starts: int) -> int:
    return 0


def _leaf(expression: re.Pattern[str], width: int) -> _Node:
    def ends(walk: _Walk, starts: int) -> int:
        walk.count()
        return (starts & walk.mask(expression)) << width

    return ends


def _one_after_other(items: list[_Node]) -> _Node:
    def ends(walk: _Walk, starts: int) -> int:
        walk.count()
        for item in items:
            if not starts:
                return 0
            starts = item(walk, starts)
        return starts

    return ends


def _any_of(branches: list[_Node]) -> _Node:
    def ends(walk: _Walk, starts: int) -> int:
        walk.count()
        found = 0
        for branch in branches:
            found |= branch(walk, starts)
        return found

    return ends


def _repeat(node: _Node, low: int, high: int | None) -> _Node:
    def ends(walk: _Walk, starts: int) -> int:
        # After twice the name's length and one more, a further repeat changes nothing.
        for _ in range(min(low, 2 * len(walk.name) + 2)):
            if not starts:
                return 0
            starts = node(walk, starts)
        found, fresh, repeats = starts, starts, low
        while fresh and (high is None or repeats < high):
            fresh = node(walk, fresh) & ~found
            found |= fresh
            repeats += 1
        return found

    return ends

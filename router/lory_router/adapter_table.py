"""What a server serves, as a table for the terminal: pinned ones first, then by where they are and
how lately they were asked.

Columns that say nothing are left out; where the terminal is narrow, so are the least needed ones.
It must not know HTTP.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

Adapter = Mapping[str, Any]
"""One of GET /v1/adapters."""

MIB = 1 << 20
TIERS = {"device": "green", "host": "cyan", "fetching": "yellow", "disk": "dim", "refused": "red"}
"""In the order that they are shown, each with its colour."""
MAX_IDLE_ROWS = 12
"""Of more adapters that are on disk alone a terminal shows the names side by side."""
MAX_NAMES = 3
"""Further names of an adapter; the others are counted."""
REVISION_SHOWN = 8
PIPE_WIDTH = 1000
"""Nobody looks at it: nothing is left out or cut."""
_NUMBER = re.compile(r"([0-9]{1,18})")
UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


@dataclass(frozen=True)
class _Column:
    title: str
    tell: Callable[[Adapter], str]
    is_number: bool = False
    rank: int = 0
    """Of two that do not fit the higher goes first; 0: never."""


def matching(adapters: Sequence[Adapter], pattern: str) -> list[Adapter]:
    """Those of which some name matches; * and ? stand for others."""
    if not pattern:
        return list(adapters)
    return [
        one
        for one in adapters
        if any(fnmatchcase(name, pattern) for name in (one["id"], *(one.get("names") or ())))
    ]


def print_adapters(console: Console, base: Sequence[str], adapters: Sequence[Adapter]) -> None:
    """The base's names, a row for each adapter, and at the end how many there are of each kind."""
    if not console.is_terminal:
        console = Console(file=console.file, width=PIPE_WIDTH)
    if base:
        console.print(Text(f"base: {', '.join(base)}"), soft_wrap=True)
    rows = sorted(adapters, key=_order)
    idle = [one for one in rows if _is_idle(one)] if console.is_terminal else []
    if len(idle) > MAX_IDLE_ROWS:
        rows = [one for one in rows if not _is_idle(one)]
    if rows:
        console.print(_fitting(console, rows))
    if len(idle) > MAX_IDLE_ROWS:
        names = [Text(one["id"], "dim") for one in idle]
        console.print(Text("on disk alone:", "bold"))
        console.print(Columns(names, column_first=True, padding=(0, 2)))
    console.print(Text(_summary(adapters), style="dim"), soft_wrap=True)
    for line in _remarks(adapters):
        console.print(Text(line), soft_wrap=True)


def _is_idle(one: Adapter) -> bool:
    """Whether its name is all there is to tell."""
    return _tier(one) == "disk" and not any(c.tell(one) for c in _COLUMNS if c.rank)


def _fitting(console: Console, adapters: Sequence[Adapter]) -> Table:
    columns = [one for one in _COLUMNS if not one.rank or any(one.tell(a) for a in adapters)]
    while True:
        table = _table(columns, adapters)
        needed = Measurement.get(console, console.options.update(width=PIPE_WIDTH), table).maximum
        droppable = max(columns, key=lambda one: one.rank)
        if needed <= console.width or not droppable.rank:
            return table
        columns.remove(droppable)


def _table(columns: Sequence[_Column], adapters: Sequence[Adapter]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        justify = "right" if column.is_number else "left"
        table.add_column(column.title, justify=justify, overflow="fold")
    for one in adapters:
        cells = (Text(column.tell(one), _style(column, one)) for column in columns)
        table.add_row(*cells)
    return table


def _style(column: _Column, one: Adapter) -> str:
    return TIERS.get(_tier(one), "") if column.title == "where" else ""


def _order(one: Adapter) -> tuple[Any, ...]:
    tiers = list(TIERS)
    tier = tiers.index(_tier(one)) if _tier(one) in tiers else len(tiers)
    return (not one.get("pinned"), tier, -(one.get("last_used") or 0), _as_read(one["id"]))


def _as_read(name: str) -> list[tuple[bool, int, str]]:
    """So that a-9 comes before a-10."""
    return [
        (not part.isdecimal(), int(part) if part.isdecimal() else 0, part)
        for part in _NUMBER.split(name)
    ]


def _tier(one: Adapter) -> str:
    return one.get("state") or one.get("tier") or "-"


def _pinned(one: Adapter) -> str:
    return "pinned" if one.get("pinned") else ""


def _requests(one: Adapter) -> str:
    return str(one["requests"]) if one.get("requests") else ""


def _used(one: Adapter) -> str:
    last = one.get("last_used")
    if last is None:
        return ""
    seconds = max(0, round(time.time() - last))
    size, unit = next(((s, u) for s, u in UNITS if seconds >= s), UNITS[-1])
    return f"{seconds // size} {unit} ago"


def _rank(one: Adapter) -> str:
    ranks = {rank for kind in (one.get("matched") or {}).values() for rank in kind["ranks"]}
    return "-".join(str(rank) for rank in sorted({min(ranks), max(ranks)})) if ranks else ""


def _size(one: Adapter) -> str:
    sizes = one.get("bytes") or {}
    size = sizes.get("device") or sizes.get("host") or sizes.get("disk")
    return f"{size / MIB:.1f} MiB" if size else ""


def _revision(one: Adapter) -> str:
    return (one.get("revision") or "")[:REVISION_SHOWN]


def _names(one: Adapter) -> str:
    """An alias of the adapter without the adapter's name; what stands for another revision than the
    newest with it."""
    names: Mapping[str, str | None] = one.get("names") or {}
    told = [_name(one, name, revision or "") for name, revision in names.items()]
    more = [f"and {len(told) - MAX_NAMES} more"] if len(told) > MAX_NAMES else []
    return ", ".join([*told[:MAX_NAMES], *more])


def _name(one: Adapter, name: str, revision: str) -> str:
    short = name.removeprefix(one["id"]) if name.startswith(f"{one['id']}@") else name
    is_other = revision and revision != one.get("revision")
    return f"{short} ({revision[:REVISION_SHOWN]})" if is_other else short


def _owner(one: Adapter) -> str:
    return one.get("owner") or ""


_COLUMNS = (
    _Column("name", lambda one: one["id"]),
    _Column("where", _tier),
    _Column("pinned", _pinned, rank=1),
    _Column("also called", _names, rank=2),
    _Column("requests", _requests, is_number=True, rank=3),
    _Column("used", _used, is_number=True, rank=4),
    _Column("owner", _owner, rank=5),
    _Column("rank", _rank, is_number=True, rank=6),
    _Column("size", _size, is_number=True, rank=7),
    _Column("revision", _revision, rank=8),
)


def _summary(adapters: Sequence[Adapter]) -> str:
    num = len(adapters)
    if not num:
        return "no adapters"
    tiers = Counter(map(_tier, adapters))
    known = [f"{tiers[tier]} {tier}" for tier in (*TIERS, "-") if tiers[tier]]
    num_pinned = sum(bool(one.get("pinned")) for one in adapters)
    pinned = f"; {num_pinned} pinned" if num_pinned else ""
    return f"{num} adapter{'' if num == 1 else 's'}: {', '.join(known)}{pinned}"


def _remarks(adapters: Sequence[Adapter]) -> Iterator[str]:
    """What takes a line of its own."""
    for one in adapters:
        if one.get("fetching"):
            yield f"{one['id']}: fetching, {fetched(one['fetching'])}"
        if one.get("refused"):
            yield f"{one['id']}: refused: {one['refused']}"
        if one.get("merged"):
            yield f"{one['id']}: merged from {merged(one['merged'])}"


def fetched(download: Mapping[str, Any]) -> str:
    """How far it has come."""
    total = download["total"]
    of = "" if total is None else f" of {total / MIB:.1f}"
    return f"{download['bytes'] / MIB:.1f}{of} MiB in {download['seconds']:.0f} s"


def merged(recipe: Mapping[str, Any]) -> str:
    """What of, and how."""
    weighted = ", ".join(f"{one['weight']:g} x {one['adapter_id']}" for one in recipe["adapters"])
    return f"{weighted} by {recipe['method']}"

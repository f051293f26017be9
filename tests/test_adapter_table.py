"""`lory adapters` in a terminal: what counts comes first, fits, and is whole where nobody looks."""

import time
from collections.abc import Mapping
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from lory_router.adapter_table import matching, print_adapters

REVISION, OLDER = "0123456789abcdef", "fedcba9876543210"


def adapter(name: str, state: str = "disk", **more: Any) -> dict[str, Any]:
    """As GET /v1/adapters tells it of what was never read."""
    nothing = {"disk": None, "host": 0, "device": 0}
    told = {"id": name, "state": state, "revision": None, "matched": None, "bytes": nothing}
    told |= {"requests": 0, "last_used": None, "pinned": False, "names": {}, "refused": None}
    return told | {"owner": None, "merged": None} | more


def resident(name: str, state: str = "device", **more: Any) -> dict[str, Any]:
    told = {
        "revision": REVISION,
        "matched": {"q_proj": {"modules": 2, "ranks": [4, 8]}, "v_proj": {"ranks": [16]}},
        "bytes": {"disk": 3 << 20, "host": 2 << 20, "device": 2 << 20},
        "last_used": time.time() - 130,
    }
    return adapter(name, state, **told | more)


def shown(*adapters: Mapping[str, Any], width: int = 200, is_terminal: bool = True) -> list[str]:
    console = Console(
        file=StringIO(),
        width=width,
        force_terminal=is_terminal,
        color_system=None,
        highlight=False,
    )
    print_adapters(console, ["demo"], adapters)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_pinned_ones_come_first_then_those_nearest_to_the_device():
    lines = shown(
        adapter("a"),
        resident("b", "host"),
        resident("c", last_used=time.time() - 10),
        resident("d", last_used=time.time() - 1),
        resident("e", pinned=True),
    )
    assert lines[0] == "base: demo"
    assert [line.split()[0] for line in lines[2:-1]] == ["e", "d", "c", "b", "a"]
    assert lines[2].split()[:3] == ["e", "device", "pinned"]
    assert lines[-1] == "5 adapters: 3 device, 1 host, 1 disk; 1 pinned"


def test_a_row_tells_names_requests_use_rank_size_and_revision():
    names = {"support@prod": REVISION, "support@old": OLDER, "help": None}
    [row] = shown(resident("support", names=names, requests=3, owner="acme"))[2:-1]
    cells = " ".join(row.split())
    assert cells == (
        "support device @prod, @old (fedcba98), help 3 2 min ago acme 4-16 2.0 MiB 01234567"
    )


def test_columns_that_say_nothing_are_left_out():
    head, row = shown(adapter("a"), adapter("b"))[1:3]
    assert head.split() == ["name", "where"]
    assert row.split() == ["a", "disk"]


@pytest.mark.parametrize(
    ("width", "last"),
    [(200, "revision"), (66, "size"), (40, "called"), (24, "pinned"), (15, "where")],
)
def test_a_narrow_terminal_loses_what_is_needed_least(width: int, last: str):
    lines = shown(resident("support", pinned=True, names={"help": None}), width=width)
    assert lines[1].split()[-1] == last
    assert all(len(line) <= width for line in lines[1:3])


def test_where_nobody_looks_nothing_is_cut():
    name = "ft-" + "x" * 150
    row = shown(resident(name), width=20, is_terminal=False)[2]
    assert row.split()[0] == name
    assert row.endswith("01234567")


def test_many_names_are_counted():
    names: dict[str, str | None] = {f"name-{n}": None for n in range(9)}
    assert "name-0, name-1, name-2, and 6 more" in shown(resident("a", names=names))[2]


def test_what_is_refused_fetched_or_merged_says_so_below():
    recipe = {"method": "ties", "adapters": [{"adapter_id": "a", "weight": 0.5}]}
    lines = shown(
        adapter("broken", "refused", refused="a tensor [bold]matches[/bold] nothing"),
        adapter("new", "fetching", fetching={"bytes": 1 << 20, "total": None, "seconds": 2.0}),
        adapter("blend", merged=recipe),
    )
    assert lines[-4] == "3 adapters: 1 fetching, 1 disk, 1 refused"
    assert set(lines[-3:]) == {
        "broken: refused: a tensor [bold]matches[/bold] nothing",
        "new: fetching, 1.0 MiB in 2 s",
        "blend: merged from 0.5 x a by ties",
    }


def test_a_pattern_picks_by_any_name():
    adapters = [adapter("ft-a"), adapter("b", names={"ft-b": None}), adapter("c")]
    assert [one["id"] for one in matching(adapters, "ft-*")] == ["ft-a", "b"]
    assert matching(adapters, "") == adapters
    assert shown(*matching(adapters, "nobody")) == ["base: demo", "no adapters"]


def test_of_hundreds_on_disk_a_terminal_shows_the_names_side_by_side():
    adapters = [adapter(f"idle-{n}") for n in range(300)] + [resident("a", names={"b": None})]
    lines = shown(*adapters, width=80)
    assert len(lines) < 60
    assert lines[2].split()[:3] == ["a", "device", "b"]
    assert lines[3] == "on disk alone:"
    down = [line.split()[0] for line in lines[4:-1]]
    assert down == [f"idle-{n}" for n in range(len(down))]
    assert sorted(" ".join(lines[4:-1]).split()) == sorted(one["id"] for one in adapters[:-1])
    assert lines[-1] == "301 adapters: 1 device, 300 disk"
    assert len(shown(*adapters, is_terminal=False)) == 304


def test_numbers_in_names_count_as_numbers():
    names = ["v10", "v9", "a-2-b", "a-10", "2", "10", "v"]
    lines = shown(*(adapter(name) for name in names))[2:-1]
    assert [line.split()[0] for line in lines] == ["2", "10", "a-2-b", "a-10", "v", "v9", "v10"]

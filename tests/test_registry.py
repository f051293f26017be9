"""Names, pins, owners and removals outlive the server; a file that cannot be trusted is refused,
and one of an older version is brought up to this one."""

import asyncio
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Coroutine, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lory_router.errors import RegistryUnwritable
from lory_router.names import Target
from lory_router.registry import Registry
from lory_router.registry_file import CHANGES, SCHEMA_VERSION, RegistryError

REVISION = "0123456789abcdef" * 2


def run(*works: Coroutine[Any, Any, None]) -> None:
    async def main() -> None:
        for work in works:
            await work

    asyncio.run(main())


def test_what_is_removed_takes_along_what_was_named_just_before() -> None:
    """The removal is asked for while a name and a pin of another branch are being written."""

    async def at_once(registry: Registry) -> None:
        await asyncio.gather(
            registry.register("support@dev", Target("hub:org/support@dev")),
            registry.pin(Target("hub:org/support@dev")),
            registry.remove("hub:org/support"),
        )

    with closing(Registry()) as registry:
        run(at_once(registry))
        assert (registry.state.names, registry.state.pins) == ({}, frozenset())


def test_everything_outlives_the_server(tmp_path: Path) -> None:
    path = str(tmp_path / "registry")
    with closing(Registry(path)) as first:
        run(
            first.register("support@prod", Target("support", REVISION)),
            first.register("helpdesk", Target("support")),
            first.pin(Target("support")),
            first.pin(Target("support", REVISION)),
            first.pin(Target("other")),
            first.unpin([Target("other")]),
            first.register("acme/own", Target("acme/own"), "acme"),
            first.remove("old"),
        )
        kept = first.state
    with closing(Registry(path)) as second:
        assert second.state == kept
        assert second.state.pins == {Target("support"), Target("support", REVISION)}
        assert second.target("support@prod") == Target("support", REVISION)
        assert second.target("helpdesk") == Target("support")
        assert second.target("old") is None
        assert second.state.owners == {"acme/own": "acme"}


def test_without_a_file_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with closing(Registry()) as registry:
        run(registry.pin(Target("a")))
        assert registry.state.pins == {Target("a")}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("a", Target("a")),
        ("team/a", Target("team/a")),
        ("a@0123ab", Target("a", "0123ab")),
        ("a@prod", None),
        ("a@", None),
        ("a@0123a", None),
        ("a@0123AB", None),
        ("@0123ab", None),
        ("+a", None),
        ("helpdesk", Target("support")),
        ("helpdesk@0123ab", Target("support", "0123ab")),
        ("support@prod", Target("support", REVISION)),
        ("gone", None),
        ("gone@0123ab", None),
        ("to-gone", None),
    ],
)
def test_what_a_name_stands_for(name: str, target: Target | None) -> None:
    with closing(Registry()) as registry:
        run(
            registry.register("helpdesk", Target("support")),
            registry.register("support@prod", Target("support", REVISION)),
            registry.remove("gone"),
            registry.register("to-gone", Target("gone")),
        )
        assert registry.target(name) == target


def test_a_removed_adapter_takes_its_names_and_pins_along_and_comes_back_without() -> None:
    with closing(Registry()) as registry:
        run(
            registry.register("a@prod", Target("a", REVISION)),
            registry.register("b@prod", Target("b", REVISION)),
            registry.pin(Target("a")),
            registry.remove("a"),
        )
        assert list(registry.state.names) == ["b@prod"]
        assert not registry.state.pins
        run(registry.register("a", Target("a")))
        assert registry.target("a") == Target("a")
        assert registry.target("a@prod") is None


def test_an_alias_moves_and_a_name_can_be_forgotten() -> None:
    with closing(Registry()) as registry:
        run(
            registry.register("a@prod", Target("a", "1" * 32)),
            registry.register("a@prod", Target("a", "2" * 32)),
        )
        assert registry.target("a@prod") == Target("a", "2" * 32)
        run(registry.forget("a@prod"))
        assert registry.target("a@prod") is None


def test_an_owner_stays_until_another_is_named_or_the_name_is_forgotten() -> None:
    with closing(Registry()) as registry:
        run(registry.register("a", Target("a"), "acme"), registry.register("a", Target("a")))
        assert registry.state.owners == {"a": "acme"}
        run(registry.register("a", Target("a"), "beta"))
        assert registry.state.owners == {"a": "beta"}
        run(registry.register("x", Target("a"), "acme"), registry.remove("a"))
        assert registry.state.owners == {"a": "beta"}, "it is not for all when it comes back"
        run(registry.register("a", Target("a"), ""))
        assert not registry.state.owners
        run(registry.register("y", Target("a"), "acme"), registry.forget("y"))
        assert not registry.state.owners
        run(registry.register("a", Target("a"), "acme"), registry.clear("a"))
        assert not registry.state.owners
        assert not registry.state.names


def test_to_who_does_not_see_a_name_it_is_not_registered() -> None:
    with closing(Registry()) as registry:
        run(
            registry.register("help", Target("a")),
            registry.register("a@prod", Target("a", "1" * 32)),
        )
        run(registry.remove("gone"))

        def sees(name: str) -> bool:
            return name not in ("help", "a@prod", "gone")

        assert registry.target("help", sees) == Target("help")
        assert registry.target("help@0123ab", sees) == Target("help", "0123ab")
        assert registry.target("a@prod", sees) is None
        assert registry.target("gone", sees) == Target("gone")


@pytest.mark.parametrize("removed", ["hub:org/x", "hub:org/x@v2"])
def test_a_source_that_was_removed_is_so_for_every_branch_if_none_was_named(removed: str) -> None:
    with closing(Registry()) as registry:
        run(registry.remove(removed), registry.register("x@prod", Target("hub:org/x@v2", REVISION)))
        assert registry.target("hub:org/x@v2") is None
        assert registry.target("x@prod") is None
        assert (registry.target("hub:org/x@v3") is None) == (removed == "hub:org/x")


@pytest.mark.parametrize(
    ("removed", "name", "is_gone"),
    [
        ("hub:org/x", "hub:Org/X", True),
        ("hub:org/x", "hub:ORG/x@v2", True),
        ("hub:org/x@V2", "hub:org/x@v2", False),
        ("hub:org/x@main", "hub:org/x", True),
        ("hub:org/x@main", "hub:org/x@v2", False),
        ("hub:org/x", "hub:org/xy", False),
        ("https://h/a", "https://h/a@b", False),
        ("s3:bucket/a", "s3:bucket/a@b", False),
        ("upload:a", "upload:A", False),
        ("a", "A", False),
    ],
)
def test_what_a_removal_covers(removed: str, name: str, is_gone: bool) -> None:
    """To a hub `Org/X` is `org/x`; in other names case counts, and an @ is a letter like others."""
    with closing(Registry()) as registry:
        run(registry.register("n", Target(name)), registry.pin(Target(name)))
        run(registry.remove(removed))
        assert (registry.target(name) is None) == is_gone
        assert ("n" not in registry.state.names) == is_gone
        assert (not registry.state.pins) == is_gone


# -- files of earlier versions --------------------------------------------------------------


def file_of_version_1(path: Path) -> None:
    """As the first version wrote it."""
    with closing(sqlite3.connect(path)) as database, database:
        for statement in (
            "CREATE TABLE names (name TEXT PRIMARY KEY, adapter_id TEXT, revision TEXT)",
            "CREATE TABLE pins (adapter_id TEXT, revision TEXT, UNIQUE (adapter_id, revision))",
            "CREATE TABLE removed (adapter_id TEXT PRIMARY KEY)",
            "PRAGMA application_id = 1282372217",
            "PRAGMA user_version = 1",
            f"INSERT INTO names VALUES ('support@prod', 'support', '{REVISION}')",
            "INSERT INTO pins VALUES ('support', '')",
            "INSERT INTO removed VALUES ('old')",
        ):
            database.execute(statement)


def version_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as database:
        return int(database.execute("PRAGMA user_version").fetchone()[0])


def test_a_file_of_the_first_version_is_brought_up_and_keeps_all(tmp_path: Path) -> None:
    path = tmp_path / "registry"
    file_of_version_1(path)
    with closing(Registry(str(path))) as registry:
        assert registry.state.names == {"support@prod": Target("support", REVISION)}
        assert registry.state.pins == {Target("support")}
        assert registry.state.removed == {"old"}
        assert not registry.state.owners
        run(registry.register("a", Target("a"), "acme"))
    assert version_of(path) == SCHEMA_VERSION
    with closing(Registry(str(path))) as registry:
        assert registry.state.owners == {"a": "acme"}


def test_a_change_of_version_that_breaks_off_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lory_router import registry_file as module

    path = tmp_path / "registry"
    file_of_version_1(path)
    broken = (CHANGES[0], ("CREATE TABLE half (a TEXT)", "CREATE TABLE names (a TEXT)"))
    monkeypatch.setattr(module, "CHANGES", broken)
    refusal(path)
    assert version_of(path) == 1
    with closing(sqlite3.connect(path)) as database:
        tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master")}
    assert "half" not in tables


# -- files that are not as they should be ---------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(RegistryError) as refused:
        Registry(str(path))
    assert str(path) in str(refused.value)
    return str(refused.value)


def test_a_file_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "registry"
    Registry(str(path)).close()
    with closing(sqlite3.connect(path)) as newer:
        newer.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    assert "newer Lory" in refusal(path)
    with closing(sqlite3.connect(path)) as same:
        assert same.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION + 1


def test_what_is_no_registry_is_refused_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("not a database, but quite long enough to be taken for one" * 20)
    assert "damaged or no registry" in refusal(text)
    assert text.read_text().startswith("not a database")
    other = tmp_path / "other"
    with closing(sqlite3.connect(other)) as database:
        database.execute("CREATE TABLE names (whose TEXT)")
    assert "another program" in refusal(other)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "registry"
    Registry(str(path)).close()
    with closing(sqlite3.connect(path)) as database, database:
        rows = [(f"a{i}@prod", "a", REVISION) for i in range(300)]
        database.executemany("INSERT INTO names VALUES (?, ?, ?)", rows)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:4096] + b"\xff" * (len(whole) - 4096)):
        path.write_bytes(damaged)
        assert "damaged" in refusal(path)


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TABLE pins",
        "ALTER TABLE names RENAME COLUMN revision TO whose",
        "INSERT INTO merges VALUES ('blend', '{')",
        "INSERT INTO merges VALUES ('blend', '{\"sources\": 3}')",
    ],
)
def test_a_sound_file_that_is_no_registry_any_more_is_refused(
    tmp_path: Path, statement: str
) -> None:
    path = tmp_path / "registry"
    Registry(str(path)).close()
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(statement)
    assert "damaged or no registry" in refusal(path)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "folder is not there" in refusal(tmp_path / "none" / "registry")
    assert "must be a file" in refusal(tmp_path)


def test_two_servers_do_not_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "registry"
    with closing(Registry(str(path))):
        program = (
            "import sys; from lory_router.registry import Registry\n"
            "from lory_router.registry_file import RegistryError\n"
            "try: Registry(sys.argv[1])\n"
            "except RegistryError as error: print(error)\n"
        )
        command = [sys.executable, "-c", program, str(path)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "another server uses it" in said
    Registry(str(path)).close()


def test_a_change_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    with closing(Registry(str(tmp_path / "registry"))) as registry:
        run(registry.pin(Target("a")))
        kept = registry.state
        registry._connection.execute("PRAGMA query_only = 1")
        with pytest.raises(RegistryUnwritable, match="nothing was changed"):
            run(registry.remove("a"))
        assert registry.state is kept
        registry._connection.execute("PRAGMA query_only = 0")
        run(registry.remove("a"))
        assert not registry.state.pins


def test_the_event_loop_goes_on_while_a_change_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lory_router import registry as module

    write, may_write = module._apply, threading.Event()

    def slow(*arguments: Any) -> Any:
        assert may_write.wait(5)
        return write(*arguments)

    monkeypatch.setattr(module, "_apply", slow)

    async def main(registry: Registry) -> None:
        writing = asyncio.ensure_future(registry.pin(Target("a")))
        await asyncio.sleep(0.01)
        assert not registry.state.pins
        writing.cancel()
        may_write.set()
        while not registry.state.pins:
            await asyncio.sleep(0.001)

    with closing(Registry(str(tmp_path / "registry"))) as registry:
        asyncio.run(main(registry))


WRITING = """
import asyncio, sys
from lory_router.names import Target
from lory_router.registry import Registry

async def main():
    registry = Registry(sys.argv[1])
    for number in range(int(sys.argv[2]), 1_000_000):
        await registry.register(f"n{number}@prod", Target("support", "0" * 32), "acme")
        await registry.pin(Target(f"n{number}"))
        print(number, flush=True)

asyncio.run(main())
"""


def test_what_was_answered_before_a_kill_is_there_and_nothing_is_half(tmp_path: Path) -> None:
    path, answered = str(tmp_path / "registry"), -1
    for num_answers in (1, 7, 20):
        command = [sys.executable, "-c", WRITING, path, str(answered + 1)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(num_answers):
                answered = int(process.stdout.readline())
            process.kill()
            answered = max([answered, *map(int, process.stdout.read().split())])
        with closing(Registry(path)) as registry:
            state = registry.state
        told = {f"n{number}@prod" for number in range(answered + 1)}
        assert told <= state.names.keys() <= told | {f"n{answered + 1}@prod"}
        assert state.owners.keys() == state.names.keys()
        assert len(state.names) - len(state.pins) in (0, 1)


# -- files that cannot be written -----------------------------------------------------------


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """That any user may enter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextmanager
def without_rights() -> Iterator[None]:
    """As a user whom the modes of files hold back."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize(("file_mode", "folder_mode"), [(0o444, 0o777), (0o666, 0o555)])
def test_a_file_that_cannot_be_written_is_refused_at_the_start(
    open_folder: Path, file_mode: int, folder_mode: int
) -> None:
    """SQLite opens it all the same, and every change was a 500 from then on."""
    path = open_folder / "registry"
    Registry(str(path)).close()
    path.chmod(file_mode)
    open_folder.chmod(folder_mode)
    with without_rights(), pytest.raises(RegistryError, match="that the server may write"):
        Registry(str(path))
    open_folder.chmod(0o755)


@pytest.mark.parametrize("is_replaced", [False, True])
def test_nothing_is_answered_that_would_be_written_to_a_file_that_was_moved(
    tmp_path: Path, is_replaced: bool
) -> None:
    """It was written to what no server will ever open again."""
    path = tmp_path / "registry"
    with closing(Registry(str(path))) as registry:
        run(registry.pin(Target("a")))
        path.rename(tmp_path / "old")
        if is_replaced:
            path.write_bytes(b"")
        with pytest.raises(RegistryUnwritable, match="moved or replaced"):
            run(registry.pin(Target("b")))
        assert registry.state.pins == {Target("a")}
    with closing(Registry(str(tmp_path / "old"))) as registry:
        assert registry.state.pins == {Target("a")}


def test_no_path_stands_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with closing(Registry(":memory:")) as registry:
        run(registry.pin(Target("a")))
    with closing(Registry(":memory:")) as registry:
        assert registry.state.pins == {Target("a")}

"""The disk cache: whole adapters only, within its budget, across restarts and kills."""

import asyncio
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from lory_router.errors import AdapterFileTooLarge, DiskFull
from lory_router.sources.disk import TOUCH_S, CacheFolderError, DiskCache, Origin
from source_files import adapter_bytes, at, is_clean, kept
from source_servers import Server

BUDGET = 1000


async def put(
    disk: DiskCache,
    folder: str,
    num_bytes: int = 300,
    kind: str = "web",
    is_removed: bool = False,
    called: str = "",
) -> None:
    """An adapter of so many bytes in its two files, fetched as `folder` or as it is `called`."""
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x" * (num_bytes - 2)}
    async with disk.arriving() as arrival:
        await arrival.cover(num_bytes)
        for file, body in files.items():
            (arrival.path / file).write_bytes(body)
        sizes = {file: (len(body), "") for file, body in files.items()}
        origin = Origin(
            kind=kind, scope="s", name=called or folder, revision="1", is_public=True,
            is_removed=is_removed, fetched_at=time.time(), files=sizes,
        )  # fmt: skip
        await disk.publish(arrival, folder, origin)


def names(disk: DiskCache) -> set[str]:
    return {entry.folder for entry in disk.entries()}


def test_the_least_recently_used_goes_and_what_is_held_stays(tmp_path: Path):
    async def work() -> None:
        disk = DiskCache(tmp_path / "c", BUDGET)
        for name in ("a", "b", "c"):
            await put(disk, name)
        disk.hold("a")
        disk.release("a")
        await put(disk, "d")
        assert names(disk) == {"a", "c", "d"}
        disk.hold("c")
        await put(disk, "e")
        assert names(disk) == {"c", "d", "e"}
        assert disk.num_bytes == 900
        assert set(kept(tmp_path / "c")) == {"c", "d", "e"}
        disk.hold("d")
        disk.hold("e")
        with pytest.raises(DiskFull, match="in use"):
            await put(disk, "f")
        disk.release("d")
        await put(disk, "f")
        assert names(disk) == {"c", "e", "f"}
        assert is_clean(tmp_path / "c")
        disk.close()

    asyncio.run(work())


def test_a_disk_that_became_read_only_serves_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The time of the last use could not be written down, which failed the request and left its
    hold behind."""

    def utime(*args: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    async def work() -> None:
        disk = DiskCache(tmp_path / "c", BUDGET)
        await put(disk, "a")
        monkeypatch.setattr(os, "utime", utime)
        used = time.time() + 2 * TOUCH_S
        monkeypatch.setattr(time, "time", lambda: used)
        disk.hold("a")
        disk.release("a")
        assert not disk.is_held("a")
        assert [entry.last_used for entry in disk.entries()] == [used]
        disk.close()

    asyncio.run(work())


def test_what_is_arriving_counts_and_is_given_back(tmp_path: Path):
    async def work() -> None:
        disk = DiskCache(tmp_path / "c", BUDGET)
        async with disk.arriving() as arrival:
            await arrival.cover(600)
            await arrival.cover(500)
            assert disk.num_bytes == 600
            with pytest.raises(DiskFull):
                await put(disk, "a", 500)
        assert disk.num_bytes == 0
        with pytest.raises(AdapterFileTooLarge, match="--adapter-cache-size"):
            await put(disk, "a", BUDGET + 1)
        await put(disk, "a", BUDGET)
        disk.close()

    asyncio.run(work())


def test_an_adapter_that_is_held_before_it_comes_is_not_removed(tmp_path: Path):
    async def work() -> None:
        disk = DiskCache(tmp_path / "c", BUDGET)
        disk.hold("a")
        await put(disk, "a", 900)
        with pytest.raises(DiskFull):
            await put(disk, "b", 900)
        assert names(disk) == {"a"}
        disk.close()

    asyncio.run(work())


def test_a_restart_finds_what_was_there_and_the_order_of_use(tmp_path: Path):
    async def first() -> None:
        disk = DiskCache(tmp_path / "c", BUDGET)
        for name in ("a", "b", "c"):
            await put(disk, name)
        for age, name in enumerate(("b", "c", "a")):
            used = time.time() - 1000 + age
            os.utime(tmp_path / "c" / "held" / name / "origin.json", (used, used))
        await disk.set_public("s", "a", False)
        disk.close()

    async def second() -> None:
        disk = DiskCache(tmp_path / "c", BUDGET)
        assert names(disk) == {"a", "b", "c"}
        public = {entry.folder: entry.origin.is_public for entry in disk.entries()}
        assert public == {"a": False, "b": True, "c": True}
        await put(disk, "d")
        assert names(disk) == {"a", "c", "d"}
        disk.close()

    asyncio.run(first())
    asyncio.run(second())


def test_a_smaller_budget_is_kept_from_the_next_adapter_on(tmp_path: Path):
    async def fill(budget: int, name: str) -> set[str]:
        disk = DiskCache(tmp_path / "c", budget)
        await put(disk, name)
        disk.close()
        return names(disk)

    for name in ("a", "b", "c"):
        asyncio.run(fill(BUDGET, name))
    assert asyncio.run(fill(650, "d")) == {"c", "d"}


def test_what_is_half_or_strange_is_removed_at_start(tmp_path: Path):
    async def fill() -> None:
        disk = DiskCache(tmp_path / "c", BUDGET * 10)
        for name in ("good", "short", "missing", "torn", "newer"):
            await put(disk, name)
        disk.close()

    asyncio.run(fill())
    held = tmp_path / "c" / "held"
    os.truncate(held / "short" / "adapter_model.safetensors", 10)
    (held / "missing" / "adapter_config.json").unlink()
    (held / "torn" / "origin.json").write_bytes(b'{"version": 1')
    newer = (held / "newer" / "origin.json").read_text().replace('"version":1', '"version":2')
    (held / "newer" / "origin.json").write_text(newer)
    (tmp_path / "c" / "arriving" / "7").mkdir()
    disk = DiskCache(tmp_path / "c", BUDGET)
    assert names(disk) == {"good"}
    assert set(kept(tmp_path / "c")) == {"good"}
    assert is_clean(tmp_path / "c")
    disk.close()


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path):
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "mine").write_text("precious")
    with pytest.raises(CacheFolderError, match="other files"):
        DiskCache(tmp_path, BUDGET)
    assert (tmp_path / "held" / "mine").read_text() == "precious"


def test_two_servers_do_not_share_a_folder(tmp_path: Path):
    disk = DiskCache(tmp_path / "c", BUDGET)
    with pytest.raises(CacheFolderError, match="another server"):
        DiskCache(tmp_path / "c", BUDGET)
    disk.close()
    DiskCache(tmp_path / "c", BUDGET).close()


def test_a_folder_that_cannot_be_made_is_told_of(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheFolderError, match="cannot be used"):
        DiskCache(tmp_path / "file" / "c", BUDGET)


# -- kill -9 --------------------------------------------------------------------------------------

FETCH_FOR_EVER = """
import asyncio, sys
from pathlib import Path
from lory_router.sources.reference import read_reference
from lory_router.sources.service import Sources
from source_files import settings

async def main(folder, url):
    sources = Sources(settings(Path(folder), hosts=(url,), budget_bytes=1_000_000))
    print("begun", flush=True)
    for number in range(10**6):
        await asyncio.gather(*(
            sources.acquire(read_reference(f"{url}/{name}/{number % 4}")) for name in "ab"
        ))
        for name in [f.engine_name for f in sources.listing()]:
            await sources.disk.remove(name[1:])

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "num_kills", [2, pytest.param(20, marks=[pytest.mark.full, pytest.mark.timeout(120)])]
)
def test_a_kill_leaves_nothing_half(tmp_path: Path, num_kills: int):
    folder, chance = tmp_path / "c", random.Random(num_kills)
    originals = {f"{n}/{i}": adapter_bytes(60_000, fill=ord(n) + i) for n in "ab" for i in range(4)}
    server = Server({k: v for name, a in originals.items() for k, v in at(f"/{name}", a).items()})
    num_torn = 0
    with server.running():
        for _ in range(num_kills):
            _run_and_kill(folder, server.url, chance.uniform(0.02, 0.3))
            num_torn += not is_clean(folder)
            disk = DiskCache(folder, 1_000_000)
            assert is_clean(folder)
            found = kept(folder)
            assert set(found) == names(disk)
            assert all(files in originals.values() for files in found.values())
            disk.close()
    assert num_torn or num_kills < 20, "no kill hit a download"


def _run_and_kill(folder: Path, url: str, after_s: float) -> None:
    command = [sys.executable, "-c", FETCH_FOR_EVER, str(folder), url]
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONPATH": path}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"begun\n"
        time.sleep(after_s)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL


def test_what_is_noted_at_once_is_whole_and_the_last_word(tmp_path: Path):
    """Two notes of one entry were written to one file at the same time."""

    async def work() -> None:
        disk = DiskCache(tmp_path / "c", BUDGET)
        await put(disk, "a")
        disk.hold("a")
        notes = (disk.set_public("s", "a", bool(number % 2)) for number in range(21))
        await asyncio.gather(*notes, disk.withdraw("a"))
        folder = tmp_path / "c" / "held" / "a"
        told = msgspec.json.decode((folder / "origin.json").read_bytes(), type=Origin)
        entry = disk.entry("a")
        assert entry is not None
        assert (told, told.is_removed) == (entry.origin, True)
        assert not list(folder.glob("*.new"))
        disk.release("a")
        disk.close()
        assert not folder.exists()
        assert is_clean(tmp_path / "c")

    asyncio.run(work())


def test_what_is_published_unserved_is_nobodys_until_it_is_adopted(tmp_path: Path):
    async def work() -> None:
        disk = DiskCache(tmp_path / "c", BUDGET)
        await put(disk, "a", is_removed=True)
        assert disk.latest("s", "a") is None
        disk.hold("a")
        await disk.adopt("a")
        disk.release("a")
        assert disk.latest("s", "a") == disk.entry("a")
        disk.close()
        again = DiskCache(tmp_path / "c", BUDGET)
        assert again.latest("s", "a") is not None
        again.close()

    asyncio.run(work())


def test_what_somebody_deleted_by_hand_is_no_error_when_room_is_made(tmp_path: Path):
    async def work() -> None:
        disk = DiskCache(tmp_path / "c", BUDGET)
        for name in ("a", "b", "c"):
            await put(disk, name)
        shutil.rmtree(tmp_path / "c" / "held" / "a")
        await put(disk, "d")
        assert names(disk) == {"b", "c", "d"}
        assert disk.num_bytes == 900
        disk.close()

    asyncio.run(work())


def test_a_disk_that_takes_no_notes_serves_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The time of the last use could not be noted, so the request failed and its hold stayed."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    async def work() -> None:
        disk = DiskCache(tmp_path / "c", BUDGET)
        await put(disk, "a")
        monkeypatch.setattr("lory_router.sources.disk.TOUCH_S", -1.0)
        monkeypatch.setattr("lory_router.sources.disk.os.utime", refuse)
        disk.hold("a")
        disk.release("a")
        assert not disk.is_held("a")
        disk.close()

    asyncio.run(work())


def test_what_an_upload_replaced_is_gone_after_a_kill(tmp_path: Path):
    """Between the new one and the end of the old one; nothing would ever have removed it."""

    async def work() -> None:
        disk = DiskCache(tmp_path / "c", BUDGET)
        for folder, kind in (("old", "upload"), ("new", "upload"), ("o", "web"), ("n", "web")):
            await put(disk, folder, 200, kind=kind, called=kind)
        disk.close()
        again = DiskCache(tmp_path / "c", BUDGET)
        assert names(again) == {"new", "o", "n"} == set(kept(tmp_path / "c"))
        assert again.num_bytes == 600
        again.close()

    asyncio.run(work())


def test_files_of_others_do_not_end_the_start(tmp_path: Path):
    DiskCache(tmp_path / "c", BUDGET).close()
    for part in ("arriving", "held"):
        (tmp_path / "c" / part / ".DS_Store").write_bytes(b"")
        (tmp_path / "c" / part / "link").symlink_to(tmp_path)
    DiskCache(tmp_path / "c", BUDGET).close()
    assert [*(tmp_path / "c").rglob("*/*")] == []
    assert tmp_path.is_dir()

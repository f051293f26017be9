"""Names become open files inside the root, and nothing else ever does."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from adapter_files import write_adapter
from lory_server.adapters import store as store_module
from lory_server.adapters.errors import AdapterInvalidError, AdapterNotFoundError
from lory_server.adapters.store import SETTLED_NS, AdapterStore, Signature

BAD_NAMES = [
    "", ".", "..", "../x", "a/../b", "a/..", "/etc", "/etc/passwd", "a//b", "a/b/c", "a/", "/a",
    "a\\b", "..\\x", "%2e%2e/x", "a\0b", "a\n", "a\r\nX: y", "~", "~/a", "-a", ".hidden", "a/.b",
    "\u2025", "\uff0e\uff0e", "a\u2215b", "a\u202eb", "\u0661", "a" * 129, "a" * 4096, "a b", "a:b",
    "file:///etc", "C:", "a?b", "a*", "a;b", "$(x)",
]  # fmt: skip


def signature_of(store: AdapterStore, adapter_id: str) -> Signature:
    with store.locate(adapter_id) as files:
        return files.signature


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "adapters"
    write_adapter(root / "one")
    write_adapter(root / "team" / "two")
    write_adapter(tmp_path / "outside")
    return root


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_names_of_one_and_two_parts_are_found(root: Path) -> None:
    store = AdapterStore(root)
    for adapter_id in ("one", "team/two"):
        with store.locate(adapter_id) as files:
            assert os.pread(files.config_fd, 1, 0) == b"{"
            assert os.fstat(files.weights_fd).st_size > 8


@pytest.mark.parametrize("name", BAD_NAMES)
def test_what_is_not_a_name_is_not_found(name: str, root: Path) -> None:
    opened: list[object] = []
    watching = True
    sys.addaudithook(
        lambda event, args: opened.append(args) if watching and event == "open" else None
    )
    with pytest.raises(AdapterNotFoundError):
        AdapterStore(root).locate(name)
    watching = False
    assert not opened


@pytest.mark.parametrize(
    "name", ["absent", "team", "team/absent", "one/two", "one/adapter_config.json"]
)
def test_an_absent_folder_is_not_found(name: str, root: Path) -> None:
    with pytest.raises(AdapterNotFoundError, match="no adapter"):
        AdapterStore(root).locate(name)


def test_without_a_root_nothing_is_found() -> None:
    assert AdapterStore(None).list_ids() == ()
    with pytest.raises(AdapterNotFoundError):
        AdapterStore(None).locate("one")


def test_missing_weights_are_invalid_and_pickles_are_named(root: Path) -> None:
    (root / "one" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterInvalidError, match="safetensors is missing"):
        AdapterStore(root).locate("one")
    (root / "one" / "adapter_model.safetensors.index.json").write_bytes(b"{}")
    with pytest.raises(AdapterInvalidError, match="lists; save them in one file"):
        AdapterStore(root).locate("one")
    (root / "one" / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(AdapterInvalidError, match="pickles are never read"):
        AdapterStore(root).locate("one")


FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_a_file_linked_from_outside_is_refused(name: str, root: Path) -> None:
    (root / "one" / name).unlink()
    (root / "one" / name).symlink_to(root.parent / "outside" / name)
    with pytest.raises(AdapterInvalidError, match="leaves the adapters folder") as caught:
        AdapterStore(root).locate("one")
    assert str(root.parent) not in str(caught.value)


@pytest.mark.parametrize("target", ["/etc", "../outside", "../../../../../../etc"])
def test_a_folder_linked_from_outside_is_refused(target: str, root: Path) -> None:
    (root / "evil").symlink_to(target)
    with pytest.raises((AdapterInvalidError, AdapterNotFoundError)):
        AdapterStore(root).locate("evil")
    assert AdapterStore(root).list_ids() == ("one", "team/two")


def test_links_that_stay_inside_are_followed(root: Path) -> None:
    (root / "alias").symlink_to("team/two")
    write_adapter(root / "copy")
    (root / "copy" / FILES[1]).unlink()
    (root / "copy" / FILES[1]).symlink_to("../one/" + FILES[1])
    store = AdapterStore(root)
    assert signature_of(store, "alias") == signature_of(store, "team/two")
    assert signature_of(store, "copy")[5:] == signature_of(store, "one")[5:]


def test_the_root_itself_may_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert AdapterStore(tmp_path / "link").list_ids() == ("one", "team/two")
    assert signature_of(AdapterStore(tmp_path / "link"), "one")


@pytest.mark.parametrize("name", FILES)
def test_what_is_not_a_regular_file_is_refused_without_waiting(name: str, root: Path) -> None:
    (root / "one" / name).unlink()
    os.mkfifo(root / "one" / name)
    with pytest.raises(AdapterInvalidError, match="not a regular file"):
        AdapterStore(root).locate("one")
    (root / "one" / name).unlink()
    (root / "one" / name).mkdir()
    with pytest.raises(AdapterInvalidError, match="not a regular file"):
        AdapterStore(root).locate("one")


@pytest.mark.parametrize("folder", ["", "team"])
def test_a_link_to_itself_is_refused_and_hides_no_other(folder: str, root: Path) -> None:
    """It raised within the listing of its folder, and all of that was lost."""
    (root / folder / "loop").symlink_to("loop")
    with pytest.raises((AdapterInvalidError, AdapterNotFoundError)):
        AdapterStore(root).locate(f"{folder}/loop".lstrip("/"))
    assert AdapterStore(root).list_ids() == ("one", "team/two")


def test_a_folder_that_may_not_be_looked_into_hides_no_other(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a link leads below a folder of somebody else's."""
    (root / "private").mkdir()
    scandir = os.scandir

    class Entry:
        def __init__(self, entry: "os.DirEntry[str]") -> None:
            self.name, self.path, self.is_symlink = entry.name, entry.path, entry.is_symlink
            self._entry = entry

        def is_dir(self) -> bool:
            if self.name == "private":
                raise PermissionError
            return self._entry.is_dir()

    @contextmanager
    def guarded(folder: str) -> Iterator[Iterator[Entry]]:
        with scandir(folder) as entries:
            yield map(Entry, entries)

    monkeypatch.setattr(os, "scandir", guarded)
    assert AdapterStore(root).list_ids() == ("one", "team/two")


@pytest.mark.parametrize("swapped", ["", *FILES])
def test_a_link_swapped_in_after_the_check_is_not_followed(
    swapped: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check sees a folder or a file; a link to a whole adapter stands there when it opens."""
    real = os.path.realpath
    victim, target = root / "one" / swapped, root.parent / "outside" / swapped
    asked = swapped or FILES[0]

    def swap(path: object, **kwargs: object) -> str:
        found = real(str(path))
        if str(path).endswith(f"one/{asked}") and not victim.is_symlink():
            victim.rename(root / "was")
            victim.symlink_to(target)
        return found

    monkeypatch.setattr(os.path, "realpath", swap)
    before = num_open_files()
    if swapped:
        with pytest.raises(AdapterInvalidError, match=f"{swapped} is not a regular file"):
            AdapterStore(root).locate("one")
    else:
        with pytest.raises(AdapterNotFoundError, match="no adapter 'one'"):
            AdapterStore(root).locate("one")
    assert victim.is_symlink()
    assert num_open_files() == before


@pytest.mark.parametrize("name", FILES)
def test_a_link_swapped_in_after_the_last_look_is_not_followed(
    name: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the file and its opening."""
    check = store_module._check_regular
    victim = root / "one" / name

    def swap(status: os.stat_result) -> None:
        check(status)
        if not victim.is_symlink() and status.st_ino == victim.stat().st_ino:
            victim.rename(root / "was")
            victim.symlink_to(root.parent / "outside" / name)

    monkeypatch.setattr(store_module, "_check_regular", swap)
    with pytest.raises(AdapterInvalidError, match=f"{name} cannot be read .*symbolic links"):
        AdapterStore(root).locate("one")
    assert victim.is_symlink()


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_swapped_in_after_the_last_look_is_refused_without_waiting(
    name: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = store_module._check_regular
    victim = root / "one" / name
    inode = victim.stat().st_ino

    def swap(status: os.stat_result) -> None:
        check(status)
        if victim.stat().st_ino == status.st_ino == inode:
            victim.rename(root / "was")
            os.mkfifo(victim)

    monkeypatch.setattr(store_module, "_check_regular", swap)
    before = num_open_files()
    with pytest.raises(AdapterInvalidError, match=f"{name} is not a regular file"):
        AdapterStore(root).locate("one")
    assert num_open_files() == before


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.EIO])
@pytest.mark.parametrize("num_good", range(4))
def test_what_the_system_refuses_is_not_blamed_on_the_adapter(
    num_good: int, code: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more open files was told as an adapter that changed while it was read."""
    opened: list[object] = []
    real = os.open

    def fail_at_last(path: Any, *args: Any, **kwargs: Any) -> int:
        if path in FILES:
            opened.append(path)
            if len(opened) > num_good:
                raise OSError(code, os.strerror(code))
        return real(path, *args, **kwargs)

    before = num_open_files()
    monkeypatch.setattr(os, "open", fail_at_last)
    if num_good == 3:  # both files, and the first once more
        AdapterStore(root).locate("one").close()
    else:
        with pytest.raises(OSError, match=os.strerror(code)) as caught:
            AdapterStore(root).locate("one")
        assert caught.value.errno == code
    assert num_open_files() == before


def test_a_file_that_may_not_be_read_is_the_adapters_fault(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def forbid(path: Any, *args: Any, **kwargs: Any) -> int:
        if path == FILES[1]:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", forbid)
    with pytest.raises(AdapterInvalidError, match="cannot be read"):
        AdapterStore(root).locate("one")


def test_refusals_leave_no_file_open(root: Path) -> None:
    store = AdapterStore(root)
    (root / "one" / FILES[1]).unlink()
    before = num_open_files()
    for name in ("one", "absent", "../x", "team"):
        with pytest.raises((AdapterInvalidError, AdapterNotFoundError)):
            store.locate(name)
    assert num_open_files() == before


def test_changed_bytes_change_the_signature(root: Path) -> None:
    store = AdapterStore(root)
    before = signature_of(store, "one")
    assert signature_of(store, "one") == before
    write_adapter(root / "new", seed=5)
    (root / "new" / FILES[1]).replace(root / "one" / FILES[1])
    assert signature_of(store, "one") != before


def test_a_change_while_reading_is_noticed(root: Path) -> None:
    with AdapterStore(root).locate("one") as files:
        files.check_unchanged()
        with open(root / "one" / FILES[1], "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\1")
        with pytest.raises(AdapterInvalidError, match="changed while it was read"):
            files.check_unchanged()


def test_a_folder_replaced_between_two_opens_is_never_mixed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old version's configuration was served with the new version's weights."""
    write_adapter(root / "next", rank=2)
    new = {os.stat(root / "next" / name).st_ino for name in os.listdir(root / "next")}
    open_weights = AdapterStore._open_weights

    def replace_first(store: AdapterStore, real_root: str, adapter_id: str) -> int:
        if (root / "next").exists():
            (root / "one").rename(root / "old")
            (root / "next").rename(root / "one")
        return open_weights(store, real_root, adapter_id)

    monkeypatch.setattr(AdapterStore, "_open_weights", replace_first)
    before = num_open_files()
    with AdapterStore(root).locate("one") as files:
        assert {os.fstat(fd).st_ino for fd in (files.config_fd, files.weights_fd)} == new
    assert num_open_files() == before


def test_a_folder_replaced_by_a_link_that_leaves_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_weights = AdapterStore._open_weights

    def replace(store: AdapterStore, real_root: str, adapter_id: str) -> int:
        weights_fd = open_weights(store, real_root, adapter_id)
        (root / "one").rename(root / "old")
        (root / "one").symlink_to(root.parent / "outside")
        return weights_fd

    monkeypatch.setattr(AdapterStore, "_open_weights", replace)
    before = num_open_files()
    with pytest.raises(AdapterInvalidError, match="link that leaves"):
        AdapterStore(root).locate("one")
    assert num_open_files() == before


def test_a_folder_replaced_all_the_time_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(root / "next")
    open_weights = AdapterStore._open_weights

    def replace_always(store: AdapterStore, real_root: str, adapter_id: str) -> int:
        (root / "one").rename(root / "old")
        (root / "next").rename(root / "one")
        (root / "old").rename(root / "next")
        return open_weights(store, real_root, adapter_id)

    monkeypatch.setattr(AdapterStore, "_open_weights", replace_always)
    before = num_open_files()
    with pytest.raises(AdapterInvalidError, match="changed while it was read"):
        AdapterStore(root).locate("one")
    assert num_open_files() == before


def test_a_fresh_file_is_not_settled(root: Path) -> None:
    with AdapterStore(root).locate("one") as files:
        changed_ns = max(files.signature[4], files.signature[9])
        assert files.is_settled == (files.located_ns - changed_ns > SETTLED_NS)


def test_a_fetched_file_is_settled_and_known_by_its_folder(root: Path) -> None:
    """Its folder never gets other bytes; that of a removed one, whose inodes come again, has
    another name. Otherwise a replacement would be read twice, at once and when it is first used."""
    store = AdapterStore(None, root)
    with store.locate("@one") as files:
        assert files.is_settled
        files.check_unchanged()
        store.remember(files.signature, "abc")
    (root / "one").rename(root / "other")
    assert store.revision_of(signature_of(store, "@other")) is None
    (root / "other").rename(root / "one")
    assert store.revision_of(signature_of(store, "@one")) == "abc"


def test_digests_are_remembered_by_signature(root: Path) -> None:
    store = AdapterStore(root)
    signature = signature_of(store, "one")
    assert store.revision_of(signature) is None
    store.remember(signature, "abc")
    assert store.revision_of(signature_of(store, "one")) == "abc"
    assert store.revision_of(signature_of(store, "team/two")) is None


def test_as_many_digests_are_remembered_as_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store_module, "MAX_REMEMBERED", 2)
    store = AdapterStore(None)
    store.remember((1,), "one")
    store.remember((2,), "two")
    assert store.revision_of((1,)) == "one"
    store.remember((3,), "three")
    known = [store.revision_of((index,)) for index in (1, 2, 3)]
    assert known == ["one", None, "three"]
    assert len(store._revisions) == 2


def test_adapters_that_nobody_can_name_are_known(root: Path) -> None:
    for folder in ("sp ace", "team/sp ace", "team/deep/three", "sp ace 2/inner"):
        write_adapter(root / folder)
    for folder in (".hidden", "team/.hidden", "one/checkpoint/last", "a/b/c/four"):
        write_adapter(root / folder)
    (root / "em pty").mkdir()
    (root / "team" / "round").symlink_to("..")
    (root / "loop").symlink_to("loop")
    expected = ("sp ace", "sp ace 2/inner", "team/deep/three", "team/sp ace")
    assert AdapterStore(root).list_nameless() == expected
    for name in expected:
        with pytest.raises(AdapterNotFoundError):
            AdapterStore(root).locate(name)
    assert AdapterStore(None).list_nameless() == ()


@pytest.mark.parametrize("counts_links", [True, False])
def test_what_is_served_of_a_folder_with_several_adapters_is_listed(
    counts_links: bool, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT saves `default` into the folder itself and the others below it, as trainers do
    checkpoints: they were served, and no list or look-up knew of them."""
    write_adapter(root / "one" / "other")
    write_adapter(root / "one" / "checkpoint-5")
    if not counts_links:
        monkeypatch.setattr(store_module, "_may_hold_folders", lambda folder: True)
    store = AdapterStore(root)
    assert store.list_ids() == ("one", "one/checkpoint-5", "one/other", "team/two")
    for name in store.list_ids():
        store.locate(name).close()


def test_listing_shows_adapters_only(root: Path) -> None:
    (root / "empty").mkdir()
    (root / "file").write_text("x")
    (root / ".hidden").mkdir()
    write_adapter(root / "team" / "deep" / "three")
    (root / "one" / "logs").mkdir()
    assert AdapterStore(root).list_ids() == ("one", "team/two")
    assert AdapterStore(root / "absent").list_ids() == ()

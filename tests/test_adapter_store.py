"""Names become open files inside the root, and nothing else ever does."""

import os
import sys
from pathlib import Path

import pytest

from adapter_files import write_adapter
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
    assert "evil" not in AdapterStore(root).list_ids()


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


def test_a_link_loop_is_refused(root: Path) -> None:
    (root / "loop").symlink_to("loop")
    with pytest.raises((AdapterInvalidError, AdapterNotFoundError)):
        AdapterStore(root).locate("loop")


def test_a_link_swapped_in_after_the_check_is_not_followed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check sees a folder; a link stands there when it is opened."""
    real = os.path.realpath

    def swap(path: object, **kwargs: object) -> str:
        found = real(str(path))
        folder = root / "one"
        if str(path).endswith(FILES[0]) and not folder.is_symlink():
            folder.rename(root / "was")
            folder.symlink_to(root.parent / "outside")
        return found

    monkeypatch.setattr(os.path, "realpath", swap)
    with pytest.raises((AdapterInvalidError, AdapterNotFoundError)):
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


def test_digests_are_remembered_by_signature(root: Path) -> None:
    store = AdapterStore(root)
    signature = signature_of(store, "one")
    assert store.revision_of(signature) is None
    store.remember(signature, "abc")
    assert store.revision_of(signature_of(store, "one")) == "abc"
    assert store.revision_of(signature_of(store, "team/two")) is None


def test_listing_shows_adapters_only(root: Path) -> None:
    (root / "empty").mkdir()
    (root / "file").write_text("x")
    (root / ".hidden").mkdir()
    write_adapter(root / "team" / "deep" / "three")
    write_adapter(root / "one" / "checkpoint")
    assert AdapterStore(root).list_ids() == ("one", "team/two")
    assert AdapterStore(root / "absent").list_ids() == ()

"""The C kernels are compiled once and kept, and a cache that is of no use never costs them."""

import ctypes
import errno
import logging
import os
import pwd
import shutil
import stat
import tempfile
from pathlib import Path

import pytest
import torch

from lory_kernels import KernelUnavailableError, best_cpu_backend, build

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None and shutil.which("cc") is None, reason="no C compiler here"
)

SOURCE = '__attribute__((visibility("default"))) int answer(void) { return %d; }\n'


@pytest.fixture(autouse=True)
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel that compiles in no time, and temporary folders that can be looked into."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "lory_cpu.c").write_text(SOURCE % 42)
    monkeypatch.setattr(build, "_SOURCES", folder)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert torch.get_num_threads()
    return folder


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "home" / "kernels"


def answer_of(cache_dir: Path | None) -> int:
    return build.load_library(cache_dir).answer()


def leftovers(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "temporary").iterdir())


def test_a_library_is_compiled_once_and_kept_private(tmp_path: Path, cache_dir: Path) -> None:
    assert answer_of(cache_dir) == 42
    (library,) = cache_dir.iterdir()
    first = library.stat().st_mtime_ns
    assert answer_of(cache_dir) == 42
    assert list(cache_dir.iterdir()) == [library]
    assert library.stat().st_mtime_ns == first
    assert stat.S_IMODE(cache_dir.stat().st_mode) == 0o700
    assert leftovers(tmp_path) == []


def test_other_sources_and_flags_are_other_libraries(
    cache_dir: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answer_of(cache_dir) == 42
    (sources / "lory_cpu.c").write_text(SOURCE % 43)
    assert answer_of(cache_dir) == 43
    (sources / "part.h").write_text("/* more */")
    assert answer_of(cache_dir) == 43
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-DMORE"))
    assert answer_of(cache_dir) == 43
    assert len(list(cache_dir.iterdir())) == 4


def test_a_cache_that_cannot_be_made_costs_a_compilation_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert answer_of(tmp_path / "file" / "kernels") == 42
    assert "cannot be used (" in caplog.text
    assert "compiled for this process alone" in caplog.text
    assert leftovers(tmp_path) == []


def test_a_cache_of_somebody_else_costs_a_compilation_only(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Even the question whether a file is there is refused."""

    def forbid(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "exists", forbid)
    monkeypatch.setattr(Path, "mkdir", forbid)
    assert answer_of(cache_dir) == 42
    assert "Permission denied" in caplog.text


def test_a_full_cache_costs_a_compilation_only(
    tmp_path: Path,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The kernels were lost: the disk was full while they were compiled in it."""

    def fill(source: Path, folder: str) -> None:
        (Path(folder) / source.name).write_bytes(source.read_bytes()[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copy", fill)
    assert answer_of(cache_dir) == 42
    assert "No space left" in caplog.text
    assert list(cache_dir.iterdir()) == []
    assert leftovers(tmp_path) == []


def test_a_cache_without_executable_files_costs_a_compilation_only(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = ctypes.CDLL

    def refuse(path: str) -> ctypes.CDLL:
        if path.startswith(str(cache_dir)):
            raise OSError("failed to map segment from shared object")
        return real(path)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    for _ in range(2):
        assert answer_of(cache_dir) == 42
    assert "failed to map segment" in caplog.text


def test_a_temporary_folder_without_executable_files_is_of_use_all_the_same(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ctypes.CDLL

    def refuse(path: str) -> ctypes.CDLL:
        if path.startswith(str(tmp_path / "temporary")):
            raise OSError("failed to map segment from shared object")
        return real(path)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert answer_of(cache_dir) == 42
    with pytest.raises(KernelUnavailableError, match="set TMPDIR"):
        answer_of(None)


def test_a_broken_library_is_compiled_again(
    tmp_path: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert answer_of(tmp_path / "sound") == 42
    (library,) = (tmp_path / "sound").iterdir()
    cache_dir.mkdir(parents=True)
    (cache_dir / library.name).write_bytes(b"not a library")
    assert answer_of(cache_dir) == 42
    assert "compiling again" in caplog.text
    (again,) = cache_dir.iterdir()
    assert again.stat().st_size == library.stat().st_size


def test_a_user_without_a_home_has_no_cache_and_all_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An id that the system does not know, and no HOME: as in many containers."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda _: {}["absent"])
    assert build.user_cache() is None
    assert answer_of(build.user_cache()) == 42
    assert "no home folder" in caplog.text


def test_the_cache_lies_in_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.user_cache() == tmp_path / ".cache" / "lory" / "kernels"


def told_when_the_kernels_are_off(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> str:
    monkeypatch.setattr(build, "compiled_library", lambda: build.load_library(cache_dir))
    with caplog.at_level(logging.WARNING):
        assert best_cpu_backend() == "torch"
    return caplog.text


def test_without_a_compiler_plain_torch_runs_and_the_log_says_what_to_install(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    told = told_when_the_kernels_are_off(cache_dir, monkeypatch, caplog)
    assert "plain PyTorch runs instead, slower" in told
    assert told.strip().endswith("install gcc")
    with pytest.raises(KernelUnavailableError, match="install gcc"):
        build.load_library(cache_dir)


def test_what_does_not_compile_is_told_in_the_compilers_words(
    tmp_path: Path,
    cache_dir: Path,
    sources: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (sources / "lory_cpu.c").write_text("#error this cannot be\n")
    told = told_when_the_kernels_are_off(cache_dir, monkeypatch, caplog)
    assert "the compiler's message follows" in told
    assert "this cannot be" in told
    assert leftovers(tmp_path) == []


def test_a_machine_without_temporary_folders_is_told_the_fix(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(KernelUnavailableError, match="set TMPDIR"):
        build.load_library(cache_dir)

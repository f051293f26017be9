"""A process of its own reads adapters exactly as a thread does, and may be lost at any moment."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adapter_files import BASE, Tensors, write_adapter
from lory_server.adapters.errors import AdapterInvalidError
from lory_server.adapters.reader import Reader, ThreadReader
from lory_server.adapters.reader_process import ProcessReader, can_read_apart
from lory_server.adapters.store import AdapterStore

pytestmark = pytest.mark.skipif(not can_read_apart(), reason="needs Linux: no shared memory here")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module")
def apart(dtype: torch.dtype) -> Iterator[ProcessReader]:
    reader = ProcessReader(BASE, dtype)
    yield reader
    reader.close()


def load(reader: Reader, root: Path, name: str) -> tuple[str, object, torch.Tensor]:
    with AdapterStore(root).locate(name) as files:
        manifest = reader.manifest(files)
        blob = reader.blob(files, manifest)
    return blob.revision, blob.manifest, blob.data.clone()


def refusal(reader: Reader, root: Path, name: str) -> str:
    with pytest.raises(AdapterInvalidError) as caught:
        load(reader, root, name)
    return str(caught.value)


def process_of(reader: ProcessReader) -> "subprocess.Popen[bytes]":
    return reader._process


def num_open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def poison(tensors: Tensors) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def test_both_readers_give_the_same_bytes_and_refusals(
    apart: ProcessReader, dtype: torch.dtype, tmp_path: Path
) -> None:
    thread = ThreadReader(BASE, dtype)
    for index, saved in enumerate(DTYPES):
        write_adapter(tmp_path / f"a{index}", rank=3 + index, dtype=saved, seed=index)
    write_adapter(tmp_path / "nan", change=poison)
    write_adapter(tmp_path / "dora", use_dora=True)
    for name in ("a0", "a1", "a2", "a0"):
        revision, manifest, data = load(apart, tmp_path, name)
        expected_revision, expected_manifest, expected = load(thread, tmp_path, name)
        assert (revision, manifest) == (expected_revision, expected_manifest)
        assert data.dtype == dtype
        assert torch.equal(data, expected)
    assert not torch.equal(load(apart, tmp_path, "a0")[2], load(apart, tmp_path, "a1")[2])
    for name, word in (("nan", "not finite"), ("dora", "DoRA")):
        assert refusal(apart, tmp_path, name) == refusal(thread, tmp_path, name)
        assert word in refusal(apart, tmp_path, name)


def test_a_reader_that_was_killed_is_replaced(apart: ProcessReader, tmp_path: Path) -> None:
    write_adapter(tmp_path / "one")
    expected = load(apart, tmp_path, "one")[2]
    os.kill(process_of(apart).pid, signal.SIGKILL)
    assert torch.equal(load(apart, tmp_path, "one")[2], expected)
    with AdapterStore(tmp_path).locate("one") as files:
        manifest = apart.manifest(files)
        os.kill(process_of(apart).pid, signal.SIGKILL)
        assert torch.equal(apart.blob(files, manifest).data, expected)


def test_loads_leave_no_files_open_on_either_side(apart: ProcessReader, tmp_path: Path) -> None:
    write_adapter(tmp_path / "one")
    write_adapter(tmp_path / "nan", change=poison)
    load(apart, tmp_path, "one")
    before = num_open_files(os.getpid()), num_open_files(process_of(apart).pid)
    for _ in range(10):
        load(apart, tmp_path, "one")
        refusal(apart, tmp_path, "nan")
    load(apart, tmp_path, "one")
    assert (num_open_files(os.getpid()), num_open_files(process_of(apart).pid)) == before


def test_a_closed_reader_leaves_no_process() -> None:
    reader = ProcessReader(BASE, torch.float32)
    process = process_of(reader)
    reader.close()
    assert process.returncode == -signal.SIGKILL

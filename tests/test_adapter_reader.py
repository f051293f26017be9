"""A process of its own reads adapters exactly as a thread does, and may be lost at any moment."""

import dataclasses
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from adapter_files import BASE, Tensors, write_adapter
from lory_server.adapters import reader_process
from lory_server.adapters.blob import AdapterBlob
from lory_server.adapters.errors import AdapterInvalidError
from lory_server.adapters.merge_sources import locate
from lory_server.adapters.reader import Reader, ThreadReader
from lory_server.adapters.reader_process import (
    ANSWER_TIMEOUT_S,
    SLOWEST_BYTES_PER_S,
    ProcessReader,
    ReaderEndedError,
    can_read_apart,
    serve,
)
from lory_server.adapters.store import AdapterStore
from lory_server.recipes import MAX_SOURCES, MergeSource, Recipe, merged_id

pytestmark = pytest.mark.skipif(not can_read_apart(), reason="needs Linux: no shared memory here")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def apart() -> Iterator[ProcessReader]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "2")
        reader = ProcessReader(BASE, torch.float32)
    reader.wait_until_ready()
    yield reader
    reader.close()


def blob_of(reader: Reader, root: Path, name: str) -> AdapterBlob:
    with AdapterStore(root).locate(name) as files:
        return reader.blob(files, reader.manifest(files))


def load(reader: Reader, root: Path, name: str) -> tuple[str, object, torch.Tensor]:
    blob = blob_of(reader, root, name)
    return blob.revision, blob.manifest, blob.data.clone()


def refusal(reader: Reader, root: Path, name: str) -> str:
    with pytest.raises(AdapterInvalidError) as caught:
        load(reader, root, name)
    return str(caught.value)


def process_of(reader: ProcessReader) -> "subprocess.Popen[bytes]":
    return reader._process


def num_open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def num_threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def state_of(pid: int) -> str:
    """One letter; Z: it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def until(condition: Callable[[], object]) -> None:
    end_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end_s, "waited too long"
        time.sleep(0.005)


def stop(reader: ProcessReader) -> None:
    os.kill(process_of(reader).pid, signal.SIGSTOP)
    until(lambda: state_of(process_of(reader).pid) == "T")


def lose_magnitudes(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith("lora_magnitude_vector")]:
        del tensors[name]


def poison(tensors: Tensors) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_readers_give_the_same_bytes_and_refusals(dtype: torch.dtype, tmp_path: Path) -> None:
    thread = ThreadReader(BASE, dtype)
    apart = ProcessReader(BASE, dtype)
    for index, saved in enumerate(DTYPES):
        write_adapter(tmp_path / f"a{index}", rank=3 + index, dtype=saved, seed=index)
    write_adapter(tmp_path / "nan", change=poison)
    write_adapter(tmp_path / "lost", use_dora=True, change=lose_magnitudes)
    write_adapter(tmp_path / "dora", rank=2, dtype=dtype, use_dora=True)
    write_adapter(tmp_path / "bias", rank=2, lora_bias=True)
    invoked = {"alora_invocation_tokens": [3, 4], "task_type": "CAUSAL_LM"}
    write_adapter(tmp_path / "alora", rank=2, **invoked)
    for name in ("a0", "a1", "dora", "a2", "bias", "alora", "a0"):
        revision, manifest, data = load(apart, tmp_path, name)
        expected_revision, expected_manifest, expected = load(thread, tmp_path, name)
        assert (revision, manifest) == (expected_revision, expected_manifest)
        assert data.dtype == dtype
        assert torch.equal(data.view(torch.uint8), expected.view(torch.uint8))
    assert not torch.equal(load(apart, tmp_path, "a0")[2], load(apart, tmp_path, "a1")[2])
    for name, word in (("nan", "not finite"), ("lost", "lora_magnitude_vector")):
        assert refusal(apart, tmp_path, name) == refusal(thread, tmp_path, name)
        assert word in refusal(apart, tmp_path, name)
    apart.close()


def test_both_readers_merge_alike(apart: ProcessReader, tmp_path: Path) -> None:
    """As many sources as there may be: a socket carries two open files of each."""

    def load_merge(reader: Reader, recipe: Recipe) -> tuple[str, object, torch.Tensor]:
        with locate(AdapterStore(tmp_path), merged_id(recipe)) as files:
            blob = reader.blob(files, reader.manifest(files))
        return blob.revision, blob.manifest, blob.data.clone()

    many = tuple(MergeSource(f"a{index}", 0.5) for index in range(MAX_SOURCES))
    for index, source in enumerate(many):
        write_adapter(tmp_path / source.adapter_id, rank=4, seed=index)
    write_adapter(tmp_path / "dora", use_dora=True)
    thread = ThreadReader(BASE, torch.float32)
    num_open = num_open_files(process_of(apart).pid)
    for recipe in (Recipe(sources=many), Recipe(sources=many[:2], method="ties", density=0.5)):
        *facts, data = load_merge(apart, recipe)
        *expected_facts, expected = load_merge(thread, recipe)
        assert facts == expected_facts
        assert torch.equal(data, expected)
        assert torch.equal(load(apart, tmp_path, "a3")[2], load(thread, tmp_path, "a3")[2])
    told: list[tuple[str, str]] = []
    for reader in (apart, thread):
        with pytest.raises(AdapterInvalidError) as caught:
            load_merge(reader, Recipe(sources=(*many[:2], MergeSource("dora", 1.0))))
        told.append((str(caught.value), caught.value.source))
    assert told[0] == told[1]
    assert told[0][1] == "dora"
    assert num_open_files(process_of(apart).pid) == num_open


def test_a_reader_that_was_killed_is_replaced(apart: ProcessReader, tmp_path: Path) -> None:
    write_adapter(tmp_path / "one")
    expected = load(apart, tmp_path, "one")[2]
    lost = process_of(apart).pid
    os.kill(lost, signal.SIGKILL)
    until(lambda: state_of(lost) == "Z")  # what is sent to it now is refused at once
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


def test_adapters_on_the_host_hold_no_files(apart: ProcessReader, tmp_path: Path) -> None:
    """Each held one for as long as it stayed, until no more could be opened."""
    write_adapter(tmp_path / "one")
    expected = blob_of(apart, tmp_path, "one").data.clone()
    before = num_open_files(os.getpid())
    kept = [blob_of(apart, tmp_path, "one") for _ in range(20)]
    assert num_open_files(os.getpid()) == before
    kept[0].data.zero_()
    assert torch.equal(kept[19].data, expected)


def test_the_process_keeps_no_adapter_open(apart: ProcessReader, tmp_path: Path) -> None:
    """The last one's files stayed open: a deleted adapter went on taking its disk space."""
    write_adapter(tmp_path / "one")
    write_adapter(tmp_path / "lost", use_dora=True, change=lose_magnitudes)
    idle = num_open_files(process_of(apart).pid)
    with AdapterStore(tmp_path).locate("one") as files:
        manifest = apart.manifest(files)
        assert num_open_files(process_of(apart).pid) == idle, "it may be long until its turn comes"
        apart.blob(files, manifest)
        assert num_open_files(process_of(apart).pid) == idle
    refusal(apart, tmp_path, "lost")
    assert num_open_files(process_of(apart).pid) == idle


def test_the_process_reads_on_one_thread(apart: ProcessReader, tmp_path: Path) -> None:
    """Those of torch would sit on the cores that the step computes on."""
    write_adapter(tmp_path / "large", rank=256, dtype=torch.float32)
    before = num_threads(process_of(apart).pid)
    assert blob_of(apart, tmp_path, "large").data.numel() > 2 * 32768, "worth a second thread"
    assert num_threads(process_of(apart).pid) == before


@pytest.mark.parametrize("has_looked", [False, True])
def test_a_stopped_reader_is_replaced(
    has_looked: bool, apart: ProcessReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loader waited for ever."""
    write_adapter(tmp_path / "one")
    expected, stopped = load(apart, tmp_path, "one")[2], process_of(apart)
    restart = ProcessReader._restart

    def restart_with_patience(reader: ProcessReader, cause: ReaderEndedError) -> None:
        assert "timed out" in str(cause)
        monkeypatch.undo()
        restart(reader, cause)

    monkeypatch.setattr(ProcessReader, "_restart", restart_with_patience)
    monkeypatch.setattr(reader_process, "ANSWER_TIMEOUT_S", 0.2)
    with AdapterStore(tmp_path).locate("one") as files:
        manifest = apart.manifest(files) if has_looked else None
        stop(apart)
        rescue = threading.Timer(20, stopped.kill)
        rescue.start()
        blob = apart.blob(files, manifest or apart.manifest(files))
        rescue.cancel()
    assert torch.equal(blob.data, expected)
    assert stopped.returncode == -signal.SIGKILL
    assert process_of(apart).pid != stopped.pid


def test_a_large_adapter_has_more_time(apart: ProcessReader, tmp_path: Path) -> None:
    """On a busy machine, with the lowest share of its cores, from a slow disk."""
    write_adapter(tmp_path / "one")
    with AdapterStore(tmp_path).locate("one") as files:
        manifest = apart.manifest(files)
        assert apart._wire._connection.gettimeout() == ANSWER_TIMEOUT_S
        apart.blob(files, dataclasses.replace(manifest, file_bytes=SLOWEST_BYTES_PER_S * 100))
    assert apart._wire._connection.gettimeout() == ANSWER_TIMEOUT_S + 100


def test_a_file_changed_while_its_reader_was_lost_is_refused(
    apart: ProcessReader, tmp_path: Path
) -> None:
    """The next process would decode it by another configuration than the engine has."""
    config = write_adapter(tmp_path / "one", lora_alpha=16) / "adapter_config.json"
    with AdapterStore(tmp_path).locate("one") as files:
        manifest = apart.manifest(files)
        config.write_text(config.read_text().replace('"lora_alpha": 16', '"lora_alpha": 32'))
        os.kill(process_of(apart).pid, signal.SIGKILL)
        with pytest.raises(AdapterInvalidError, match="changed while it was read"):
            apart.blob(files, manifest)


def test_our_own_want_of_files_is_no_fault_of_reader_or_adapter(
    apart: ProcessReader, tmp_path: Path
) -> None:
    """It was taken for a lost reader, and another one was started in vain."""
    write_adapter(tmp_path / "one")
    before, limits = process_of(apart).pid, resource.getrlimit(resource.RLIMIT_NOFILE)
    with AdapterStore(tmp_path).locate("one") as files:
        manifest = apart.manifest(files)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                apart.blob(files, manifest)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert process_of(apart).poll() is None
        assert apart.blob(files, manifest).revision
        assert process_of(apart).pid == before


def test_what_the_system_refuses_the_reader_is_no_fault_of_the_adapter(
    apart: ProcessReader, tmp_path: Path
) -> None:
    """Here a folder in place of a file stands for a disk that cannot be read."""
    write_adapter(tmp_path / "one")
    before = process_of(apart).pid
    for reader in (apart, ThreadReader(BASE, torch.float32)):
        with AdapterStore(tmp_path).locate("one") as files:
            folder_fd = os.open(tmp_path, os.O_RDONLY)
            os.dup2(folder_fd, files.config_fd)
            os.close(folder_fd)
            with pytest.raises(IsADirectoryError):
                reader.manifest(files)
    assert process_of(apart).pid == before
    assert blob_of(apart, tmp_path, "one").revision


def test_a_reader_is_ready_when_its_process_is() -> None:
    reader = ProcessReader(BASE, torch.float32)
    stop(reader)
    reader._wire._connection.settimeout(0.2)
    with pytest.raises(ReaderEndedError, match="timed out"):
        reader.wait_until_ready()
    reader._wire._connection.settimeout(60)
    os.kill(process_of(reader).pid, signal.SIGCONT)
    reader.wait_until_ready()
    process = process_of(reader)
    os.kill(process.pid, signal.SIGKILL)
    reader.wait_until_ready()  # it has been, and the next load finds out
    reader.close()
    assert process.returncode == -signal.SIGKILL


def test_a_closed_reader_leaves_no_process_and_starts_none(tmp_path: Path) -> None:
    """A load that is under way while the cache is closed finds its reader lost."""
    write_adapter(tmp_path / "one")
    reader = ProcessReader(BASE, torch.float32)
    process = process_of(reader)
    reader.close()
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(ReaderEndedError, match="the process that reads adapters was lost"):
        load(reader, tmp_path, "one")
    assert process_of(reader) is process


def test_an_engine_that_leaves_before_its_first_word_is_no_error() -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    wire = reader_process._Wire(theirs)
    serve(wire)
    wire.close()


def test_an_engine_that_leaves_within_a_frame_is_no_error(capfd: pytest.CaptureFixture) -> None:
    """Nor is it worth a trace in the log of the server that has just ended."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", reader_process.__name__, "--fd", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
        )
    ours.sendall(b"\0\0")
    ours.close()
    assert process.wait(60) == 1
    assert capfd.readouterr() == ("", "")


ENGINE = """
import os, signal, sys, time
sys.path.insert(0, {tests!r})
import torch
from adapter_files import BASE
from lory_server.adapters.reader_process import ProcessReader
reader = ProcessReader(BASE, torch.float32)
reader.wait_until_ready()
os.kill(reader._process.pid, signal.SIGSTOP)
print(reader._process.pid, flush=True)
time.sleep(60)
"""


def test_not_even_a_stopped_reader_outlives_its_engine() -> None:
    program = ENGINE.format(tests=os.path.dirname(__file__))
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as engine:
        assert engine.stdout is not None
        pid = int(engine.stdout.readline())
        until(lambda: state_of(pid) == "T")
        engine.kill()
    until(lambda: state_of(pid) == "Z")

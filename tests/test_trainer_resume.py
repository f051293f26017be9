"""A run that was stopped or killed goes on as if nothing had happened, to the last bit."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from random import Random
from typing import Any

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lory_trainer import checkpoint
from lory_trainer.checkpoint import checkpoints
from lory_trainer.errors import OutputError, StoppedError
from lory_trainer.events import read_events
from trainer_world import CONFIG, events, make_world, tensor_bytes, train, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
STEPS = CONFIG.replace("r: 4", "r: 4, dropout: 0.2, lora_plus_ratio: 4")
STEPS += "neftune_noise_alpha: 5\neval_data: held.jsonl\neval_steps: 3\n"
PAIRS = STEPS.replace("rows.jsonl", "pairs.jsonl").replace("held.jsonl", "pairs.jsonl")
FILES = {"adapter_config.json", "adapter_manifest.json", "adapter_model.safetensors"}


@pytest.fixture
def world(tmp_path) -> Path:
    make_world(tmp_path)
    write_rows(tmp_path / "held.jsonl", {"text": "ab", "completion": "y"})
    rows = [{"prompt": a, "chosen": "y", "rejected": "z"} for a in "abcdefgh"]
    write_rows(tmp_path / "pairs.jsonl", *rows)
    return tmp_path


def after(world: Path, count: int) -> Callable[[], bool]:
    """Wishes to stop after so many more steps."""

    def num_steps() -> int:
        is_there = (world / "runs" / "mine" / "events.jsonl").exists()
        return len(events(world, "step")) if is_there else 0

    before = num_steps()
    return lambda: num_steps() >= before + count


def full(text: str, name: str) -> Any:
    return pytest.param(text, id=name, marks=pytest.mark.full)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(STEPS, id="sft"),
        pytest.param(
            PAIRS.replace('template: "{text}>"', 'template: "{prompt}>"\nmethod: dpo'), id="dpo"
        ),
        full(STEPS + "packing: true\nmax_length: 16\n", "packed"),
        full(STEPS + "optimizer: adamw_8bit\n", "8bit"),
        full(STEPS + "early_stop: 50\n", "early-stop"),
        full(STEPS.replace("r: 4", "r: 4, use_dora: true"), "dora"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(world, text):
    whole = train(world, text)
    wanted = tensor_bytes(world)
    shutil.rmtree(world / "adapters")
    shutil.rmtree(world / "runs")
    for count in (1, 2):
        with pytest.raises(StoppedError, match="after a checkpoint"):
            train(world, text, resume=True, should_stop=after(world, count))
        assert not (world / "adapters").exists()
        assert events(world)[-1]["code"] == "stopped"
    resumed = train(world, text, resume=True)
    assert tensor_bytes(world) == wanted
    assert resumed.losses == whole.losses
    assert resumed.num_tokens == whole.num_tokens
    started = events(world, "started")
    assert [event["resumed_from"] for event in started] == [None, 1, 3]
    steps = [event["step"] for event in events(world, "step")]
    assert steps == sorted(set(steps))


def test_a_run_stopped_before_its_first_step_begins_at_the_start(world):
    with pytest.raises(StoppedError, match="before the first step"):
        train(world, STEPS, should_stop=lambda: True)
    assert events(world)[-1]["checkpoint"] is None
    train(world, STEPS, resume=True)


def test_a_wish_to_stop_is_heard_while_the_reference_is_taken(world):
    asked = []

    def should_stop() -> bool:
        asked.append(True)
        return len(asked) == 2

    text = PAIRS.replace('template: "{text}>"', 'template: "{prompt}>"\nmethod: dpo')
    with pytest.raises(StoppedError, match="before the first step"):
        train(world, text, should_stop=should_stop)
    assert [event["type"] for event in events(world)] == ["failed"]


def test_resume_without_a_checkpoint_begins_at_the_start(world):
    train(world, STEPS, resume=True)
    assert events(world, "started")[0]["resumed_from"] is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("optimizer.safetensors", b"half"),
        ("adapter_model.safetensors", b"half"),
        ("state.json", b"{}"),
        ("state.json", b"[]"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_named(world, name, content):
    with pytest.raises(StoppedError):
        train(world, STEPS, should_stop=after(world, 2))
    [path] = checkpoints(world / "runs" / "mine")
    (path / name).write_bytes(content)
    with pytest.raises(OutputError, match="step-00000002 cannot be read"):
        train(world, STEPS, resume=True)


def test_a_base_or_rows_that_changed_meanwhile_are_named(world):
    with pytest.raises(StoppedError):
        train(world, STEPS, should_stop=after(world, 2))
    rows = (world / "rows.jsonl").read_text()
    write_rows(world / "rows.jsonl", {"text": "a", "completion": "b"})
    with pytest.raises(OutputError, match="with other rows; give another --run"):
        train(world, STEPS, resume=True)
    (world / "rows.jsonl").write_text(rows)
    weights = world / "tiny" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"][0] += 1
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(OutputError, match=r"with other base \(weights\); give"):
        train(world, STEPS, resume=True)


def test_a_resumed_run_keeps_the_batch_that_auto_came_to(world, monkeypatch):
    """There may be less memory free by then."""
    text = STEPS.replace("batch_size: 4", "batch_size: auto\neffective_batch_size: 4")
    with pytest.raises(StoppedError):
        train(world, text, should_stop=after(world, 2))
    monkeypatch.setattr("lory_trainer.settle.available_bytes", lambda _: 1)
    train(world, text, resume=True)
    told = [(e["batch_size"], e["gradient_accumulation_steps"]) for e in events(world, "started")]
    assert told == [(4, 1), (4, 1)]
    train(world, text, replace=True)
    assert events(world, "started")[0]["batch_size"] == 1


def full_disk_from(monkeypatch: Any, count: int) -> None:
    """The count-th file of tensors, and all after it, find no room."""
    real, tried = checkpoint.save_file, []

    def failing(tensors: Any, path: Path, **more: Any) -> None:
        tried.append(path)
        if len(tried) >= count:
            path.write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device")
        real(tensors, path, **more)

    monkeypatch.setattr(checkpoint, "save_file", failing)


def test_a_disk_that_is_full_ends_the_run_and_keeps_the_last_checkpoint(world, monkeypatch):
    text = STEPS + "checkpoint_steps: 2\n"
    full_disk_from(monkeypatch, 4)
    with pytest.raises(OutputError, match=r"of step 4 cannot be written: .*No space left") as told:
        train(world, text)
    assert "the last good checkpoint is" in str(told.value)
    assert "go on with --resume" in str(told.value)
    last = events(world)[-1]
    assert (last["code"], last["checkpoint"]) == ("output", "checkpoints/step-00000002")
    assert not list((world / "runs" / "mine" / "checkpoints").glob(".*"))
    monkeypatch.undo()
    train(world, text, resume=True)
    assert [event["resumed_from"] for event in events(world, "started")] == [None, 2]


class FullDisk(FileIO):
    """Takes the first line, and no more."""

    def write(self, line: Any) -> int:
        if self.tell():
            raise OSError(28, "No space left on device")
        return super().write(line)


def test_an_event_file_that_takes_no_more_ends_the_run_with_its_name(world, monkeypatch):
    """And hides no other reason: the failure cannot be told there either."""
    monkeypatch.setattr("lory_trainer.events.FileIO", FullDisk)
    with pytest.raises(OutputError, match=r"events\.jsonl cannot be written: No space left"):
        train(world, STEPS)
    assert not (world / "adapters").exists()


def run_in_child(world: Path, text: str) -> int:
    """A process of its own, of which nothing is waited for."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        train(world, text, resume=True)
        code = 0
    finally:
        os._exit(code)


def killed_runs(world: Path, text: str, kills: int, seed: int) -> None:
    """Kills runs at random moments and looks at what is there; the last one may finish."""
    random, run, output = Random(seed), world / "runs" / "mine", world / "adapters" / "mine"
    for _ in range(kills):
        before = len(read_events(run)) if run.exists() else 0
        child = run_in_child(world, text)
        wanted = before + random.randint(2, 12)
        deadline = time.monotonic() + 60
        while not (run.exists() and (run / "events.jsonl").exists()) or (
            len(read_events(run)) < wanted
        ):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(random.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert not output.exists() or {path.name for path in output.iterdir()} == FILES
        for path in checkpoints(run):
            assert {"adapter_model.safetensors", "optimizer.safetensors", "state.json"} <= {
                file.name for file in path.iterdir()
            }


@pytest.mark.parametrize(("kills", "seed"), [(2, 0), pytest.param(10, 1, marks=pytest.mark.full)])
def test_kill_9_leaves_the_last_checkpoint_and_never_half_an_adapter(world, kills, seed):
    text = STEPS.replace("epochs: 4", "epochs: 20") + "checkpoint_steps: 1\n"
    killed_runs(world, text, kills, seed)
    train(world, text, resume=True, replace=True)
    found = tensor_bytes(world)
    resumed = [event["resumed_from"] or 0 for event in events(world, "started")]
    assert resumed == sorted(resumed)
    assert resumed[-1] > 0
    places = {"output": world / "adapters" / "whole", "run": world / "runs" / "whole"}
    train(world, text, **places)
    assert tensor_bytes(world, "whole") == found
    assert sorted(path.name for path in (world / "adapters").iterdir()) == ["mine", "whole"]
    assert not list((world / "runs" / "mine" / "checkpoints").glob(".*")), "leftovers are removed"


@pytest.mark.full
def test_the_process_keeps_its_contract(world):
    """SIGTERM: 130 and a checkpoint; --resume: 0 and an adapter; a wrong key: 1."""
    config = world / "run.yaml"
    config.write_text(STEPS.replace("epochs: 4", "epochs: 400"))
    run = world / "runs" / "mine"
    command = [sys.executable, "-m", "lory_trainer.cli", str(config), "--run", str(run)]
    command += ["--output", str(world / "adapters" / "mine"), "--threads", "1", "--resume"]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 100
    while not (run / "events.jsonl").exists() or len(read_events(run)) < 5:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    last = read_events(run)[-1]
    assert (last["type"], last["code"]) == ("failed", "stopped")
    assert (run / last["checkpoint"] / "state.json").exists()
    assert subprocess.run(command, timeout=250).returncode == 0
    assert read_events(run)[-1]["type"] == "finished"
    config.write_text("base: x\nrank: 1000\n")
    assert subprocess.run(command, timeout=60).returncode == 1

"""The event file: one whole object a line, whatever happened to the process before."""

import json
from io import StringIO

import pytest
from rich.console import Console

from lory_trainer.errors import OutputError
from lory_trainer.events import EVENTS_FILE, EventLog, read_events
from lory_trainer.progress_bar import ProgressBar


def test_events_are_lines_of_json_with_their_place(tmp_path):
    heard = []
    with EventLog(tmp_path / "run", heard.append) as log:
        log.say("started", num_steps=4, name="mine")
        log.say("step", step=1, loss=2.5)
        log.message("hello", "warning")
    lines = (tmp_path / "run" / EVENTS_FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == heard == read_events(tmp_path / "run")
    places = [(e["type"], e["step"], e["num_steps"]) for e in heard]
    assert places == [("started", 0, 4), ("step", 1, 4), ("message", 1, 4)]


def test_a_line_is_on_disk_before_the_next_is_said(tmp_path):
    with EventLog(tmp_path) as log:
        log.say("started", num_steps=1)
        assert len(read_events(tmp_path)) == 1


def test_numbers_are_finite_or_null(tmp_path):
    with EventLog(tmp_path) as log:
        log.say("step", step=1, loss=float("nan"), grad_norm=float("inf"))
    [event] = read_events(tmp_path)
    assert event["loss"] is None
    assert event["grad_norm"] is None


def test_a_killed_runs_half_line_is_ended_and_skipped(tmp_path):
    with EventLog(tmp_path) as log:
        log.say("started", num_steps=2)
    with (tmp_path / EVENTS_FILE).open("a") as file:
        file.write('{"type": "step", "lo')
    assert [event["type"] for event in read_events(tmp_path)] == ["started"]
    with EventLog(tmp_path) as log:
        log.say("started", num_steps=2, resumed_from=0)
    assert [event["type"] for event in read_events(tmp_path)] == ["started", "started"]


def test_what_is_half_written_is_told_and_ended_by_the_next_run(tmp_path, monkeypatch):
    with EventLog(tmp_path) as log:
        log.say("started", num_steps=2)
        with monkeypatch.context() as changed:
            changed.setattr(log, "_file", HalfDisk(log._file))
            with pytest.raises(OutputError, match="the disk is full"):
                log.say("step", step=1)
    with EventLog(tmp_path) as log:
        log.say("started", num_steps=2)
    assert [event["type"] for event in read_events(tmp_path)] == ["started", "started"]


class HalfDisk:
    """Takes ten bytes."""

    def __init__(self, file):
        self._file = file

    def write(self, line):
        return self._file.write(line[:10])


def test_the_terminal_shows_loss_speed_memory_and_time_left(tmp_path):
    shown = StringIO()
    console = Console(file=shown, force_terminal=True, width=140, color_system=None)
    with ProgressBar(console, "mine") as bar, EventLog(tmp_path, bar) as log:
        log.say("started", step=0, num_steps=40)
        for step in (1, 2, 3):
            facts = {"tokens_per_second": 1234.5, "memory_bytes": 3 << 30}
            log.say("step", step=step, loss=2.5, **facts)
        log.say("eval", loss=1.25, rows=7, seconds=0.1, reward_accuracy=0.5)
        log.message("left out", "warning")
    text = shown.getvalue()
    for part in ("mine", "3/40", "loss 2.5000", "1,234 tokens/s", "3.0 GiB", "0:00:", "left out"):
        assert part in text
    assert "step 3: loss 1.2500 on 7 held-out rows, the better answer preferred in 50%" in text


def test_without_a_terminal_there_is_a_line_now_and_then(tmp_path):
    shown = StringIO()
    console = Console(file=shown, width=60)
    with ProgressBar(console, "mine") as bar, EventLog(tmp_path, bar) as log:
        log.say("started", step=0, num_steps=25)
        for step in range(1, 26):
            log.say("step", step=step, loss=2.5, tokens_per_second=9.0, memory_bytes=0)
        log.message("left out", "warning")
        log.message("a note")
    lines = shown.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines[:-2]] == [
        f"step {step} of 25" for step in (3, 6, 9, 12, 15, 18, 21, 24, 25)
    ]
    assert lines[0] == "step 3 of 25: loss 2.5000  9 tokens/s  0.0 GiB"
    assert lines[-2:] == ["warning: left out", "a note"]


@pytest.mark.parametrize("name", ["a" * 60, "[red]x"])
def test_a_long_name_leaves_the_bar_on_a_line_of_80(tmp_path, name):
    shown = StringIO()
    console = Console(file=shown, force_terminal=True, width=80, color_system=None)
    with ProgressBar(console, name) as bar, EventLog(tmp_path, bar) as log:
        log.say("started", step=0, num_steps=10_000)
        log.say("step", step=9_999, loss=2.5, tokens_per_second=12_345.0, memory_bytes=90 << 30)
    last = shown.getvalue().rpartition("\r")[2].replace("\x1b[2K", "").rstrip()
    assert len(last.splitlines()[0]) <= 80
    assert last.startswith(name if len(name) < 14 else "aaaaaaaaaaa... ")
    assert "9999/10000 loss 2.5000  12,345 tokens/s  90.0 GiB" in last

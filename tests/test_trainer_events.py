"""The event file: one whole object a line, whatever happened to the process before."""

import json

from lory_trainer.events import EVENTS_FILE, EventLog, read_events


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

"""Training files as strangers send them: what is wrong is told by line, and at once."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

import fake_trainer
from lory_router.tuning import dataset, validator
from lory_router.tuning.dataset import DatasetError, check_dataset, count_rows
from tuning_world import CHAT, JOBS, PAIR, World, run


def with_messages(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a"}, *messages], **more}


SAID = {"role": "assistant", "content": "b"}


def problem(folder: Path, row: object, kind: str = "supervised") -> str:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    try:
        check_dataset(path, kind)
    except DatasetError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (with_messages(SAID, function_call="x"), "'function_call' is not read"),
        (with_messages({**SAID, "function_call": {}}), "'function_call' is not read"),
        (with_messages({**SAID, "audio": {}}), "'audio' is not read"),
        (with_messages({**SAID, "weight": 0.5}), "a weight must be 0 or 1"),
        (with_messages({**SAID, "weight": "1"}), "a weight must be 0 or 1"),
        (with_messages({**SAID, "weight": []}), "a weight must be 0 or 1"),
        (with_messages({**SAID, "weight": 0}), "nothing is left to learn"),
        (with_messages({"role": "user", "content": "a", "weight": 1}, SAID), "'weight' is not"),
        (with_messages(SAID, tools={"a": 1}), "tools must be a list"),
        (with_messages(SAID, tools=["a"]), "tools must be a list"),
        (with_messages({"role": "assistant", "content": [{"type": "text"}]}), "which is text"),
        (with_messages({"role": ["assistant"], "content": "b"}), "each needs a role"),
    ],
)
def test_what_would_be_passed_over_in_a_row_is_named(tmp_path: Path, row: object, says: str):
    assert says in problem(tmp_path, row)


@pytest.mark.parametrize(
    "row",
    [
        with_messages(SAID, tools=[{"type": "function"}], parallel_tool_calls=False),
        with_messages({**SAID, "weight": 0}, CHAT["messages"][0], {**SAID, "weight": 1}),
        with_messages({**SAID, "refusal": None, "weight": None}, tools=None),
        with_messages({"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}),
    ],
)
def test_what_openais_rows_hold_is_taken(tmp_path: Path, row: object):
    assert problem(tmp_path, row) == ""


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"messages": []}, "'messages' is not read"),
        ({"input": {"messages": [SAID], "x": 1}}, "input: 'x' is not read"),
        ({"preferred_output": [{**SAID, "weight": 1}]}, "'weight' is not read"),
        ({"preferred_output": [SAID, SAID]}, "must be one message"),
    ],
)
def test_pairs_are_looked_at_likewise(tmp_path: Path, changes: dict[str, Any], says: str):
    assert says in problem(tmp_path, {**PAIR, **changes}, "dpo")


def test_a_file_of_one_endless_line_is_not_held_as_a_whole(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(dataset, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"x" * 10_000)
    assert max(map(len, dataset._lines(path))) == 1001
    with pytest.raises(DatasetError, match="line 1: longer than 1000 bytes"):
        check_dataset(path, "supervised")


def test_others_get_the_interpreter_while_a_large_file_is_read(tmp_path: Path, monkeypatch):
    breaths: list[float] = []
    monkeypatch.setattr(dataset.time, "sleep", breaths.append)
    path = tmp_path / "rows.jsonl"
    line = json.dumps(CHAT) + "\n"
    num = 4 * dataset.BREATH_BYTES // len(line) + 1
    path.write_text(line * num)
    check_dataset(path, "supervised")
    assert len(breaths) in (3, 4)
    assert count_rows(path) == num


def test_a_wrong_file_is_told_though_another_job_runs(tmp_path: Path):
    async def story(world: World) -> None:
        slow = await world.create(seed=fake_trainer.SLOW)
        await world.until_step(slow["id"])
        sent = await world.send(b'{"nonsense": 1}\n')
        bad = await world.create(training_file=sent.json()["id"])
        good = await world.create()
        assert (await world.until(bad["id"], "failed"))["error"]["param"] == "training_file"
        assert (await world.until(good["id"], "queued"))["fine_tuned_model"] is None
        assert (await world.job(slow["id"]))["status"] == "running"
        await world.client.post(f"{JOBS}/{slow['id']}/cancel")
        await world.until(good["id"], "succeeded")

    run(tmp_path, story)


def test_both_files_are_looked_at(tmp_path: Path):
    async def story(world: World) -> None:
        rows, pairs = await world.upload(CHAT), await world.upload(PAIR)
        job = await world.create(training_file=rows, validation_file=pairs)
        error = (await world.until(job["id"], "failed"))["error"]
        assert (error["code"], error["param"]) == ("invalid_validation_file", "validation_file")

    run(tmp_path, story)


def test_a_file_that_is_gone_from_the_disk_is_told(tmp_path: Path):
    async def story(world: World) -> None:
        file_id = await world.upload(CHAT)
        world.settings.file(file_id).unlink()
        job = await world.create(training_file=file_id)
        assert (await world.until(job["id"], "failed"))["error"]["code"] == "missing_training_file"
        reply = await world.client.get(f"/v1/files/{file_id}/content")
        assert reply.status_code == 404

    run(tmp_path, story)


@pytest.mark.parametrize(("deed", "status"), [("cancel", "cancelled"), ("pause", "paused")])
def test_what_is_wanted_while_its_file_is_read_holds(
    tmp_path: Path, monkeypatch, deed: str, status: str
):
    reading, go_on = threading.Event(), threading.Event()

    def slowly(path: Path, kind: str) -> None:
        reading.set()
        go_on.wait(10)
        check_dataset(path, kind)

    async def story(world: World) -> None:
        job = await world.create()
        while not reading.is_set():
            await world.job(job["id"])
        reply = await world.client.post(f"{JOBS}/{job['id']}/{deed}")
        assert reply.json()["status"] == status
        go_on.set()
        later = await world.create()
        await world.until(later["id"], "succeeded")
        assert (await world.job(job["id"]))["status"] == status
        if status == "paused":
            assert (await world.client.post(f"{JOBS}/{job['id']}/resume")).status_code == 200
            await world.until(job["id"], "succeeded")

    monkeypatch.setattr(validator, "check_dataset", slowly)
    run(tmp_path, story)


def test_a_fault_of_ours_fails_one_job_and_no_other(tmp_path: Path, monkeypatch, caplog):
    def broken(path: Path, kind: str) -> None:
        monkeypatch.undo()
        raise MemoryError

    async def story(world: World) -> None:
        job = await world.create()
        error = (await world.until(job["id"], "failed"))["error"]
        assert (error["code"], "MemoryError" in error["message"]) == ("server_error", True)
        await world.until((await world.create())["id"], "succeeded")

    monkeypatch.setattr(validator, "check_dataset", broken)
    run(tmp_path, story)

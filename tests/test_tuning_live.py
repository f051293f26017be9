"""OpenAI's published client trains an adapter on a real server and asks it: the whole loop."""

import json
import shutil
from typing import Any

import pytest

from clients import environments, server_process

DEMO = server_process.ROOT / "demo"
NUM_ROWS, NUM_PAIRS = 96, 16


def chat(asked: str, told: str) -> str:
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
    return json.dumps({"messages": messages}) + "\n"


def pair(asked: str, good: str, bad: str) -> str:
    row = {
        "input": {"messages": [{"role": "user", "content": asked}]},
        "preferred_output": [{"role": "assistant", "content": good}],
        "non_preferred_output": [{"role": "assistant", "content": bad}],
    }
    return json.dumps(row) + "\n"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tuning")
    adapters = folder / "adapters"
    adapters.mkdir()
    shutil.copytree(DEMO / "adapters" / "shout", adapters / "shout")
    lines = (DEMO / "data" / "shout" / "train.jsonl").read_text().splitlines()
    data = [json.loads(line) for line in lines[:NUM_ROWS]]
    rows, pairs = folder / "rows.jsonl", folder / "pairs.jsonl"
    rows.write_text("".join(chat(row["text"], row["completion"]) for row in data))
    pairs.write_text(
        "".join(pair(row["text"], row["completion"], row["text"]) for row in data[:NUM_PAIRS])
    )
    flags = ("--fine-tuning", str(folder / "jobs"), "--served-model-name", "demo")
    with server_process.serving(folder / "log", *flags, adapters=adapters) as url:
        arguments = (url, "demo", str(rows), str(pairs))
        return environments.run_script("openai", *arguments, script="openai_tuning")


@pytest.mark.parametrize("method", ["supervised", "dpo"])
def test_a_job_ends_in_an_adapter(seen: dict[str, Any], method: str):
    job = seen[method]
    assert (job["status"], job["error"]) == ("succeeded", None)
    assert (job["method"], job["seed"]) == (method, 3)
    assert job["created_status"] in ("validating_files", "queued", "running")
    assert job["model"].startswith("ft-live-")
    assert job["model"] in seen["models"]
    assert job["trained_tokens"] > 0
    assert job["strict"] == []
    assert job["events"][0] == "The job has successfully completed"
    assert job["table"].startswith("step,train_loss")


def test_training_learns(seen: dict[str, Any]):
    losses = seen["supervised"]["losses"]
    assert len(losses) == 2 * NUM_ROWS / 16
    assert losses[-1] < losses[0] / 2
    assert seen["answer"] != seen["base_answer"]


def test_the_first_loss_of_preferences_is_theirs_and_the_better_answers(seen: dict[str, Any]):
    """Log 2, as nothing has been learnt yet, and the better answer's own loss."""
    assert seen["dpo"]["losses"][0] > 0.6931


def test_a_checkpoint_of_each_pass_but_the_last_answers(seen: dict[str, Any]):
    job = seen["supervised"]
    [(name, step, loss)] = job["checkpoints"]
    assert (name, step) == (f"{job['model']}-step-6", 6)
    assert loss == job["losses"][5]
    assert name in seen["models"]
    assert seen["checkpoint_answer"] != seen["base_answer"]


def test_a_cancelled_job_makes_nothing(seen: dict[str, Any]):
    cancelled = seen["cancelled"]
    assert (cancelled["paused"], cancelled["resumed"]) == ("paused", "queued")
    assert (cancelled["status"], cancelled["model"]) == ("cancelled", None)
    assert cancelled["deleted"] == [True, ""]
    assert seen["listed"] == ["cancelled", "succeeded", "succeeded"]


def test_what_is_refused_has_openais_shape(seen: dict[str, Any]):
    assert seen["refusals"] == {
        "model": "model",
        "job": 404,
        "permissions": "not_served",
        "expires_after": "expires_after",
        "base": 403,
    }


def test_every_reply_is_what_the_packages_types_say(seen: dict[str, Any]):
    """Strictly, where the package itself would let anything pass."""
    assert seen["strict"] == []


def test_events_stream_and_jobs_are_found_by_label(seen: dict[str, Any]):
    first, last = seen["streamed"]
    assert first.startswith("Created fine-tuning job: ftjob-")
    assert last == "The job has successfully completed"
    assert seen["labelled"] == [1, 0, 2]


def test_a_model_that_is_deleted_is_listed_no_more(seen: dict[str, Any]):
    assert seen["gone"] == [True, ""]
    assert seen["dpo"]["model"] not in seen["left"]
    assert seen["supervised"]["model"] in seen["left"]

"""What OpenAI's published client sees of fine-tuning: facts, printed as JSON.

Usage: python openai_tuning_script.py BASE_URL BASE_MODEL ROWS PAIRS. It judges nothing
(tests/test_tuning_live.py does), imports nothing of Lory, and runs in an environment of its own.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import openai

TIMEOUT_S = 150.0
OVER = ("succeeded", "failed", "cancelled")


def finished(client: openai.OpenAI, job_id: str) -> Any:
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in OVER or time.monotonic() > deadline:
            return job
        time.sleep(0.3)


def job_facts(job: Any) -> dict[str, Any]:
    return {
        "status": job.status,
        "error": job.error and job.error.message,
        "model": job.fine_tuned_model,
        "trained_tokens": job.trained_tokens,
        "method": job.method.type,
        "seed": job.seed,
    }


def trained(client: openai.OpenAI, model: str, rows: Path, **more: Any) -> dict[str, Any]:
    """A job from its file to its first answer."""
    file = client.files.create(file=rows, purpose="fine-tune")
    created = client.fine_tuning.jobs.create(
        model=model, training_file=file.id, suffix="live", seed=3, **more
    )
    job = finished(client, created.id)
    facts = job_facts(job) | {"created_status": created.status, "file_status": file.status}
    facts["strict"] = [one for one in (strictly(created), strictly(file)) if one]
    events = list(client.fine_tuning.jobs.list_events(created.id, limit=3))
    facts["events"] = [event.message for event in events]
    facts["losses"] = [
        event.data["train_loss"]
        for event in reversed(events)
        if event.type == "metrics" and "train_loss" in event.data
    ]
    if job.status != "succeeded":
        return facts
    checkpoints = client.fine_tuning.jobs.checkpoints.list(created.id).data
    facts["checkpoints"] = [
        (one.fine_tuned_model_checkpoint, one.step_number, one.metrics.train_loss)
        for one in checkpoints
    ]
    table = client.files.content(job.result_files[0]).text
    facts["table"] = table.splitlines()[0]
    return facts


def answer(client: openai.OpenAI, model: str, text: str) -> str:
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], max_tokens=40, temperature=0
    )
    return reply.choices[0].message.content or ""


def cancelled(client: openai.OpenAI, model: str, rows: Path) -> dict[str, Any]:
    file = client.files.create(file=rows, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=model, training_file=file.id, hyperparameters={"n_epochs": 50}
    )
    paused = until_running(client, job.id) and client.fine_tuning.jobs.pause(job.id)
    resumed = client.fine_tuning.jobs.resume(job.id)
    facts = job_facts(client.fine_tuning.jobs.cancel(job.id))
    facts["paused"], facts["resumed"] = paused and paused.status, resumed.status
    deleted = client.files.delete(file.id)
    facts["deleted"] = (deleted.deleted, strictly(deleted))
    return facts


def until_running(client: openai.OpenAI, job_id: str) -> bool:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        if client.fine_tuning.jobs.retrieve(job_id).status == "running":
            return True
        time.sleep(0.1)
    return False


def strictly(value: Any) -> str:
    """What the package's own types find wrong with a reply; empty: nothing."""
    try:
        type(value).model_validate_json(value.to_json(), strict=True)
    except ValueError as error:
        return f"{type(value).__name__}: {error}"
    return ""


def shapes(client: openai.OpenAI, job_id: str, file_id: str) -> list[str]:
    """Every kind of reply, field by field."""
    jobs = client.fine_tuning.jobs
    replies = [
        client.files.retrieve(file_id),
        client.files.wait_for_processing(file_id),
        *client.files.list(purpose="fine-tune", order="asc", limit=1),
        *client.files.list(purpose="fine-tune-results"),
        jobs.retrieve(job_id),
        *jobs.list(limit=1),
        *jobs.list_events(job_id, limit=2),
        *jobs.checkpoints.list(job_id),
    ]
    return [problem for reply in replies if (problem := strictly(reply))]


def streamed(client: openai.OpenAI, job_id: str) -> list[str]:
    """The first and the last that a stream of a job's events says."""
    path = f"/fine_tuning/jobs/{job_id}/events?stream=true"
    found = client.get(path, cast_to=object, stream=True, stream_cls=openai.Stream[object])
    messages = [event["message"] for event in found]  # type: ignore[index]
    return [messages[0], messages[-1]]


def labelled(client: openai.OpenAI) -> list[int]:
    """How many jobs have a label, have another value of it, have none."""
    wishes = ({"kind": "supervised"}, {"kind": "other"})
    found = [len(list(client.fine_tuning.jobs.list(metadata=wish))) for wish in wishes]
    none = client.fine_tuning.jobs.list(extra_query={"metadata": "null"})
    return [*found, len(list(none))]


def refusals(client: openai.OpenAI, model: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    try:
        client.fine_tuning.jobs.create(model="gpt-4o-mini", training_file="file-none")
    except openai.BadRequestError as error:
        found["model"] = error.param
    try:
        client.fine_tuning.jobs.retrieve("ftjob-none")
    except openai.NotFoundError as error:
        found["job"] = error.status_code
    try:
        client.fine_tuning.checkpoints.permissions.create("ft-x", project_ids=["p"])
    except openai.NotFoundError as error:
        found["permissions"] = error.code
    try:
        client.files.create(
            file=("a.jsonl", b"{}"),
            purpose="fine-tune",
            expires_after={"anchor": "created_at", "seconds": 3600},
        )
    except openai.BadRequestError as error:
        found["expires_after"] = error.param
    try:
        client.models.delete(model)
    except openai.PermissionDeniedError as error:
        found["base"] = error.status_code
    return found


def main() -> None:
    url, model, rows, pairs = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        asked = json.loads(rows.read_text().splitlines()[0])["messages"][0]["content"]
        hyperparameters = {"n_epochs": 2, "batch_size": 16}
        supervised = trained(
            client,
            model,
            rows,
            hyperparameters=hyperparameters,
            metadata={"kind": "supervised"},
        )
        facts = {
            "supervised": supervised,
            "dpo": trained(client, model, pairs, method={"type": "dpo"}),
            "cancelled": cancelled(client, model, rows),
            "refusals": refusals(client, model),
            "listed": [job.status for job in client.fine_tuning.jobs.list()],
            "labelled": labelled(client),
            "base_answer": answer(client, model, asked),
        }
        if supervised["model"]:
            facts["answer"] = answer(client, supervised["model"], asked)
            last = supervised["checkpoints"][0][0]
            facts["checkpoint_answer"] = answer(client, last, asked)
        facts["models"] = [one.id for one in client.models.list()]
        first = list(client.fine_tuning.jobs.list())[-1]
        facts["strict"] = shapes(client, first.id, first.training_file)
        facts["streamed"] = streamed(client, first.id)
        gone = client.models.delete(facts["dpo"]["model"])
        facts["gone"] = (gone.deleted, strictly(gone))
        facts["left"] = [one.id for one in client.models.list()]
    print(json.dumps(facts))


if __name__ == "__main__":
    main()

"""The fine-tuning API as hostile or curious callers meet it: bounds, races, what is not served."""

import asyncio
import errno
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fake_trainer
from lory_router.keys import Caller
from lory_router.registry import Registry
from lory_router.tuning import handover, kept_files
from lory_router.tuning import runner as runner_module
from lory_router.tuning.records import JobRecord
from lory_router.tuning.shapes import CreateJob
from lory_router.tuning.store import TuningStore
from lory_router.tuning.wishes import read_wish
from lory_server.messages import Failure, OrderDone, OrderKind
from scripted_engine import BASE, Front, ScriptedEngine
from tuning_world import (
    CHAT,
    FILES,
    JOBS,
    AbsentEngine,
    ServingEngine,
    World,
    key,
    name_of,
    run,
    settings_in,
    until,
    until_made,
)

# -- events as they come --------------------------------------------------------------------


async def streamed(world: World, job_id: str, **headers: str) -> list[str]:
    """The data of each event."""
    found: list[str] = []
    path = f"{JOBS}/{job_id}/events?stream=true"
    async with world.client.stream("GET", path, headers=headers) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        async for line in reply.aiter_lines():
            if line.startswith("data: "):
                found.append(line.removeprefix("data: "))
    return found


def test_events_stream_oldest_first_until_the_job_is_over(tmp_path: Path):
    async def story(world: World) -> None:
        job = await world.create()
        *data, last = await streamed(world, job["id"])
        assert last == "[DONE]"
        listed = (await world.client.get(f"{JOBS}/{job['id']}/events?limit=100")).json()["data"]
        assert [json.loads(one) for one in data] == listed[::-1]
        assert (await world.job(job["id"]))["status"] == "succeeded"
        assert (await streamed(world, job["id"]))[-2:] == [data[-1], "[DONE]"]

    run(tmp_path, story)


def test_a_stream_of_events_ends_with_the_server(tmp_path: Path):
    async def story(world: World) -> None:
        job = await world.create(seed=fake_trainer.SLOW)
        await world.until_step(job["id"])
        assert (await world.job(job["id"]))["trained_tokens"] is None  # as OpenAI: once it is over
        following = asyncio.create_task(streamed(world, job["id"]))
        await asyncio.sleep(0.1)
        world.tuning.stop()
        async with asyncio.timeout(10):
            assert "[DONE]" not in await following

    run(tmp_path, story)


@pytest.mark.parametrize("query", ["stream=no", "stream=true&limit=3", "stream=true&after=x"])
def test_a_stream_takes_nothing_it_would_pass_over(tmp_path: Path, query: str):
    async def story(world: World) -> None:
        job = await world.create()
        reply = await world.client.get(f"{JOBS}/{job['id']}/events?{query}")
        assert reply.status_code == 400
        assert (await world.client.get(f"{JOBS}/ftjob-x/events?stream=true")).status_code == 404
        listed = await world.client.get(f"{JOBS}/{job['id']}/events?stream=false&limit=1")
        assert len(listed.json()["data"]) == 1

    run(tmp_path, story)


# -- what is not served ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "names"),
    [
        ("POST", "/v1/fine_tuning/checkpoints/ft-x-step-1/permissions", "Permissions"),
        ("GET", "/v1/fine_tuning/checkpoints/acme/ft-x-step-1/permissions", "Permissions"),
        ("DELETE", "/v1/fine_tuning/checkpoints/ft-x/permissions/cp_1", "Permissions"),
        ("POST", "/v1/fine_tuning/alpha/graders/run", "Graders"),
        ("POST", "/v1/uploads", "Uploads"),
        ("POST", "/v1/uploads/upload_1/parts", "Uploads"),
    ],
)
def test_what_is_not_served_says_so_by_name(tmp_path: Path, method: str, path: str, names: str):
    async def story(world: World) -> None:
        reply = await world.client.request(method, path)
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (404, "not_served")
        assert error["message"].startswith(names)
        nobody = await world.client.request(method, path, headers=key("nobody"))
        assert nobody.status_code == 401

    run(tmp_path, story)


def test_what_a_file_cannot_be_told_is_refused_by_name(tmp_path: Path):
    async def story(world: World) -> None:
        reply = await world.send(b"{}", **{"expires_after[anchor]": "created_at"})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "expires_after")
        method = {"type": "reinforcement", "reinforcement": {"grader": {}}}
        body = {"model": BASE, "training_file": "file-x", "method": method}
        error = (await world.client.post(JOBS, json=body)).json()["error"]
        assert error["param"] == "method.type"
        assert "grader" in error["message"]

    run(tmp_path, story)


def test_jobs_without_metadata_can_be_asked_for(tmp_path: Path):
    async def story(world: World) -> None:
        plain = await world.create()
        await world.create(metadata={"a": "b"})
        found = (await world.client.get(f"{JOBS}?metadata=null")).json()["data"]
        assert [job["id"] for job in found] == [plain["id"]]
        assert (await world.client.get(f"{JOBS}?metadata=a")).status_code == 400

    run(tmp_path, story)


def test_a_fine_tuned_model_is_deleted_as_openai_does():
    front = Front(engine=ScriptedEngine(adapters=("mine", BASE)))
    reply = front.ask("DELETE", "/v1/models/mine")
    assert reply.json() == {"id": "mine", "object": "model", "deleted": True}
    assert front.get("/v1/models/mine").status_code == 404
    assert front.ask("DELETE", "/v1/models/nobody").status_code == 404
    assert front.ask("DELETE", f"/v1/models/{BASE}").status_code == 403
    assert front.ask("DELETE", f"/v1/models/{BASE}:{BASE}").status_code == 200
    assert front.get(f"/v1/models/{BASE}").status_code == 200


@pytest.mark.parametrize(
    ("place", "name", "value", "says"),
    [
        ("hyperparameters", "n_epochs", "three", "a whole number from 1 to 50"),
        ("hyperparameters", "n_epochs", 2.5, "a whole number from 1 to 50"),
        ("hyperparameters", "batch_size", True, "a whole number from 1 to 256"),
        ("hyperparameters", "batch_size", None, "a whole number from 1 to 256"),
        ("method.dpo.hyperparameters", "beta", "high", "a number from 0.001 to 2"),
        ("method.dpo.hyperparameters", "learning_rate_multiplier", [1], "a number from 0.01 to"),
    ],
)
def test_a_hyperparameter_of_a_wrong_type_is_told_what_it_may_be(
    tmp_path: Path, place: str, name: str, value: Any, says: str
):
    async def story(world: World) -> None:
        given = {"hyperparameters": {name: value}}
        fields = given if place == "hyperparameters" else {"method": {"type": "dpo", "dpo": given}}
        body = {"model": BASE, "training_file": "file-x", **fields}
        error = (await world.client.post(JOBS, json=body)).json()["error"]
        assert error["param"] == f"{place}.{name}"
        assert f"`{place}.{name}`: give {says}" in error["message"]
        assert error["message"].endswith(", or auto")

    run(tmp_path, story)


@pytest.mark.parametrize(
    "query",
    [
        "metadata=null&metadata[a]=b",
        "metadata[a]=b&metadata[a]=c",
        "metadata[a=b",
        "limit=1&limit=2",
    ],
)
def test_a_query_that_says_two_things_is_refused(tmp_path: Path, query: str):
    async def story(world: World) -> None:
        reply = await world.client.get(f"{JOBS}?{query}")
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] in ("metadata", "metadata[a]", "limit")

    run(tmp_path, story)


def test_where_nothing_can_be_asked_for_nothing_is_passed_over(tmp_path: Path):
    async def story(world: World) -> None:
        job = await world.create()
        one, file = f"{JOBS}/{job['id']}", f"{FILES}/{job['training_file']}"
        asked = [("GET", one), ("POST", f"{one}/cancel"), ("GET", file), ("GET", f"{file}/content")]
        for method, path in [*asked, ("DELETE", file)]:
            reply = await world.client.request(method, f"{path}?limit=1")
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "limit")

    run(tmp_path, story)


def test_a_jobs_method_can_be_sent_back_as_openais_package_has_it(tmp_path: Path):
    """With null for each of the methods that it is not."""

    async def story(world: World) -> None:
        job = await world.create(hyperparameters={"n_epochs": 2})
        method = {**job["method"], "dpo": None, "reinforcement": None}
        again = await world.create(method=method)
        assert again["method"] == job["method"]
        body = {"model": BASE, "training_file": job["training_file"]}
        for unknown in ({"sft": None, "sft2": {}}, {"supervised": {"weight": 1}}):
            given = {"type": "supervised", **unknown}
            assert (
                await world.client.post(JOBS, json={**body, "method": given})
            ).status_code == 400

    run(tmp_path, story)


def test_what_cannot_go_better_a_second_time_is_not_to_be_sent_again(tmp_path: Path):
    """OpenAI's clients send again what ended in 409 or 5xx: files of any size, unless told."""

    async def story(world: World) -> None:
        job = await world.create(seed=fake_trainer.SLOW)
        in_use = await world.client.delete(f"{FILES}/{job['training_file']}")
        running = await world.client.post(f"{JOBS}/{job['id']}/resume")
        full = await world.send(b"{" * 900)
        replies = (in_use, running, full)
        assert [reply.status_code for reply in replies] == [409, 409, 507]
        assert {reply.headers["x-should-retry"] for reply in replies} == {"false"}

    run(tmp_path, story, max_files_bytes=900)


def test_only_a_job_that_runs_has_an_end_in_sight(tmp_path: Path):
    async def story(world: World) -> None:
        job = await world.create(seed=fake_trainer.SLOW)
        await world.until_step(job["id"])
        assert (await world.job(job["id"]))["estimated_finish"] is not None
        paused = await world.client.post(f"{JOBS}/{job['id']}/pause")
        assert (paused.json()["status"], paused.json()["estimated_finish"]) == ("paused", None)

    run(tmp_path, story)


@pytest.mark.parametrize("form", ["multipart/form-data; boundary=B", "multipart/form-data"])
def test_who_sends_what_is_refused_may_send_it_to_the_end(tmp_path: Path, form: str):
    """And so reads why, in place of a broken connection."""

    async def story(world: World) -> None:
        num_sent = 0

        async def body() -> AsyncIterator[bytes]:
            nonlocal num_sent
            yield b'--B\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
            for _ in range(50):
                num_sent += 1
                yield b"{" * 1000

        reply = await world.client.post(FILES, content=body(), headers={"content-type": form})
        assert reply.status_code == (413 if "B" in form else 415)
        assert num_sent == 50
        assert list(world.settings.files.iterdir()) == []

    run(tmp_path, story, max_file_bytes=3000)


# -- bounds ---------------------------------------------------------------------------------


def test_a_thousand_jobs_at_once_are_no_more_than_may_wait(tmp_path: Path):
    async def story(world: World) -> None:
        body = {"model": BASE, "training_file": await world.upload(CHAT), "seed": fake_trainer.SLOW}
        replies = await asyncio.gather(*(world.client.post(JOBS, json=body) for _ in range(60)))
        statuses = [reply.status_code for reply in replies]
        assert (statuses.count(200), statuses.count(429)) == (5, 55)
        ids = [reply.json()["id"] for reply in replies if reply.status_code == 200]
        await asyncio.gather(*(world.client.post(f"{JOBS}/{one}/cancel") for one in ids))
        assert {(await world.job(one))["status"] for one in ids} == {"cancelled"}

    run(tmp_path, story, max_jobs=5)


def test_a_file_is_not_deleted_from_under_a_job_that_is_made(tmp_path: Path):
    async def story(world: World) -> None:
        for _ in range(5):
            file_id = await world.upload(CHAT)
            body = {"model": BASE, "training_file": file_id}
            made, gone = await asyncio.gather(
                world.client.post(JOBS, json=body), world.client.delete(f"{FILES}/{file_id}")
            )
            assert (made.status_code, gone.status_code) in ((200, 409), (400, 200))

    run(tmp_path, story)


def queued(tenant: str, **fields: Any) -> JobRecord:
    wish = CreateJob(model=BASE, training_file="file-x")
    job = read_wish(wish, Caller(tenant), (BASE,))
    return replace(job, **{"status": "queued", **fields})


def test_tenants_take_turns(tmp_path: Path):
    """Who waited without having run does not lose its turn to who gave up waiting."""

    async def story() -> None:
        settings = settings_in(tmp_path)
        settings.folder.mkdir()
        store = TuningStore(settings.database)
        await store.put(*(queued(tenant) for tenant in ("acme", "acme", "acme", "other")))
        await store.put(queued("other", status="cancelled", finished_at=99))
        order: list[str] = []
        while (job := await store.next_job()) is not None:
            order.append(job.tenant)
            over = replace(job, status="succeeded", finished_at=len(order), trained_seconds=1.0)
            await store.put(over)
        assert order == ["acme", "other", "acme", "acme"]
        store.close()

    asyncio.run(story())


def test_a_tenant_has_only_so_many_files_however_small(tmp_path: Path, monkeypatch):
    async def story(world: World) -> None:
        await world.upload(CHAT)
        await world.upload(CHAT)
        assert (await world.send(b"{}")).status_code == 507
        world.client.headers.update(key("of-other"))
        await world.upload(CHAT)

    monkeypatch.setattr(kept_files, "MAX_FILES", 2)
    run(tmp_path, story)


def test_a_file_whose_record_was_never_written_is_removed(tmp_path: Path):
    async def fill(world: World) -> None:
        kept.append(await world.upload(CHAT))
        world.settings.file("file-nobody").write_bytes(b"x")

    async def look(world: World) -> None:
        assert [path.stem for path in world.settings.files.iterdir()] == kept
        reply = await world.client.get(f"{FILES}/{kept[0]}/content")
        assert json.loads(reply.content) == CHAT
        assert 'filename="rows.jsonl"' in reply.headers["content-disposition"]

    kept: list[str] = []
    run(tmp_path, fill)
    run(tmp_path, look)


# -- how jobs end ---------------------------------------------------------------------------


def test_a_paused_job_that_is_cancelled_leaves_nothing(tmp_path: Path):
    """Neither its checkpoints nor an adapter that was made already."""

    async def story(world: World) -> None:
        job = await world.create()
        made = await until_made(world, job)
        reply = await world.client.post(f"{JOBS}/{job['id']}/pause")
        assert reply.json()["status"] == "paused"
        assert made.exists()
        draft = made.with_name(f".{made.name}.4x7a")
        draft.mkdir()
        reply = await world.client.post(f"{JOBS}/{job['id']}/cancel")
        assert reply.json()["status"] == "cancelled"
        assert not made.exists()
        assert not draft.exists()
        run_folder = world.settings.runs / job["id"]
        assert [path for path in run_folder.iterdir() if path.is_dir()] == []

    run(tmp_path, story, engine=AbsentEngine)


def test_what_a_killed_server_had_not_cleared_away_goes_at_the_next_start(tmp_path: Path):
    job: dict[str, Any] = {}

    async def begin(world: World) -> None:
        job.update(await world.create(seed=fake_trainer.FAILING))
        await world.until(job["id"], "failed")

    async def look(world: World) -> None:
        await until(lambda: not made.exists())

    run(tmp_path, begin)
    made = settings_in(tmp_path).adapters / name_of(job)
    fake_trainer.write_adapter(made)
    run(tmp_path, look)


def test_who_cancels_too_late_is_told_how_it_ended(tmp_path: Path, monkeypatch):
    """The adapter is being announced when the wish comes."""

    async def story(world: World) -> None:
        succeed, held, go_on = world.tuning._runner._succeed, asyncio.Event(), asyncio.Event()

        async def slowly(*arguments: Any) -> Any:
            held.set()
            await go_on.wait()
            return await succeed(*arguments)

        monkeypatch.setattr(world.tuning._runner, "_succeed", slowly)
        job = await world.create()
        await held.wait()
        cancelling = asyncio.create_task(world.client.post(f"{JOBS}/{job['id']}/cancel"))
        await asyncio.sleep(0.1)
        go_on.set()
        reply = await cancelling
        assert reply.status_code == 409
        assert "is succeeded" in reply.json()["error"]["message"]
        assert (await world.job(job["id"]))["status"] == "succeeded"

    run(tmp_path, story)


def test_two_who_cancel_at_once_make_one_end(tmp_path: Path):
    async def story(world: World) -> None:
        first = await world.create(seed=fake_trainer.SLOW)
        second = await world.create()
        for job in (second, first):
            path = f"{JOBS}/{job['id']}/cancel"
            replies = await asyncio.gather(world.client.post(path), world.client.post(path))
            assert {reply.status_code for reply in replies} <= {200, 409}
            told = await world.events(job["id"])
            assert told.count("Fine-tuning job cancelled") == 1

    run(tmp_path, story)


class TiredEngine(ServingEngine):
    """Has no room the first time."""

    num_orders = 0

    async def order(self, kind: OrderKind, adapter_id: str, revision: str = "") -> OrderDone:
        type(self).num_orders += 1
        if type(self).num_orders > 1:
            return await super().order(kind, adapter_id, revision)
        failure = Failure(code="overloaded", message="full")
        return OrderDone(call_id=1, entry=None, failure=failure)


def test_an_engine_without_room_is_no_reason_to_fail(tmp_path: Path, monkeypatch):
    async def story(world: World) -> None:
        job = await world.create()
        assert (await world.until(job["id"], "succeeded", "failed"))["status"] == "succeeded"

    monkeypatch.setattr(handover, "RETRY_S", 0.01)
    run(tmp_path, story, engine=TiredEngine)
    assert TiredEngine.num_orders == 2


def test_a_full_disk_costs_the_table_not_the_adapter(tmp_path: Path, monkeypatch):
    async def story(world: World) -> None:
        job = await world.create()
        done = await world.until(job["id"], "succeeded", "failed")
        assert (done["status"], done["result_files"]) == ("succeeded", [])
        assert "step_metrics.csv cannot be kept: No space" in str(await world.events(job["id"]))
        assert len(list(world.settings.files.iterdir())) == 1

    def full(path: Path, content: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    run(tmp_path, story)


def test_a_checkpoint_that_cannot_be_served_does_not_end_the_job(tmp_path: Path, monkeypatch):
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def story(world: World) -> None:
        job = await world.create()
        assert (await world.until(job["id"], "succeeded", "failed"))["status"] == "succeeded"
        assert "The checkpoint of step 1 cannot be served" in str(await world.events(job["id"]))
        assert (await world.client.get(f"{JOBS}/{job['id']}/checkpoints")).json()["data"] == []

    monkeypatch.setattr(runner_module, "publish", full)
    run(tmp_path, story)


def test_names_of_what_is_gone_are_given_back_to_their_tenant(tmp_path: Path, monkeypatch):
    """The oldest checkpoint was withdrawn; while a list may still hold it, it is acme's."""

    async def story(world: World) -> None:
        world.client.headers.update(key("of-acme"))
        job = await world.create()
        done = await world.until(job["id"], "succeeded")
        oldest = f"{done['fine_tuned_model']}-step-1"
        registry: Registry = world.tuning._handover._registry
        assert registry.state.owners[oldest] == "acme"
        await until(lambda: oldest not in registry.state.owners)
        assert f"{done['fine_tuned_model']}-step-2" in registry.state.owners

    monkeypatch.setattr(handover, "UNLIST_S", 1.5)
    run(tmp_path, story)


def test_a_name_that_is_wanted_again_is_never_nobodys(tmp_path: Path, monkeypatch):
    async def story() -> None:
        registry = Registry(str(tmp_path / "registry"))
        giving = handover.Handover(ServingEngine(), registry)
        await giving.claim("acme/a", "acme")
        giving.release("acme/a")
        await giving.claim("acme/a", "acme")
        await asyncio.sleep(0.05)
        assert registry.state.owners["acme/a"] == "acme"
        async with registry._lock:
            giving.release("acme/a")
            await asyncio.sleep(0.05)  # the name is about to be forgotten, and cannot be kept
            claiming = asyncio.create_task(giving.claim("acme/a", "acme"))
            await asyncio.sleep(0.01)
        await claiming
        await asyncio.sleep(0.05)
        assert registry.state.owners["acme/a"] == "acme"
        giving.release("acme/a")
        await until(lambda: "acme/a" not in registry.state.owners)
        await giving.close()
        registry.close()

    monkeypatch.setattr(handover, "UNLIST_S", 0.01)
    asyncio.run(story())

"""What becomes of jobs that are cancelled, paused, interrupted, and how their processes are run."""

import asyncio
import os
import signal
import sqlite3
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

import fake_trainer
from lory_router.errors import JobsUnwritable
from lory_router.keys import Caller
from lory_router.registry import Registry
from lory_router.tuning import runner as runner_module
from lory_router.tuning.shapes import CreateJob
from lory_router.tuning.store import TuningStore, TuningStoreError
from scripted_engine import BASE
from tuning_world import (
    CHAT,
    FILES,
    JOBS,
    WAIT_S,
    AbsentEngine,
    ServingEngine,
    World,
    name_of,
    run,
    settings_in,
    unserved,
    until,
    until_made,
    world,
)

# -- an engine that is not there yet --------------------------------------------------------


class LoadingEngine(ServingEngine):
    """Until told that it is up."""

    is_up = False

    def __init__(self) -> None:
        super().__init__(info=None)

    def is_ready(self) -> bool:
        return type(self).is_up


def test_files_and_jobs_are_taken_while_the_engine_loads_and_wait_for_it(
    tmp_path: Path, monkeypatch
):
    """The engine takes its memory first, and then it is seen what is left for a job."""

    async def story(world: World) -> None:
        job, unwanted = await world.create(), await world.create()
        for path in (FILES, JOBS, f"{JOBS}/{job['id']}/checkpoints"):
            assert (await world.client.get(path)).status_code == 200
        await world.until(job["id"], "queued")
        async with asyncio.timeout(WAIT_S):
            while (await world.events(job["id"]))[-1] != runner_module.LOADING:
                await asyncio.sleep(0.02)
        reply = await world.client.post(f"{JOBS}/{unwanted['id']}/cancel")
        assert reply.json()["status"] == "cancelled"
        assert list(world.settings.runs.iterdir()) == []
        LoadingEngine.is_up = True
        await world.until(job["id"], "succeeded")
        assert (await world.events(job["id"])).count(runner_module.LOADING) == 1

    monkeypatch.setattr(LoadingEngine, "is_up", False)
    monkeypatch.setattr(runner_module, "RETRY_S", 0.05)
    run(tmp_path, story, engine=LoadingEngine)


class DrainingEngine(ServingEngine):
    def __init__(self) -> None:
        super().__init__(draining=True)


def test_a_server_that_stops_takes_no_job(tmp_path: Path):
    async def story(world: World) -> None:
        body = {"model": BASE, "training_file": await world.upload(CHAT)}
        assert (await world.client.post(JOBS, json=body)).status_code == 503

    run(tmp_path, story, engine=DrainingEngine)


def test_a_made_adapter_that_waits_for_the_engine_says_so(tmp_path: Path, monkeypatch):
    async def story(world: World) -> None:
        job = await world.create()
        async with asyncio.timeout(WAIT_S):
            while (await world.events(job["id"]))[-1] != runner_module.HANDING_OVER:
                await asyncio.sleep(0.02)

    monkeypatch.setattr(runner_module, "SOON_S", 0.05)
    run(tmp_path, story, engine=AbsentEngine)


def test_a_database_that_cannot_be_written_is_not_the_adapters_fault(tmp_path: Path, monkeypatch):
    """The note that the adapter waits is refused the first time."""

    async def story(world: World) -> None:
        put, refused = world.tuning._store.put, []

        async def full(*records: Any) -> None:
            if not refused and getattr(records[0], "message", "") == runner_module.HANDING_OVER:
                refused.append(records)
                raise JobsUnwritable("the disk is full")
            await put(*records)

        monkeypatch.setattr(world.tuning._store, "put", full)
        job = await world.create()
        async with asyncio.timeout(WAIT_S):
            while (await world.events(job["id"]))[-1] != runner_module.HANDING_OVER:
                await asyncio.sleep(0.02)
        assert refused
        assert (await world.job(job["id"]))["status"] == "running"

    monkeypatch.setattr(runner_module, "SOON_S", 0.05)
    monkeypatch.setattr(runner_module, "RETRY_S", 0.05)
    run(tmp_path, story, engine=AbsentEngine)


# -- cancel, pause, restart -----------------------------------------------------------------


@pytest.mark.parametrize("seed", [fake_trainer.SLOW, fake_trainer.DEAF])
def test_a_running_job_is_cancelled_and_makes_nothing(tmp_path: Path, seed: int):
    async def story(world: World) -> None:
        job = await world.create(seed=seed)
        await world.until_step(job["id"])
        reply = await world.client.post(f"{JOBS}/{job['id']}/cancel")
        assert (reply.status_code, reply.json()["status"]) == (200, "cancelled")
        assert reply.json()["fine_tuned_model"] is None
        assert not (world.settings.adapters / name_of(job)).exists()
        assert [path for path in (world.settings.runs / job["id"]).iterdir() if path.is_dir()] == []
        told = await world.events(job["id"])
        assert told.count("Fine-tuning job cancelled") == 1
        assert len(await world.events(job["id"], "metrics")) < fake_trainer.NUM_STEPS
        again = await world.client.post(f"{JOBS}/{job['id']}/cancel")
        assert again.status_code == 409

    run(tmp_path, story, stop_grace_s=30.0)  # nobody needs the checkpoint that it would write


@pytest.mark.parametrize(("deed", "status"), [("cancel", "cancelled"), ("pause", "paused")])
def test_a_job_that_waits_for_the_engine_is_still_heard(tmp_path: Path, deed: str, status: str):
    async def story(world: World) -> None:
        job = await world.create()
        made = await until_made(world, job)
        assert (await world.client.post(f"{JOBS}/{job['id']}/{deed}")).status_code == 200
        assert (await world.until(job["id"], status, "succeeded"))["status"] == status
        assert made.exists() == (status == "paused")
        assert (await world.client.post(f"{JOBS}/{job['id']}/{deed}")).status_code == 409

    run(tmp_path, story, engine=AbsentEngine)


@pytest.mark.parametrize("seed", [fake_trainer.DEAF, 1])
def test_a_server_stops_though_a_new_adapter_waits_for_the_engine(tmp_path: Path, seed: int):
    """Whether it was made before the server was told to stop, or after."""
    job: dict[str, Any] = {}

    async def begin(world: World) -> None:
        job.update(await world.create(seed=seed))
        await (until_made(world, job) if seed == 1 else world.until_step(job["id"]))

    async def within_time() -> None:
        async with asyncio.timeout(WAIT_S), world(tmp_path, engine=AbsentEngine) as found:
            await begin(found)

    async def go_on(world: World) -> None:
        done = await world.until(job["id"], "succeeded", "failed")
        assert done["fine_tuned_model"] == name_of(job)

    asyncio.run(within_time())
    run(tmp_path, go_on)


def test_a_job_is_not_begun_by_a_server_that_stops(tmp_path: Path):
    async def story() -> None:
        registry = Registry()
        tuning = unserved(tmp_path, registry)
        caller = Caller("root", is_admin=True)
        file = await tuning._files.write("root", "rows.jsonl", "fine-tune", b"{}")
        await tuning._store.put(file)
        job = await tuning.create(caller, CreateJob(model=BASE, training_file=file.id))
        await tuning._store.change(job.id, lambda job: replace(job, status="queued"))
        next_job = tuning._store.next_job

        async def told_to_stop() -> Any:
            found = await next_job()
            tuning.stop()
            return found

        tuning._store.next_job = told_to_stop
        await tuning.run()
        assert (await tuning.job(caller, job.id)).status == "queued"
        tuning.close()
        registry.close()

    asyncio.run(story())


def test_a_job_that_is_paused_as_it_begins_is_paused(tmp_path: Path):
    """Nothing is done to it, and nothing said of it, that was not asked for."""

    async def story(world: World) -> None:
        next_job, held = world.tuning._store.next_job, asyncio.Event()

        async def slowly() -> Any:
            found = await next_job()
            if found is not None:
                held.set()
                await asyncio.sleep(0.1)
            return found

        world.tuning._store.next_job = slowly
        job = await world.create()
        await held.wait()
        assert (await world.client.post(f"{JOBS}/{job['id']}/pause")).json()["status"] == "paused"
        await asyncio.sleep(0.3)
        assert (await world.job(job["id"]))["status"] == "paused"
        assert await world.events(job["id"]) == [
            f"Created fine-tuning job: {job['id']}",
            "Files validated, moving job to queued state",
            "Fine-tuning job paused",
        ]

    run(tmp_path, story)


def test_jobs_go_on_after_a_database_that_could_not_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    async def story(world: World) -> None:
        job = await world.create(seed=fake_trainer.SLOW)
        await world.until_step(job["id"])
        await query_only(world, "ON")
        reply = await world.client.post(JOBS, json={"model": BASE, "training_file": "file-x"})
        assert reply.status_code == 500
        assert "database of jobs" in reply.json()["error"]["message"]
        async with asyncio.timeout(WAIT_S):
            while "fine-tuning goes on" not in caplog.text:
                await asyncio.sleep(0.05)
        await query_only(world, "OFF")
        assert (await world.until(job["id"], "succeeded", "failed"))["status"] == "succeeded"

    run(tmp_path, story)


async def query_only(world: World, value: str) -> None:
    """What a full disk does, as far as statements go."""
    await asyncio.to_thread(world.tuning._store._connection.execute, f"PRAGMA query_only = {value}")


def test_a_waiting_job_is_cancelled_at_once_and_never_runs(tmp_path: Path):
    async def story(world: World) -> None:
        first = await world.create(seed=fake_trainer.SLOW)
        second = await world.create()
        reply = (await world.client.post(f"{JOBS}/{second['id']}/cancel")).json()
        assert reply["status"] == "cancelled"
        assert reply["finished_at"] is not None
        await world.until(first["id"], "succeeded")
        assert (await world.job(second["id"]))["status"] == "cancelled"

    run(tmp_path, story)


def test_a_paused_job_goes_on_from_its_checkpoint(tmp_path: Path):
    async def story(world: World) -> None:
        job = await world.create(seed=fake_trainer.SLOW)
        await world.until_step(job["id"])
        await world.client.post(f"{JOBS}/{job['id']}/pause")
        await world.until(job["id"], "paused")
        before = len(await world.events(job["id"], "metrics"))
        other = await world.create()
        await world.until(other["id"], "succeeded")
        assert (await world.client.post(f"{JOBS}/{job['id']}/resume")).status_code == 200
        await world.until(job["id"], "succeeded")
        steps = await world.events(job["id"], "metrics")
        assert 0 < before < len(steps) == fake_trainer.NUM_STEPS
        assert (await world.client.post(f"{JOBS}/{job['id']}/resume")).status_code == 409

    run(tmp_path, story)


def test_a_job_outlives_its_server(tmp_path: Path):
    job: dict[str, Any] = {}

    async def begin(world: World) -> None:
        job.update(await world.create(seed=fake_trainer.SLOW))
        await world.until_step(job["id"])

    async def go_on(world: World) -> None:
        done = await world.until(job["id"], "succeeded", "failed")
        assert done["status"] == "succeeded"
        assert len(await world.events(job["id"], "metrics")) == fake_trainer.NUM_STEPS

    run(tmp_path, begin)
    run(tmp_path, go_on)


def test_a_job_whose_server_was_killed_goes_on(tmp_path: Path):
    """Even one that had made its adapter, and was killed before it could say so."""

    async def begin(world: World) -> None:
        for _ in range(2):
            job = await world.create()
            ids.append(job["id"])
            names.append((await world.until(job["id"], "succeeded"))["fine_tuned_model"])

    async def go_on(world: World) -> None:
        for job_id in ids:
            assert (await world.until(job_id, "succeeded", "failed"))["status"] == "succeeded"

    ids: list[str] = []
    names: list[str] = []
    run(tmp_path, begin)
    with sqlite3.connect(tmp_path / "tuning" / "jobs.sqlite") as db:
        db.execute("UPDATE jobs SET status = 'running', finished_at = 0")
    made = tmp_path / "adapters" / names[1]
    made.rename(tmp_path / "lost")
    run(tmp_path, go_on)
    assert made.is_dir()


def served_by_a_child(folder: Path, *, is_busy: bool) -> int:
    """A server of its own, of which nothing is waited for; if it is busy, its jobs are held."""
    child = os.fork()
    if child:
        return child

    async def forever(world: World) -> None:
        if is_busy:
            world.serving.set()
        await asyncio.sleep(WAIT_S)

    try:
        run(folder, forever, share=0.0)
    finally:
        os._exit(1)


def is_left_of(folder: Path) -> bool:
    """A run's process, stopped or not."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if f"{folder}/tuning/runs" in path.read_text():
                return True
    return False


@pytest.mark.parametrize("is_busy", [False, True])
@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.full)])
def test_kill_9_of_the_server_loses_no_job_and_shows_no_half_adapter(
    tmp_path: Path, kills: int, is_busy: bool
):
    job: dict[str, Any] = {}

    async def begin(world: World) -> None:
        job.update(await world.create(seed=fake_trainer.SLOW))

    async def go_on(world: World) -> None:
        done = await world.until(job["id"], "succeeded", "failed")
        assert (done["status"], done["fine_tuned_model"]) == ("succeeded", name_of(job))

    run(tmp_path, begin)
    moments = Random(kills)
    for _ in range(kills):
        child = served_by_a_child(tmp_path, is_busy=is_busy)
        time.sleep(moments.uniform(0.05, 0.9))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        asyncio.run(until(lambda: not is_left_of(tmp_path)))
        for adapter in (tmp_path / "adapters").glob("ft-*"):
            assert {path.name for path in adapter.iterdir()} == set(fake_trainer.FILES)
    run(tmp_path, go_on)


def test_a_database_is_one_servers(tmp_path: Path):
    settings = settings_in(tmp_path)
    settings.folder.mkdir()
    store = TuningStore(settings.database)
    with pytest.raises(TuningStoreError, match="another server uses it"):
        TuningStore(settings.database)
    store.close()
    settings.database.write_bytes(b"nonsense" * 100)
    with pytest.raises(TuningStoreError, match="is damaged"):
        TuningStore(settings.database)


def test_a_database_of_schema_1_is_brought_up_and_keeps_its_jobs(tmp_path: Path):
    job: dict[str, Any] = {}

    async def begin(world: World) -> None:
        job.update(await world.create())
        await world.until(job["id"], "succeeded")

    async def still_there(world: World) -> None:
        found = await world.job(job["id"])
        assert found["status"] == "succeeded"
        assert found["usage"]["held_seconds"] == 0.0
        await world.until((await world.create())["id"], "succeeded")

    run(tmp_path, begin)
    with sqlite3.connect(tmp_path / "tuning" / "jobs.sqlite") as db:
        for name in ("held_seconds", "charged_seconds", "cost"):
            db.execute(f"ALTER TABLE jobs DROP COLUMN {name}")
        db.execute("PRAGMA user_version = 1")
    run(tmp_path, still_there)

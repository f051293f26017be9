"""What stays of jobs that are over, and what files may take: bounded, told by name, nothing lost
that runs or answers."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from lory_router.keys import Caller
from lory_router.tuning.news import message_event
from lory_router.tuning.records import FileRecord, JobRecord
from lory_router.tuning.retention import SECONDS_PER_DAY, Retention
from lory_router.tuning.settings import TuningSettings
from lory_router.tuning.shapes import CreateJob
from lory_router.tuning.store import TuningStore
from lory_router.tuning.wishes import read_wish
from scripted_engine import BASE
from tuning_world import CHAT, FILES, JOBS, World, key, name_of, run, settings_in

NOW = 100 * SECONDS_PER_DAY

# -- jobs -----------------------------------------------------------------------------------


class Shelf:
    """A database of jobs that are over, with what belongs to each."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.settings: TuningSettings = settings_in(folder, **changes)
        for path in (self.settings.files, self.settings.runs):
            path.mkdir(parents=True)
        self.store = TuningStore(self.settings.database)
        self.retention = Retention(self.store, self.settings)

    async def put(self, tenant: str, age_s: int, status: str = "succeeded") -> str:
        wish = CreateJob(model=BASE, training_file="file-sent")
        job = read_wish(wish, Caller(tenant), (BASE,))
        is_over = status != "paused"
        job = replace(
            job,
            **{"status": status, "finished_at": NOW - age_s if is_over else 0},
            result_file=f"file-of-{job.id}",
        )
        table = FileRecord(job.result_file, tenant, "t.csv", "fine-tune-results", 1, NOW - age_s)
        await self.store.put(job, table, message_event(job.id, "said"))
        self.settings.file(job.result_file).write_bytes(b"x")
        state = self.settings.runs / job.id / "checkpoints"
        state.mkdir(parents=True)
        (state.parent / "log").write_text("said")
        return job.id

    async def sweep(self) -> list[str]:
        """Which jobs are left, oldest first; of the others nothing is."""
        before = {job.id: job for job in await self.store.jobs()}
        await self.retention.sweep(NOW)
        left = [job.id for job in await self.store.jobs()][::-1]
        for gone in before.keys() - set(left):
            assert await self.store.events(gone, "", 9) == []
            assert await self.store.file(before[gone].result_file) is None
            assert not self.settings.file(before[gone].result_file).exists()
            assert not (self.settings.runs / gone).exists()
        for kept in left:
            assert len(await self.store.events(kept, "", 9) or ()) == 1
            assert self.settings.file(before[kept].result_file).exists()
            assert (self.settings.runs / kept / "log").exists()
        return left


def test_of_each_tenant_the_newest_jobs_stay(tmp_path: Path):
    async def story() -> None:
        shelf = Shelf(tmp_path, keep_jobs=2)
        sent = shelf.settings.file("file-sent")
        sent.write_bytes(b"{}")
        await shelf.put("acme", 900)
        kept = [await shelf.put("other", 999, "failed")]
        await shelf.put("acme", 800, "cancelled")
        kept += [await shelf.put("acme", 700), await shelf.put("acme", 600)]
        kept.append(await shelf.put("acme", 950, "paused"))
        assert await shelf.sweep() == kept
        assert await shelf.sweep() == kept
        assert sent.exists()
        shelf.store.close()

    asyncio.run(story())


def test_none_stays_longer_than_so_many_days(tmp_path: Path):
    async def story() -> None:
        shelf = Shelf(tmp_path, keep_days=2)
        await shelf.put("acme", 2 * SECONDS_PER_DAY + 1)
        kept = [await shelf.put("acme", 2 * SECONDS_PER_DAY - 1)]
        kept.append(await shelf.put("acme", 3 * SECONDS_PER_DAY, "paused"))
        assert await shelf.sweep() == kept
        shelf.store.close()

    asyncio.run(story())


def test_what_has_just_ended_stays_for_who_waits_for_it(tmp_path: Path):
    async def story() -> None:
        shelf = Shelf(tmp_path, keep_jobs=1)
        kept = [await shelf.put("acme", age_s) for age_s in (50, 40, 30)]
        assert await shelf.sweep() == kept
        shelf.store.close()

    asyncio.run(story())


def test_of_failed_runs_the_newest_keeps_the_state_it_could_go_on_from(tmp_path: Path):
    async def story() -> None:
        shelf = Shelf(tmp_path)
        ids = [await shelf.put("acme", age_s, "failed") for age_s in (300, 200)]
        ids.append(await shelf.put("other", 400, "failed"))
        assert await shelf.sweep() == ids
        states = [(shelf.settings.runs / one / "checkpoints").exists() for one in ids]
        assert states == [False, True, True]
        shelf.store.close()

    asyncio.run(story())


def test_a_folder_that_cannot_be_removed_keeps_its_job(tmp_path: Path, monkeypatch):
    def deny(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    async def story() -> None:
        shelf = Shelf(tmp_path, keep_jobs=1)
        ids = [await shelf.put("acme", age_s) for age_s in (300, 200)]
        monkeypatch.setattr("lory_router.tuning.retention.shutil.rmtree", deny)
        assert await shelf.sweep() == ids
        monkeypatch.undo()
        assert await shelf.sweep() == ids[1:]
        shelf.store.close()

    asyncio.run(story())


def test_a_job_that_is_forgotten_leaves_its_adapter_and_the_files_it_was_sent(tmp_path: Path):
    async def story(world: World) -> None:
        old, new = await world.create(), await world.create()
        for job in (old, new):
            await world.until(job["id"], "succeeded")
        [table] = (await world.job(old["id"]))["result_files"]
        await world.tuning._retention.sweep(time.time() + 120)
        for path in ("", "/events", "/checkpoints"):
            assert (await world.client.get(f"{JOBS}/{old['id']}{path}")).status_code == 404
            assert (await world.client.get(f"{JOBS}/{new['id']}{path}")).status_code == 200
        assert (await world.client.get(f"{FILES}/{table}")).status_code == 404
        assert (await world.client.get(f"{FILES}/{old['training_file']}")).status_code == 200
        names = [name_of(old), f"{name_of(old)}-step-4"]
        assert all((world.settings.adapters / name).is_dir() for name in names)

    run(tmp_path, story, keep_jobs=1)


def test_a_server_sweeps_as_it_starts(tmp_path: Path):
    job: list[JobRecord] = []

    async def begin(world: World) -> None:
        made = await world.create()
        await world.until(made["id"], "succeeded")
        long_ago = await world.tuning._store.change(
            made["id"], lambda job: replace(job, finished_at=1)
        )
        job.append(long_ago)

    async def look(world: World) -> None:
        async with asyncio.timeout(10):
            while (await world.client.get(f"{JOBS}/{job[0].id}")).status_code != 404:
                await asyncio.sleep(0.02)

    run(tmp_path, begin)
    run(tmp_path, look, keep_days=1)


# -- files ----------------------------------------------------------------------------------


def test_a_budget_that_is_used_up_is_named_and_tells_nothing_of_others(tmp_path: Path):
    async def refusal(world: World, size: int) -> dict[str, Any]:
        reply = await world.send(b"{" * size)
        assert reply.status_code == 507
        return reply.json()["error"]

    async def story(world: World) -> None:
        world.client.headers.update(key("of-acme"))
        assert (await world.send(b"{" * 700)).status_code == 200
        error = await refusal(world, 400)
        assert error["message"] == (
            "The files of tenant acme may take 1000 bytes together (--tenant-tuning-files) and"
            " take 700; delete some that are not needed: DELETE /v1/files/{id}"
        )
        assert (error["code"], error["param"]) == ("disk_full", "file")
        world.client.headers.update(key("of-other"))
        message = (await refusal(world, 900))["message"]
        assert message.startswith("The files of all may take 1500 bytes together (--tuning-files)")
        assert "700" not in message

    run(tmp_path, story, max_files_bytes_per_tenant=1000, max_files_bytes=1500)


PURPOSES = ("assistants", "batch", "fine-tune-results", "vision", "user_data", "evals", "x" * 300)


@pytest.mark.parametrize("purpose", PURPOSES)
def test_a_purpose_that_is_not_served_is_refused_by_name(tmp_path: Path, purpose: str):
    async def story(world: World) -> None:
        error = (await world.send(b"{}\n", purpose=purpose)).json()["error"]
        assert error["param"] == "purpose"
        assert list(world.settings.files.iterdir()) == []

    run(tmp_path, story)


async def sent_without_a_name(world: World, text: bytes) -> httpx.Response:
    """As `curl -F file=TEXT` does."""
    form = {"purpose": (None, b"fine-tune"), "file": (None, text)}
    return await world.client.post(FILES, files=form)


def test_a_path_sent_in_place_of_its_file_is_refused_with_the_at_that_is_missing(tmp_path: Path):
    async def story(world: World) -> None:
        reply = await sent_without_a_name(world, b"rows.jsonl")
        error = reply.json()["error"]
        assert (reply.status_code, error["param"]) == (400, "file")
        assert error["message"] == (
            "`file`: is the text 'rows.jsonl' and no file; curl sends a file's content only with"
            " an @ before its name: -F file=@rows.jsonl"
        )
        assert (await sent_without_a_name(world, b'{"messages": []}')).status_code == 200

    run(tmp_path, story)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"prompt,completion\na,b\n", "begins with 'prompt,completion\\na,b\\n'"),
        (b"[1]", "begins with '[1]'; give JSON lines"),
        (b"PAR1\x00\x15", "begins with 'PAR1"),
        (b"\xff\xfe{\x00", "begins with"),
        (b"\n\n \n", "holds no rows"),
        (b"\xef\xbb\xbf\n", "holds no rows"),
    ],
)
def test_what_cannot_be_json_lines_is_refused_as_it_is_sent(
    tmp_path: Path, content: bytes, says: str
):
    async def story(world: World) -> None:
        reply = await world.send(content, name="rows.csv")
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "file")
        assert says in reply.json()["error"]["message"]
        assert list(world.settings.files.iterdir()) == []

    run(tmp_path, story)


@pytest.mark.parametrize("before", [b"\xef\xbb\xbf", b"\n" * 200_000, b" \t\r\n"])
def test_rows_may_come_after_blanks_and_a_mark(tmp_path: Path, before: bytes):
    async def story(world: World) -> None:
        assert (await world.send(before + b'{"messages": []}\n')).status_code == 200

    run(tmp_path, story)


# -- what may have been meant ---------------------------------------------------------------


def test_an_id_that_is_mistyped_or_cut_off_is_told_to_who_may_see_it(tmp_path: Path):
    async def story(world: World) -> None:
        world.client.headers.update(key("of-acme"))
        file_id = await world.upload(CHAT)
        job = await world.create(training_file=file_id)
        ids = {JOBS: job["id"], FILES: file_id}
        for route, known in ids.items():
            swapped = known[:-2] + known[-1] + known[-2]
            for wrong in {known[:18], known + "x", swapped} - {known}:
                reply = await world.client.get(f"{route}/{wrong}")
                message = reply.json()["error"]["message"]
                assert reply.status_code == 404
                assert message.endswith(f"'{wrong}'; did you mean '{known}'?")
        body = {"model": BASE, "training_file": file_id[:18]}
        error = (await world.client.post(JOBS, json=body)).json()["error"]
        assert error["message"] == (
            f"`training_file`: no such file: '{file_id[:18]}'; did you mean '{file_id}'?"
        )
        world.client.headers.update(key("of-other"))
        for route, known in ids.items():
            for wrong in (known, known[:18]):
                message = (await world.client.get(f"{route}/{wrong}")).json()["error"]["message"]
                assert message.endswith(f"'{wrong}'")

    run(tmp_path, story)

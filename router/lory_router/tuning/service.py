"""What callers can do with files and jobs, each seeing its own tenant's, and admins all.

It must not know HTTP.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from lory_router.errors import Conflict, Invalid, NotFound, Overloaded, shown
from lory_router.keys import Caller
from lory_router.tuning.handover import Handover
from lory_router.tuning.kept_files import KeptFiles, meant, sees
from lory_router.tuning.meter import Meter
from lory_router.tuning.news import message_event
from lory_router.tuning.records import (
    CheckpointRecord,
    EventRecord,
    FileRecord,
    JobRecord,
    JobStatus,
)
from lory_router.tuning.retention import Retention
from lory_router.tuning.runner import MESSAGES, JobRunner, Wish
from lory_router.tuning.settings import TuningSettings
from lory_router.tuning.shapes import CreateJob
from lory_router.tuning.store import TuningStore
from lory_router.tuning.validator import Validator
from lory_router.tuning.wishes import read_wish

MAX_LIMIT = 100
MAX_FILES_LIMIT = 10_000
FOLLOW_S = 0.5
"""Until a stream of events looks for more."""
SILENCE_S = 15.0
STOP_WAIT_S = 20.0
"""How long who cancels or pauses a job waits for it to have stopped."""
TRY_S, NUM_TRIES = 0.1, 30

R = TypeVar("R", FileRecord, JobRecord, EventRecord, CheckpointRecord)
WAITING: tuple[JobStatus, ...] = ("validating_files", "queued")


class Tuning:
    def __init__(
        self,
        settings: TuningSettings,
        environment: Mapping[str, str],
        handover: Handover,
        meter: Meter,
        serving: asyncio.Event,
    ) -> None:
        """Opens its folder; raises OSError or TuningStoreError. `serving` is set while requests
        run."""
        for folder in (settings.files, settings.runs):
            folder.mkdir(parents=True, exist_ok=True)
        self.settings = settings
        self.meter = meter
        self._handover = handover
        self._store = TuningStore(settings.database)
        self._files = KeptFiles(self._store, settings)
        self._files.sweep()
        self._runner = JobRunner(
            self._store, self._files, settings, environment, handover, meter, serving
        )
        self._retention = Retention(self._store, settings)
        self._validator = Validator(self._store, settings, self._runner.wake)
        self._lock = asyncio.Lock()
        """Held while it is seen whether a job may be made, or a file deleted, and that is done."""
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Do jobs until stopped."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._validator.run())
            group.create_task(self._runner.run())
            group.create_task(self._retention.run())
        await self._handover.close()

    def stop(self) -> None:
        self._stopping.set()
        self._validator.stop()
        self._retention.stop()
        self._runner.stop()

    def close(self) -> None:
        self._store.close()

    # -- files ------------------------------------------------------------------------------

    async def take_file(
        self, caller: Caller, boundary: bytes, body: AsyncIterator[bytes]
    ) -> FileRecord:
        return await self._files.take(caller.tenant, boundary, body)

    async def file(self, caller: Caller, file_id: str) -> FileRecord:
        return await self._files.find(caller, file_id)

    async def file_place(self, caller: Caller, file_id: str) -> tuple[FileRecord, Path]:
        """A file, and where its bytes are."""
        record = await self._files.find(caller, file_id)
        path = self._files.path(record)
        if not await asyncio.to_thread(path.is_file):
            raise NotFound(f"No such file: {shown(file_id)}")
        return record, path

    async def list_files(
        self, caller: Caller, purpose: str, after: str, limit: int, *, oldest_first: bool
    ) -> tuple[list[FileRecord], bool]:
        found = [one for one in await self._store.files() if sees(caller, one.tenant)]
        if purpose:
            found = [one for one in found if one.purpose == purpose]
        return _page(found[::-1] if oldest_first else found, after, limit)

    async def delete_file(self, caller: Caller, file_id: str) -> None:
        async with self._lock:
            record = await self._files.find(caller, file_id)
            for job in await self._store.jobs():
                if job.is_open and file_id in (job.training_file, job.validation_file):
                    raise Conflict(f"The job {job.id} needs this file; cancel it first")
            await self._files.forget(record)

    # -- jobs -------------------------------------------------------------------------------

    async def create(self, caller: Caller, wish: CreateJob) -> JobRecord:
        job = read_wish(wish, caller, self.settings.model_names)
        self._handover.check_owner(job.owner)
        note = message_event(job.id, f"Created fine-tuning job: {job.id}")
        async with self._lock:
            for param in ("training_file", "validation_file"):
                if (file_id := getattr(wish, param)) is not None:
                    record = await self._files.find(caller, file_id, param)
                    if record.purpose != "fine-tune":
                        raise Invalid(f"`{param}`: is no file to train on", param=param)
            await self._check_room(caller.tenant)
            await self._store.put(job, note)
        self._validator.wake()
        return job

    async def _check_room(self, tenant: str) -> None:
        most = self.settings.max_jobs_per_tenant
        if most and await self._store.num_open(tenant) >= most:
            raise Overloaded(f"{most} jobs of {tenant} wait already; cancel some, or come back")
        if await self._store.num_open() >= self.settings.max_jobs:
            raise Overloaded("Too many jobs wait already; cancel some, or come back later")

    async def job(self, caller: Caller, job_id: str) -> JobRecord:
        job = await self._store.job(job_id)
        if job is None or not sees(caller, job.tenant):
            ids = [one.id for one in await self._store.jobs() if sees(caller, one.tenant)]
            message = f"No such fine-tuning job: {shown(job_id)}{await meant(job_id, ids)}"
            raise NotFound(message)
        return job

    async def list_jobs(
        self, caller: Caller, metadata: Mapping[str, str] | None, after: str, limit: int
    ) -> tuple[list[JobRecord], bool]:
        """Newest first, those that have this metadata; None: those that have none."""
        found = [job for job in await self._store.jobs() if sees(caller, job.tenant)]
        if metadata is None:
            found = [job for job in found if not job.labels]
        else:
            found = [job for job in found if metadata.items() <= job.labels.items()]
        return _page(found, after, limit)

    async def events(
        self, caller: Caller, job_id: str, after: str, limit: int
    ) -> tuple[list[EventRecord], bool]:
        await self.job(caller, job_id)
        found = await self._store.events(job_id, after, limit + 1)
        if found is None:
            raise _no_such_entry(after)
        return found[:limit], len(found) > limit

    async def follow(self, caller: Caller, job_id: str) -> AsyncGenerator[EventRecord | None, None]:
        """Every event, oldest first, as they come, until the job is over or the server stops; None
        where nothing has been said for a while."""
        number, told_at = 0, time.monotonic()
        while not self._stopping.is_set():
            job = await self.job(caller, job_id)  # before its events: what is over has said all
            while news := await self._store.events_since(job_id, number, MAX_LIMIT):
                for number, event in news:  # noqa: B007 - where the next look begins
                    yield event
                told_at = time.monotonic()
            if not job.is_open:
                return
            if time.monotonic() - told_at > SILENCE_S:
                told_at = time.monotonic()
                yield None
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), FOLLOW_S)

    async def checkpoints(
        self, caller: Caller, job_id: str, after: str, limit: int
    ) -> tuple[list[CheckpointRecord], bool]:
        await self.job(caller, job_id)
        return _page(await self._store.checkpoints(job_id), after, limit)

    async def cancel(self, caller: Caller, job_id: str) -> JobRecord:
        return await self._ask(caller, job_id, "cancel", "cancelled", (*WAITING, "paused"))

    async def pause(self, caller: Caller, job_id: str) -> JobRecord:
        return await self._ask(caller, job_id, "pause", "paused", WAITING)

    async def resume(self, caller: Caller, job_id: str) -> JobRecord:
        """What never ran is looked at again."""
        before = await self.job(caller, job_id)
        status: JobStatus = "queued" if before.trained_seconds else "validating_files"
        note = message_event(job_id, "Fine-tuning job resumed")
        job, was = await self._change(job_id, ("paused",), status, note)
        if was != "paused":
            raise Conflict(f"The job {job_id} is {was}, not paused")
        self._validator.wake()
        self._runner.wake()
        return job

    async def _ask(
        self,
        caller: Caller,
        job_id: str,
        wish: Wish,
        status: JobStatus,
        waiting: Sequence[JobStatus],
    ) -> JobRecord:
        """The job afterwards: of one that waits at once; of one that runs as soon as it has
        stopped, or as it is when that takes too long to wait for."""
        await self.job(caller, job_id)
        for _ in range(NUM_TRIES):  # between the queue and the runner a job is neither's
            over = self._runner.wish(job_id, wish)
            if over is not None:
                return await self._stopped(caller, job_id, over, status)
            note = message_event(job_id, MESSAGES[status])
            job, was = await self._change(job_id, waiting, status, note)
            if was in waiting:
                await self._runner.clear_away(job)
                return job
            if was != "running":
                raise Conflict(f"The job {job_id} is {was}; it cannot be {status}")
            await asyncio.sleep(TRY_S)
        raise Conflict(f"The job {job_id} is about to run; try again")

    async def _stopped(
        self, caller: Caller, job_id: str, over: asyncio.Event, status: JobStatus
    ) -> JobRecord:
        with suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), STOP_WAIT_S)
        job = await self.job(caller, job_id)
        if job.is_open or job.status == status:
            return job
        raise Conflict(f"The job {job_id} is {job.status}; it cannot be {status}")

    async def _change(
        self, job_id: str, before: Sequence[JobStatus], status: JobStatus, note: EventRecord
    ) -> tuple[JobRecord, JobStatus]:
        """The job afterwards, and what it was."""
        was: JobStatus = status

        def change(job: JobRecord) -> JobRecord:
            nonlocal was
            was = job.status
            if was not in before:
                return job
            finished_at = int(time.time()) if status == "cancelled" else 0
            return replace(job, status=status, finished_at=finished_at)

        return await self._store.change(job_id, change, note), was


def _no_such_entry(after: str) -> Invalid:
    return Invalid(f"`after`: no such entry: {shown(after)}", param="after")


def _page(found: list[R], after: str, limit: int) -> tuple[list[R], bool]:
    """What comes behind `after`, and whether there is more."""
    start = 0
    if after:
        places = [place for place, one in enumerate(found) if one.id == after]
        if not places:
            raise _no_such_entry(after)
        start = places[0] + 1
    return found[start : start + limit], len(found) > start + limit

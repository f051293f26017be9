"""What callers can do with files and jobs, each seeing its own tenant's, and admins all.

It must not know HTTP.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from lory_router.errors import Conflict, Invalid, NotFound, Overloaded, shown
from lory_router.keys import Caller
from lory_router.tuning.handover import Handover
from lory_router.tuning.kept_files import KeptFiles, sees
from lory_router.tuning.meter import Meter
from lory_router.tuning.records import (
    CheckpointRecord,
    EventRecord,
    FileRecord,
    JobRecord,
    JobStatus,
    new_id,
)
from lory_router.tuning.runner import MESSAGES, JobRunner, Wish
from lory_router.tuning.settings import TuningSettings
from lory_router.tuning.shapes import CreateJob
from lory_router.tuning.store import TuningStore
from lory_router.tuning.wishes import read_wish

MAX_LIMIT = 100
MAX_FILES_LIMIT = 10_000

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
        for leftover in settings.files.glob(".*.part"):
            leftover.unlink(missing_ok=True)
        self._files = KeptFiles(self._store, settings)
        self._runner = JobRunner(
            self._store, self._files, settings, environment, handover, meter, serving
        )

    async def run(self) -> None:
        """Do jobs until stopped."""
        await self._runner.run()

    def stop(self) -> None:
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

    async def file_content(self, caller: Caller, file_id: str) -> tuple[FileRecord, bytes]:
        record = await self._files.find(caller, file_id)
        return record, await asyncio.to_thread(self._files.path(record).read_bytes)

    async def list_files(
        self, caller: Caller, purpose: str, after: str, limit: int, *, oldest_first: bool
    ) -> tuple[list[FileRecord], bool]:
        found = [one for one in await self._store.files() if sees(caller, one.tenant)]
        if purpose:
            found = [one for one in found if one.purpose == purpose]
        return _page(found[::-1] if oldest_first else found, after, limit)

    async def delete_file(self, caller: Caller, file_id: str) -> None:
        record = await self._files.find(caller, file_id)
        for job in await self._store.jobs():
            if job.is_open and file_id in (job.training_file, job.validation_file):
                raise Conflict(f"The job {job.id} needs this file; cancel it first")
        await self._files.forget(record)

    # -- jobs -------------------------------------------------------------------------------

    async def create(self, caller: Caller, wish: CreateJob) -> JobRecord:
        job = read_wish(wish, caller, self.settings.model_names)
        self._handover.check_owner(job.owner)
        for param in ("training_file", "validation_file"):
            if file_id := getattr(job, param):
                record = await self._files.find(caller, file_id, param)
                if record.purpose != "fine-tune":
                    raise Invalid(f"`{param}`: is no file to train on", param=param)
        await self._check_room(caller.tenant)
        note = EventRecord(
            new_id("ftevent"),
            job.id,
            job.created_at,
            "info",
            "message",
            f"Created fine-tuning job: {job.id}",
            "{}",
        )
        await self._store.put(job, note)
        self._runner.wake()
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
            raise NotFound(f"No such fine-tuning job: {shown(job_id)}")
        return job

    async def list_jobs(
        self, caller: Caller, metadata: Mapping[str, str], after: str, limit: int
    ) -> tuple[list[JobRecord], bool]:
        found = [job for job in await self._store.jobs() if sees(caller, job.tenant)]
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
        job = await self.job(caller, job_id)
        if job.status != "paused":
            raise Conflict(f"The job {job_id} is {job.status}, not paused")
        job = await self._store.change(job_id, _from(("paused",), "queued"))
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
        """Of a job that waits at once; of one that runs, as soon as its step is over."""
        job = await self.job(caller, job_id)
        if job.is_open and self._runner.wish(job_id, wish):
            return job
        changed = await self._store.change(job_id, _from(waiting, status))
        if changed.status != status or job.status == status:
            raise Conflict(f"The job {job_id} is {changed.status}; it cannot be {status}")
        note = EventRecord(
            new_id("ftevent"), job_id, int(time.time()), "info", "message", MESSAGES[status], "{}"
        )
        await self._store.put(note)
        return changed


def _from(before: Sequence[JobStatus], status: JobStatus) -> Callable[[JobRecord], JobRecord]:
    def change(job: JobRecord) -> JobRecord:
        if job.status not in before:
            return job
        finished_at = int(time.time()) if status == "cancelled" else 0
        return replace(job, status=status, finished_at=finished_at)

    return change


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

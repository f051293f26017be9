"""New jobs' files, looked at beside the job that runs: a caller learns at once what is wrong.

    validating_files -> queued | failed

It must not know HTTP, processes or what is done with a job afterwards.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from lory_router.errors import JobsUnwritable
from lory_router.tuning.dataset import DatasetError, check_dataset
from lory_router.tuning.news import message_event
from lory_router.tuning.records import JobRecord, failed
from lory_router.tuning.settings import TuningSettings
from lory_router.tuning.store import TuningStore

log = logging.getLogger(__name__)

RETRY_S = 1.0
"""Until a database that could not be used is tried again."""
VALIDATED = "Files validated, moving job to queued state"


class Validator:
    def __init__(
        self, store: TuningStore, settings: TuningSettings, on_queued: Callable[[], None]
    ) -> None:
        """`on_queued` is told that a job waits to run."""
        self._store = store
        self._settings = settings
        self._on_queued = on_queued
        self._awake = asyncio.Event()
        self._stopping = False

    def wake(self) -> None:
        """There may be a job to look at."""
        self._awake.set()

    def stop(self) -> None:
        self._stopping = True
        self._awake.set()

    async def run(self) -> None:
        """Until stopped; oldest first."""
        while not self._stopping:
            self._awake.clear()
            try:
                job = await self._store.next_unchecked()
                if job is not None and not self._stopping:
                    await self._check(job)
                    continue
                timeout_s = None
            except JobsUnwritable:
                timeout_s = RETRY_S
            await _set_within(self._awake, timeout_s)

    async def _check(self, job: JobRecord) -> None:
        problem = await asyncio.to_thread(self._problem, job)
        if problem is None:
            after, event = replace(job, status="queued"), message_event(job.id, VALIDATED)
        else:
            after = failed(job, *problem)
            event = message_event(job.id, f"The job failed: {after.error_message}", "error")

        def change(job: JobRecord) -> JobRecord:
            """Unless it was cancelled or paused meanwhile."""
            return after if job.status == "validating_files" else job

        await self._store.change(job.id, change, event)
        self._on_queued()

    def _problem(self, job: JobRecord) -> tuple[str, str, str] | None:
        """Code, message and field."""
        for param in ("training_file", "validation_file"):
            file_id: str = getattr(job, param)
            if not file_id:
                continue
            try:
                check_dataset(self._settings.file(file_id), job.kind)
            except FileNotFoundError:
                return f"missing_{param}", "the file was deleted", param
            except DatasetError as error:
                return f"invalid_{param}", str(error), param
            except Exception as error:
                log.exception("the files of fine-tuning job %s", job.id)
                return "server_error", f"the file could not be read: {type(error).__name__}", param
        return None


async def _set_within(event: asyncio.Event, timeout_s: float | None) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return

"""What is kept of jobs that are over: the newest of each tenant, and none that are too old.

With a job's record go its events, the folder of its run and its table of steps. What answers (its
adapter, its checkpoints) and what callers have sent is never touched. It must not know HTTP or what
runs.
"""

import asyncio
import logging
import shutil
import time
from contextlib import suppress

from lory_router.errors import JobsUnwritable
from lory_router.tuning.checkpoints import forget_states
from lory_router.tuning.records import JobRecord
from lory_router.tuning.settings import TuningSettings
from lory_router.tuning.store import TuningStore

log = logging.getLogger(__name__)

EVERY_S = 60.0
KEPT_AT_LEAST_S = 60
"""So that who waits for a job learns how it ended."""
SECONDS_PER_DAY = 24 * 60 * 60


class Retention:
    def __init__(self, store: TuningStore, settings: TuningSettings) -> None:
        self._store = store
        self._settings = settings
        self._stopping = asyncio.Event()
        self._bare: set[str] = set()
        """Failed jobs whose states are known to be gone."""

    def stop(self) -> None:
        self._stopping.set()

    async def run(self) -> None:
        """Until stopped."""
        while not self._stopping.is_set():
            try:
                await self.sweep(time.time())
            except JobsUnwritable as error:
                log.warning("jobs that are over stay: %s", error.message)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), EVERY_S)

    async def sweep(self, now: float) -> None:
        days = self._settings.keep_days
        oldest = int(now) - days * SECONDS_PER_DAY if days else 0
        before = int(now) - KEPT_AT_LEAST_S
        for job in await self._store.surplus(self._settings.keep_jobs, oldest, before):
            if self._stopping.is_set():
                return
            await self._forget(job)
        for job in await self._store.older_failures():
            if job.id not in self._bare:
                await asyncio.to_thread(forget_states, self._settings.runs / job.id)
                self._bare.add(job.id)

    async def _forget(self, job: JobRecord) -> None:
        """Its record last but for its table: what a killed server leaves is found again."""
        try:
            await asyncio.to_thread(shutil.rmtree, self._settings.runs / job.id)
        except FileNotFoundError:
            pass  # it never ran
        except OSError as error:
            log.warning("fine-tuning job %s, which is over, stays: %s", job.id, error)
            return
        await self._store.forget_job(job)
        self._bare.discard(job.id)
        if job.result_file:
            table = self._settings.file(job.result_file)
            await asyncio.to_thread(table.unlink, missing_ok=True)

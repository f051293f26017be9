"""Jobs, carried out one after another: validate, train in a process of its own, hand over.

    queued -> running -> succeeded | failed | cancelled
                 |  \\-> paused -> queued
                 server ends -> queued, and goes on from its checkpoint when the server is back

It must not know HTTP, nor how training is done.
"""

import asyncio
import logging
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from lory_router.errors import ApiError, JobsUnwritable
from lory_router.tuning.checkpoints import MAX_KEPT, checkpoint_name, publish, withdraw
from lory_router.tuning.child import LOOK_S, Child
from lory_router.tuning.dataset import DatasetError, check_dataset
from lory_router.tuning.handover import Handover
from lory_router.tuning.job_usage import JobUsage
from lory_router.tuning.kept_files import KeptFiles
from lory_router.tuning.memory import MemoryLimit
from lory_router.tuning.meter import Meter
from lory_router.tuning.news import (
    STOPPED,
    News,
    last_failure,
    read_news,
    results_csv,
    told,
    without_paths,
)
from lory_router.tuning.records import EventRecord, JobRecord, JobStatus, new_id
from lory_router.tuning.run_config import RunConfig, train_command, write_config
from lory_router.tuning.settings import TuningSettings
from lory_router.tuning.share import Share, kept
from lory_router.tuning.store import TuningStore

log = logging.getLogger(__name__)

Wish = Literal["", "cancel", "pause", "shutdown"]

ENDS: Mapping[str, JobStatus] = {"cancel": "cancelled", "pause": "paused", "shutdown": "queued"}
MESSAGES: Mapping[str, str] = {
    "running": "Fine-tuning job started",
    "queued": "The server stops; the job goes on from its checkpoint once it is back",
    "paused": "Fine-tuning job paused",
    "cancelled": "Fine-tuning job cancelled",
}
RETRY_S = 1.0
"""Until a database that could not be written is tried again."""
LAST_WORDS = 2000
"""Characters of a run's log that go into the message of one that died without a word."""


class JobFailedError(Exception):
    def __init__(self, code: str, message: str, param: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


@dataclass(slots=True)
class _Current:
    """The job that runs, and what is wanted of it."""

    job_id: str
    wish: Wish = ""
    asked: asyncio.Event = field(default_factory=asyncio.Event)

    def want(self, wish: Wish) -> None:
        """What was wanted first holds, but for a cancellation."""
        self.wish = wish if wish == "cancel" else self.wish or wish
        self.asked.set()


class JobRunner:
    def __init__(
        self,
        store: TuningStore,
        files: KeptFiles,
        settings: TuningSettings,
        environment: Mapping[str, str],
        handover: Handover,
        meter: Meter,
        serving: asyncio.Event,
    ) -> None:
        """`serving` is set while requests run."""
        self._store = store
        self._files = files
        self._settings = settings
        self._environment = environment
        self._handover = handover
        self._meter = meter
        self._serving = serving
        self._share = Share(settings.share)
        self._awake = asyncio.Event()
        self._stopping = False
        self._current: _Current | None = None

    def wake(self) -> None:
        """There may be a job to do."""
        self._awake.set()

    def wish(self, job_id: str, wish: Wish) -> bool:
        """Want something of the job that runs; False: it does not."""
        if self._current is None or self._current.job_id != job_id:
            return False
        self._current.want(wish)
        return True

    def stop(self) -> None:
        """Let `run` return, the job that runs having written a checkpoint."""
        self._stopping = True
        if self._current is not None:
            self._current.want("shutdown")
        self._awake.set()

    async def run(self) -> None:
        """Do jobs until stopped, and again where the database could not be written."""
        while not self._stopping:
            try:
                await self._requeue()
                await self._work()
            except JobsUnwritable as error:
                log.error("%s; fine-tuning goes on in %s s", error.message, RETRY_S)
                self._awake.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._awake.wait(), RETRY_S)

    async def _requeue(self) -> None:
        """What still runs by the database's word: the server was killed, or could not write."""
        for job in await self._store.jobs():
            if job.status == "running":
                await self._store.change(job.id, lambda job: replace(job, status="queued"))

    async def _work(self) -> None:
        while not self._stopping:
            self._awake.clear()
            job = await self._store.next_job()
            if self._stopping:
                return
            if job is None:
                await self._awake.wait()
            else:
                await self._do(job)

    async def _do(self, job: JobRecord) -> None:
        self._current = current = _Current(job.id)
        try:
            end = await self._carry_out(job, current)
        except JobFailedError as error:
            await self._fail(job.id, error)
        except JobsUnwritable:
            raise
        except Exception as error:
            log.exception("fine-tuning job %s", job.id)
            await self._fail(job.id, JobFailedError("server_error", f"the run failed: {error}"))
        else:
            await self._move(job.id, end)
            if end in ("succeeded", "cancelled"):
                await asyncio.to_thread(_forget_checkpoints, self._settings.runs / job.id)
        finally:
            self._current = None

    async def _carry_out(self, job: JobRecord, current: _Current) -> JobStatus:
        num_rows = await self._validate(job)
        status = (await self._start(job.id)).status
        if status != "running":
            return status  # it was cancelled or paused meanwhile
        await self._handover.claim(job.adapter_id, job.owner)
        run = self._settings.runs / job.id
        if current.wish or await asyncio.to_thread(self._is_made, job):
            return await self._conclude(job, 0, run, current)
        await asyncio.to_thread(run.mkdir, parents=True, exist_ok=True)
        file, validation = self._settings.file, job.validation_file
        config = RunConfig(
            job, file(job.training_file), file(validation) if validation else None, run, num_rows
        )
        await asyncio.to_thread(write_config, config, self._settings)
        child = await Child.start(
            train_command(config, self._settings), self._environment, run / "log"
        )
        code = await self._watch(job, child, run, current)
        return await self._conclude(job, code, run, current)

    async def _validate(self, job: JobRecord) -> int:
        """How many rows there are to train on."""
        kind = "dpo" if '"type": "dpo"' in job.method else "supervised"
        num_rows = 0
        for param in ("validation_file", "training_file"):
            file_id = getattr(job, param)
            if not file_id:
                continue
            try:
                path = self._settings.file(file_id)
                num_rows = await asyncio.to_thread(check_dataset, path, kind)
            except FileNotFoundError as error:
                raise JobFailedError(f"missing_{param}", "the file was deleted", param) from error
            except DatasetError as error:
                raise JobFailedError(f"invalid_{param}", str(error), param) from error
        return num_rows

    async def _start(self, job_id: str) -> JobRecord:
        """Running, unless it waits no more."""

        def begin(job: JobRecord) -> JobRecord:
            waits = job.status in ("validating_files", "queued")
            return replace(job, status="running") if waits else job

        return await self._store.change(job_id, begin, _event(job_id, MESSAGES["running"]))

    async def _watch(self, job: JobRecord, child: Child, run: Path, current: _Current) -> int:
        """Pass on what the run tells until it ends; its exit status."""
        limit = MemoryLimit(self._settings.max_memory_bytes)
        with self._meter.running(job.tenant) as tally:
            usage = JobUsage(job, tally, self._meter)
            try:
                async with kept(self._share, child, self._serving, tally):
                    code: int | None = None
                    while code is None:
                        code = await child.wait(LOOK_S, current.asked)
                        await self._pass_on(usage, run)
                        if excess := await asyncio.to_thread(limit.excess, child.session):
                            raise JobFailedError("memory_exceeded", excess)
                        if (texts := usage.look()) is not None:
                            await self._note(usage, *(_event(job.id, t, "warn") for t in texts))
                        if current.wish and code is None:
                            code = await child.stop(self._settings.stop_grace_s)
                await self._pass_on(usage, run)
                return code
            finally:
                await child.kill()
                await self._note(usage, _event(job.id, usage.total))

    async def _note(self, usage: JobUsage, *events: EventRecord) -> None:
        """Events, and what the job has taken until then."""
        await self._store.change(usage.job_id, usage.entered, *events)

    async def _pass_on(self, usage: JobUsage, run: Path) -> None:
        """What the run has told since, as events of the job."""
        job = await self._store.job(usage.job_id)
        assert job is not None
        news, num_bytes = await asyncio.to_thread(read_news, run, job.bytes_read)
        if not news:
            return
        records = [record for one in news if (record := told(job, one, self._hidden)) is not None]

        def change(job: JobRecord) -> JobRecord:
            return usage.entered(_after(replace(job, bytes_read=num_bytes), news))

        for one in news:
            if one.type == "checkpoint":
                await self._publish(job, one, run)
        changed = await self._store.change(job.id, change, *records)
        self._meter.learned(job.tenant, max(changed.trained_tokens - job.trained_tokens, 0))

    async def _publish(self, job: JobRecord, one: News, run: Path) -> None:
        """Let a checkpoint be served, and those before the last few no more."""
        adapters = self._settings.adapters
        await self._handover.claim(checkpoint_name(job, one), job.owner)
        made = await asyncio.to_thread(publish, job, one, run, adapters)
        if made is None:
            return
        older = await self._store.checkpoints(job.id)
        same = [old for old in older if old.adapter_id == made.adapter_id]
        others = [old for old in older if old.adapter_id != made.adapter_id]
        surplus = others[MAX_KEPT - 1 :]
        await self._store.put(made)
        for old in (*same, *surplus):
            await self._store.forget(old)
        for old in surplus:
            await asyncio.to_thread(withdraw, adapters, old.adapter_id)

    @property
    def _hidden(self) -> tuple[Path, ...]:
        """Folders of this machine, which are no caller's to know."""
        settings = self._settings
        return settings.folder, settings.adapters, Path(settings.base).parent

    def _is_made(self, job: JobRecord) -> bool:
        return (self._settings.adapters / job.adapter_id).is_dir()

    async def _conclude(self, job: JobRecord, code: int, run: Path, current: _Current) -> JobStatus:
        """An adapter that is there is whole, however the process ended after it was."""
        is_made = await asyncio.to_thread(self._is_made, job)
        if is_made and not current.wish:
            await self._hand_over(job, current)
        if current.wish == "cancel":
            await asyncio.to_thread(withdraw, self._settings.adapters, job.adapter_id)
        if current.wish:
            return ENDS[current.wish]
        if not is_made:
            raise JobFailedError("training_failed", await asyncio.to_thread(_why, run, code))
        return await self._succeed(job, run)

    async def _hand_over(self, job: JobRecord, current: _Current) -> None:
        """See whether what was made can be served, until that is known or something else wanted:
        an engine that is not there may be long in coming."""
        checking = asyncio.ensure_future(self._handover.check(job.adapter_id))
        asked = asyncio.ensure_future(current.asked.wait())
        try:
            await asyncio.wait({checking, asked}, return_when=asyncio.FIRST_COMPLETED)
            if checking.done():
                await checking
        except ApiError as error:
            raise JobFailedError("adapter_refused", error.message) from error
        finally:
            checking.cancel()
            asked.cancel()

    async def _succeed(self, job: JobRecord, run: Path) -> JobStatus:
        table = await asyncio.to_thread(results_csv, run)
        kept = await self._files.add(job.tenant, "step_metrics.csv", "fine-tune-results", table)
        await self._store.change(
            job.id,
            lambda job: replace(
                job, status="succeeded", finished_at=int(time.time()), result_file=kept.id
            ),
            _event(job.id, f"New fine-tuned model created: {job.adapter_id}"),
            _event(job.id, "The job has successfully completed"),
        )
        return "succeeded"

    async def _move(self, job_id: str, status: JobStatus) -> None:
        def change(job: JobRecord) -> JobRecord:
            if not job.is_open or job.status == status:
                return job
            finished_at = int(time.time()) if status == "cancelled" else 0
            return replace(job, status=status, finished_at=finished_at)

        await self._store.change(job_id, change, _event(job_id, MESSAGES.get(status, status)))

    async def _fail(self, job_id: str, error: JobFailedError) -> None:
        log.warning("fine-tuning job %s failed: %s", job_id, error.message)
        message = without_paths(error.message, self._hidden)

        def change(job: JobRecord) -> JobRecord:
            if not job.is_open:
                return job
            return replace(
                job,
                status="failed",
                finished_at=int(time.time()),
                error_code=error.code,
                error_message=message,
                error_param=error.param,
            )

        record = _event(job_id, f"The job failed: {message}", "error")
        await self._store.change(job_id, change, record)


def _forget_checkpoints(run: Path) -> None:
    """Of a run that is over; what it told stays."""
    if run.is_dir():
        for path in run.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


def _after(job: JobRecord, news: list[News]) -> JobRecord:
    """The job, as far as its last step tells."""
    steps = [one for one in news if one.type == "step"]
    if not steps:
        return job
    last = steps[-1]
    left = max(last.num_steps - last.step, 0)
    per_step = last.seconds / last.step if last.step else 0.0
    return replace(
        job,
        trained_tokens=last.learned_tokens,
        estimated_finish=int(time.time() + left * per_step),
    )


def _why(run: Path, code: int) -> str:
    """What a run said when it failed, or the last it said at all."""
    failure = last_failure(run)
    if failure is not None and failure.code != STOPPED:
        return failure.error
    log_file = run / "log"
    words = log_file.read_text(errors="replace")[-LAST_WORDS:] if log_file.exists() else ""
    lines = [line for line in words.splitlines() if line.strip()]
    said = lines[-1] if lines else "it said nothing"
    how = f"ended with code {code}" if code >= 0 else f"was ended by signal {-code}"
    return f"the run {how}: {said}"


def _event(
    job_id: str, message: str, level: Literal["info", "warn", "error"] = "info"
) -> EventRecord:
    return EventRecord(new_id("ftevent"), job_id, int(time.time()), level, "message", message, "{}")

"""Jobs, carried out one after another: validate, train in a process of its own, hand over.

    queued -> running -> succeeded | failed | cancelled
                 |  \\-> paused -> queued
                 server ends -> queued, and goes on from its checkpoint when the server is back

It must not know HTTP, nor how training is done.
"""

import asyncio
import logging
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from lory_router.errors import ApiError, JobsUnwritable
from lory_router.tuning.beginning import Beginning
from lory_router.tuning.checkpoints import (
    MAX_KEPT,
    checkpoint_name,
    clear,
    forget_states,
    publish,
)
from lory_router.tuning.child import LOOK_S, Child
from lory_router.tuning.dataset import count_rows
from lory_router.tuning.handover import Handover
from lory_router.tuning.job_usage import JobUsage
from lory_router.tuning.kept_files import RESULTS_PURPOSE, KeptFiles
from lory_router.tuning.memory import MemoryLimit
from lory_router.tuning.meter import Meter
from lory_router.tuning.news import (
    STOPPED,
    News,
    last_failure,
    message_event,
    read_news,
    results_csv,
    told,
    without_paths,
)
from lory_router.tuning.records import JobRecord, JobStatus, failed
from lory_router.tuning.run_config import RunConfig, train_command, write_config
from lory_router.tuning.settings import TuningSettings
from lory_router.tuning.share import Share, kept
from lory_router.tuning.store import Record, TuningStore

log = logging.getLogger(__name__)

Wish = Literal["", "cancel", "pause", "shutdown"]

ENDS: Mapping[str, JobStatus] = {"cancel": "cancelled", "pause": "paused", "shutdown": "queued"}
LOADING = "The job waits for the server to load the base"
HANDING_OVER = "The adapter is made; it waits for the engine to load it"
SOON_S = 5.0
"""That the engine may take for it unnoticed."""
MESSAGES: Mapping[str, str] = {
    "running": "Fine-tuning job started",
    "queued": "The server stops; the job goes on from its checkpoint once it is back",
    "paused": "Fine-tuning job paused",
    "cancelled": "Fine-tuning job cancelled",
}
RETRY_S = 1.0
"""Until a database that could not be written is tried again."""
OUT_OF_MEMORY = ", as the kernel does where memory runs out"
RESULTS = "step_metrics.csv"
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
    over: asyncio.Event = field(default_factory=asyncio.Event)
    """The database knows how it ended."""

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

    def wish(self, job_id: str, wish: Wish) -> asyncio.Event | None:
        """Want something of the job that runs, and what is set when it does no more; None: it
        does not."""
        if self._current is None or self._current.job_id != job_id:
            return None
        self._current.want(wish)
        return self._current.over

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
                await self._pick_up()
                await self._work()
            except JobsUnwritable as error:
                log.error("%s; fine-tuning goes on in %s s", error.message, RETRY_S)
                self._awake.clear()
                await self._wait_until_awake(RETRY_S)

    async def _pick_up(self) -> None:
        """After a server that was killed, or could not write: what still runs by the database's
        word waits again, and what is over leaves nothing."""
        for job in await self._store.jobs():
            if job.status == "running":
                await self._store.change(job.id, lambda job: replace(job, status="queued"))
            elif not job.is_open:
                await self.clear_away(job)

    async def clear_away(self, job: JobRecord) -> None:
        """What a job that is over needs no more."""
        try:
            if job.status in ("succeeded", "cancelled"):
                await asyncio.to_thread(forget_states, self._settings.runs / job.id)
            if job.status in ("failed", "cancelled"):
                await self._take_back(job.adapter_id)
        except OSError as error:
            log.warning("what fine-tuning job %s leaves stays: %s", job.id, error)

    async def _take_back(self, adapter_id: str) -> None:
        await asyncio.to_thread(clear, self._settings.adapters, adapter_id)
        self._handover.release(adapter_id)

    async def _work(self) -> None:
        told = ""
        while not self._stopping:
            self._awake.clear()
            job = await self._store.next_job()
            if self._stopping:
                return
            if job is None:
                await self._awake.wait()
            elif self._handover.is_possible:
                await self._do(job)
            else:
                # The engine takes its memory first: what is left of it is the job's.
                if told != job.id:
                    told = job.id
                    await self._store.put(message_event(job.id, LOADING))
                await self._wait_until_awake(RETRY_S)

    async def _wait_until_awake(self, timeout_s: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._awake.wait(), timeout_s)

    async def _do(self, job: JobRecord) -> None:
        self._current = current = _Current(job.id)
        try:
            end = await self._carry_out(job, current)
        except JobFailedError as error:
            await self._fail(job, error)
        except JobsUnwritable:
            raise
        except Exception as error:
            log.exception("fine-tuning job %s", job.id)
            await self._fail(job, JobFailedError("server_error", f"the run failed: {error}"))
        else:
            await self.clear_away(await self._move(job.id, end))
        finally:
            self._current = None
            current.over.set()

    async def _carry_out(self, job: JobRecord, current: _Current) -> JobStatus:
        status = (await self._start(job.id)).status
        if status != "running":
            return status  # it was cancelled or paused meanwhile
        await self._handover.claim(job.adapter_id, job.owner)
        run = self._settings.runs / job.id
        if current.wish or await asyncio.to_thread(self._is_made, job):
            return await self._conclude(job, 0, run, current)
        await asyncio.to_thread(run.mkdir, parents=True, exist_ok=True)
        config = await asyncio.to_thread(self._config, job, run)
        beginning = Beginning(config.num_rows)
        await self._store.put(message_event(job.id, beginning.text))
        child = await Child.start(
            train_command(config, self._settings), self._environment, run / "log"
        )
        code = await self._watch(job, child, run, current, beginning)
        return await self._conclude(job, code, run, current)

    def _config(self, job: JobRecord, run: Path) -> RunConfig:
        """Written where the run finds it."""
        file, validation = self._settings.file, job.validation_file
        rows, held_out = file(job.training_file), file(validation) if validation else None
        try:
            num_rows = count_rows(rows)
        except FileNotFoundError as error:
            text = "the file is not there any more"
            raise JobFailedError("missing_training_file", text, "training_file") from error
        config = RunConfig(job, rows, held_out, run, num_rows)
        write_config(config, self._settings)
        return config

    async def _start(self, job_id: str) -> JobRecord:
        """Running, unless it waits no more."""

        def begin(job: JobRecord) -> JobRecord:
            return replace(job, status="running") if job.status == "queued" else job

        event = message_event(job_id, MESSAGES["running"])
        return await self._store.change(job_id, begin, event)

    async def _watch(
        self, job: JobRecord, child: Child, run: Path, current: _Current, beginning: Beginning
    ) -> int:
        """Pass on what the run tells until it ends; its exit status."""
        limit = MemoryLimit(self._settings.max_memory_bytes)
        with self._meter.running(job.tenant) as tally:
            usage = JobUsage(job, tally, self._meter)
            try:
                async with kept(self._share, child, self._serving, tally):
                    code: int | None = None
                    while code is None:
                        code = await child.wait(LOOK_S, current.asked)
                        await self._pass_on(usage, run, beginning)
                        if excess := await asyncio.to_thread(limit.excess, child.session):
                            raise JobFailedError("memory_exceeded", excess)
                        if texts := beginning.look(tally.usage):
                            await self._note(usage, *texts)
                        if (texts := usage.look()) is not None:
                            await self._note(usage, *texts, level="warn")
                        if current.wish and code is None:
                            code = await self._end(child, current)
                await self._pass_on(usage, run, beginning)
                return code
            finally:
                await child.kill()
                await self._note(usage, usage.total)

    async def _end(self, child: Child, current: _Current) -> int:
        """It may write a checkpoint, unless nobody needs one."""
        if current.wish == "cancel":
            return await child.kill()
        return await child.stop(self._settings.stop_grace_s)

    async def _note(
        self, usage: JobUsage, *texts: str, level: Literal["info", "warn"] = "info"
    ) -> None:
        """What there is to tell, and what the job has taken until then."""
        events = [message_event(usage.job_id, text, level) for text in texts]
        await self._store.change(usage.job_id, usage.entered, *events)

    async def _pass_on(self, usage: JobUsage, run: Path, beginning: Beginning) -> None:
        """What the run has told since, as events of the job."""
        job = await self._store.job(usage.job_id)
        assert job is not None
        news, num_bytes = await asyncio.to_thread(read_news, run, job.bytes_read)
        if not news:
            return
        begun = beginning.hear(news, usage.usage)
        records = [message_event(job.id, text) for text in begun]
        records += [record for one in news if (record := told(job, one, self._hidden)) is not None]

        def change(job: JobRecord) -> JobRecord:
            return usage.entered(_after(replace(job, bytes_read=num_bytes), news))

        for one in news:
            if one.type == "checkpoint":
                await self._publish(job, one, run)
        changed = await self._store.change(job.id, change, *records)
        self._meter.learned(job.tenant, max(changed.trained_tokens - job.trained_tokens, 0))

    async def _publish(self, job: JobRecord, one: News, run: Path) -> None:
        """Let a checkpoint be served, and those before the last few no more: these are taken away
        before the database forgets them, so that a server that is killed between does it again."""
        adapters = self._settings.adapters
        await self._handover.claim(checkpoint_name(job, one), job.owner)
        try:
            made = await asyncio.to_thread(publish, job, one, run, adapters)
        except OSError as error:
            text = f"The checkpoint of step {one.step} cannot be served: {error.strerror}"
            await self._store.put(message_event(job.id, text, "warn"))
            return
        if made is None:
            return
        older = await self._store.checkpoints(job.id)
        same = [old for old in older if old.adapter_id == made.adapter_id]
        others = [old for old in older if old.adapter_id != made.adapter_id]
        surplus = others[MAX_KEPT - 1 :]
        for old in surplus:
            await self._take_back(old.adapter_id)
        await self._store.put(made)
        for old in (*same, *surplus):
            await self._store.forget(old)

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
            either = {checking, asked}
            await asyncio.wait(either, timeout=SOON_S, return_when=asyncio.FIRST_COMPLETED)
            if not (checking.done() or asked.done()):
                await self._store.put(message_event(job.id, HANDING_OVER))
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if checking.done():
                _check_accepted(checking)
        finally:
            checking.cancel()
            asked.cancel()

    async def _succeed(self, job: JobRecord, run: Path) -> JobStatus:
        made = message_event(job.id, f"New fine-tuned model created: {job.adapter_id}")
        result_file = ""
        try:
            table = await asyncio.to_thread(results_csv, run)
            more: Record = await self._files.write(job.tenant, RESULTS, RESULTS_PURPOSE, table)
            result_file = more.id
        except OSError as error:
            text = f"{RESULTS} cannot be kept: {error.strerror}"
            more = message_event(job.id, text, "warn")
        await asyncio.to_thread(forget_states, run)
        await self._store.change(
            job.id,
            lambda job: replace(
                job, status="succeeded", finished_at=int(time.time()), result_file=result_file
            ),
            more,
            made,
            message_event(job.id, "The job has successfully completed"),
        )
        return "succeeded"

    async def _move(self, job_id: str, status: JobStatus) -> JobRecord:
        def change(job: JobRecord) -> JobRecord:
            if not job.is_open or job.status == status:
                return job
            finished_at = int(time.time()) if status == "cancelled" else 0
            return replace(job, status=status, finished_at=finished_at)

        event = message_event(job_id, MESSAGES.get(status, status))
        return await self._store.change(job_id, change, event)

    async def _fail(self, job: JobRecord, error: JobFailedError) -> None:
        """What was made goes before the job is called failed."""
        log.warning("fine-tuning job %s failed: %s", job.id, error.message)
        message = without_paths(error.message, self._hidden)
        event = message_event(job.id, f"The job failed: {message}", "error")
        await self.clear_away(failed(job, error.code, message))
        await self._store.change(
            job.id, lambda job: failed(job, error.code, message, error.param), event
        )


def _check_accepted(checking: "asyncio.Future[None]") -> None:
    try:
        checking.result()
    except ApiError as error:
        raise JobFailedError("adapter_refused", error.message) from error


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
    return f"the run {how}{OUT_OF_MEMORY if code == -signal.SIGKILL else ''}: {said}"

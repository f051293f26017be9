"""Threads for slow work, so that no step waits for it: a job goes in, what came of it comes out.

A worker owns nothing but its thread. Jobs are plain callables; an exception ends the job, never
the thread. Its priority is the step's own: while a thread of low priority holds the interpreter and
waits for a core, the step waits with it. It must not know what the jobs do.

A read can stall for as long as a disk or a network file system likes. Where all threads are stuck
in jobs that began long ago, `relieve` starts spare ones, so that the other jobs do not wait too.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

import torch

STALL_S = 2.0
"""A job that takes longer may be stuck; those behind it get another thread."""


class Job(Protocol):
    def run(self) -> object:
        """What is handed back; called once, on a worker's thread."""
        ...


@dataclass(frozen=True, slots=True)
class JobFailed:
    job: Job
    error: Exception


class Workers:
    """Threads that share one queue of jobs and one of outcomes."""

    def __init__(
        self,
        name: str,
        num_threads: int,
        outcomes: "SimpleQueue[object]",
        on_outcome: Callable[[], None],
        *,
        max_spares: int = 0,
    ) -> None:
        self._name = name
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._outcomes = outcomes
        self._on_outcome = on_outcome
        self._max_spares = max_spares
        self._began_s: dict[threading.Thread, float] = {}
        """When the job of each thread that has one began."""
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{index}", daemon=True)
            for index in range(num_threads)
        ]
        self._spares: list[threading.Thread] = []
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def relieve(self) -> None:
        """Start a spare thread if jobs wait and no thread has begun one for STALL_S; it ends when
        nothing is left to do. The submitting thread calls this now and then."""
        if self._jobs.empty():
            return
        self._spares = [thread for thread in self._spares if thread.is_alive()]
        threads = [*self._threads, *self._spares]
        is_stuck_since = time.monotonic() - STALL_S
        began_s = self._began_s.copy()
        stuck = [
            thread for thread in threads if began_s.get(thread, is_stuck_since) < is_stuck_since
        ]
        if len(stuck) == len(threads) and len(self._spares) < self._max_spares:
            name = f"{self._name}-spare"
            self._spares.append(threading.Thread(target=self._work_off, name=name, daemon=True))
            self._spares[-1].start()

    def stop(self) -> None:
        """Let each thread end after its present job; `join` waits for that."""
        for _ in (*self._threads, *self._spares):
            self._jobs.put(None)

    def join(self, timeout_s: float) -> None:
        for thread in (*self._threads, *self._spares):
            thread.join(timeout_s)

    @property
    def threads(self) -> Sequence[threading.Thread]:
        return self._threads

    def _work(self) -> None:
        # Of this thread alone. A team of torch's own beside the step's makes OpenMP see more
        # threads than cores: it stops spinning, and every later step is a third slower.
        torch.set_num_threads(1)
        while (job := self._jobs.get()) is not None:
            self._do(job)
            del job  # or its bytes would stay until the next one comes

    def _work_off(self) -> None:
        """What is waiting, and no more."""
        torch.set_num_threads(1)
        while (job := _next_of(self._jobs)) is not None:
            self._do(job)
            del job

    def _do(self, job: Job) -> None:
        thread = threading.current_thread()
        self._began_s[thread] = time.monotonic()
        outcome = _outcome(job)
        del self._began_s[thread]
        self._outcomes.put(outcome)
        self._on_outcome()


def _next_of(jobs: "SimpleQueue[Job | None]") -> Job | None:
    """None if there is none now, or if all are to end."""
    try:
        return jobs.get_nowait()
    except Empty:
        return None


def _outcome(job: Job) -> object:
    try:
        return job.run()
    except Exception as error:  # noqa: BLE001 - the thread's border: the owner reports it
        return JobFailed(job, error)

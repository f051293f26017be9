"""Threads for slow work, so that no step waits for it: a job goes in, what came of it comes out.

A worker owns nothing but its thread. Jobs are plain callables; an exception ends the job, never
the thread. Its priority is the step's own: while a thread of low priority holds the interpreter and
waits for a core, the step waits with it. It must not know what the jobs do.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

import torch


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
    ) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._outcomes = outcomes
        self._on_outcome = on_outcome
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{index}", daemon=True)
            for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def stop(self) -> None:
        """Let each thread end after its present job; `join` waits for that."""
        for _ in self._threads:
            self._jobs.put(None)

    def join(self, timeout_s: float) -> None:
        for thread in self._threads:
            thread.join(timeout_s)

    @property
    def threads(self) -> Sequence[threading.Thread]:
        return self._threads

    def _work(self) -> None:
        # Of this thread alone. A team of torch's own beside the step's makes OpenMP see more
        # threads than cores: it stops spinning, and every later step is a third slower.
        torch.set_num_threads(1)
        while (job := self._jobs.get()) is not None:
            self._outcomes.put(_outcome(job))
            self._on_outcome()


def _outcome(job: Job) -> object:
    try:
        return job.run()
    except Exception as error:  # noqa: BLE001 - the thread's border: the owner reports it
        return JobFailed(job, error)

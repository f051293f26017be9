"""Worker threads keep out of the step's way."""

import os
import subprocess
import sys
import threading
import time
import weakref
from functools import partial
from queue import SimpleQueue

import pytest
import torch

from lory_server.adapters import workers as workers_module
from lory_server.adapters.workers import JobFailed, Workers


class Call:
    def __init__(self, function: object) -> None:
        self._function = function

    def run(self) -> object:
        assert callable(self._function)
        return self._function()


def outcome_of(function: object) -> object:
    outcomes: SimpleQueue[object] = SimpleQueue()
    workers = Workers("test", 1, outcomes, lambda: None)
    workers.submit(Call(function))
    outcome = outcomes.get(timeout=30)
    workers.stop()
    workers.join(30)
    return outcome


def report_threads_started(num_threads: int | None) -> None:
    """By a job that torch would share among threads, in this process; the step's own come first."""
    torch.set_num_threads(2)
    torch.zeros(1 << 22)

    def count() -> int:
        return len(os.listdir("/proc/self/task"))

    def job() -> int:
        before = count()
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        torch.zeros(1 << 22)
        return count() - before

    print(outcome_of(job), torch.get_num_threads())


def threads_started(num_threads: int | None) -> list[int]:
    """By the job, in a process of its own, and those the step has afterwards."""
    program = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
    program += f"import test_adapter_workers as t; t.report_threads_started({num_threads})"
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    return [int(word) for word in answer.stdout.split()]


def test_a_job_of_torch_starts_no_threads_and_takes_none_from_the_step() -> None:
    """A second team of OpenMP threads beside the step's costs every later step a third."""
    assert threads_started(None) == [0, 2]
    assert threads_started(2) == [1, 2], "a job that may does start one"


def test_an_exception_ends_the_job_and_not_the_thread() -> None:
    outcomes: SimpleQueue[object] = SimpleQueue()
    workers = Workers("test", 1, outcomes, lambda: None)
    workers.submit(Call(lambda: 1 / 0))
    workers.submit(Call(lambda: "done"))
    failed = outcomes.get(timeout=30)
    assert isinstance(failed, JobFailed)
    assert isinstance(failed.error, ZeroDivisionError)
    assert outcomes.get(timeout=30) == "done"
    workers.stop()
    workers.join(30)


def test_spare_threads_are_few_and_end_when_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "STALL_S", 0.0)
    opened, outcomes = threading.Event(), SimpleQueue[object]()
    workers = Workers("test", 1, outcomes, lambda: None, max_spares=2)
    for _ in range(5):
        workers.submit(Call(lambda: opened.wait(20)))
    workers.submit(Call(lambda: "last"))
    most, end_s = 0, time.monotonic() + 0.3
    while time.monotonic() < end_s:
        workers.relieve()
        most = max(most, sum(thread.name == "test-spare" for thread in threading.enumerate()))
        time.sleep(0.005)
    assert most == 2
    assert outcomes.empty()
    opened.set()
    assert [outcomes.get(timeout=20) for _ in range(6)].count("last") == 1
    workers.stop()
    workers.join(20)
    assert not [t for t in (*workers.threads, *workers._spares) if t.is_alive()]


def test_what_a_job_held_is_free_when_it_has_ended() -> None:
    """An adapter that was evicted stayed in memory until the next one was copied."""

    class Held:
        """Something large."""

    held = Held()
    alive = weakref.ref(held)
    outcomes = SimpleQueue[object]()
    workers = Workers("test", 1, outcomes, lambda: None)
    workers.submit(Call(partial(isinstance, held, Held)))
    assert outcomes.get(timeout=20) is True
    del held
    end_s = time.monotonic() + 20
    while alive() is not None:
        assert time.monotonic() < end_s, "a thread that waits for work keeps the last one"
        time.sleep(0.005)
    workers.stop()
    workers.join(20)

"""Worker threads keep out of the step's way."""

import os
import subprocess
import sys
from queue import SimpleQueue

import torch

from lory_server.adapters.workers import JobFailed, Workers


class Call:
    def __init__(self, function: object) -> None:
        self._function = function

    def run(self) -> object:
        assert callable(self._function)
        return self._function()


def outcome_of(function: object) -> object:
    outcomes: SimpleQueue[object] = SimpleQueue()
    workers = Workers("test", 1, outcomes, lambda: None, low_priority=False)
    workers.submit(Call(function))
    outcome = outcomes.get(timeout=30)
    workers.stop()
    workers.join(30)
    return outcome


def num_threads_started_by(function: object) -> int:
    """In this process, by a job that runs to its end."""
    before = len(os.listdir("/proc/self/task"))
    counts: list[int] = []

    def job() -> None:
        assert callable(function)
        function()
        counts.append(len(os.listdir("/proc/self/task")) - before - 1)

    outcome_of(job)
    return counts[0]


def start_a_team() -> None:
    torch.zeros(1 << 22)


def main() -> None:
    torch.set_num_threads(2)
    start_a_team()
    print(num_threads_started_by(start_a_team), torch.get_num_threads())
    print(num_threads_started_by(lambda: (torch.set_num_threads(2), start_a_team())))


def test_a_job_of_torch_starts_no_threads_and_takes_none_from_the_step() -> None:
    """A second team of OpenMP threads beside the step's costs every later step a third."""
    program = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
    program += "import test_adapter_workers; test_adapter_workers.main()"
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    in_worker, of_the_step, unrestrained = map(int, answer.stdout.split())
    assert in_worker == 0
    assert of_the_step == 2
    assert unrestrained == 1, "a job that may does start one"


def test_an_exception_ends_the_job_and_not_the_thread() -> None:
    outcomes: SimpleQueue[object] = SimpleQueue()
    workers = Workers("test", 1, outcomes, lambda: None, low_priority=True)
    workers.submit(Call(lambda: 1 / 0))
    workers.submit(Call(lambda: "done"))
    failed = outcomes.get(timeout=30)
    assert isinstance(failed, JobFailed)
    assert isinstance(failed.error, ZeroDivisionError)
    assert outcomes.get(timeout=30) == "done"
    workers.stop()
    workers.join(30)

"""Work that gives way: it sleeps now and then while others wait for a core, on Linux.

Priority alone (low_priority) does not do it. A kernel that preempts at ticks lets whoever runs go
on for up to 4 ms, and within one system call for as long as that takes. So a timer interrupts the
work every WORK_S; if more threads want to run than there are cores, it sleeps for PAUSE_S. Where
cores are idle nothing is lost, and nobody can keep it from more than half of its speed.

Work on other threads than a process's main one gives way between its pieces, which it keeps short.

It must not know what the work is. Python code and short calls can give way, a long call cannot.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

WORK_S = 0.0004
PAUSE_S = 0.0003
LOAD = Path("/proc/loadavg")

PAUSE_SHARE = 8
"""Pauses between pieces are so many times as long as the pieces: a thread that shares the cores of
a step is not to make it longer by more than an eighth."""


@contextmanager
def giving_way(load: Path = LOAD) -> Iterator[None]:
    """Only on a process's main thread, where Python handles signals. Elsewhere than on Linux, and
    in a container that hides the load, the work goes on without a pause."""
    if not load.exists():
        yield
        return
    cores = os.cpu_count() or 1
    is_over = False

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        if is_over:
            return
        if num_running(load) > cores:
            time.sleep(PAUSE_S)
        signal.setitimer(signal.ITIMER_REAL, WORK_S)

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, WORK_S)
    try:
        yield
    finally:
        # Python handles a signal that has come between any two of these lines. Were the timer set
        # again there, it would end the process once nobody handles it.
        is_over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def pause_between_pieces(piece_s: float, load: Path = LOAD) -> None:
    """After a piece of work that took so much of a core, on any thread."""
    if load.exists() and num_running(load) > (os.cpu_count() or 1):
        time.sleep(PAUSE_SHARE * piece_s)


def num_running(load: Path) -> int:
    """Threads that run or wait for a core, on the whole machine, the one that asks included: the
    fourth field of proc_loadavg(5), `running/all`."""
    return int(load.read_bytes().split()[3].partition(b"/")[0])

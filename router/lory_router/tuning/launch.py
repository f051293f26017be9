"""`python -m lory_router.tuning.launch PARENT COMMAND...`: becomes COMMAND, of the lowest priority.

What has to be done within the process before it is another program: it dies with its parent, and
gets a core when nobody else wants one. It must not know what it starts.
"""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

NICENESS = 19
PR_SET_PDEATHSIG = 1
AUTOGROUP = Path("/proc/self/autogroup")
AUTOGROUP_TRIES = 20
AUTOGROUP_WAIT_S = 0.11
"""The kernel takes one change in 0.1 s."""


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    os.nice(NICENESS)
    if sys.platform == "linux":
        _die_with_parent(parent)
        _be_nice_as_session()
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    os.execv(command[0], command)


def _die_with_parent(parent: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        sys.exit(1)  # it ended before it could be watched


def _be_nice_as_session() -> None:
    """Where the kernel shares cores among sessions first (sched(7)), what a process is within its
    own counts for nothing between them."""
    if not AUTOGROUP.exists():
        return
    for _ in range(AUTOGROUP_TRIES):
        try:
            AUTOGROUP.write_text(str(NICENESS))
        except BlockingIOError:
            time.sleep(AUTOGROUP_WAIT_S)
        else:
            return


if __name__ == "__main__":
    main()

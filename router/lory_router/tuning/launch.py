"""`python -m lory_router.tuning.launch PARENT TIED COMMAND...`: becomes COMMAND, of the lowest
priority.

What has to be done within the process before it is another program: it dies with its parent, comes
after everybody else for a core, and is the first that the kernel ends where memory runs out. The
descriptor TIED is closed once it would die with its parent even if it were stopped. It must not
know what it starts.
"""

import os
import sys
from pathlib import Path

from lory_server.lifeline import die_with_parent
from lory_server.low_priority import be_nice_as_session

NICENESS = 19
FIRST_TO_GO = "1000"
"""The most there is, which everybody may ask for itself; what it starts inherits it."""


def main() -> None:
    parent, tied, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    die_with_parent()
    if os.getppid() != parent:
        sys.exit(1)  # it ended before it could be watched
    os.close(tied)
    os.nice(NICENESS)
    if sys.platform == "linux":
        _go_first()
        _lower()
    os.execv(command[0], command)


def _go_first() -> None:
    try:
        Path("/proc/self/oom_score_adj").write_text(FIRST_TO_GO)
    except OSError as error:
        print(f"the engine may be ended before the run: {error}", file=sys.stderr)  # noqa: T201


def _lower() -> None:
    """What cannot be is told in the run's log; the run goes on, and serving notices it more."""
    try:
        be_nice_as_session(os.getpid(), NICENESS)
    except OSError as error:
        print(f"the session keeps its priority: {error}", file=sys.stderr)  # noqa: T201
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


if __name__ == "__main__":
    main()

"""Low priority for a process that must not be noticed beside the step, on Linux.

Three things make it low:
    niceness    how a core is shared with others of its session;
    autogroup   where the kernel shares cores among sessions first (sched(7)), niceness counts for
                nothing between them, but a session has one too;
    slice       since Linux 6.6 (EEVDF) whoever wakes waits for the next tick, up to 4 ms, unless it
                is due earlier than who runs; since 6.12 a process with a long slice is due late.

It must not know whom it is for.
"""

import ctypes
import logging
import os
import platform
import sys
import time
from pathlib import Path

NICENESS = 10
"""Not lower: beside engine threads on all cores, 32 adapters took 8 s to load at niceness 19."""
SLICE_NS = 100_000_000
"""The longest there is."""
AUTOGROUP_TRIES = 20
AUTOGROUP_WAIT_S = 0.11

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
"""Number of the system call, by machine: neither Python nor the C library has a name for it."""

_log = logging.getLogger(__name__)


class _SchedAttr(ctypes.Structure):
    """`struct sched_attr` of sched_setattr(2), in its first version."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )


def lower(process_id: int) -> None:
    """Of a process of one thread that leads a session of its own. What cannot be is logged."""
    if sys.platform != "linux":
        return
    for part in (_be_nice, be_nice_as_session, _be_due_late):
        try:
            part(process_id)
        except OSError as error:
            _log.info("process %d keeps its priority: %s: %s", process_id, part.__name__, error)


def _be_nice(process_id: int) -> None:
    os.setpriority(os.PRIO_PROCESS, process_id, NICENESS)


def be_nice_as_session(process_id: int, niceness: int = NICENESS) -> None:
    """Of a process that leads its session; raises OSError if it cannot be.

    A kernel without autogroups has no such file; one with them takes a change in 0.1 s.
    """
    autogroup = Path(f"/proc/{process_id}/autogroup")
    if not autogroup.exists():
        return
    assert os.getsid(process_id) == process_id, "others of its session would be lowered with it"
    for _ in range(AUTOGROUP_TRIES):
        try:
            autogroup.write_text(str(niceness))
        except BlockingIOError:
            time.sleep(AUTOGROUP_WAIT_S)
        else:
            return
    raise TimeoutError("the kernel takes no niceness for the session")


def _be_due_late(process_id: int) -> None:
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None:
        return
    attributes = _SchedAttr(size=ctypes.sizeof(_SchedAttr), nice=NICENESS, runtime=SLICE_NS)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, process_id, ctypes.byref(attributes), 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

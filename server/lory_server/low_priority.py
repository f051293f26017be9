"""Low priority for what must not be noticed beside the step, on Linux.

Niceness says how a core is shared, not when it is given up: since Linux 6.6 (EEVDF) whoever runs
keeps its core to the end of its slice, some milliseconds, though a thread of higher priority
wakes. So a short slice is asked for too, which kernels obey since 6.12. It must not know whom it
is for.
"""

import ctypes
import logging
import os
import platform
import sys

NICENESS = 10
"""Not lower: beside engine threads on all cores, 32 adapters took 8 s to load at niceness 19."""
SLICE_NS = 100_000

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


def lower(thread_id: int) -> None:
    """Of one thread, or of a process that has no other yet. Where it cannot be, a log line."""
    if sys.platform != "linux":
        return
    try:
        os.setpriority(os.PRIO_PROCESS, thread_id, NICENESS)
        _shorten_slice(thread_id)
    except OSError as error:
        _log.info("thread %d keeps its priority: %s", thread_id, error)


def _shorten_slice(thread_id: int) -> None:
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None:
        return
    attributes = _SchedAttr(size=ctypes.sizeof(_SchedAttr), nice=NICENESS, runtime=SLICE_NS)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, thread_id, ctypes.byref(attributes), 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

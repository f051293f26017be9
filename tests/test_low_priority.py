"""Low priority: a niceness and a slice that the kernel has taken."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lory_server.low_priority import NICENESS, SLICE_NS, lower

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="priorities are lowered on Linux")


major, minor = map(int, platform.release().split(".")[:2])
OBEYS_SLICES = (major, minor) >= (6, 12)


def test_a_process_and_its_session_are_nicer_and_it_is_due_late() -> None:
    command = [sys.executable, "-c", "input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as process:
        lower(process.pid)
        folder = Path(f"/proc/{process.pid}")
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == NICENESS
        if (folder / "autogroup").exists():
            assert (folder / "autogroup").read_text().endswith(f"nice {NICENESS}\n")
        told = (folder / "sched").read_text() if (folder / "sched").exists() else ""
        slice_ns = re.search(r"se\.slice\s*:\s*(\d+)", told)
        if slice_ns is not None and OBEYS_SLICES:
            assert int(slice_ns[1]) == SLICE_NS
        process.kill()


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="no autogroups here")
def test_a_session_that_others_share_is_never_lowered() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        with pytest.raises(AssertionError, match="others of its session"):
            lower(process.pid)
        process.kill()


def test_a_process_that_is_gone_is_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    with caplog.at_level("INFO"):
        lower(process.pid)
    assert "keeps its priority" in caplog.text

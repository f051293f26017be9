"""Low priority: a niceness and a slice that the kernel has taken."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lory_server.low_priority import NICENESS, SLICE_NS, lower

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="priorities are lowered on Linux")


def test_a_process_is_nicer_and_gives_way_sooner() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        lower(process.pid)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == NICENESS
        told = Path(f"/proc/{process.pid}/sched")
        slice_ns = re.search(r"se\.slice\s*:\s*(\d+)", told.read_text()) if told.exists() else None
        assert slice_ns is None or int(slice_ns[1]) == SLICE_NS
        process.kill()


def test_a_thread_that_is_gone_is_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    with caplog.at_level("INFO"):
        lower(process.pid)
    assert "keeps its priority" in caplog.text

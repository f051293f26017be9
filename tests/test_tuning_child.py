"""How a run's process is started, stopped, let go on and ended, whatever becomes of its server."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from lory_router.tuning.child import LAUNCHER, Child

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="priorities and /proc of Linux")

WAIT_S = 10.0
COUNTS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
while True:
    print("x", end="", flush=True)
    time.sleep(0.002)
"""


def launched(code: str) -> list[str]:
    """The launcher's command line, its descriptor one that nobody reads."""
    return [*LAUNCHER, str(os.getpid()), "0", sys.executable, "-c", code]


def test_a_run_gets_what_nobody_else_wants():
    code = "import os; print(os.nice(0), os.sched_getscheduler(0) == os.SCHED_IDLE)"
    done = subprocess.run(
        launched(code), capture_output=True, text=True, check=True, start_new_session=True
    )
    assert done.stdout == "19 True\n"


def test_where_memory_runs_out_a_run_is_the_first_to_go_and_the_server_is_not():
    """And so is all that it starts."""
    tell = "print(open('/proc/self/oom_score_adj').read())"
    code = f"import subprocess, sys; {tell}; subprocess.run([sys.executable, '-c', {tell!r}])"
    before = Path("/proc/self/oom_score_adj").read_text()
    done = subprocess.run(
        launched(code), capture_output=True, text=True, check=True, start_new_session=True
    )
    assert done.stdout.split() == ["1000", "1000"]
    assert Path("/proc/self/oom_score_adj").read_text() == before


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="no autogroups here")
def test_the_session_that_others_are_in_is_never_lowered():
    done = subprocess.run(launched(""), capture_output=True, text=True)
    assert "others of its session would be lowered with it" in done.stderr


SERVER = """
import asyncio, os, sys
from pathlib import Path
from lory_router.tuning.child import Child

async def serve(log):
    command = (sys.executable, "-c", "import time; print('runs', flush=True); time.sleep(60)")
    child = await Child.start(command, dict(os.environ), log)
    while not log.read_text():
        await asyncio.sleep(0.02)
    if sys.argv[2] == "stopped":
        child.hold()
    print(child.session, flush=True)
    await asyncio.sleep(60)

asyncio.run(serve(Path(sys.argv[1])))
"""


@pytest.mark.parametrize("state", ["running", "stopped"])
def test_a_run_dies_with_its_server(tmp_path: Path, state: str):
    """One that is stopped, too: nobody else would ever let it go on."""
    command = [sys.executable, "-c", SERVER, str(tmp_path / "log"), state]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        child = int(server.stdout.readline())
        until(lambda: is_stopped(child) == (state == "stopped"))
        server.kill()
        until(lambda: not Path(f"/proc/{child}").exists() or state_of(child) == "Z")


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def state_of(process_id: int) -> str:
    text = Path(f"/proc/{process_id}/stat").read_text()
    return text.rpartition(")")[2].split()[0]


def is_stopped(process_id: int) -> bool:
    return state_of(process_id) == "T"


def with_child(tmp_path: Path, code: str, story: Callable[[Child, Path], Awaitable[None]]) -> None:
    async def whole() -> None:
        log = tmp_path / "log"
        child = await Child.start((sys.executable, "-c", code), dict(os.environ), log)
        try:
            async with asyncio.timeout(WAIT_S):
                assert not child.may_be_held, "not before it would die with us"
                while not log.read_text():
                    await asyncio.sleep(0.01)
                assert child.may_be_held
                await story(child, log)
        finally:
            await child.kill()

    asyncio.run(whole())


def test_a_held_run_does_nothing_until_it_goes_on(tmp_path: Path):
    async def story(child: Child, log: Path) -> None:
        child.hold()
        child.hold()
        await until_stopped(child)
        done = log.stat().st_size
        assert await child.wait(0.1) is None
        assert log.stat().st_size == done
        child.go_on()
        while log.stat().st_size == done:
            await asyncio.sleep(0.01)

    with_child(tmp_path, COUNTS, story)


async def until_stopped(child: Child) -> None:
    while not is_stopped(child.session):
        await asyncio.sleep(0.001)


def test_a_held_run_hears_that_it_is_to_end(tmp_path: Path):
    async def story(child: Child, log: Path) -> None:
        child.hold()
        await until_stopped(child)
        assert await child.stop(WAIT_S) == 130
        assert not child.may_be_held
        child.go_on()
        child.hold()

    with_child(tmp_path, COUNTS, story)


def test_a_held_run_that_hears_nothing_is_killed(tmp_path: Path):
    deaf = COUNTS.replace("lambda *_: sys.exit(130)", "signal.SIG_IGN")

    async def story(child: Child, log: Path) -> None:
        child.hold()
        await until_stopped(child)
        assert await child.stop(0.05) == -signal.SIGKILL

    with_child(tmp_path, deaf, story)

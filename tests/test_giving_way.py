"""Work that gives way: it pauses while others wait for a core, only then, and leaves no timer."""

import signal
import sys
import time
from pathlib import Path

import pytest

from lory_server import giving_way

BUSY_S = 0.05

pytestmark = pytest.mark.timeout(60, method="thread")
"""The default method takes the signal and the timer that are tested here."""

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/loadavg")


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(giving_way.time, "sleep", slept.append)
    return slept


def load(folder: Path, num_running: int) -> Path:
    path = folder / "loadavg"
    path.write_text(f"0.10 0.20 0.30 {num_running}/345 6789\n")
    return path


def work() -> None:
    end = time.thread_time() + BUSY_S
    while time.thread_time() < end:
        pass


def test_work_pauses_while_others_wait(tmp_path: Path, pauses: list[float]) -> None:
    with giving_way.giving_way(load(tmp_path, 10_000)):
        work()
    most = BUSY_S / giving_way.WORK_S
    assert most / 4 < len(pauses)
    assert set(pauses) == {giving_way.PAUSE_S}


def test_work_goes_on_where_cores_are_idle(tmp_path: Path, pauses: list[float]) -> None:
    with giving_way.giving_way(load(tmp_path, 1)):
        work()
    assert pauses == []


def test_a_pause_never_outweighs_the_work() -> None:
    assert giving_way.PAUSE_S < giving_way.WORK_S


def test_between_pieces_others_have_the_cores_for_most_of_the_time(
    tmp_path: Path, pauses: list[float]
) -> None:
    giving_way.pause_between_pieces(0.002, load(tmp_path, 1))
    assert pauses == []
    giving_way.pause_between_pieces(0.002, load(tmp_path, 10_000))
    assert pauses == [0.002 * giving_way.PAUSE_SHARE]
    giving_way.pause_between_pieces(0.002, tmp_path / "absent")
    assert len(pauses) == 1


def test_nothing_is_left_behind(tmp_path: Path, pauses: list[float]) -> None:
    before = signal.getsignal(signal.SIGALRM)
    with (
        pytest.raises(ZeroDivisionError),
        giving_way.giving_way(load(tmp_path, 10_000)),
    ):
        raise ZeroDivisionError
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is before
    work()
    assert pauses == []


def test_a_signal_that_comes_as_the_work_ends_sets_no_timer(
    tmp_path: Path, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fired when the handler was gone, and one reader process in a hundred loads was ended."""
    late: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: late.append(number))
    setitimer = signal.setitimer

    def interrupted(which: int, seconds: float) -> tuple[float, float]:
        was = setitimer(which, seconds)
        if not seconds:
            signal.raise_signal(signal.SIGALRM)
        return was

    try:
        monkeypatch.setattr(giving_way.signal, "setitimer", interrupted)
        with giving_way.giving_way(load(tmp_path, 1)):
            pass
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        work()
        assert late == []
    finally:
        setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_without_a_load_to_read_nothing_is_set(tmp_path: Path) -> None:
    with giving_way.giving_way(tmp_path / "none"):
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@linux_only
def test_this_machine_says_who_runs() -> None:
    assert giving_way.num_running(giving_way.LOAD) >= 1

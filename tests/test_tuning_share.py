"""What a job gets beside requests: never more than its share, and all of the rest."""

import asyncio
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

import fake_trainer
from lory_router.tuning.beginning import Beginning
from lory_router.tuning.child import Child
from lory_router.tuning.job_usage import JobUsage
from lory_router.tuning.meter import Meter, Tally, Usage
from lory_router.tuning.news import News
from lory_router.tuning.records import JobRecord
from lory_router.tuning.share import LOOK_S, SLICE_S, Share, kept
from tuning_world import JOBS, WAIT_S, World, name_of, run

linux = pytest.mark.skipif(sys.platform != "linux", reason="nothing is stopped elsewhere")

# -- the bucket -----------------------------------------------------------------------------


@dataclass
class Day:
    """Time as a test lets it pass for a share."""

    share: Share
    late_s: float = 0.0
    """By which every look comes late."""
    is_serving: bool = False
    may_be_held: bool = True
    beside_s: float = 0.0
    served_s: float = 0.0
    alone_s: float = 0.0
    slices: list[float] = field(default_factory=list)

    def pass_time(self, seconds: float, *, is_serving: bool) -> None:
        self.is_serving = is_serving
        while seconds > 0.0:
            wait_s = self.share.decide(is_serving=is_serving, may_be_held=self.may_be_held)
            assert 0.0 < wait_s <= LOOK_S
            step_s = min(wait_s + self.late_s, seconds)
            self.share.pass_time(step_s)
            seconds -= step_s
            self._count(step_s)

    def _count(self, seconds: float) -> None:
        if not self.is_serving:
            self.alone_s += seconds if self.share.runs else 0.0
            return
        self.served_s += seconds
        if self.share.runs:
            self.beside_s += seconds
            self.slices.append(seconds)


@pytest.mark.parametrize("part", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("late_s", [0.0, 0.003])
def test_a_busy_server_gives_a_job_its_share_and_no_more(part: float, late_s: float):
    day = Day(Share(part), late_s)
    day.pass_time(100.0, is_serving=True)
    assert 0.95 * part * 100.0 < day.beside_s <= part * 100.0 + SLICE_S + late_s
    if not late_s:
        assert max(day.slices) <= SLICE_S / (1 - part) + 1e-9


@pytest.mark.parametrize(("part", "expected_s"), [(0.0, 0.0), (1.0, 100.0)])
def test_no_share_is_no_time_and_a_whole_one_is_never_held(part: float, expected_s: float):
    day = Day(Share(part))
    day.pass_time(100.0, is_serving=True)
    assert day.beside_s == expected_s


def test_without_requests_a_job_always_runs():
    day = Day(Share(0.0))
    day.pass_time(5.0, is_serving=True)
    day.pass_time(50.0, is_serving=False)
    assert day.alone_s == 50.0


def test_a_job_is_stopped_as_requests_begin_whatever_it_has_saved():
    day = Day(Share(0.5))
    day.pass_time(10.01, is_serving=True)
    day.pass_time(1.0, is_serving=False)
    before_s = day.beside_s
    day.pass_time(0.001, is_serving=True)
    assert day.beside_s == before_s


def test_what_ran_too_long_is_paid_back():
    """The router slept for two seconds, or the run was ending and could not be stopped."""
    day = Day(Share(0.1))
    day.pass_time(1.0, is_serving=True)
    day.may_be_held = False
    day.pass_time(2.0, is_serving=True)
    day.may_be_held = True
    before_s = day.beside_s
    day.pass_time(17.0, is_serving=True)
    assert day.beside_s == before_s
    day.pass_time(100.0, is_serving=True)
    assert day.beside_s == pytest.approx(12.0, abs=2 * SLICE_S)


@examples(max_examples=80, deadline=None)
@given(
    st.floats(0.0, 0.95),
    st.lists(st.tuples(st.booleans(), st.floats(0.001, 3.0)), min_size=1, max_size=40),
)
def test_requests_never_lose_more_than_the_share(part: float, turns: list[tuple[bool, float]]):
    """However they come and go; but for a slice, once."""
    day = Day(Share(part))
    for is_serving, seconds in turns:
        day.pass_time(seconds, is_serving=is_serving)
        assert day.beside_s <= part * day.served_s + SLICE_S
    assert day.alone_s == pytest.approx(sum(s for serving, s in turns if not serving))


# -- a real process -------------------------------------------------------------------------

SPINS = "import time\nwhile True: time.process_time()"


@linux
def test_a_process_that_spins_gets_its_share_of_the_time(tmp_path: Path):
    async def story() -> None:
        serving = asyncio.Event()
        child = await Child.start((sys.executable, "-c", SPINS), dict(os.environ), tmp_path / "log")
        while not child.may_be_held:
            await asyncio.sleep(0.01)
        meter = Meter(0.0)
        try:
            with meter.running("t") as tally:
                async with kept(Share(0.1), child, serving, tally):
                    await asyncio.sleep(0.2)
                    serving.set()
                    await asyncio.sleep(0.05)
                    before, spun_s = tally.usage, cpu_seconds(child)
                    await asyncio.sleep(1.0)
                    found = tally.usage - before
                    assert found.alone == 0.0
                    assert found.beside <= 0.1 * (found.beside + found.held) + 2 * SLICE_S
                    assert found.held > 0.8
                    assert cpu_seconds(child) - spun_s <= found.beside + 0.05
                    serving.clear()
                    await asyncio.sleep(0.4)
                    assert tally.usage.alone - before.alone > 0.1
        finally:
            await child.kill()

    asyncio.run(story())


def cpu_seconds(child: Child) -> float:
    fields = Path(f"/proc/{child.session}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- a job ----------------------------------------------------------------------------------


async def until_held(world: World, job_id: str) -> dict[str, Any]:
    """Its run has begun, and stands still."""
    async with asyncio.timeout(WAIT_S):
        while not next(iter(world.tuning.meter.usages().values()), Usage()).held:
            await asyncio.sleep(0.02)
    return await world.job(job_id)


@linux
def test_a_job_waits_for_requests_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(JobUsage.__init__, "__defaults__", (0.3,))

    async def story(world: World) -> None:
        world.serving.set()
        job = await world.create(seed=fake_trainer.SLOW)
        async with asyncio.timeout(WAIT_S):
            while not any("Requests come first" in text for text in await world.events(job["id"])):
                await asyncio.sleep(0.05)
        waiting = await world.job(job["id"])
        assert waiting["status"] == "running"
        assert waiting["usage"]["held_seconds"] > 0.1
        assert await world.events(job["id"], "metrics") == []
        world.serving.clear()
        done = await world.until(job["id"], "succeeded", "failed")
        assert done["fine_tuned_model"] == name_of(job)
        usage = done["usage"]
        assert usage["held_seconds"] > waiting["usage"]["held_seconds"] / 2
        assert usage["charged_seconds"] < usage["trained_seconds"], "half was the requests'"
        assert usage["cost"] == pytest.approx(usage["charged_seconds"], abs=0.01)

    run(tmp_path, story, share=0.0)


@linux
@pytest.mark.parametrize(("deed", "status"), [("cancel", "cancelled"), ("pause", "paused")])
def test_a_job_that_is_held_is_still_heard(tmp_path: Path, deed: str, status: str):
    async def story(world: World) -> None:
        world.serving.set()
        job = await world.create(seed=fake_trainer.SLOW)
        await until_held(world, job["id"])
        assert (await world.client.post(f"{JOBS}/{job['id']}/{deed}")).status_code == 200
        assert (await world.until(job["id"], status, "succeeded"))["status"] == status

    run(tmp_path, story, share=0.0)


@linux
def test_a_server_stops_though_its_job_is_held_and_the_job_goes_on_after(tmp_path: Path):
    job: dict[str, Any] = {}

    async def begin(world: World) -> None:
        world.serving.set()
        job.update(await world.create())
        await until_held(world, job["id"])

    async def go_on(world: World) -> None:
        done = await world.until(job["id"], "succeeded", "failed")
        assert done["status"] == "succeeded"
        assert done["usage"]["held_seconds"] > 0.0, "of the server before"

    run(tmp_path, begin, share=0.0)
    run(tmp_path, go_on, share=0.0)


# -- what is told ---------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_job_that_waits_says_so_ever_more_rarely_and_once_that_it_waits_no_more():
    clock = Clock()
    tally = Tally(clock)
    job = JobRecord("j", "t", 0, "running", "", "", "", 1, "{}", "", "{}", "a")
    usage = JobUsage(job, tally, Meter(3600.0), 10.0)
    told: list[str] = []
    seconds = {"alone": 10, "held": 55, "beside": 5, "alone again": 40}
    for state, num in seconds.items():
        tally.enter("alone" if "alone" in state else state)  # type: ignore[arg-type]
        for _ in range(num):
            clock.now += 1
            told += usage.look() or ()
    waits = (
        "Requests come first: of the last 10 s the job ran 0.0 s, {} s were theirs so far; it goes"
        " on at this pace until there are fewer"
    )
    assert told == [
        *(waits.format(held) for held in (10, 20, 40)),
        "Requests leave time again: the job runs at full speed",
    ]
    record = usage.entered(job)
    assert (record.trained_seconds, record.held_seconds) == (55.0, 55.0)
    assert (record.charged_seconds, record.cost) == (52.5, 52.5)
    assert usage.total == "Trained for 55.0 s, held back for requests 55.0 s; charged with 52.5 s"


def test_a_run_that_has_made_no_step_says_what_it_is_at_and_for_how_long():
    clock = Clock()
    tally = Tally(clock)
    beginning = Beginning(96)
    told = [beginning.text]
    for second in range(90):
        tally.enter("held" if second < 30 else "alone")
        clock.now += 1
        if second == 50:
            started = News(type="started", num_steps=12, num_rows=90)
            told += beginning.hear([started], tally.usage)
        told += beginning.look(tally.usage)
    told += beginning.hear([News(type="step", step=1)], tally.usage)
    clock.now += 500
    told += beginning.look(tally.usage)
    assert told == [
        "The run begins by loading the base and tokenizing the rows, 96 in the training file",
        *(
            f"Still loading the base and tokenizing the rows: {total} s, of which {held} s held"
            " back for requests so far"
            for total, held in ((10, 10), (20, 20), (40, 30))
        ),
        "Loaded and tokenized, after 51 s, of which 30 s held back for requests: 90 rows, step 0"
        " of 12 done",
        "Still at the first step: 80 s, of which 30 s held back for requests so far",
    ]

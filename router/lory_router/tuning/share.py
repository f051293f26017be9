"""How much of the time a job may run while requests run, and that it gets no more.

A bucket fills with `part` seconds a second while requests run, and empties while the job runs
beside them. The job runs from the moment that it holds a slice until it is empty, and is stopped
(SIGSTOP) otherwise. So requests lose at most that part of their time, whatever the job takes from
them while it runs: cores, caches, memory bandwidth. As requests begin the job is stopped at once;
without requests it always runs.

What ran too long (a timer was late, a run that ends is not stopped any more) is a debt that the
next slices pay, those of the next job too. It must not know processes or what a job is.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Protocol

from lory_router.tuning.meter import Tally

SLICE_S = 0.02
"""Of running beside requests: about what a token may be late by."""
LOOK_S = 0.5
"""At most so long until it is looked again whether anything has changed."""
SHORTEST_S = 0.001


class Stoppable(Protocol):
    """A job, as far as its share is concerned."""

    @property
    def may_be_held(self) -> bool:
        """False as long as it must not be stopped, and from the moment that it is to end."""
        ...

    def hold(self) -> None: ...

    def go_on(self) -> None: ...


class Share:
    """The bucket. Told what is, it says whether the job `runs`; times are the caller's."""

    def __init__(self, part: float) -> None:
        self._part = part
        self._credit_s = 0.0
        self._is_serving = False
        self.runs = True

    def pass_time(self, seconds: float) -> None:
        """So long everything was as it was last decided."""
        if self._is_serving:
            spent_s = seconds if self.runs else 0.0
            self._credit_s = min(self._credit_s + self._part * seconds - spent_s, SLICE_S)

    def decide(self, *, is_serving: bool, may_be_held: bool) -> float:
        """Whether it runs from now on; in how many seconds to decide again."""
        begins = is_serving and not self._is_serving
        self._is_serving = is_serving
        if not is_serving or not may_be_held or self._part >= 1.0:
            self.runs = True
            return LOOK_S if may_be_held else SLICE_S
        if self.runs:
            self.runs = self._credit_s > 0.0 and not begins
        else:
            self.runs = self._credit_s >= SLICE_S
        return self._next_change_s()

    def _next_change_s(self) -> float:
        left_s = self._credit_s if self.runs else SLICE_S - self._credit_s
        speed = 1.0 - self._part if self.runs else self._part
        return max(left_s / speed, SHORTEST_S) if left_s < LOOK_S * speed else LOOK_S


@asynccontextmanager
async def kept(
    share: Share, job: Stoppable, serving: asyncio.Event, tally: Tally
) -> AsyncIterator[None]:
    """Hold the job to its share, and tally what it gets, for as long as this lasts."""
    keeping = asyncio.ensure_future(_keep(share, job, serving, tally))
    try:
        yield
    finally:
        keeping.cancel()
        with suppress(asyncio.CancelledError):
            await keeping


async def _keep(
    share: Share,
    job: Stoppable,
    serving: asyncio.Event,
    tally: Tally,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    looked_at = clock()
    try:
        while True:
            is_serving = serving.is_set()
            wait_s = share.decide(is_serving=is_serving, may_be_held=job.may_be_held)
            if share.runs:
                job.go_on()
            else:
                job.hold()
            tally.enter("held" if not share.runs else "beside" if is_serving else "alone")
            await _wait(serving, is_serving, wait_s)
            now = clock()
            share.pass_time(now - looked_at)
            looked_at = now
    finally:
        share.pass_time(clock() - looked_at)
        job.go_on()


async def _wait(serving: asyncio.Event, is_serving: bool, wait_s: float) -> None:
    """Or until requests begin."""
    if is_serving:
        await asyncio.sleep(wait_s)
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(wait_s):
            await serving.wait()

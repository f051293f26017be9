"""What a job has taken of the machine, as its record has it and its events tell it.

It must not know processes, nor how a job is held back.
"""

from dataclasses import replace

from lory_router.tuning.meter import Meter, Tally, Usage
from lory_router.tuning.records import JobRecord

WINDOW_S = 10.0
"""So often it is looked whether a job is held back, and what it has taken is written down."""


class JobUsage:
    """Of one run, and of those of the same job before it."""

    def __init__(
        self, job: JobRecord, tally: Tally, meter: Meter, window_s: float = WINDOW_S
    ) -> None:
        self._before = job
        self._tally = tally
        self._meter = meter
        self._window_s = window_s
        self._mark = tally.usage
        self._waits = False
        self._told_held_s = 0.0

    @property
    def usage(self) -> Usage:
        """Of this run."""
        return self._tally.usage

    @property
    def job_id(self) -> str:
        return self._before.id

    def entered(self, job: JobRecord) -> JobRecord:
        """The record as it is now."""
        before, usage = self._before, self._tally.usage
        return replace(
            job,
            trained_seconds=before.trained_seconds + usage.ran,
            held_seconds=before.held_seconds + usage.held,
            charged_seconds=before.charged_seconds + usage.charged,
            cost=before.cost + self._meter.cost(usage.charged),
        )

    def look(self) -> tuple[str, ...] | None:
        """At the end of each window what there is to tell, perhaps nothing; else None.

        A job waits once it was held for most of a window, and waits no more after one in which it
        was not held at all. While it waits it is told again, each time that it was held for twice
        as long.
        """
        usage = self._tally.usage
        window = usage - self._mark
        if window.ran + window.held < self._window_s:
            return None
        self._mark = usage
        waited, self._waits = self._waits, window.held > (0.0 if self._waits else window.ran)
        if waited and not self._waits:
            return ("Requests leave time again: the job runs at full speed",)
        if not self._waits or (waited and usage.held < 2 * self._told_held_s):
            return ()
        self._told_held_s = usage.held
        seconds = window.ran + window.held
        return (
            f"Requests come first: of the last {seconds:.0f} s the job ran {window.ran:.1f} s,"
            f" {usage.held:.0f} s were theirs so far; it goes on at this pace until there are"
            " fewer",
        )

    @property
    def total(self) -> str:
        usage = self._tally.usage
        return (
            f"Trained for {usage.ran:.1f} s, held back for requests {usage.held:.1f} s;"
            f" charged with {usage.charged:.1f} s"
        )

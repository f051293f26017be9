"""Where the machine's hours went: to adapters, to idling, to nobody.

    sum(seconds by adapter) + idle + unattributed = seconds since start, up to the last report

Unattributed is time without an engine: loading, restarting, and steps lost in a crash, whose
report never came. It must not know prices, labels or how figures are shown.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from lory_server.messages import StepReport


@dataclass(frozen=True, slots=True)
class Split:
    """The ledger at one moment, in seconds."""

    by_adapter: Mapping[str, float]
    idle: float
    unattributed: float

    @property
    def total(self) -> float:
        return sum(self.by_adapter.values()) + self.idle + self.unattributed


class Ledger:
    """Fed with reports, told when engines come and go; `now` is any one monotonic clock.

    While an engine lives its reports alone move the ledger. At its end what they did not cover is
    unattributed, and so is all time until the first report of the next one.
    """

    def __init__(self, now: float) -> None:
        self._start = now
        self._by_adapter: dict[str, float] = {}
        self._idle = 0.0
        self._unattributed = 0.0
        self._is_running = False

    def report(self, report: StepReport, now: float) -> None:
        """One report's interval, which ended just before `now`."""
        if not self._is_running:
            self._unattributed += max(self._uncovered(now) - report.wall_seconds, 0.0)
            self._is_running = True
        left = report.wall_seconds
        for charge in report.charges:
            left -= charge.seconds
            name = charge.adapter_id
            self._by_adapter[name] = self._by_adapter.get(name, 0.0) + charge.seconds
        self._idle += max(left, 0.0)

    def engine_ended(self, now: float) -> None:
        self._is_running = False
        self._unattributed += max(self._uncovered(now), 0.0)

    def split(self, now: float) -> Split:
        """The state at `now`; without an engine, the time since its end is already counted."""
        lost = 0.0 if self._is_running else max(self._uncovered(now), 0.0)
        return Split(dict(self._by_adapter), self._idle, self._unattributed + lost)

    def _uncovered(self, now: float) -> float:
        covered = sum(self._by_adapter.values()) + self._idle + self._unattributed
        return now - self._start - covered

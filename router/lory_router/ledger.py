"""Where the machine's hours went: to adapters and their tenants, to idling, to nobody.

    sum(seconds by adapter) + idle + unattributed = seconds since start, up to the last report
    sum(seconds by tenant) = sum(seconds by adapter)

Unattributed is time without an engine: loading, restarting, and steps lost in a crash, whose
report never came. It must not know prices or how figures are shown.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lory_server.messages import StepReport


@dataclass(frozen=True, slots=True)
class Split:
    """The ledger at one moment, in seconds."""

    by_adapter: Mapping[str, float]
    """By its label, of which there are boundedly many."""
    by_tenant: Mapping[str, float]
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

    def __init__(self, now: float, label_of: Callable[[str], str] = str) -> None:
        self._start = now
        self._label_of = label_of
        self._by_adapter: defaultdict[str, float] = defaultdict(float)
        self._by_tenant: defaultdict[str, float] = defaultdict(float)
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
            self._by_adapter[self._label_of(charge.adapter_id)] += charge.seconds
            self._by_tenant[charge.tenant] += charge.seconds
        self._idle += max(left, 0.0)

    def engine_ended(self, now: float) -> None:
        self._is_running = False
        self._unattributed += max(self._uncovered(now), 0.0)

    def split(self, now: float) -> Split:
        """The state at `now`; without an engine, the time since its end is already counted."""
        lost = 0.0 if self._is_running else max(self._uncovered(now), 0.0)
        by_adapter, by_tenant = dict(self._by_adapter), dict(self._by_tenant)
        return Split(by_adapter, by_tenant, self._idle, self._unattributed + lost)

    def _uncovered(self, now: float) -> float:
        covered = sum(self._by_adapter.values()) + self._idle + self._unattributed
        return now - self._start - covered

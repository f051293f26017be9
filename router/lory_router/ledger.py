"""Where the machine's hours went: to adapters and their tenants, to training, idling, nobody.

    sum(seconds by adapter) + sum(seconds of training) + idle + unattributed
        = seconds since start, up to the last report
    sum(seconds by tenant) = sum(seconds by adapter)

Unattributed is time without an engine: loading, restarting, and steps lost in a crash, whose
report never came. What training is charged with is taken from idle time first, then from all that
ran beside it in the same interval, so that no second is paid for twice. It must not know prices or
how figures are shown.
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
    by_trainee: Mapping[str, float]
    """Training, by tenant."""
    idle: float
    unattributed: float

    @property
    def total(self) -> float:
        served, trained = sum(self.by_adapter.values()), sum(self.by_trainee.values())
        return served + trained + self.idle + self.unattributed


class Ledger:
    """Fed with reports, told when engines come and go; `now` is any one monotonic clock.

    While an engine lives its reports alone move the ledger. At its end what they did not cover is
    unattributed, and so is all time until the first report of the next one. `trained` tells the
    seconds that training has been charged with so far, by tenant.
    """

    def __init__(
        self,
        now: float,
        label_of: Callable[[str], str] = str,
        trained: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self._start = now
        self._label_of = label_of
        self._trained = trained
        self._by_adapter: defaultdict[str, float] = defaultdict(float)
        self._by_tenant: defaultdict[str, float] = defaultdict(float)
        self._by_trainee: defaultdict[str, float] = defaultdict(float)
        self._idle = 0.0
        self._unattributed = 0.0
        self._is_running = False

    def report(self, report: StepReport, now: float) -> None:
        """One report's interval, which ended just before `now`."""
        wall_s = report.wall_seconds
        if not self._is_running:
            self._lose(self._uncovered(now) - wall_s)
            self._is_running = True
        served_s = sum(charge.seconds for charge in report.charges)
        idle_s = max(wall_s - served_s, 0.0)
        trained_s = self._take_trained(wall_s)
        from_idle_s = min(trained_s, idle_s)
        kept = 1.0 - (trained_s - from_idle_s) / served_s if served_s else 1.0
        for charge in report.charges:
            self._by_adapter[self._label_of(charge.adapter_id)] += charge.seconds * kept
            self._by_tenant[charge.tenant] += charge.seconds * kept
        self._idle += idle_s - from_idle_s

    def engine_ended(self, now: float) -> None:
        self._is_running = False
        self._lose(self._uncovered(now))

    def split(self, now: float) -> Split:
        """The state at `now`; without an engine, the time since its end is already counted."""
        lost_s = 0.0 if self._is_running else max(self._uncovered(now), 0.0)
        by_trainee = dict(self._by_trainee)
        for tenant, seconds in self._due(lost_s).items():
            by_trainee[tenant] = by_trainee.get(tenant, 0.0) + seconds
            lost_s -= seconds
        by_adapter, by_tenant = dict(self._by_adapter), dict(self._by_tenant)
        return Split(by_adapter, by_tenant, by_trainee, self._idle, self._unattributed + lost_s)

    def _lose(self, seconds: float) -> None:
        """Time without an engine."""
        seconds = max(seconds, 0.0)
        self._unattributed += seconds - self._take_trained(seconds)

    def _take_trained(self, most_s: float) -> float:
        """Charge training with what is due, out of an interval of such a length."""
        due = self._due(most_s)
        for tenant, seconds in due.items():
            self._by_trainee[tenant] += seconds
        return sum(due.values())

    def _due(self, most_s: float) -> dict[str, float]:
        """What training has to be charged with, by tenant; what is more than fits waits."""
        due: dict[str, float] = {}
        for tenant, seconds in self._trained().items():
            left_s = max(seconds - self._by_trainee.get(tenant, 0.0), 0.0)
            due[tenant] = min(left_s, most_s)
            most_s -= due[tenant]
        return due

    def _uncovered(self, now: float) -> float:
        served_s, trained_s = sum(self._by_adapter.values()), sum(self._by_trainee.values())
        return now - self._start - (served_s + trained_s + self._idle + self._unattributed)

"""What training takes, counted as serving is: seconds of the machine, and their price.

A run is in one of three states at every moment:
    alone     it runs and no request does: it is charged with the whole time
    beside    it runs, and so do requests: it is charged with half, the other half is theirs
    held      it is stopped because requests run: it is charged with nothing
The ledger takes what is charged here out of what idling and requests would be charged with. This
module must not know what is trained.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

SECONDS_PER_HOUR = 3600.0
PART_BESIDE = 0.5
"""Two that run at once pay half each."""

State = Literal["alone", "beside", "held"]
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Usage:
    """Of a run, or of all of a tenant's, in seconds."""

    alone: float = 0.0
    beside: float = 0.0
    held: float = 0.0

    @property
    def ran(self) -> float:
        return self.alone + self.beside

    @property
    def charged(self) -> float:
        return self.alone + PART_BESIDE * self.beside

    def __add__(self, other: "Usage") -> "Usage":
        held = self.held + other.held
        return Usage(self.alone + other.alone, self.beside + other.beside, held)

    def __sub__(self, other: "Usage") -> "Usage":
        held = self.held - other.held
        return Usage(self.alone - other.alone, self.beside - other.beside, held)


class Tally:
    """Of a run, counted up to the moment it is asked."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._seconds: dict[State, float] = {"alone": 0.0, "beside": 0.0, "held": 0.0}
        self._state: State | None = "alone"
        self._since = clock()

    def enter(self, state: State | None) -> None:
        """From now on the run is in this state, or over."""
        now = self._clock()
        if self._state is not None:
            self._seconds[self._state] += now - self._since
        self._state, self._since = state, now

    @property
    def usage(self) -> Usage:
        self.enter(self._state)
        return Usage(**self._seconds)


class Meter(Collector):
    """Of this server since it started; the database has each job's own figures."""

    def __init__(self, price_per_hour: float) -> None:
        self._price_per_s = price_per_hour / SECONDS_PER_HOUR
        self._over: defaultdict[str, Usage] = defaultdict(Usage)
        self._running: dict[str, Tally] = {}
        self._tokens: defaultdict[str, int] = defaultdict(int)

    @contextmanager
    def running(self, tenant: str) -> Iterator[Tally]:
        self._running[tenant] = tally = Tally()
        try:
            yield tally
        finally:
            tally.enter(None)
            self._over[tenant] += self._running.pop(tenant).usage

    def learned(self, tenant: str, num_tokens: int) -> None:
        self._tokens[tenant] += num_tokens

    def usages(self) -> dict[str, Usage]:
        found = dict(self._over)
        for tenant, tally in self._running.items():
            found[tenant] = found.get(tenant, Usage()) + tally.usage
        return found

    def charged(self) -> dict[str, float]:
        """Seconds, by tenant."""
        return {tenant: usage.charged for tenant, usage in self.usages().items()}

    def cost(self, seconds: float) -> float:
        return seconds * self._price_per_s

    def collect(self) -> Iterator[Metric]:
        """What it costs is told with all other costs."""
        yield GaugeMetricFamily(
            "lory_training_jobs_running", "Fine-tuning jobs under way now.", len(self._running)
        )
        families = {
            "ran": _counter("lory_training_seconds", "Time that fine-tuning jobs ran."),
            "held": _counter(
                "lory_training_held_seconds", "Time that they were stopped because requests ran."
            ),
            "charged": _counter(
                "lory_training_charged_seconds",
                "Time that they are charged with: that without requests, and half of the rest.",
            ),
        }
        for tenant, usage in self.usages().items():
            for name, family in families.items():
                family.add_metric((tenant,), getattr(usage, name))
        yield from families.values()
        tokens = _counter("lory_training_tokens", "Tokens that fine-tuning jobs learnt from.")
        for tenant, num_tokens in self._tokens.items():
            tokens.add_metric((tenant,), num_tokens)
        yield tokens


def _counter(name: str, text: str) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, labels=("tenant",))

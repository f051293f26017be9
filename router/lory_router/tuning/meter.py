"""What training takes, counted as serving is: seconds of the machine, and their price.

It must not know what is trained.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

SECONDS_PER_HOUR = 3600.0


class Meter(Collector):
    """Of this server since it started; the database has each job's own seconds."""

    def __init__(self, price_per_hour: float) -> None:
        self._price_per_s = price_per_hour / SECONDS_PER_HOUR
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._running: dict[str, float] = {}

    @contextmanager
    def running(self, tenant: str) -> Iterator[None]:
        self._running[tenant] = time.monotonic()
        try:
            yield
        finally:
            self._seconds[tenant] += time.monotonic() - self._running.pop(tenant)

    def seconds(self) -> dict[str, float]:
        now, found = time.monotonic(), dict(self._seconds)
        for tenant, since in self._running.items():
            found[tenant] = found.get(tenant, 0.0) + now - since
        return found

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "lory_training_jobs_running", "Fine-tuning jobs that run now.", len(self._running)
        )
        seconds = CounterMetricFamily(
            "lory_training_seconds", "Time that fine-tuning jobs ran.", labels=("tenant",)
        )
        cost = CounterMetricFamily(
            "lory_training_cost",
            "Cost of that time at the price of the machine's hour, on top of what serving costs.",
            labels=("tenant",),
        )
        for tenant, value in self.seconds().items():
            seconds.add_metric((tenant,), value)
            cost.add_metric((tenant,), value * self._price_per_s)
        yield seconds
        if self._price_per_s:
            yield cost

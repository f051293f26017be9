"""What `/metrics` says: figures gathered from requests and engine reports, rendered on demand.

Gathering is additions to plain numbers; Prometheus' format is made when someone asks. The number
of series is bounded whatever callers send. It must not know HTTP, processes or where the figures
come from.
"""

import time
from bisect import bisect_left
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from lory_router import __version__
from lory_router.ledger import Ledger
from lory_router.observe import RequestRecord
from lory_server.messages import AdapterMove, EngineInfo, StepReport
from lory_server.recipes import MERGED

BASE = "base"
MERGES = "merged"
OTHER = "other"
NONE = "none"
MAX_REMEMBERED = 4096
"""Adapters whose label is remembered; each replacement of an upload is another to the engine."""
SECONDS_PER_HOUR = 3600.0
TOKENS_PER_PRICE = 1e6
PRICED_TOKENS = ("prompt", "generated")

ROUTES = frozenset(
    (
        "/",
        "/generate",
        "/generate_stream",
        "/invocations",
        "/tokenize",
        "/v1/adapters",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/fine_tuning/jobs",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
    )
)
"""Those that are counted; any other is `other`."""

# The union of vLLM's edges and OpenTelemetry's GenAI ones, finer where a small base needs it.
FIRST_TOKEN_EDGES = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
PER_TOKEN_EDGES = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
DURATION_EDGES = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.3, 0.32, 0.5, 0.64, 0.8, 1.0, 1.28, 1.5, 2.0, 2.5, 2.56, 5.0,
    5.12, 10.0, 10.24, 15.0, 20.0, 20.48, 30.0, 40.0, 40.96, 50.0, 60.0, 81.92, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
STEP_EDGES = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
ROW_EDGES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)


class _Histogram:
    """Counts of values by upper edge."""

    def __init__(self, edges: tuple[float, ...]) -> None:
        self._edges = edges
        self._counts = [0] * (len(edges) + 1)
        self._total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._edges, value)] += times
        self._total += value * times

    def add_to(self, family: HistogramMetricFamily, labels: tuple[str, ...] = ()) -> None:
        names = [*(repr(edge) for edge in self._edges), "+Inf"]
        seen = 0
        buckets: list[tuple[str, float]] = []
        for name, count in zip(names, self._counts, strict=True):
            seen += count
            buckets.append((name, seen))
        family.add_metric(labels, buckets=buckets, sum_value=self._total)


class AdapterLabels:
    """Names adapters in labels as /v1/models does: the first ones seen, all later ones `other`.

    `base` is the base, `merged` all merges that have no name of their own, `none` a request that
    got no token: refused, failed or cancelled before. An adapter called by one of these words is
    named through the base, which /v1/models takes, too.
    """

    def __init__(self, limit: int, model: str, name_of: Callable[[str], str]) -> None:
        self._limit = limit
        self._model = model
        self._name_of = name_of
        self._labels: OrderedDict[str, str] = OrderedDict()
        self._shown: set[str] = set()

    def of(self, adapter_id: str) -> str:
        if adapter_id in ("", MERGED):
            return MERGES if adapter_id else BASE
        label = self._labels.get(adapter_id)
        if label is None:
            label = self._name_of(adapter_id)
            if len(self._shown) >= self._limit and label not in self._shown:
                return OTHER
            if label in (BASE, MERGES, OTHER, NONE):
                label = f"{self._model}:{adapter_id}"
            self._shown.add(label)
            self._labels[adapter_id] = label
            if len(self._labels) > MAX_REMEMBERED:
                self._labels.popitem(last=False)
        return label


class Metrics(Collector):
    """A `observe.MetricsSink` that also takes the engine's reports. One per server."""

    def __init__(
        self,
        *,
        model: str,
        price_per_hour: float = 0.0,
        max_adapter_labels: int = 200,
        name_of: Callable[[str], str] = str,
        trained: Callable[[], Mapping[str, float]] = dict,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._price_per_s = price_per_hour / SECONDS_PER_HOUR
        self._clock = clock
        self._labels = AdapterLabels(max_adapter_labels, model, name_of)
        self._ledger = Ledger(clock(), self._labels.of, trained)
        self._info: EngineInfo | None = None
        self._report: StepReport | None = None
        self._last_report_at = clock()
        self._is_up = False
        self._restarts = 0
        self._open = 0
        self._counts: defaultdict[tuple[str, ...], int] = defaultdict(int)
        self._first_token = _Histogram(FIRST_TOKEN_EDGES)
        self._per_token = _Histogram(PER_TOKEN_EDGES)
        self._queue = _Histogram(FIRST_TOKEN_EDGES)
        self._duration = _Histogram(DURATION_EDGES)
        self._rows = _Histogram(ROW_EDGES)
        self._step = _Histogram(STEP_EDGES)
        self._loads = {tier: _Histogram(STEP_EDGES) for tier in ("host", "device")}
        self._last_step = 0
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    # -- from the routes --------------------------------------------------------------------

    def request_started(self, route: str) -> None:
        self._open += 1

    def request_finished(self, record: RequestRecord) -> None:
        """Count one request that is over."""
        self._open -= 1
        adapter_id = record.adapter_id
        label = NONE if adapter_id is None else self._labels.of(adapter_id)
        route = record.route if record.route in ROUTES else OTHER
        self._counts["request", route, label, record.outcome] += 1
        self._duration.add(record.duration_s)
        if adapter_id is not None:
            self._count_served(record, label)

    def _count_served(self, record: RequestRecord, label: str) -> None:
        self._queue.add(record.queue_s)
        if record.time_to_first_token_s is not None:
            self._first_token.add(record.time_to_first_token_s)
        if record.time_per_token_s is not None:
            self._per_token.add(record.time_per_token_s)
        self._counts["tenant_request", record.tenant] += 1
        self._counts["tenant_token", record.tenant, "prompt"] += record.prompt_tokens
        self._counts["tenant_token", record.tenant, "generated"] += record.generated_tokens
        self._counts["adapter_request", label] += 1
        self._counts["token", label, "prompt"] += record.prompt_tokens
        self._counts["token", label, "generated"] += record.generated_tokens
        self._counts["token", label, "cached"] += record.cached_tokens

    def render(self) -> tuple[bytes, str]:
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    # -- from the engine --------------------------------------------------------------------

    def add(self, collector: Collector) -> None:
        """Tell what it collects, too."""
        self._registry.register(collector)

    def engine_up(self, info: EngineInfo) -> None:
        self._info = info
        self._is_up = True
        self._last_step = 0

    def engine_report(self, report: StepReport) -> None:
        """Count what one report tells."""
        now = self._clock()
        self._ledger.report(report, now)
        self._report = report
        self._last_report_at = now
        if report.num_rows:
            self._count_steps(report)
        counts = self._counts
        counts["preemption",] += report.preemptions
        counts["prefix", "hit"] += report.prefix_hits
        counts["prefix", "miss"] += report.prefix_queries - report.prefix_hits
        for move in report.moves:
            self._count_move(move)

    def engine_down(self) -> None:
        if self._is_up:
            self._ledger.engine_ended(self._clock())
        self._is_up = False
        self._report = None

    def engine_restarting(self) -> None:
        self._restarts += 1

    def _count_steps(self, report: StepReport) -> None:
        """A report tells of one step, or of the few that ran since the last."""
        steps = max(report.step - self._last_step, 1)
        self._last_step = report.step
        self._counts["step",] += steps
        self._rows.add(report.num_rows / steps, steps)
        seconds = sum(charge.seconds for charge in report.charges)
        self._step.add(seconds / steps, steps)

    def _count_move(self, move: AdapterMove) -> None:
        self._counts[move.kind, move.tier] += 1
        if move.kind == "load":
            self._loads[move.tier].add(move.seconds)

    # -- to Prometheus ----------------------------------------------------------------------

    def collect(self) -> Iterator[Metric]:
        """Every family, made now."""
        yield from self._collect_requests()
        yield from self._collect_engine()
        yield from self._collect_steps()
        yield from self._collect_adapters()
        if self._price_per_s:
            yield from self._collect_costs()

    def _collect_requests(self) -> Iterator[Metric]:
        yield self._counter(
            "lory_requests", "Requests that are over.", "request", ("route", "adapter", "outcome")
        )
        yield _gauge("lory_open_requests", "HTTP requests being answered now.", self._open)
        tokens = CounterMetricFamily(
            "lory_tokens", "Tokens served; a prompt counts once.", labels=("kind",)
        )
        for kind in ("prompt", "generated", "cached"):
            tokens.add_metric((kind,), self._tokens(kind))
        yield tokens
        yield self._counter(
            "lory_tenant_requests", "Requests served.", "tenant_request", ("tenant",)
        )
        yield self._counter(
            "lory_tenant_tokens", "Tokens served.", "tenant_token", ("tenant", "kind")
        )
        for name, text, histogram in (
            ("time_to_first_token", "From arrival to the first token.", self._first_token),
            ("time_per_output_token", "Mean gap between a request's tokens.", self._per_token),
            ("request_queue", "From acceptance to the first step.", self._queue),
            ("request_duration", "From arrival to the end.", self._duration),
        ):
            yield _histogram(f"lory_{name}_seconds", text, histogram)

    def _collect_engine(self) -> Iterator[Metric]:
        yield _gauge("lory_engine_up", "1 while an engine is loaded and running.", self._is_up)
        yield CounterMetricFamily(
            "lory_engine_restarts", "Engines started after the first.", value=self._restarts
        )
        yield _gauge(
            "lory_engine_last_report_age_seconds",
            "Since the engine last spoke.",
            self._clock() - self._last_report_at,
        )
        labels = {"version": __version__, "model": self._model, "quantize": "", "device": ""}
        if self._info is not None:
            labels |= {"quantize": self._info.quantize, "device": self._info.device}
        info = GaugeMetricFamily("lory_info", "What is served.", labels=tuple(labels))
        info.add_metric(tuple(labels.values()), 1)
        yield info

    def _collect_steps(self) -> Iterator[Metric]:
        report = self._report
        yield CounterMetricFamily(
            "lory_steps", "Steps that had rows.", value=self._counts.get(("step",), 0)
        )
        yield _histogram("lory_batch_rows", "Rows of a step.", self._rows)
        yield _histogram("lory_step_seconds", "Time between commits.", self._step)
        yield _gauge(
            "lory_running_requests", "Sequences in the batch.", report.num_running if report else 0
        )
        yield _gauge(
            "lory_waiting_requests", "Sequences in the queue.", report.num_waiting if report else 0
        )
        blocks = GaugeMetricFamily("lory_kv_blocks", "Blocks of KV cache.", labels=("state",))
        for state, count in _blocks(report).items():
            blocks.add_metric((state,), count)
        yield blocks
        yield CounterMetricFamily(
            "lory_preemptions", "Sequences set back.", value=self._counts.get(("preemption",), 0)
        )
        yield self._counter(
            "lory_prefix_cache_tokens", "Prompt tokens looked up.", "prefix", ("result",)
        )

    def _collect_adapters(self) -> Iterator[Metric]:
        report = self._report
        tiers = GaugeMetricFamily(
            "lory_adapters",
            "Adapters by where they are; one on the device is on the host and on disk, too.",
            labels=("tier",),
        )
        sizes = GaugeMetricFamily("lory_adapter_bytes", "Bytes of adapters.", labels=("tier",))
        pins = GaugeMetricFamily(
            "lory_pinned_adapters", "Pinned adapters by where they are.", labels=("tier",)
        )
        if report is not None:
            tiers.add_metric(("disk",), report.adapters_disk)
            tiers.add_metric(("host",), report.adapters_host)
            tiers.add_metric(("device",), report.adapters_device)
            sizes.add_metric(("host",), report.adapter_host_bytes)
            sizes.add_metric(("device",), report.adapter_device_bytes)
            pins.add_metric(("host",), report.pins_host)
            pins.add_metric(("device",), report.pins_device)
        yield tiers
        yield pins
        yield sizes
        yield self._counter("lory_adapter_loads", "Adapters brought in.", "load", ("tier",))
        yield self._counter("lory_adapter_evictions", "Adapters put out.", "evict", ("tier",))
        yield self._counter("lory_adapter_load_failures", "Loads that failed.", "fail", ("tier",))
        seconds = HistogramMetricFamily(
            "lory_adapter_load_seconds", "Time to bring one in.", labels=("tier",)
        )
        for tier, histogram in self._loads.items():
            histogram.add_to(seconds, (tier,))
        yield seconds
        yield self._counter(
            "lory_adapter_requests", "Requests served.", "adapter_request", ("adapter",)
        )
        yield self._counter("lory_adapter_tokens", "Tokens served.", "token", ("adapter", "kind"))

    def _collect_costs(self) -> Iterator[Metric]:
        """Costs by the price of the machine's hour, without which there are none.

        See `ledger` for what they add up to.
        """
        split = self._ledger.split(self._clock())
        price = self._price_per_s
        costs = {label: seconds * price for label, seconds in split.by_adapter.items()}
        cost = CounterMetricFamily("lory_cost", "Cost of steps.", labels=("adapter",))
        unit = GaugeMetricFamily(
            "lory_cost_per_million_tokens",
            "Cost since start by million prompt and generated tokens.",
            labels=("adapter",),
        )
        for label, value in costs.items():
            cost.add_metric((label,), value)
            tokens = sum(self._counts.get(("token", label, kind), 0) for kind in PRICED_TOKENS)
            if tokens:
                unit.add_metric((label,), value / tokens * TOKENS_PER_PRICE)
        yield cost
        yield unit
        tenant_cost = CounterMetricFamily("lory_tenant_cost", "Cost of steps.", labels=("tenant",))
        for tenant, seconds in split.by_tenant.items():
            tenant_cost.add_metric((tenant,), seconds * price)
        yield tenant_cost
        training_cost = CounterMetricFamily(
            "lory_training_cost", "Cost of fine-tuning jobs.", labels=("tenant",)
        )
        for tenant, seconds in split.by_trainee.items():
            training_cost.add_metric((tenant,), seconds * price)
        yield training_cost
        yield CounterMetricFamily(
            "lory_cost_idle", "Cost of a machine with nothing to do.", value=split.idle * price
        )
        yield CounterMetricFamily(
            "lory_cost_unattributed",
            "Cost of time without an engine (loading, downtime) and of steps lost in a crash.",
            value=split.unattributed * price,
        )

    def _counter(
        self, name: str, text: str, key: str, labels: tuple[str, ...]
    ) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=labels)
        for (kind, *values), count in self._counts.items():
            if kind == key:
                family.add_metric(values, count)
        return family

    def _tokens(self, kind: str) -> int:
        return sum(
            count for key, count in self._counts.items() if key[0] == "token" and key[2] == kind
        )


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _histogram(name: str, text: str, histogram: _Histogram) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, text, labels=())
    histogram.add_to(family)
    return family


def _blocks(report: StepReport | None) -> dict[str, int]:
    if report is None:
        return {}
    free = report.blocks_total - report.blocks_used - report.blocks_cached
    return {"used": report.blocks_used, "cached": report.blocks_cached, "free": free}

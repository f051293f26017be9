"""What /metrics says: figures that add up, and a bounded number of them."""

import math
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from lory_router.intake_openai import adapter_of, model_of
from lory_router.ledger import Ledger
from lory_router.metrics import ROUTES, Metrics
from lory_router.observe import RequestRecord
from lory_router.settings import RouterSettings
from lory_server.messages import AdapterMove, Charge, EngineInfo, StepReport

PRICE = 3.6
"""An hour's price that makes a second cost 0.001."""


class Clock:
    """Time as a test says it is."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def report(
    wall: float = 1.0, charges: tuple[Charge, ...] = (), step: int = 1, **changes: object
) -> StepReport:
    values: dict[str, object] = {
        "step": step,
        "wall_seconds": wall,
        "num_rows": len(charges),
        "num_prompt_tokens": 0,
        "num_sampled": 0,
        "num_running": 3,
        "num_waiting": 2,
        "blocks_used": 10,
        "blocks_cached": 5,
        "blocks_total": 100,
        "prefix_queries": 8,
        "prefix_hits": 6,
        "preemptions": 1,
        "adapters_disk": 7,
        "adapters_host": 2,
        "adapters_device": 1,
        "adapter_host_bytes": 200,
        "adapter_device_bytes": 100,
        "charges": charges,
    }
    return StepReport(**(values | changes))  # type: ignore[arg-type]


def charge(adapter_id: str, seconds: float) -> Charge:
    return Charge(1, "default", adapter_id, seconds, 4, 1)


def record(**changes: object) -> RequestRecord:
    values: dict[str, object] = {
        "route": "/generate",
        "tenant": "default",
        "adapter_id": "polite",
        "status": 200,
        "outcome": "stop",
        "duration_s": 0.7,
        "queue_s": 0.003,
        "time_to_first_token_s": 0.03,
        "time_per_token_s": 0.02,
        "prompt_tokens": 10,
        "generated_tokens": 5,
        "cached_tokens": 4,
    }
    return RequestRecord(**(values | changes))  # type: ignore[arg-type]


def move(kind: Literal["load", "evict", "fail"], tier: Literal["host", "device"]) -> AdapterMove:
    return AdapterMove(adapter_id="a", kind=kind, tier=tier, seconds=0.004, num_bytes=10)


INFO = EngineInfo(
    model="/folder/base",
    architecture="Fake",
    device="cpu",
    dtype="float32",
    quantize="nf4",
    vocab_size=256,
    max_model_len=64,
    eos_token_ids=(0,),
    num_blocks=100,
    block_size=16,
    max_batch_rows=8,
    max_step_tokens=64,
    pid=1,
    memory_table=(),
    load_seconds=0.0,
)


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Every sample by name and label values, these in the order of their names."""
    text = metrics.render()[0].decode()
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def new_metrics(clock: Clock | None = None, max_adapter_labels: int = 200) -> Metrics:
    return Metrics(
        model="base",
        price_per_hour=PRICE,
        max_adapter_labels=max_adapter_labels,
        clock=clock or Clock(),
    )


def test_a_request_is_counted_under_its_route_adapter_and_outcome() -> None:
    metrics = new_metrics()
    metrics.request_started("/generate")
    assert samples(metrics)["lory_open_requests",] == 1
    metrics.request_finished(record())
    found = samples(metrics)
    assert found["lory_open_requests",] == 0
    assert found["lory_requests_total", "polite", "stop", "/generate"] == 1
    assert found["lory_adapter_requests_total", "polite"] == 1
    tokens = {kind: found["lory_tokens_total", kind] for kind in ("prompt", "generated", "cached")}
    assert tokens == {"prompt": 10, "generated": 5, "cached": 4}
    assert found["lory_adapter_tokens_total", "polite", "generated"] == 5


def test_times_fall_in_the_bucket_whose_edge_they_do_not_pass() -> None:
    metrics = new_metrics()
    metrics.request_started("/generate")
    metrics.request_finished(record(time_to_first_token_s=0.04))
    found = samples(metrics)
    assert found["lory_time_to_first_token_seconds_bucket", "0.02"] == 0
    assert found["lory_time_to_first_token_seconds_bucket", "0.04"] == 1
    assert found["lory_time_to_first_token_seconds_bucket", "+Inf"] == 1
    assert found["lory_time_to_first_token_seconds_sum",] == pytest.approx(0.04)
    assert found["lory_request_duration_seconds_count",] == 1
    assert found["lory_request_queue_seconds_bucket", "0.005"] == 1
    assert found["lory_time_per_output_token_seconds_bucket", "0.025"] == 1


def test_refused_requests_leave_no_times_and_no_adapter() -> None:
    metrics = new_metrics()
    metrics.request_started("/generate")
    metrics.request_finished(
        record(
            adapter_id=None, status=404, outcome="refused", prompt_tokens=0, generated_tokens=0,
            cached_tokens=0, time_to_first_token_s=None, time_per_token_s=None,
        )
    )  # fmt: skip
    found = samples(metrics)
    assert found["lory_requests_total", "none", "refused", "/generate"] == 1
    assert ("lory_requests_total", "base", "refused", "/generate") not in found
    assert found["lory_time_to_first_token_seconds_count",] == 0
    assert not [key for key in found if key[0] == "lory_adapter_requests_total"]


def test_routes_that_are_not_ours_share_one_label() -> None:
    metrics = new_metrics()
    for number in range(50):
        metrics.request_started("/x")
        metrics.request_finished(record(route=f"/scan/{number}"))
    assert samples(metrics)["lory_requests_total", "polite", "stop", "other"] == 50


def test_the_labelled_routes_are_those_that_the_application_counts() -> None:
    from lory_router.adapters import COUNTED
    from lory_router.app import GENERATION
    from lory_router.tuning.routes import JOBS

    assert {*(path for path, _, _ in GENERATION), *COUNTED, JOBS} == ROUTES


def test_only_the_first_adapters_have_labels_of_their_own() -> None:
    metrics = new_metrics(max_adapter_labels=3)
    metrics.engine_up(INFO)
    for number in range(10):
        metrics.request_finished(record(adapter_id=f"a{number}"))
        metrics.engine_report(report(charges=(charge(f"a{number}", 1.0),)))
    found = samples(metrics)
    labels = {key[1] for key in found if key[0] == "lory_adapter_requests_total"}
    assert labels == {"a0", "a1", "a2", "other"}
    assert found["lory_adapter_requests_total", "other"] == 7
    assert found["lory_cost_total", "other"] == pytest.approx(0.007)


@pytest.mark.parametrize("base", ["base", "demo"])
def test_adapters_are_called_as_the_list_of_models_calls_them(base: str) -> None:
    """One had two names: base:base in the list, adapter:base here."""
    router = RouterSettings(model_names=(base,))
    metrics = Metrics(model=base, name_of=partial(model_of, settings=router))
    names = ("base", "other", "none", "demo", "base:x", "polite", "")
    for name in names:
        metrics.request_finished(record(adapter_id=name))
    labels = {key[1] for key in samples(metrics) if key[0] == "lory_adapter_requests_total"}
    assert len(labels) == len(names)
    own = {"base", "other", "none"}
    assert {model_of(name, router) for name in names if name} - own <= labels
    assert {adapter_of(label, router) for label in labels - {"base"}} == set(names) - {""}


def test_the_engines_state_is_shown_and_cleared_when_it_ends() -> None:
    clock = Clock()
    metrics = new_metrics(clock)
    assert samples(metrics)["lory_engine_up",] == 0
    metrics.engine_up(INFO)
    metrics.engine_report(report(charges=(charge("polite", 1.0), charge("", 0.5))))
    clock.now += 2
    found = samples(metrics)
    assert found["lory_engine_up",] == 1
    assert found["lory_engine_last_report_age_seconds",] == 2
    assert found["lory_running_requests",] == 3
    assert found["lory_waiting_requests",] == 2
    states = ("used", "cached", "free")
    assert [found["lory_kv_blocks", state] for state in states] == [10, 5, 85]
    assert found["lory_adapters", "disk"] == 7
    assert found["lory_adapter_bytes", "device"] == 100
    assert found["lory_prefix_cache_tokens_total", "hit"] == 6
    assert found["lory_prefix_cache_tokens_total", "miss"] == 2
    assert found["lory_preemptions_total",] == 1
    metrics.engine_down()
    metrics.engine_restarting()
    found = samples(metrics)
    assert found["lory_engine_up",] == 0
    assert found["lory_running_requests",] == 0
    assert found["lory_engine_restarts_total",] == 1


def test_info_names_the_model_and_not_where_it_lies() -> None:
    metrics = new_metrics()
    metrics.engine_up(INFO)
    line = next(key for key in samples(metrics) if key[0] == "lory_info")
    assert line[1:4] == ("cpu", "base", "nf4")


def test_steps_and_rows_are_counted_only_when_rows_ran() -> None:
    metrics = new_metrics()
    metrics.engine_up(INFO)
    metrics.engine_report(report(wall=0.5, step=0))
    metrics.engine_report(report(wall=0.012, charges=tuple([charge("a", 0.004)] * 3), step=1))
    metrics.engine_report(report(wall=0.5, step=1))
    metrics.engine_report(report(wall=0.02, charges=tuple([charge("a", 0.005)] * 4), step=3))
    found = samples(metrics)
    assert found["lory_steps_total",] == 3
    assert found["lory_batch_rows_bucket", "2.0"] == 2
    assert found["lory_batch_rows_sum",] == 7
    assert found["lory_step_seconds_count",] == 3
    assert found["lory_step_seconds_sum",] == pytest.approx(0.032)


def test_steps_go_on_counting_over_a_restart() -> None:
    metrics = new_metrics()
    for _ in range(2):
        metrics.engine_up(INFO)
        metrics.engine_report(report(charges=(charge("a", 1.0),), step=1))
        metrics.engine_report(report(charges=(charge("a", 1.0),), step=2))
        metrics.engine_down()
    assert samples(metrics)["lory_steps_total",] == 4


def test_moves_of_adapters_are_counted_by_tier() -> None:
    metrics = new_metrics()
    moves = (move("load", "host"), move("load", "device"), move("evict", "device"))
    moves += (move("fail", "host"),)
    metrics.engine_report(report(moves=moves))
    found = samples(metrics)
    assert found["lory_adapter_loads_total", "host"] == 1
    assert found["lory_adapter_loads_total", "device"] == 1
    assert found["lory_adapter_evictions_total", "device"] == 1
    assert found["lory_adapter_load_failures_total", "host"] == 1
    assert found["lory_adapter_load_seconds_bucket", "0.005", "host"] == 1
    assert found["lory_adapter_load_seconds_count", "device"] == 1


def test_cost_goes_by_charge_and_a_million_tokens_by_what_was_served() -> None:
    metrics = new_metrics()
    metrics.engine_up(INFO)
    metrics.engine_report(report(wall=4.0, charges=(charge("polite", 3.0), charge("", 0.5))))
    metrics.request_finished(record(prompt_tokens=20, generated_tokens=10))
    found = samples(metrics)
    assert found["lory_cost_total", "polite"] == pytest.approx(0.003)
    assert found["lory_cost_total", "base"] == pytest.approx(0.0005)
    assert found["lory_cost_idle_total",] == pytest.approx(0.0005)
    assert found["lory_cost_per_million_tokens", "polite"] == pytest.approx(0.003 / 30 * 1e6)
    assert ("lory_cost_per_million_tokens", "base") not in found


def test_without_a_price_no_cost_is_told() -> None:
    """A cost of 0.0 was told instead."""
    metrics = Metrics(model="base")
    metrics.engine_up(INFO)
    metrics.engine_report(report(wall=4.0, charges=(charge("polite", 3.0),)))
    metrics.request_finished(record())
    assert not [key for key in samples(metrics) if key[0].startswith("lory_cost")]


def all_costs(metrics: Metrics) -> float:
    names = {"lory_cost_total", "lory_cost_idle_total", "lory_cost_unattributed_total"}
    return sum(value for key, value in samples(metrics).items() if key[0] in names)


def test_costs_add_up_to_the_machines_over_loading_work_crash_and_restart() -> None:
    clock = Clock()
    metrics = new_metrics(clock)
    clock.now += 20
    assert all_costs(metrics) == pytest.approx(0.020)
    for _ in range(2):
        metrics.engine_up(INFO)
        for wall, busy in ((0.5, 0.0), (0.25, 0.25), (2.0, 1.5)):
            clock.now += wall
            charges = (charge("a", busy / 2), charge("b", busy / 2)) if busy else ()
            metrics.engine_report(report(wall=wall, charges=charges))
        assert all_costs(metrics) == pytest.approx((clock.now - 1000) / 1000)
        clock.now += 0.75
        metrics.engine_down()
        assert all_costs(metrics) == pytest.approx((clock.now - 1000) / 1000)
        clock.now += 6
        assert all_costs(metrics) == pytest.approx((clock.now - 1000) / 1000)
    found = samples(metrics)
    assert found["lory_cost_total", "a"] == pytest.approx(0.00175)
    assert found["lory_cost_idle_total",] == pytest.approx(0.002)
    assert found["lory_cost_unattributed_total",] == pytest.approx(0.0335)


Event = tuple[str, float]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["work", "idle", "crash"]), st.floats(0.001, 50))))
def test_no_second_is_lost_or_counted_twice(events: list[Event]) -> None:
    now, last_report, running = 50.0, 50.0, False
    ledger = Ledger(now)
    previous = ledger.split(now)
    for kind, seconds in events:
        now += seconds
        if kind == "crash":
            ledger.engine_ended(now)
            running = False
        else:
            wall = now - last_report if running else seconds / 2
            charges = (charge("a", wall / 3), charge("b", wall / 3)) if kind == "work" else ()
            ledger.report(report(wall=wall, charges=charges), now)
            running = True
        last_report = now
        split = ledger.split(now)
        assert math.isclose(split.total, now - 50.0, rel_tol=1e-9)
        assert split.idle >= previous.idle
        assert split.unattributed >= previous.unattributed - 1e-9
        previous = split


Turn = tuple[str, float, float]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["work", "half", "idle", "crash"]), st.floats(0.01, 50), st.floats(0, 1)
        )
    )
)
def test_training_is_charged_once_whatever_ran_beside_it(turns: list[Turn]) -> None:
    """Out of idle time, out of what requests would pay, out of time without an engine."""
    now, charged = 50.0, {"t": 0.0, "u": 0.0}
    ledger = Ledger(now, trained=lambda: charged)
    for kind, seconds, trained in turns:
        now += seconds
        charged["u" if trained > 0.5 else "t"] += seconds * trained
        if kind == "crash":
            ledger.engine_ended(now)
        else:
            busy = {"work": seconds, "half": seconds / 2, "idle": 0.0}[kind]
            charges = (charge("a", busy / 4), charge("b", busy * 3 / 4)) if busy else ()
            ledger.report(report(wall=seconds, charges=charges), now)
        split = ledger.split(now)
        assert math.isclose(split.total, now - 50.0, rel_tol=1e-9)
        assert split.by_trainee == pytest.approx(charged)
        assert sum(split.by_tenant.values()) == pytest.approx(sum(split.by_adapter.values()))
        parts = (*split.by_adapter.values(), split.idle, split.unattributed)
        assert min(parts) >= -1e-9


def test_a_report_that_comes_late_charges_training_no_more_than_there_was() -> None:
    """The rest waits for the next one."""
    charged = {"t": 3.0}
    ledger = Ledger(0.0, trained=lambda: charged)
    ledger.report(report(wall=1.0, charges=(charge("a", 0.8),)), 1.0)
    split = ledger.split(1.0)
    assert (split.by_trainee, split.idle, split.by_adapter["a"]) == ({"t": 1.0}, 0.0, 0.0)
    ledger.report(report(wall=4.0, charges=(charge("a", 1.0),)), 5.0)
    split = ledger.split(5.0)
    assert split.by_trainee == pytest.approx(charged)
    assert (split.idle, split.by_adapter["a"]) == pytest.approx((1.0, 1.0))


def test_costs_with_a_job_add_up_to_the_machines() -> None:
    """The sum of everything that has a price, training with it, by one job's own clock."""
    clock, charged = Clock(), {"acme": 0.0}
    metrics = Metrics(model="base", price_per_hour=PRICE, clock=clock, trained=lambda: charged)
    for busy in (0.0, 1.0, 1.0, 0.25):
        metrics.engine_up(INFO)
        clock.now += 2
        charged["acme"] += 0.5
        charges = (charge("a", busy),) if busy else ()
        metrics.engine_report(report(wall=2.0, charges=charges))
    found = samples(metrics)
    assert found["lory_training_cost_total", "acme"] == pytest.approx(0.002)
    assert found["lory_cost_idle_total",] == pytest.approx(0.00375)
    assert found["lory_cost_total", "a"] == pytest.approx(0.00225), "there was idle time enough"
    together = all_costs(metrics) + found["lory_training_cost_total", "acme"]
    assert together == pytest.approx(0.008)


def test_counters_never_fall_between_scrapes_of_a_running_engine() -> None:
    clock = Clock()
    metrics = new_metrics(clock)
    seen: dict[tuple[str, ...], float] = {}
    for turn in range(20):
        clock.now += 0.4
        if turn == 5:
            metrics.engine_up(INFO)
        if turn in range(5, 12):
            metrics.engine_report(report(wall=0.4, charges=(charge("a", 0.3),), step=turn))
        if turn == 12:
            metrics.engine_down()
        found = samples(metrics)
        for key, value in seen.items():
            if key[0].endswith("_total"):
                assert found[key] >= value - 1e-12, key
        seen = found


def test_the_number_of_series_is_bounded_whatever_is_asked() -> None:
    metrics = new_metrics(max_adapter_labels=5)
    for number in range(300):
        metrics.request_finished(record(route=f"/{number}", adapter_id=f"a{number}"))
        metrics.engine_report(report(charges=(charge(f"a{number}", 0.1),)))
    num_series = len(samples(metrics))
    for number in range(300, 600):
        metrics.request_finished(record(route=f"/{number}", adapter_id=f"a{number}"))
        metrics.engine_report(report(charges=(charge(f"a{number}", 0.1),)))
    assert len(samples(metrics)) == num_series < 400


def test_the_version_is_the_distributions() -> None:
    import tomllib

    from lory_router import __version__

    project = Path(__file__).parents[1] / "pyproject.toml"
    assert tomllib.loads(project.read_text())["project"]["version"] == __version__

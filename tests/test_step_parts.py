"""The parts of a step: they add up, each is where its name says, and the command writes them."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import step_parts
from benchmarks.models import SHAPES, ensure_base
from benchmarks.step_parts import PARTS, SCENARIOS, Bench, Settings, Watch

from lory_kernels import panels

CAN_RECORD = panels.can_pack(torch.empty((2, 2), dtype=torch.bfloat16))
TINY = Settings(
    model="tiny",
    quantize="none",
    rows=3,
    context=20,
    rank=4,
    threads=1,
    turns=2,
    warmup=1,
    reps=3,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def base(models: Path) -> Path:
    return ensure_base(SHAPES["tiny"], models)


def test_the_parts_of_a_step_add_up_to_it(base: Path) -> None:
    bench = Bench(TINY, base, has_adapters=True)
    seconds = dict(bench.step(bench.plan("distinct")))
    whole_s = seconds.pop("whole")
    assert seconds.keys() == set(PARTS)
    assert all(value > 0 for value in seconds.values())
    assert sum(seconds.values()) == pytest.approx(whole_s)


def test_base_rows_spend_nothing_on_adapters(base: Path) -> None:
    bench = Bench(TINY, base, has_adapters=True)
    assert bench.step(bench.plan("base"))["sgmv"] == 0
    assert bench.step(bench.plan("one"))["sgmv"] > 0


@pytest.mark.skipif(not CAN_RECORD, reason="this CPU has no linears that can be recorded")
def test_the_layers_of_a_recorded_step_are_one_part(base: Path) -> None:
    bench = Bench(TINY, base, has_adapters=True)
    bench.record()
    assert bench.decoder.is_recorded
    seconds = bench.step(bench.plan("one"))
    # The last norm is no part of a layer.
    told_apart = {part for part in PARTS if seconds[part] > 0}
    assert told_apart == {"elementwise", "head", "sampling", "packing", "rest"}


def test_rows_of_an_adapter_and_of_none_are_what_a_scenario_says(base: Path) -> None:
    bench = Bench(TINY, base, has_adapters=True)
    slots = {name: [row.slot for row in bench.plan(name).rows] for name in SCENARIOS}
    assert slots["bare"] == slots["base"] == [-1, -1, -1]
    assert slots["one"] == [0, 0, 0]
    assert slots["distinct"] == [0, 1, 2]


def test_time_goes_to_the_part_that_took_it() -> None:
    watch = Watch()
    head = watch.timed("head", lambda: time.sleep(0.02))
    linear = watch.timed("linears", lambda: time.sleep(0.01))

    def run() -> None:
        linear()
        time.sleep(0.03)
        linear()
        head()
        time.sleep(0.04)

    for _ in range(2):  # nothing is left of the step before
        seconds = watch.step(run)
        wanted = {"linears": 0.02, "head": 0.02, "sampling": 0.04, "rest": 0.03, "whole": 0.11}
        for part, wanted_s in wanted.items():
            assert wanted_s <= seconds[part] + 1e-6, part
        assert seconds["sgmv"] == 0
        assert seconds["linears"] < 2 * seconds["whole"] / 3


def test_typical_steps_are_the_middle_half_and_still_add_up() -> None:
    wholes = (1.0, 100.0, 2.0, 4.0, 3.0, 0.1, 3.0, 50.0)
    steps = [{"head": whole / 4, "rest": whole * 3 / 4, "whole": whole} for whole in wholes]
    assert step_parts.typical(steps) == {"head": 0.75, "rest": 2.25, "whole": 3.0}


def test_scenarios_take_turns_and_first_steps_do_not_count() -> None:
    calls: list[str] = []

    def run(name: str) -> dict[str, float]:
        calls.append(name)
        return {"whole": float(len(calls))}

    runs = {"base": lambda: run("b"), "one": lambda: run("o")}
    found = step_parts.in_turn(replace(TINY, turns=2, warmup=1, reps=2), runs)
    assert "".join(calls) == "bbbooobbbooo"
    turns = [[step["whole"] for step in turn] for turn in found["base"]]
    assert turns == [[2.0, 3.0], [8.0, 9.0]]


def test_a_ratio_is_taken_within_each_turn() -> None:
    """A machine that slows down half-way changes both alike."""
    ours, theirs = (
        [[{"whole": s}] for s in wholes] for wholes in ((9.0, 18.0, 5.0), (10.0, 20.0, 1.0))
    )
    assert step_parts.ratio(ours, theirs) == pytest.approx(0.9)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_the_command_writes_every_scenario(
    quantize: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_parts, "QUIET_LIMIT_S", 0.0)
    out = tmp_path / "parts.json"
    sizes = ["--rows", "2", "--context", "20", "--turns", "2", "--warmup", "1", "--reps", "2"]
    argv = ["--model", "tiny", "--quantize", quantize, "--threads", "1", *sizes]
    assert step_parts.main([*argv, "--models", str(models), "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["settings"]["quantize"] == quantize
    assert found["command"].startswith("python -m benchmarks.step_parts --model tiny")
    assert found["is_recorded"] == CAN_RECORD
    assert found["bare_to_base"] > 0
    assert tuple(found["scenarios"]) == SCENARIOS
    for figures in found["scenarios"].values():
        parts = figures["parts_ms"]
        assert tuple(parts) == PARTS
        assert all(value >= 0 for value in parts.values())
        assert sum(parts.values()) == pytest.approx(figures["op_by_op_ms"], abs=1e-3)
        assert figures["served_ms"] > 0

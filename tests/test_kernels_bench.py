"""The kernel bench's parts: popularity, limits, measuring, the clock, the table and the command."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernel_bench_cases import LIMITS, ONCE, WrongOps, place, quickly, tiny_cases
from lory_kernels import BASE_SLOT, TorchOps
from lory_kernels.bench import limits, table
from lory_kernels.bench import run as running
from lory_kernels.bench.__main__ import main
from lory_kernels.bench.case import Case, Contender, Label, Role, Run, cloned, tensor_bytes
from lory_kernels.bench.clock import CpuClock, Effort, Times
from lory_kernels.bench.measure import CaseFindings, error_of
from lory_kernels.bench.nf4 import nf4_case
from lory_kernels.bench.peers import Peers
from lory_kernels.bench.popularity import POPULARITIES, Mix, by_name, equal
from lory_kernels.bench.sgmv import Ranks, sgmv_case
from lory_kernels.bench.shapes import MODELS

# -- popularity -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "counts", "slots"),
    [
        ("distinct", (1,) * 10, range(10)),
        ("identical", (10,), (0,)),
        ("uniform", (3, 3, 2, 2), range(4)),
        ("base-only", (10,), (BASE_SLOT,)),
        ("half-base", (5, 1, 1, 1, 1, 1), (BASE_SLOT, 0, 1, 2, 3, 4)),
        ("equal-3", (4, 3, 3), range(3)),
        ("equal-64", (1,) * 10, range(10)),
    ],
)
def test_popularity_deals_ten_rows(
    name: str, counts: tuple[int, ...], slots: Sequence[int]
) -> None:
    assert by_name(name).mix(10) == Mix(counts, tuple(slots))


def test_of_odd_rows_the_base_has_the_fewer() -> None:
    assert by_name("half-base").mix(7) == Mix((3, 1, 1, 1, 1), (BASE_SLOT, 0, 1, 2, 3))


def test_zipf_deals_in_proportion_to_its_formula() -> None:
    """Off by less than a row each; who gets none is absent."""
    mix = POPULARITIES["zipf-1.5"].mix(32)
    shares = [k**-1.5 for k in range(1, 33)]
    exact = [32 * share / sum(shares) for share in shares]
    dealt = [*mix.counts, *[0] * (32 - len(mix.counts))]
    assert all(abs(a - b) < 1 for a, b in zip(dealt, exact, strict=True))
    assert mix.counts[0] > 3 * mix.counts[1] * 0.8
    assert sorted(mix.counts, reverse=True) == list(mix.counts)


@pytest.mark.parametrize("rows", [1, 2, 7, 33, 64])
@pytest.mark.parametrize("name", [*POPULARITIES, "equal-8"])
def test_every_row_is_dealt_once(name: str, rows: int) -> None:
    mix = by_name(name).mix(rows)
    assert sum(mix.counts) == rows == len(mix.slot_of_row)
    assert 0 not in mix.counts
    assert mix.adapted_rows == sum(slot != BASE_SLOT for slot in mix.slot_of_row)
    assert mix.used_slots == tuple(range(len(mix.used_slots)))


@pytest.mark.parametrize("name", ["zipf", "equal", "equal-0", "equal-x", ""])
def test_an_unknown_popularity_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match="is not one of distinct, identical"):
        by_name(name)


# -- limits -----------------------------------------------------------------------------------


def test_the_limit_is_the_larger_of_bytes_and_products() -> None:
    assert LIMITS.seconds(num_bytes=4_000_000_000, flops=10_000_000_000) == 2.0
    assert LIMITS.seconds(num_bytes=4_000_000_000, flops=30_000_000_000) == 3.0


def test_limits_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(limits, "PRODUCT_SIZE", {"cpu": 64})
    found = limits.measured_limits(place())
    assert found.bytes_per_s == max(found.copy_bytes_per_s, found.read_bytes_per_s) > 1e8
    assert found.flops_per_s > 1e7


def test_the_bytes_of_an_8b_base_in_nf4_are_four_and_a_half_bits_a_weight() -> None:
    """6.98e9 weights in the linears of 32 layers; one row adds a thousandth."""
    there = place(dtype=torch.bfloat16)
    cases = [nf4_case(there, site, 1) for site in MODELS["8b"].sites]
    assert 32 * sum(case.num_bytes for case in cases) == pytest.approx(6.98e9 * 0.5625, rel=2e-3)
    assert 32 * sum(case.flops for case in cases) == pytest.approx(2 * 6.98e9, rel=1e-3)


def test_the_bytes_of_distinct_adapters_are_those_of_their_factors() -> None:
    """A rank-16 adapter of an 8B model has 84 MB in 16 bits; base rows add nothing."""
    there = place(dtype=torch.bfloat16)
    rank = Ranks.parse("16")

    def layer_bytes(popularity: str, rows: int) -> int:
        mixed = by_name(popularity)
        sites = MODELS["8b"].sites
        return sum(sgmv_case(there, site, rows, rank, mixed).num_bytes for site in sites)

    one, eight = layer_bytes("distinct", 1), layer_bytes("distinct", 8)
    assert 32 * one == pytest.approx(84e6, rel=0.1)
    assert eight == 8 * one
    assert layer_bytes("half-base", 16) == eight
    assert layer_bytes("base-only", 16) == 0
    assert layer_bytes("identical", 8) < 2 * one


# -- measuring --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Doubled:
    x: Tensor


def doubling(scale: float = 2.0, shape: int = 3) -> Run:
    return lambda: (torch.arange(float(shape)) * scale,)


def case_of(*contenders: Contender[Doubled], shift: float = 1.0) -> Case[Doubled]:
    return Case(
        Label("double", "3", 1),
        torch.float32,
        make_inputs=lambda: Doubled(torch.arange(3.0)),
        expected=lambda inputs: (inputs.x * 2,),
        spoiled=lambda inputs: Doubled(inputs.x + shift),
        contenders=contenders,
        num_bytes=2_000_000_000,
        flops=0,
    )


def contender(run: Run, role: Role = "ours") -> Contender[Doubled]:
    return Contender("one", role, lambda inputs: run)


def failing() -> tuple[Tensor, ...]:
    raise RuntimeError("no such kernel\nat line 7")


@pytest.mark.parametrize(
    ("run", "status"),
    [
        (doubling(), "right"),
        (doubling(2.1), "wrong"),
        (doubling(math.nan), "wrong"),
        (doubling(shape=4), "failed"),
        (lambda: (torch.arange(3.0).double() * 2,), "failed"),
        (failing, "failed"),
    ],
)
def test_only_a_right_answer_has_a_time(run: Run, status: str) -> None:
    findings = quickly(case_of(contender(run)))
    finding = findings.findings[0]
    assert finding.status == status
    assert (finding.timing is not None) == (status == "right") == findings.passed


def test_a_wrong_peer_is_called_wrong_and_fails_nothing() -> None:
    findings = quickly(case_of(contender(doubling()), contender(doubling(3), "peer")))
    assert [one.status for one in findings.findings] == ["right", "wrong"]
    assert findings.passed


def test_a_case_that_could_not_have_failed_does_not_pass() -> None:
    findings = quickly(case_of(contender(doubling()), shift=1e-5))
    assert findings.findings[0].status == "right"
    assert not findings.passed
    assert any("unproved" in line for line in table.lines(findings))


def test_a_contender_that_overwrites_its_inputs_spoils_them_for_nobody() -> None:
    def prepare(inputs: Doubled) -> Run:
        def run() -> tuple[Tensor, ...]:
            doubled = inputs.x * 2
            inputs.x.zero_()
            return (doubled,)

        return run

    twice = (Contender("a", "ours", prepare), Contender("b", "peer", prepare))
    assert [one.status for one in quickly(case_of(*twice)).findings] == ["right", "right"]


def test_the_worst_tensor_counts() -> None:
    expected = (torch.ones(2), torch.full((2,), 10.0))
    actual = (torch.tensor([1.0, 1.5]), torch.full((2,), 10.0))
    assert error_of(actual, expected) == 0.5
    unknown = torch.full((2,), math.nan)
    assert math.isnan(error_of((unknown, expected[1]), expected))
    assert math.isnan(error_of((expected[0], unknown), expected))


def test_what_a_step_needs_anew_is_timed_apart() -> None:
    made: list[int] = []

    def per_step(inputs: Doubled) -> Run:
        return lambda: made.append(1) or ()

    one = replace(contender(doubling()), per_step=per_step)
    findings = quickly(case_of(one))
    assert made
    assert findings.findings[0].per_step is not None
    assert any("for each step's metadata" in line for line in table.lines(findings))


def test_times_are_percentiles() -> None:
    assert Times.of([3.0, 1.0, 2.0]) == Times(1.0, 2.0, 3.0, 3)
    assert Times.of([float(n) for n in range(101)]) == Times(10.0, 50.0, 90.0, 101)


def test_a_cpu_call_is_cold_if_its_copies_fill_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy once around, before the first comes again."""
    monkeypatch.setattr("lory_kernels.bench.clock.CPU_CACHE_BYTES", 48)
    inputs, turns = Doubled(torch.arange(3.0)), list[int]()

    def prepare(copy: Doubled) -> Run:
        number = len(prepared)
        prepared.append(copy)
        return lambda: turns.append(number) or ()

    prepared: list[Doubled] = []
    timing = CpuClock(Effort(0.0, 8, 8)).measure(Contender("one", "ours", prepare), inputs)
    assert timing.cold is not None
    assert timing.cold.repetitions == 8
    assert len({copy.x.data_ptr() for copy in prepared}) == 48 // inputs.x.nbytes == 4
    assert turns[:12] == [0, 1, 2, 3] * 3
    assert turns[12:] == [0] * 8

    never = CpuClock(ONCE, can_be_cold=False).measure(contender(doubling()), inputs)
    assert never.cold is None


def test_copies_share_no_memory_and_bytes_are_counted() -> None:
    inputs = next(iter(tiny_cases(place(), "sgmv"))).make_inputs()
    copy = cloned(inputs)
    assert copy.pool.data_ptr() != inputs.pool.data_ptr()
    assert copy.segments.slots_G.data_ptr() != inputs.segments.slots_G.data_ptr()
    assert torch.equal(copy.pool, inputs.pool)
    tensors = [inputs.y_TN, inputs.x_TH, inputs.pool, inputs.segments.starts_G1]
    tensors += [inputs.segments.slots_G, inputs.site.a_offset_SK, inputs.site.b_offset_SK]
    tensors += [inputs.site.rank_SK, inputs.site.scale_SK]
    for offset_SK in (inputs.site.gain_offset_SK, inputs.site.bias_offset_SK):
        assert offset_SK is not None
        tensors.append(offset_SK)
    assert tensor_bytes(inputs) == sum(one.nbytes for one in tensors)


# -- the table --------------------------------------------------------------------------------


def line_of(findings: CaseFindings, number: int = 0) -> list[str]:
    return list(table.lines(findings))[number].split()


def test_a_line_has_time_bytes_share_of_the_limit_and_both_errors() -> None:
    findings = quickly(case_of(contender(doubling()), contender(doubling(), "reference")))
    timing = findings.findings[0].timing
    assert timing is not None
    found = table.as_json(findings)
    assert findings.limit_s == 1.0
    assert found["contenders"][0]["of_limit"] == pytest.approx(1.0 / timing.warm.median_s)
    line = line_of(findings)
    assert line[:4] == ["double", "3", "1", "one"]
    assert {"2000.000", "0.0e+00", "1e-05"} <= set(line)
    assert any(cell.endswith("x") for cell in line)


def test_a_line_of_a_wrong_answer_says_so_and_has_no_time() -> None:
    findings = quickly(case_of(contender(doubling(2.5)), contender(failing, "peer")))
    assert "WRONG" in line_of(findings)
    assert line_of(findings)[-2:] == ["2.5e-01", "1e-05"]
    found = table.as_json(findings)["contenders"]
    assert [one["timing"] for one in found] == [None, None]
    assert [one["of_limit"] for one in found] == [None, None]
    assert "one failed: RuntimeError: no such kernel" in list(table.lines(findings))[2]
    json.dumps(table.as_json(findings), allow_nan=False)


# -- a run, and the command -------------------------------------------------------------------


@pytest.fixture
def known_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "measured_limits", lambda _place: LIMITS)


@pytest.mark.usefixtures("known_limits")
def test_a_case_beyond_the_budget_is_named() -> None:
    now, said = iter([0.0, 1.0, 9.0, 9.0]), list[str]()
    cases = list(tiny_cases(place(), "norm", rows=(1, 2, 3)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running.time, "monotonic", lambda: next(now, 9.0))
        found = running.run(place(), ONCE, None, lambda _peers: cases, said.append, budget_s=5.0)
    assert [case["rows"] for case in found["cases"]] == [1]
    assert found["not_reached"] == [f"norm {cases[0].label.shape}, {n} rows" for n in (2, 3)]
    assert sum(line.startswith("not reached within 5 s: norm") for line in said) == 2


@pytest.mark.usefixtures("known_limits")
def test_a_run_fails_if_any_case_does() -> None:
    def cases(there_ops: type[TorchOps], _peers: Peers) -> Iterator[Case]:
        yield from tiny_cases(place("cpu", new_ops=there_ops), "norm")
        yield from tiny_cases(place("cpu", new_ops=TorchOps), "activation")

    def passed(ops: type[TorchOps]) -> bool:
        said: list[str] = []
        return running.run(place(), ONCE, None, lambda p: cases(ops, p), said.append)["passed"]

    assert passed(TorchOps)
    assert not passed(WrongOps)


COMMAND = ["--shapes", "tiny", "--rows", "3", "--dtype", "float32", "--seconds", "0"]


@pytest.mark.usefixtures("known_limits")
def test_the_command_writes_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lory_kernels.bench.clock.CPU_CACHE_BYTES", 0)
    path = tmp_path / "found.json"
    argv = [*COMMAND, "--backend", "torch", "--op", "sgmv,norm", "--ranks", "8,mixed"]
    assert main([*argv, "--popularity", "identical,equal-2", "--json", str(path)]) == 0
    said, found = capsys.readouterr().out, json.loads(path.read_text())
    assert found["passed"]
    assert found["command"].startswith("python -m lory_kernels.bench --shapes tiny")
    assert found["popularities"]["identical"] == "every row uses one adapter"
    labels = {(one["op"], one["ranks"], one["popularity"]) for one in found["cases"]}
    ranks, popularities = ("8", "mixed 8/16/32/64"), ("identical", "equal-2")
    assert labels == {("sgmv", r, p) for r in ranks for p in popularities} | {("norm", "", "")}
    assert len(found["cases"]) == 4 * 2 * 2 + 1
    assert "popularity equal-2: 2 adapters" in said
    assert "skipped: vLLM's lora_shrink and lora_expand: its kernels are Triton's" in said
    assert found["limits"]["bytes_per_s"] == 2e9


@pytest.mark.usefixtures("known_limits")
@pytest.mark.parametrize(("ops", "code"), [(TorchOps, 0), (WrongOps, 1)])
def test_the_command_exits_with_1_if_an_answer_is_wrong(
    ops: type[TorchOps], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lory_kernels.bench.case.select", lambda _backend: ops())
    monkeypatch.setattr("lory_kernels.bench.clock.CPU_CACHE_BYTES", 0)
    assert main([*COMMAND, "--backend", "cpu", "--op", "activation"]) == code


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--op", "sgmv,conv"], "'conv' is not one of sgmv, linear, nf4"),
        (["--shapes", "9b"], "'9b' is not one of tiny, small"),
        (["--rows", "8,0"], "'0' is not a number above 0"),
        (["--rows", "-1"], "--rows"),
        (["--ranks", "16,257"], "'257' is neither a number of 1 to 256 nor 'mixed'"),
        (["--ranks", "0"], "'0' is neither"),
        (["--popularity", "zipf"], "'zipf' is not one of distinct"),
        (["--contexts", "x"], "'x' is not a number"),
        (["--prefill=-5"], "'-5' is not a number, or it is below 0"),
        (["--threads=-2"], "'-2' is not a number, or it is below 0"),
        (["--seconds", "nan"], "'nan' is not between 0 and 60"),
        (["--seconds", "61"], "'61' is not between 0 and 60"),
        (["--peers", "/no/such"], "/no/such is not a folder"),
        (["--json", "/no/such/file"], "its folder is not there"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--backend", "cuda"], "invalid choice: 'cuda'"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(
    argv: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("lory_kernels.bench.__main__.run")
    with pytest.raises(SystemExit) as refused:
        main(argv)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.triton
def test_triton_without_a_gpu_or_the_interpreter_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether triton is there or not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--backend", "triton"])
    assert "triton" in capsys.readouterr().err


def test_popularities_that_deal_alike_are_measured_once() -> None:
    """With one row: distinct, identical, uniform, Zipf and half-base are all one adapter."""
    cases = list(tiny_cases(place(), "sgmv", rows=(1,)))
    assert [case.label.popularity for case in cases] == ["distinct", "base-only"] * 4
    assert [equal(2).mix(1)] == [POPULARITIES["identical"].mix(1)]

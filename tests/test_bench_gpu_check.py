"""The GPU checks as scripts: dry runs on the CPU, and that their tolerances can fail."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import (
    gpu_base,
    gpu_check,
    gpu_parity,
    gpu_report,
    gpu_step,
    gpu_world,
    record,
)
from benchmarks.deadline import Deadline
from benchmarks.gpu_parity import Check, Scope
from benchmarks.gpu_step import Cell
from benchmarks.gpu_trace import PARTS

from kernel_bench_cases import LIMITS
from lory_kernels import TorchOps
from lory_kernels.bench.limits import Limits

CPU = torch.device("cpu")
TINY = Scope(CPU, is_tiny=True)
OVER = Deadline.within(0.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_step, "measured_limits", lambda _place: LIMITS)


def dry_run(section: str, out: Path) -> dict:
    assert gpu_check.main([section, "--device", "cpu", "--tiny", "--out", str(out)]) == 0
    return json.loads(out.read_text())[section]


def test_sections_lie_side_by_side_in_one_file(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    step = dry_run("step", out)
    parity = dry_run("parity", out)
    assert json.loads(out.read_text()).keys() == {"step", "parity"}
    assert parity["passed"]
    assert parity["num_checks"] == len(parity["checks"]) > 20
    assert {check["passed"] for check in parity["checks"]} == {True}
    assert parity["is_whole"]
    assert step["is_whole"]
    assert step["not_reached"] == []
    points = [*step["points"], *step["prompts"]]
    assert all(point["kernels_ms"] for point in points)
    assert all(set(point["parts_ms"]) == {*PARTS, "idle"} for point in points)
    assert all(sum(point["parts_ms"].values()) > 0 for point in points)
    assert {point["tokens"] for point in step["prompts"]} == {gpu_step.TINY.prompt}
    assert "| 4 | 4 of mixed ranks | " in gpu_report.parts_tables(tmp_path)
    assert all(point["step_ms"] > 0 and point["limit_ms"] > 0 for point in step["points"])
    assert step["device"] == "cpu, dry run"


@pytest.mark.filterwarnings("ignore")
def test_the_engine_and_peft_answer_the_same_requests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = dry_run("peft", tmp_path / "gpu.json")
    assert list(found["cases"]) == ["base", "one", "distinct"]
    for case in found["cases"].values():
        assert set(case) == {"Lory", "transformers + PEFT"}
        assert all(one["output_tokens_per_s"] > 0 for one in case.values())
    assert found["not_reached"] == []
    assert "distinct: Lory " in capsys.readouterr().out
    assert "| 3 requests, distinct adapters | " in gpu_report.peft_table(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_peft_and_trl_learn_the_same(tmp_path: Path) -> None:
    found = dry_run("train", tmp_path / "gpu.json")
    losses = {name: one["losses"] for name, one in found["contenders"].items()}
    assert set(losses) == (
        {"lory", "peft", "trl"} if found["trl_is_installed"] else {"lory", "peft"}
    )
    for other in losses.values():
        assert other == pytest.approx(losses["lory"], abs=1e-3)
    assert all(one["tokens_per_s"] > 0 for one in found["contenders"].values())
    assert "| Lory's trainer | " in gpu_report.train_table(tmp_path)


def test_without_a_device_nothing_is_written_or_claimed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "RESULT", tmp_path / "gpu.json")
    assert set(gpu_check.SECTIONS) == {"parity", "step", "kernels", "curve", "peft", "train"}
    for section in gpu_check.SECTIONS:
        assert gpu_check.main([section]) == 0
    assert "nothing is claimed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_dry_run_never_writes_the_real_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_check, "RESULT", tmp_path / "gpu.json")
    monkeypatch.setitem(gpu_check.SECTIONS, "step", lambda *_: {"passed": True})
    assert gpu_check.main(["step", "--device", "cpu", "--tiny"]) == 0
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        gpu_check.main(["step", "--device", "cpu"])


def test_what_breaks_one_group_of_checks_is_a_failure_beside_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(scope: Scope) -> Iterator[Check]:
        yield Check("first", 0.0, 0.1, math.inf)
        raise RuntimeError("no graph can be captured\nmore")

    good = iter([Check("other", 0.0, 0.1, math.inf)])
    monkeypatch.setattr(gpu_parity, "sgmv_checks", broken)
    monkeypatch.setattr(gpu_parity, "nf4_checks", lambda scope: good)
    for name in ("decode_checks", "logprob_checks"):
        monkeypatch.setattr(gpu_parity, name, lambda scope, family, world: iter(()))
    monkeypatch.setattr(gpu_parity, "engine_checks", lambda scope, world: iter(()))
    out = tmp_path / "gpu.json"
    assert gpu_check.main(["parity", "--device", "cpu", "--tiny", "--out", str(out)]) == 1
    found = json.loads(out.read_text())["parity"]
    assert [(c["name"], c["passed"]) for c in found["checks"]] == [
        ("first", True),
        ("sgmv, whole", False),
        ("other", True),
    ]
    assert found["checks"][1]["error"] is None
    assert found["checks"][1]["note"] == "RuntimeError: no graph can be captured"


@pytest.mark.parametrize("section", ["parity", "step"])
def test_what_was_found_is_kept_if_the_rest_never_comes(
    section: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A machine that is taken away, or a limit: KeyboardInterrupt stands for both."""

    def cut_short(*_: object) -> Iterator[Check]:
        yield Check("first", 0.0, 0.1, math.inf)
        raise KeyboardInterrupt

    points = gpu_step._point

    def one_point(bench: gpu_step.Bench, cell: Cell, limits: Limits) -> dict:
        if cell.batch > 1:
            raise KeyboardInterrupt
        return points(bench, cell, limits)

    monkeypatch.setattr(gpu_parity, "every_check", cut_short)
    monkeypatch.setattr(gpu_step, "_point", one_point)
    out = tmp_path / "gpu.json"
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main([section, "--device", "cpu", "--tiny", "--out", str(out)])
    found = json.loads(out.read_text())[section]
    assert not found["is_whole"]
    assert len(found["checks" if section == "parity" else "points"]) in (1, 2)


def test_a_failed_check_fails_the_section(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bad = [Check("one", 0.5, 0.1, math.inf)]
    monkeypatch.setattr(gpu_parity, "every_check", lambda _scope, _deadline: iter(bad))
    out = tmp_path / "gpu.json"
    assert gpu_check.main(["parity", "--device", "cpu", "--tiny", "--out", str(out)]) == 1
    assert json.loads(out.read_text())["parity"]["checks"][0]["wrong_error"] is None


@pytest.mark.parametrize(
    ("error", "tolerance", "wrong_error", "passed"),
    [
        (0.01, 0.02, 1.0, True),
        (0.03, 0.02, 1.0, False),
        (math.nan, 0.02, 1.0, False),
        (0.01, 0.02, 0.05, False),
        (0.01, 0.02, math.nan, False),
        (0.0, 0.0, 0.5, True),
        (0.0, 0.0, 0.0, False),
    ],
)
def test_a_check_passes_only_if_it_could_have_failed(
    error: float, tolerance: float, wrong_error: float, passed: bool
) -> None:
    assert Check("x", error, tolerance, wrong_error).passed == passed


def test_a_kernel_that_takes_the_wrong_adapter_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TorchOps.sgmv

    def wrong(self, y_TN, x_TH, site, pool, segments):
        following = (segments.slots_G + 1) % site.rank_SK.shape[0]
        right(self, y_TN, x_TH, site, pool, replace(segments, slots_G=following.int()))

    class WrongOps(TorchOps):
        sgmv = wrong

    selected = {"torch": TorchOps(), "triton": WrongOps()}
    monkeypatch.setattr(gpu_parity, "select", selected.__getitem__)
    monkeypatch.setattr(Scope, "backend", property(lambda self: "triton"))
    checks = [check for check in gpu_parity.sgmv_checks(TINY) if not check.note]
    assert checks
    assert not any(check.passed for check in checks)


def test_an_engine_that_answers_with_another_adapter_is_caught(tmp_path: Path) -> None:
    world = gpu_world.make_world("llama", tmp_path)
    commands = gpu_world.requests(world, 4, scored=False)
    options = world.options(device="cpu", dtype="float32")
    right = gpu_world.answer(options, commands).answers
    wrong = gpu_world.answer(options, gpu_world.rotated(world, commands)).answers
    assert gpu_parity._share_of_answers_that_differ(right, right) == 0
    assert gpu_parity._share_of_answers_that_differ(wrong, right) == 1


def test_a_step_has_no_more_adapters_than_rows() -> None:
    cells = list(gpu_step.cells_of(gpu_step.FULL))
    assert len(set(cells)) == len(cells)
    assert {(cell.batch, cell.distinct) for cell in cells if not cell.is_mixed} == {
        *((1, 0), (1, 1)),
        *((8, 0), (8, 1), (8, 8)),
        *((32, 0), (32, 1), (32, 8), (32, 32)),
        *((64, 0), (64, 1), (64, 8), (64, 32), (64, 64)),
        *((128, 0), (128, 1), (128, 8), (128, 32), (128, 64)),
    }
    assert {(cell.batch, cell.distinct) for cell in cells if cell.is_mixed} == {
        *((8, 8), (32, 8), (32, 32), (64, 8), (64, 32), (64, 64)),
        *((128, 8), (128, 32), (128, 64)),
    }


def test_steps_with_adapters_have_their_rank() -> None:
    """With a rank of 0 a step changes no rows: op by op there was no SGMV in what was timed."""
    scale = gpu_step.TINY
    bench = gpu_step.Bench(scale, CPU)
    for cell in gpu_step.cells_of(scale):
        plan = bench.plan(cell)
        segments = bench.op_by_op._packer.pack(plan).segments
        largest = max(row.rank for row in plan.rows)
        assert (0 if segments is None else segments.max_rank) == largest
        assert len({row.slot for row in plan.rows} - {-1}) == cell.distinct
        ranks = {row.rank for row in plan.rows}
        if cell.is_mixed:
            assert ranks == set(scale.mixed)
        else:
            assert ranks == ({scale.rank} if cell.distinct else {0})


def test_rows_of_prompts_share_no_block() -> None:
    bench = gpu_step.Bench(gpu_step.TINY, CPU)
    for rows, distinct in gpu_step.TINY.prompts:
        plan = bench.prompt_plan(rows, distinct)
        assert plan.num_tokens == gpu_step.TINY.prompt
        blocks = [block for row in plan.rows for block in row.blocks]
        assert len(set(blocks)) == len(blocks)
        assert max(blocks) < bench.kv.keys[0].shape[0]


def test_steps_that_time_does_not_reach_are_named() -> None:
    found = gpu_step.measure(gpu_step.TINY, CPU, lambda _: None, lambda _: None, OVER)
    assert found["points"] == found["prompts"] == []
    cells = [str(cell) for cell in gpu_step.cells_of(gpu_step.TINY)]
    prompts = ["1 prompts, 0 adapters", "2 prompts, 2 adapters"]
    assert found["not_reached"] == [*cells, *prompts, "parts"]


def test_checks_that_time_does_not_reach_have_failed() -> None:
    checks = list(gpu_parity.every_check(TINY, OVER))
    assert [check.name for check in checks] == [
        "sgmv, whole",
        "nf4, whole",
        "decode llama, whole",
        "engine, whole",
        "log-probabilities llama, whole",
    ]
    assert not any(check.passed for check in checks)
    assert {check.note for check in checks} == {"not reached within 0 s"}


def test_a_file_that_cannot_be_written_is_noticed_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu_check.SECTIONS, "step", lambda *_: pytest.fail("was measured"))
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "gpu.json"
    with pytest.raises(OSError, match="file"):
        gpu_check.main(["step", "--device", "cpu", "--tiny", "--out", str(out)])


def test_a_result_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.json"
    record.write(out, {"a": 1})

    def cut_short(self: Path, text: str, encoding: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut_short)
    with pytest.raises(KeyboardInterrupt):
        record.write(out, {"b": 2})
    assert json.loads(out.read_text()) == {"a": 1}


@pytest.mark.parametrize(
    "argument", ["--host-gib=8", "--price-per-hour=2", "--no-cuda-graphs", "--peers=."]
)
def test_an_argument_of_another_section_is_refused(argument: str) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["step", "--device", "cpu", "--tiny", argument])


def test_the_8b_base_has_the_bytes_of_an_8b_base() -> None:
    """NF4 with float32 scales: 4.5 bits a weight; 6.98e9 weights in the linears of 32 layers."""
    spec = gpu_base.llama_8b()
    assert gpu_base.linear_weights(spec) == pytest.approx(6.98e9, rel=1e-3)
    manifest = gpu_base.manifest_of(spec.sites(), rank=16)
    assert manifest.num_bytes(2) == pytest.approx(84e6, rel=0.01)


def test_the_bytes_of_a_step_are_those_that_the_decoder_holds() -> None:
    scale = gpu_step.TINY
    bench = gpu_step.Bench(scale, CPU)
    parts = bench.bytes_read(bench.plan(Cell(4, 2)))
    spec = scale.spec
    assert parts["adapters"] == 2 * bench.adapter_bytes[scale.rank]
    mixed = bench.bytes_read(bench.plan(Cell(4, 4, is_mixed=True)))["adapters"]
    assert mixed == sum(bench.adapter_bytes[rank] for rank in (2, 4, 8, 2))
    assert parts["kv"] == 4 * gpu_step.TINY.context * 2 * spec.num_layers * spec.kv_size * 2
    assert parts["head"] == spec.vocab_size * spec.hidden_size * 2


def test_the_record_names_its_versions() -> None:
    facts = record.facts("benchmarks.gpu_check", ["step"])
    assert facts["command"] == "python -m benchmarks.gpu_check step"
    assert facts["versions"]["torch"] == torch.__version__

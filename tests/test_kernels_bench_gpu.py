"""The section `kernels` of the GPU check, as a dry run on the CPU."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import gpu_check, gpu_kernels

from kernel_bench_cases import LIMITS, WrongOps
from lory_kernels import nf4_choice
from lory_kernels.bench import run as running
from lory_kernels.bench.case import Case
from lory_kernels.bench.nf4 import tilings
from lory_kernels.bench.selection import OPS

CPU = torch.device("cpu")
RANK_16_EQUAL = ("16", "equal")
DRY_RUN = ["kernels", "--device", "cpu", "--tiny", "--out"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "measured_limits", lambda _place: LIMITS)
    monkeypatch.setattr("lory_kernels.bench.clock.MOST_COPIES", 0)


def test_a_dry_run_reaches_every_op(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    assert gpu_check.main([*DRY_RUN, str(out)]) == 0
    found = json.loads(out.read_text())["kernels"]
    assert found["passed"]
    assert found["not_reached"] == []
    assert {case["op"] for case in found["cases"]} == set(OPS)
    assert all(
        case["passed"] and case["limit_s"] > 0 for case in found["cases"] if case["num_bytes"]
    )
    assert (found["model"], found["num_layers"], found["device"]) == ("tiny", 2, "cpu, dry run")
    assert len(found["absent"]) == 2
    said = capsys.readouterr().out
    assert "skipped: SGLang" in said
    assert "limits: copy" in said


def test_a_wrong_op_fails_the_section(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrong = replace(gpu_kernels.make_place(CPU), backend="cpu", new_ops=WrongOps)
    monkeypatch.setattr(gpu_kernels, "make_place", lambda _device: wrong)
    out = tmp_path / "gpu.json"
    assert gpu_check.main([*DRY_RUN, str(out)]) == 1
    assert not json.loads(out.read_text())["kernels"]["passed"]


def test_what_the_time_does_not_reach_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    found = gpu_kernels.measure(replace(gpu_kernels.TINY, budget_s=0.0), CPU, None)
    place = gpu_kernels.make_place(CPU)
    cases = list(gpu_kernels.cases_of(gpu_kernels.TINY, place, ()))
    assert found["cases"] == []
    assert not found["passed"]
    assert found["not_reached"] == [str(case.label) for case in cases]
    assert f"not reached within 0 s: {cases[0].label}" in capsys.readouterr().out


def test_what_was_found_is_kept_if_the_rest_never_comes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cases = gpu_kernels.cases_of

    def cut_short(*arguments: Any) -> Iterator[Case[Any]]:
        yield next(cases(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_kernels, "cases_of", cut_short)
    out = tmp_path / "gpu.json"
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main([*DRY_RUN, str(out)])
    found = json.loads(out.read_text())["kernels"]
    assert len(found["cases"]) == 1
    assert (found["is_whole"], found["passed"], found["model"]) == (False, False, "tiny")


def test_peers_are_for_the_kernels_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["step", "--device", "cpu", "--tiny", "--peers", "."])
    assert "--peers is for the section kernels" in capsys.readouterr().err


def test_the_whole_matrix_has_every_site_rank_and_op_of_an_8b_model() -> None:
    cases = list(gpu_kernels.cases_of(gpu_kernels.FULL, gpu_kernels.make_place(CPU), ()))
    labels = [case.label for case in cases]
    sites = {site.label for site in gpu_kernels.FULL.model.sites}
    assert len(set(labels)) == len(labels) < 200
    assert {label.op for label in labels} == set(OPS)
    assert {label.shape for label in labels if label.op == "sgmv"} == sites
    nf4 = {(label.shape, label.rows) for label in labels if label.op == "nf4"}
    assert nf4 == {(shape, rows) for shape in sites for rows in gpu_kernels.FULL.rows}
    ranks = {label.ranks for label in labels if label.op == "sgmv"}
    assert ranks == {"8", "16", "64", "mixed 8/16/32/64"}
    in_32_rows = [one for one in labels if one.op == "sgmv" and one.rows == 32]
    equal = {one.distinct for one in in_32_rows if (one.ranks, one.popularity[:5]) == RANK_16_EQUAL}
    assert equal == {1, 8, 32}, "the steps that goals are set for"
    assert {one.distinct for one in in_32_rows if one.popularity == "base-only"} == {0}


def test_the_rows_measured_are_where_the_choice_of_a_path_changes() -> None:
    """Each rule of the GPU that is measured for has a number of rows that it decides."""
    rules = nf4_choice.RULES[9, 0]
    bounds = [0, *(rule.max_rows for rule in rules)]
    for low, high in pairwise(bounds[:-1]):
        assert any(low < rows <= high for rows in gpu_kernels.FULL.rows), (low, high)
    tried = sum(
        len(tilings(site.out_features, site.in_features, rows))
        for site in gpu_kernels.FULL.model.sites
        for rows in gpu_kernels.FULL.rows
    )
    assert tried < 300, "every tiling takes a tenth of a second"

"""The kernel bench's cases: right answers on tiny shapes, and every one can be wrong.

Triton's run in the interpreter, in a process of its own. Others' kernels are checked there too
where LORY_KERNEL_PEERS names a folder with their unpacked wheels; without it that is skipped aloud.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kernel_bench_cases import WrongOps, place, quickly, tiny_cases
from lory_kernels import nf4_choice, panels
from lory_kernels.bench import nf4, sgmv, table
from lory_kernels.bench.case import Case, Place
from lory_kernels.bench.clock import Times, Timing
from lory_kernels.bench.linears import dense_case
from lory_kernels.bench.measure import CaseFindings, Finding
from lory_kernels.bench.nf4 import nf4_case, tilings
from lory_kernels.bench.peers import find_peers
from lory_kernels.bench.popularity import by_name
from lory_kernels.bench.selection import OPS
from lory_kernels.bench.sgmv import Ranks, sgmv_case
from lory_kernels.bench.shapes import MODELS, LinearShape
from lory_kernels.contract import KernelUnavailableError
from lory_kernels.nf4_choice import ANY_ROWS, GROUP, MAX_SPLITS, Choice, Tiles, choices_for
from triton_processes import Findings, answer, findings_of, needs_triton

PEERS = os.environ.get("LORY_KERNEL_PEERS", "")
OF_OPS = ("sgmv", "attention", "norm", "rope", "activation")
SITE = LinearShape("o", 128, (64,))
Mix = tuple[LinearShape, int, str]
MIXES: tuple[Mix, ...] = (
    (MODELS["tiny"].sites[0], 3, "half-base"),
    (LinearShape("odd", 96, (48, 80)), 3, "equal-2"),
    (SITE, 20, "equal-2"),
    (SITE, 2, "base-only"),
)
"""Three slices, two and one; each form of a step in some."""


def cpu_place(dtype: torch.dtype) -> Place:
    there = place("cpu", dtype)
    try:
        there.new_ops()
    except KernelUnavailableError as error:
        pytest.skip(str(error))
    return there


def statuses(findings: CaseFindings, role: str) -> set[str]:
    return {one.status for one in findings.findings if one.role == role}


@pytest.mark.parametrize("model", MODELS)
def test_adapters_lie_as_those_that_are_served(model: str) -> None:
    """Without alignment Triton takes 2 bytes at a time: a kernel that no server runs was timed."""
    for shape in MODELS[model].sites:
        site, _ = sgmv._table(place("torch", torch.bfloat16), shape, (16, 3, 8))
        assert site.alignment * torch.bfloat16.itemsize % 16 == 0
        for offset_SK in (site.a_offset_SK, site.b_offset_SK):
            assert not (offset_SK % site.alignment).any()
        assert site.gain_offset_SK is not None
        assert site.bias_offset_SK is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_the_cpu_backend_is_right(op: str, dtype: torch.dtype) -> None:
    for case in tiny_cases(cpu_place(dtype), op):
        findings = quickly(case)
        told = [f"{one.contender}: {one.error:.1e} {one.note}" for one in findings.findings]
        assert findings.passed, (case.label, told)
        assert "wrong" not in statuses(findings, "peer"), (case.label, told)


@pytest.mark.parametrize("op", OF_OPS)
def test_a_wrong_op_is_called_wrong(op: str) -> None:
    for case in tiny_cases(place("cpu", new_ops=WrongOps), op):
        findings = quickly(case)
        assert statuses(findings, "ours") == {"wrong"}, case.label
        assert statuses(findings, "reference") == {"right"}, case.label
        assert findings.wrong_error > 3 * findings.tolerance
        assert not findings.passed


def next_output(pack: Callable[..., Any]) -> Callable[..., Any]:
    """A weight with its outputs in another order."""
    return lambda weight, *rest: pack(weight.roll(64), *rest)


@pytest.mark.parametrize(("make", "name"), [(dense_case, "pack"), (nf4_case, "pack_nf4")])
def test_a_wrong_panel_is_called_wrong(
    make: Callable[..., Case[Any]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = cpu_place(torch.float32)
    assert quickly(make(there, SITE, 3)).passed
    monkeypatch.setattr(panels, name, next_output(getattr(panels, name)))
    findings = quickly(make(there, SITE, 3))
    assert statuses(findings, "ours") == {"wrong"}
    assert not findings.passed


def test_every_contender_has_a_role_and_ours_comes_first() -> None:
    there = cpu_place(torch.float32)
    for op in OPS:
        for case in tiny_cases(there, op):
            roles = [one.role for one in case.contenders]
            assert roles[0] == "ours", case.label
            assert roles.count("reference") == 1


def test_ops_are_of_a_case_alone() -> None:
    """They keep each pool that they were called with: one for all would never free any."""
    made: list[WrongOps] = []

    def new_ops() -> WrongOps:
        made.append(WrongOps())
        return made[-1]

    cases = list(tiny_cases(place("cpu", new_ops=new_ops), "norm", rows=(1, 2, 3)))
    assert len(made) == len(cases) == 3


def test_nf4_by_hand() -> None:
    """Codes 0 and 15 stand for minus and plus one scale, the high half of a byte first."""
    codes = torch.full((64,), 0x0F, dtype=torch.uint8)
    inputs = nf4.NF4Inputs(torch.ones(1, 64), codes, torch.tensor([1.0, 2.0]), 2, 64)
    expected = torch.tensor([[-1.0, 1.0] * 32, [-2.0, 2.0] * 32])
    assert torch.equal(inputs.decoded(torch.float32), expected)


# -- NF4 in Triton: what is tried, and what a table needs -------------------------------------


def paths(case: Case[Any]) -> list[dict[str, Any]]:
    return [dict(one.facts) for one in case.contenders if one.facts]


@pytest.mark.parametrize(
    ("rows", "path"), [(1, "bitsandbytes"), (16, "triton"), (256, "triton"), (257, "dequantize")]
)
def test_the_served_path_comes_first_and_the_others_stand_beside_it(rows: int, path: str) -> None:
    site = MODELS["8b"].sites[2]
    case = nf4_case(place("triton", torch.float16), site, rows)
    found = paths(case)
    assert found[0]["is_served"]
    assert found[0]["path"] == path
    assert case.contenders[0].role == "ours"
    expected = {path, "bitsandbytes", "dequantize"}
    assert {one["path"] for one in found} == expected
    assert len(found) == len(expected)


def test_a_gpu_serves_float32_without_the_triton_kernel() -> None:
    there = replace(place("triton"), device=torch.device("cuda"))
    found = paths(nf4_case(there, SITE, 16, every_tiling=True))
    assert [(one["path"], one["is_served"]) for one in found] == [
        ("bitsandbytes", True),
        ("dequantize", False),
    ]
    interpreted = paths(nf4_case(place("triton"), SITE, 16, every_tiling=True))
    assert "triton" in {one["path"] for one in interpreted}


def test_what_was_measured_on_a_gpu_is_what_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = Tiles(rows=16, columns=64, groups=1, warps=4, stages=3, splits=2)
    measured = (Choice(ANY_ROWS, "triton", "Measured.", tiles),)
    monkeypatch.setattr(nf4_choice, "MEASURED", {nf4.INTERPRETED[0]: {(64, 128): measured}})
    found = paths(nf4_case(place("triton", torch.float16), SITE, 1))
    assert found[0] == {"path": "triton", "tiles": asdict(tiles), "is_served": True}


@pytest.mark.parametrize("rows", [1, 8, 16, 32, 64, 128, 256])
def test_tilings_can_be_launched_and_hold_the_served_one(rows: int) -> None:
    for site in MODELS["8b"].sites:
        tried = tilings(site.out_features, site.in_features, rows)
        assert len(set(tried)) == len(tried) > 2
        for tiles in tried:
            assert site.in_features // GROUP % tiles.groups == 0
            assert 1 <= tiles.splits <= MAX_SPLITS
            assert tiles.rows <= 128
        choices = choices_for(*nf4.INTERPRETED, site.out_features, site.in_features, nf4.BLOCK)
        served = nf4_choice.choose(choices, rows).tiles
        cuts = {replace(tiles, splits=1) for tiles in tried}
        assert served is None or replace(served, splits=1) in cuts


def test_a_table_of_choices_can_be_made_of_the_findings() -> None:
    """Shape, rows, path, tiles and time of each: all that `nf4_choice.MEASURED` takes."""
    case = nf4_case(
        place("triton", torch.float16), LinearShape("o", 4096, (4096,)), 8, every_tiling=True
    )
    seconds = {one.name: 1e-5 * (1 + n % 3) for n, one in enumerate(case.contenders)}
    third = case.contenders[3]
    seconds[third.name] = 5e-6
    findings = tuple(
        Finding(one.name, one.role, "right", 0.0, "", timing(seconds[one.name]), None, one.facts)
        for one in case.contenders
    )
    whole = CaseFindings(case.label, case.num_bytes, case.flops, 1e-6, 0.01, 1.0, findings)
    found = json.loads(json.dumps(table.as_json(replace(whole, facts=case.facts))))

    served = [one for one in found["contenders"] if one["facts"]]
    fastest = min(served, key=lambda one: one["timing"]["cold"]["median_s"])
    tiles = fastest["facts"]["tiles"] and Tiles(**fastest["facts"]["tiles"])
    choice = Choice(found["rows"], fastest["facts"]["path"], "Measured.", tiles)
    assert (found["facts"]["out_features"], found["facts"]["in_features"]) == (4096, 4096)
    assert found["facts"]["block"] == 64
    assert choice.path == "triton"
    assert asdict(tiles) == third.facts["tiles"]
    assert {one["facts"]["path"] for one in served} == {"triton", "bitsandbytes", "dequantize"}


def timing(seconds: float) -> Timing:
    times = Times(seconds, seconds, seconds, 5)
    return Timing(times, times, is_captured=True)


# -- Triton, interpreted ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted() -> Findings:
    return findings_of(__file__, "interpret")


@pytest.mark.triton
@pytest.mark.skipif(needs_triton[1].args[0], reason="the triton package is not installed")
def test_triton_is_right_in_the_interpreter(interpreted: Findings) -> None:
    cases = interpreted["ops"]
    assert {name.split()[0] for name in cases} == set(OPS)
    for name, found in cases.items():
        assert found["passed"], (name, found)
        assert bool(found["ours"]) != name.startswith("linear"), "torch's product is the one served"
    assert all(len(found["ours"]) > 3 for name, found in cases.items() if "nf4" in name)


@pytest.mark.triton
@pytest.mark.skipif(needs_triton[1].args[0], reason="the triton package is not installed")
@pytest.mark.skipif(not PEERS, reason="LORY_KERNEL_PEERS names no folder with unpacked wheels")
def test_peers_are_right_in_the_interpreter(interpreted: Findings) -> None:
    found = interpreted["peers"]
    assert found.pop("absent") == []
    names = ("vllm", "sglang csgmv", "sglang triton_v2")
    assert len(found) == 2
    for name, told in found.items():
        assert told == dict.fromkeys(names, "right"), name


def _interpret() -> Findings:
    return {"ops": _check_ops(), "peers": _check_peers() if PEERS else {}}


def _check_ops() -> dict[str, Any]:
    there = place("triton", torch.float16)
    cases = [*tiny_cases(there, *(op for op in OPS if op not in ("sgmv", "nf4")), rows=(3,))]
    cases += _sgmv_cases(there, *MIXES)
    cases.append(nf4_case(there, LinearShape("o", 128, (192,)), 20, every_tiling=True))
    return {str(case.label): _told(case) for case in cases}


def _told(case: Case[Any]) -> dict[str, Any]:
    findings = quickly(case)
    return {
        "passed": findings.passed,
        "ours": [one.status for one in findings.findings if one.role == "ours"],
        "notes": [f"{one.contender}: {one.error} {one.note}" for one in findings.findings],
    }


def _sgmv_cases(there: Place, *mixes: Mix, peers: tuple[Any, ...] = ()) -> Iterator[Case[Any]]:
    mixed = Ranks.parse("mixed")
    for site, rows, popularity in mixes:
        yield sgmv_case(there, site, rows, mixed, by_name(popularity), peers)


def _check_peers() -> dict[str, Any]:
    there = place("triton", torch.float16)
    peers = find_peers(Path(PEERS), there)
    found: dict[str, Any] = {"absent": list(peers.absent)}
    for case in _sgmv_cases(there, *MIXES[:2], peers=peers.sgmv):
        named = {one.contender: one.status + one.note for one in quickly(case).findings}
        found[str(case.label)] = {one.name: named[one.name] for one in peers.sgmv}
    return found


if __name__ == "__main__":
    answer({"interpret": _interpret})

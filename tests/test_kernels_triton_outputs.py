"""Triton's SGMV where adapters have gains and biases: interpreted, and compiled for sm_80 and 90.

As in test_kernels_triton.py each half runs in a process of its own: this file, called with a mode.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import lory_kernels
from kernel_cases import TOLERANCE, SgmvCase, error_of, every_pair, sgmv_case, with_outputs
from lory_kernels import Ops
from test_kernels_triton import COMPILED, DTYPES, SHAPES, launch
from triton_processes import (
    SHARED_MEMORY_LIMIT_BYTES,
    Findings,
    answer,
    findings_of,
    launches_built,
    needs_triton,
)

pytestmark = needs_triton

KINDS = {
    "all": ("both", "gain", "none", "bias"),
    "gains": ("gain", "none"),
    "biases": ("none", "bias"),
}
RANKS = {"0": (0,), "3-0": (3, 0), "33": (33, 0, 100)}
WORKLOADS = ("distinct", "zipf", "half_base")
SAMPLE = {
    "-".join(map(str, choice)): choice
    for choice in every_pair(
        (WORKLOADS, (1, 7, 33), list(RANKS), list(SHAPES), list(KINDS), list(DTYPES))
    )
}
COMPILED_STEPS = (("bfloat16", 8, 16), ("bfloat16", 1024, 64), ("float32", 8, 64))
"""(dtype, rows, largest rank): a rule each."""


@pytest.fixture(scope="module")
def interpreted() -> Findings:
    return findings_of(__file__, "interpret")


@pytest.mark.parametrize("name", SAMPLE)
def test_gains_and_biases_equal_the_reference(interpreted: Findings, name: str) -> None:
    assert interpreted["sample"][name] <= TOLERANCE[DTYPES[SAMPLE[name][-1]]]


def test_tolerance_catches_two_swapped_gains_or_biases(interpreted: Findings) -> None:
    assert len(interpreted["swapped"]) == 2 * len(DTYPES)
    for key, error in interpreted["swapped"].items():
        assert error > 3 * TOLERANCE[DTYPES[key.split("-")[-1]]], key


def test_base_rows_keep_every_bit(interpreted: Findings) -> None:
    assert set(interpreted["base"].values()) == {True}


def test_steps_with_and_without_gains_and_biases_are_one_kernel() -> None:
    """So that none of them compiles anything after a warm-up of the other."""
    assert findings_of(__file__, "compile_both")["kernels"] == {"expand": 1}


def test_tables_of_another_dtype_are_refused(interpreted: Findings) -> None:
    assert "must be torch.int64" in interpreted["refused"]["message"]


def test_kernels_with_gains_and_biases_compile_fit_and_do_not_spill() -> None:
    found = findings_of(__file__, "compile")["built"]
    assert len(found) == len(COMPILED_STEPS) * len(SHARED_MEMORY_LIMIT_BYTES)
    for name, (spilled_bytes, shared_bytes) in found.items():
        arch = int(name.split("-")[0].removeprefix("sm_"))
        assert spilled_bytes == 0, name
        assert shared_bytes <= SHARED_MEMORY_LIMIT_BYTES[arch], name


def _interpret() -> Findings:
    torch.use_deterministic_algorithms(True)  # fills what torch.empty makes with NaN
    reference, ops = lory_kernels.select("torch"), lory_kernels.select("triton")
    found: Findings = {"sample": {}, "swapped": {}, "base": {}}
    for name, (workload, rows, ranks, shape, kinds, dtype) in SAMPLE.items():
        case = sgmv_case(workload, rows, DTYPES[dtype], ranks=RANKS[ranks], **SHAPES[shape])
        case = with_outputs(case, KINDS[kinds])
        found["sample"][name] = error_of(case.run_apart(ops), case.run(reference))
    for name, dtype in DTYPES.items():
        plain = sgmv_case("half_base", 33, dtype)
        actual_TN = with_outputs(plain, ("both",)).run(ops)
        found["base"][name] = torch.equal(actual_TN[:16], plain.y_TN[:16])
        for which in ("gain_offset_SK", "bias_offset_SK"):
            case = with_outputs(sgmv_case("distinct", 7, dtype, ranks=(8, 0)), ("both",))
            found["swapped"][f"{which}-{name}"] = _swapped_error(case, which, ops, reference)
    found["refused"] = {"message": _refusal(ops)}
    return found


def _swapped_error(case: SgmvCase, which: str, ops: Ops, reference: Ops) -> float:
    offset_SK: Tensor = getattr(case.site, which).clone()
    offset_SK[[2, 3]] = offset_SK[[3, 2]]
    wrong = replace(case, site=replace(case.site, **{which: offset_SK}))
    return error_of(wrong.run(ops), case.run(reference))


def _refusal(ops: Ops) -> str:
    case = with_outputs(sgmv_case("distinct", 3, torch.float32))
    assert case.site.gain_offset_SK is not None
    site = replace(case.site, gain_offset_SK=case.site.gain_offset_SK.int())
    with pytest.raises(ValueError, match="int64") as refusal:
        replace(case, site=site).run(ops)
    return str(refusal.value)


def _compile() -> Findings:
    found: Findings = {"built": {}}
    for dtype, rows, max_rank in COMPILED_STEPS:
        call = launch(COMPILED[dtype], rows, 2, max_rank, 3, has_outputs=True)
        for arch in SHARED_MEMORY_LIMIT_BYTES:
            built = launches_built(call, arch)["expand_kernel"]
            found["built"][f"sm_{arch}-{dtype}-{rows}"] = built.spilled_bytes, built.shared_bytes
    return found


def _compile_both() -> Findings:
    """A kernel that compiled twice is an AssertionError of `launches_built`."""
    calls = [
        launch(torch.bfloat16, 8, 2, 16, 3, has_outputs=True, has_gain_or_bias=has_any)
        for has_any in (False, True)
    ]
    built = launches_built(lambda: [call() for call in calls], 90)
    return {"kernels": {"expand": list(built).count("expand_kernel")}}


if __name__ == "__main__":
    answer({"interpret": _interpret, "compile": _compile, "compile_both": _compile_both})

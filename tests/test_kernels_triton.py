"""Triton's SGMV: against the reference in the interpreter, and compiled for sm_80 and sm_90.

The interpreter is chosen when triton is imported, so each half runs in a process of its own: this
file, called with a mode, prints its findings as JSON.
"""

import pytest
import torch

import lory_kernels
from kernel_cases import TOLERANCE, WORKLOADS, error_of, sgmv_case
from triton_processes import (
    SHARED_MEMORY_LIMIT_BYTES,
    Findings,
    answer,
    build,
    findings_of,
    needs_triton,
)

pytestmark = needs_triton

DTYPES = {"float32": torch.float32, "float16": torch.float16}
CASES = {
    f"{workload}-{rows}": (workload, rows, {"out_features": (40, 24)})
    for workload in WORKLOADS
    for rows in (1, 7, 33)
} | {
    "widths": ("zipf", 19, {"in_features": 150, "out_features": (130, 7), "ranks": (16, 3)}),
    "rank_1": ("skewed", 7, {"ranks": (1,)}),
    "rank_100": ("skewed", 7, {"ranks": (100, 0, 33)}),
    "rank_256": ("identical", 7, {"ranks": (256,), "out_features": (40,)}),
    "mixed_ranks": ("distinct", 7, {"ranks": (16, 1, 64, 3, 8, 33)}),
}
COMPILED = (("bf16", 16), ("bf16", 64), ("fp16", 16), ("fp32", 64))
"""(dtype, block of rank) that are compiled ahead of time."""


@pytest.fixture(scope="module")
def interpreted() -> Findings:
    return findings_of(__file__, "interpret")


@pytest.fixture(scope="module")
def compiled() -> Findings:
    return findings_of(__file__, "compile")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_sgmv_equals_the_reference(interpreted: Findings, name: str, dtype: str) -> None:
    assert interpreted["error"][f"{name}-{dtype}"] <= TOLERANCE[DTYPES[dtype]]


def test_tolerance_catches_one_swapped_adapter(interpreted: Findings) -> None:
    for dtype, error in interpreted["swapped"].items():
        assert error > 3 * TOLERANCE[DTYPES[dtype]]


def test_results_are_the_same_from_run_to_run(interpreted: Findings) -> None:
    assert set(interpreted["repeat"].values()) == {0.0}


def test_base_rows_keep_every_bit(interpreted: Findings) -> None:
    assert set(interpreted["base"].values()) == {0.0}


@pytest.mark.parametrize("arch", SHARED_MEMORY_LIMIT_BYTES)
def test_kernels_compile_for_the_gpu_fit_and_do_not_spill(compiled: Findings, arch: int) -> None:
    sizes, spills = (
        {key: size for key, size in compiled[what].items() if key.startswith(f"sm_{arch}")}
        for what in ("shared_bytes", "spilled_bytes")
    )
    assert len(sizes) == len(spills) == 2 * len(COMPILED)
    assert max(sizes.values()) <= SHARED_MEMORY_LIMIT_BYTES[arch]
    assert set(spills.values()) == {0}, spills


def _interpret() -> Findings:
    from dataclasses import replace

    reference, ops = lory_kernels.select("torch"), lory_kernels.select("triton")
    found: Findings = {"error": {}, "swapped": {}, "repeat": {}, "base": {}}
    for name, dtype in DTYPES.items():
        cases = {
            key: sgmv_case(workload, rows, dtype, **shape)
            for key, (workload, rows, shape) in CASES.items()
        }
        for key, case in cases.items():
            found["error"][f"{key}-{name}"] = error_of(case.run(ops), case.run(reference))
        case = cases["distinct-7"]
        slots_G = case.segments.slots_G.clone()
        slots_G[[2, 3]] = slots_G[[3, 2]]
        wrong = replace(case, segments=replace(case.segments, slots_G=slots_G))
        found["swapped"][name] = error_of(wrong.run(ops), case.run(reference))
        found["repeat"][name] = error_of(case.run(ops), case.run(ops))
        half = cases["half_base-33"]
        found["base"][name] = error_of(half.run(ops)[:16], half.y_TN[:16])
    return found


def _compile() -> Findings:
    from lory_kernels import triton_sgmv as kernels

    found: Findings = {"shared_bytes": {}, "spilled_bytes": {}}
    for dtype, block_r in COMPILED:
        types = {
            "a_offset_ptr": "*i64", "b_offset_ptr": "*i64", "out_offset_ptr": "*i64",
            "out_features_ptr": "*i64", "rank_ptr": "*i32", "starts_ptr": "*i32",
            "slots_ptr": "*i32", "scale_ptr": "*fp32", "h_ptr": "*fp32", "x_ptr": f"*{dtype}",
            "y_ptr": f"*{dtype}", "pool_ptr": f"*{dtype}",
        }  # fmt: skip
        for kernel in (kernels.shrink_kernel, kernels.expand_kernel):
            expands = kernel is kernels.expand_kernel
            blocks = {
                "SLICES": 3, "TILE": kernels.TILE_ROWS, "BLOCK_G": 256,
                "BLOCK_I": kernels.BLOCK_IN, "BLOCK_O": kernels.BLOCK_OUT,
                "BLOCK_R": kernels.EXPAND_BLOCK_RANK if expands else block_r,
            }  # fmt: skip
            for arch in SHARED_MEMORY_LIMIT_BYTES:
                aligned = ("x_stride", "y_stride", "in_features")
                built = build(kernel, arch, types, blocks, aligned)
                key = f"sm_{arch}-{kernel.__name__}-{dtype}-{block_r}"
                found["shared_bytes"][key] = built.shared_bytes
                found["spilled_bytes"][key] = built.spilled_bytes
    return found


if __name__ == "__main__":
    answer({"interpret": _interpret, "compile": _compile})

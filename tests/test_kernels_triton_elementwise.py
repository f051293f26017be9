"""Triton's norms, gated activations and rotary embedding: in the interpreter, and compiled."""

import itertools
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

import lory_kernels
from kernel_cases import TOLERANCE, angles, error_of
from lory_kernels import Ops
from triton_processes import (
    SHARED_MEMORY_LIMIT_BYTES,
    Findings,
    answer,
    findings_of,
    launches_built,
    needs_triton,
)

pytestmark = needs_triton

DTYPES = {"float32": torch.float32, "float16": torch.float16}
WIDTHS = (1, 64, 576, 896, 960, 4864, 8192, 8193, 20000)
NORMS = ("rms", "rms_fp32", "add", "add_fp32")
GATES = {
    "silu_mul": torch.nn.functional.silu,
    "gelu_tanh_mul": lambda gate: torch.nn.functional.gelu(gate, approximate="tanh"),
}
ROPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "partial": {"rotary_dim": 24},
    "partial_normed": {"rotary_dim": 8, "normed": True},
    "normed": {"normed": True},
    "normed_fp32": {"normed": True, "in_fp32": True},
    "odd_heads": {"heads": 9, "kv_heads": 3, "head_dim": 80, "rotary_dim": 32, "normed": True},
    "many_heads": {"heads": 71, "kv_heads": 1, "head_dim": 64, "rotary_dim": 64},
    "odd_block": {"block_size": 5},
}
EXTREMES = (-1e30, -200.0, -88.5, -87.0, -1e-30, 0.0, 1e-30, 87.0, 200.0, 1e30)
COMPILED_WIDTHS = (896, 8192, 14336)
COMPILED_ROPES = ((32, 8, 128, 128, False), (16, 8, 256, 256, False), (32, 32, 80, 32, True))
"""(heads, kv heads, head dim, rotary dim, with norms)."""


@pytest.fixture(scope="module")
def interpreted() -> Findings:
    return findings_of(__file__, "interpret")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", NORMS)
def test_norms_equal_the_reference(
    interpreted: Findings, kind: str, width: int, dtype: str
) -> None:
    found = interpreted["norm"][f"{kind}-{width}-{dtype}"]
    assert found["out"] <= TOLERANCE[DTYPES[dtype]]
    assert found["residual_is_equal"]


def test_tolerance_catches_a_norm_of_a_wrong_width(interpreted: Findings) -> None:
    """As if the padding of a row counted in its mean."""
    for dtype, error in interpreted["wrong_norm"].items():
        assert error > 3 * TOLERANCE[DTYPES[dtype]]


def test_norms_round_before_the_weight_unless_it_is_fp32(interpreted: Findings) -> None:
    """In float16 the two orders differ in their last bits, and each is told from the other."""
    assert interpreted["rounding"] == {"as_asked": 0, "otherwise": True}


def test_activations_round_before_the_product(interpreted: Findings) -> None:
    """One in a hundred has other bits than the reference, or a tenth without that rounding."""
    for gate in GATES:
        found = interpreted["gated_rounding"][gate]
        assert found["as_asked"] < 0.01
        assert found["otherwise"] > 0.1


def test_norms_return_out_and_make_one_where_none_is_given(interpreted: Findings) -> None:
    assert interpreted["returned"] == {"given": True, "in_place": True, "new": True}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("gate", GATES)
def test_gated_activations_equal_the_reference(
    interpreted: Findings, gate: str, width: int, dtype: str
) -> None:
    assert interpreted["gated"][f"{gate}-{width}-{dtype}"] <= TOLERANCE[DTYPES[dtype]]


def test_tolerance_catches_the_other_activation(interpreted: Findings) -> None:
    for dtype, error in interpreted["wrong_gate"].items():
        assert error > 3 * TOLERANCE[DTYPES[dtype]]


@pytest.mark.parametrize("gate", GATES)
def test_activations_are_finite_and_right_at_the_extremes(interpreted: Findings, gate: str) -> None:
    actual = torch.tensor(interpreted["extremes"][gate]).double()
    exact = GATES[gate](torch.tensor(EXTREMES).double())
    assert torch.allclose(actual, exact, rtol=1e-6, atol=1e-35)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROPES)
def test_rope_writes_what_the_reference_writes(
    interpreted: Findings, name: str, dtype: str
) -> None:
    """Into caches that were 9 everywhere, so that a stray write shows."""
    found = interpreted["rope"][f"{name}-{dtype}"]
    assert max(found["qkv"], found["keys"]) <= TOLERANCE[DTYPES[dtype]]
    assert found["values_are_equal"]
    assert found["untouched_are_equal"]


def test_tolerance_catches_a_position_off_by_one(interpreted: Findings) -> None:
    for dtype, error in interpreted["wrong_position"].items():
        assert error > 3 * TOLERANCE[DTYPES[dtype]]


def test_steps_without_tokens_launch_nothing(interpreted: Findings) -> None:
    assert interpreted["empty"] == {"ran": True}


def test_what_is_not_served_is_refused_by_name(interpreted: Findings) -> None:
    refused = interpreted["refused"]
    assert "x_TH is torch.bfloat16" in refused["bfloat16"]
    assert "x_TH is torch.float64" in refused["float64"]
    assert "x_TH must be contiguous" in refused["strided"]
    assert "weight_H must be torch.float16, not torch.float32" in refused["weight"]
    assert "gate_up_TN is torch.bfloat16" in refused["gate"]
    assert "positions_T must be torch.int64" in refused["positions"]


def test_kernels_compile_for_gpus_fit_and_do_not_spill() -> None:
    built = findings_of(__file__, "compile")["built"]
    kinds = len(COMPILED_WIDTHS) * (len(NORMS) + len(GATES)) + len(COMPILED_ROPES)
    assert len(built) == 2 * len(SHARED_MEMORY_LIMIT_BYTES) * kinds
    assert not {key: sizes for key, sizes in built.items() if sizes["spilled_bytes"]}
    assert max(sizes["shared_bytes"] for sizes in built.values()) <= 48 * 1024


def _interpret() -> Findings:
    torch.manual_seed(0)
    reference, ops = lory_kernels.select("torch"), lory_kernels.select("triton")
    subjects = ("norm", "wrong_norm", "gated", "wrong_gate", "rope", "wrong_position")
    found: Findings = {subject: {} for subject in subjects}
    for name, dtype in DTYPES.items():
        for width in WIDTHS:
            for kind in NORMS:
                found["norm"][f"{kind}-{width}-{name}"] = _norm_found(
                    ops, reference, kind, width, dtype
                )
            gate_up_TN = (4 * torch.randn(3, 2 * width)).to(dtype)
            for gate in GATES:
                found["gated"][f"{gate}-{width}-{name}"] = error_of(
                    _gated(ops, gate, gate_up_TN), _gated(reference, gate, gate_up_TN)
                )
        for key, shape in ROPES.items():
            found["rope"][f"{key}-{name}"] = _rope_found(ops, reference, dtype, **shape)
        found["wrong_position"][name] = _rope_found(ops, reference, dtype, shift=1)["qkv"]
        x_TH, weight_H = torch.randn(3, 96).to(dtype), torch.ones(96).to(dtype)
        wide_TH = torch.cat((x_TH, torch.zeros(3, 32).to(dtype)), 1)
        wide = ops.rms_norm(wide_TH, torch.ones(128).to(dtype), 1e-5)[:, :96]
        found["wrong_norm"][name] = error_of(wide, reference.rms_norm(x_TH, weight_H, 1e-5))
        gate_up_TN = torch.randn(3, 128).to(dtype)
        found["wrong_gate"][name] = error_of(
            _gated(ops, "silu_mul", gate_up_TN), _gated(reference, "gelu_tanh_mul", gate_up_TN)
        )
    row_TN = torch.tensor([*EXTREMES, *[1.0] * len(EXTREMES)])[None]
    found["extremes"] = {gate: _gated(ops, gate, row_TN)[0].tolist() for gate in GATES}
    found["rounding"], found["returned"] = _rounding(ops, reference), _returned(ops)
    found["gated_rounding"] = {gate: _gated_rounding(ops, reference, gate) for gate in GATES}
    found["empty"], found["refused"] = _empty(ops), _refusals(ops)
    return found


def _norm_found(
    ops: Ops, reference: Ops, kind: str, width: int, dtype: torch.dtype
) -> dict[str, Any]:
    x_TH, residual_TH = torch.randn(2, 3, width).to(dtype)
    in_fp32 = kind.endswith("fp32")
    weight_H = torch.randn(width).to(torch.float32 if in_fp32 else dtype)
    results = []
    for each in (ops, reference):
        here_TH, out_TH = residual_TH.clone(), torch.full_like(x_TH, float("nan"))
        if kind.startswith("add"):
            each.add_rms_norm(here_TH, x_TH, weight_H, 1e-5, out_TH, weight_in_fp32=in_fp32)
        else:
            each.rms_norm(x_TH, weight_H, 1e-5, out_TH, weight_in_fp32=in_fp32)
        results.append((out_TH, here_TH))
    (out, residual), (expected, expected_residual) = results
    return {
        "out": error_of(out, expected),
        "residual_is_equal": torch.equal(residual, expected_residual),
    }


def _gated(ops: Ops, gate: str, gate_up_TN: Tensor) -> Tensor:
    shape = (gate_up_TN.shape[0], gate_up_TN.shape[1] // 2)
    out_TI = torch.full(shape, float("nan"), dtype=gate_up_TN.dtype)
    getattr(ops, gate)(gate_up_TN, out_TI)
    return out_TI


def _rope_found(
    ops: Ops,
    reference: Ops,
    dtype: torch.dtype,
    *,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 32,
    rotary_dim: int = 32,
    block_size: int = 16,
    normed: bool = False,
    in_fp32: bool = False,
    shift: int = 0,
) -> dict[str, Any]:
    tokens = 7
    qkv_TN = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim + 9).to(dtype)[:, :-9]
    positions_T = torch.randint(0, 400, (tokens,))
    slots_T = 1 + torch.randperm(4 * block_size - 1)[:tokens]
    slots_T[::3], slots_T[1] = -1, 0
    norms = torch.randn(2, head_dim).to(torch.float32 if in_fp32 else dtype)
    q_norm_D, k_norm_D = norms if normed else (None, None)
    results = []
    for each, positions in ((ops, positions_T + shift), (reference, positions_T)):
        row_TN = qkv_TN.clone()
        k_cache, v_cache = torch.full((2, 4, kv_heads, block_size, head_dim), 9.0).to(dtype)
        each.rope_write_kv(
            row_TN, positions, angles(402, rotary_dim), k_cache, v_cache, slots_T, heads,
            kv_heads, head_dim, q_norm_D=q_norm_D, k_norm_D=k_norm_D, norm_eps=1e-6,
            norm_weight_in_fp32=in_fp32,
        )  # fmt: skip
        results.append((row_TN, k_cache, v_cache))
    (row, keys, values), (expected_row, expected_keys, expected_values) = results
    untouched = expected_keys == 9.0
    return {
        "qkv": error_of(row, expected_row),
        "keys": error_of(keys, expected_keys),
        "values_are_equal": torch.equal(values, expected_values),
        "untouched_are_equal": torch.equal(keys[untouched], expected_keys[untouched]),
    }


def _rounding(ops: Ops, reference: Ops) -> dict[str, Any]:
    """How many values of 64 rows differ between orders of rounding."""
    x_TH, weight_H = torch.randn(64, 96).half(), torch.randn(96).half()
    ours, theirs = (
        [each.rms_norm(x_TH, weight_H, 1e-5, weight_in_fp32=in_fp32) for in_fp32 in (False, True)]
        for each in (ops, reference)
    )
    differ = sum(int((a != b).sum()) for a, b in zip(ours, theirs, strict=True))
    return {"as_asked": differ // 64, "otherwise": int((ours[0] != ours[1]).sum()) > 640}


def _gated_rounding(ops: Ops, reference: Ops, gate: str) -> dict[str, float]:
    """Shares of values with other bits than the reference's."""
    gate_up_TN = torch.randn(64, 192).half()
    expected_TI = _gated(reference, gate, gate_up_TN)
    gate_TI, up_TI = gate_up_TN.float().chunk(2, 1)
    answers = {
        "as_asked": _gated(ops, gate, gate_up_TN),
        "otherwise": (GATES[gate](gate_TI) * up_TI).half(),
    }
    return {name: float((out != expected_TI).double().mean()) for name, out in answers.items()}


def _returned(ops: Ops) -> dict[str, bool]:
    x_TH, weight_H = torch.randn(2, 64), torch.ones(64)
    out_TH, before_TH = torch.empty(2, 64), x_TH.clone()
    given = ops.rms_norm(x_TH, weight_H, 1e-5, out_TH) is out_TH
    new_TH = ops.rms_norm(x_TH, weight_H, 1e-5)
    kept = torch.equal(x_TH, before_TH) and torch.equal(new_TH, out_TH)
    residual_TH = torch.zeros(2, 64)
    same = ops.add_rms_norm(residual_TH, x_TH, weight_H, 1e-5, x_TH) is x_TH
    return {"given": given, "in_place": same and torch.equal(x_TH, out_TH), "new": kept}


def _empty(ops: Ops) -> dict[str, bool]:
    ops.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-5)
    ops.silu_mul(torch.empty(0, 16), torch.empty(0, 8))
    none = torch.empty(0, dtype=torch.int64)
    caches = torch.empty(2, 1, 1, 4, 8)
    ops.rope_write_kv(torch.empty(0, 24), none, angles(4, 8), *caches, none, 1, 1, 8)
    return {"ran": True}


def _refusals(ops: Ops) -> dict[str, str]:
    x_TH, caches = torch.randn(2, 8), torch.empty(2, 1, 1, 4, 8)
    positions_T = torch.zeros(2, dtype=torch.int32)
    calls = {
        "bfloat16": lambda: ops.rms_norm(x_TH.bfloat16(), torch.ones(8).bfloat16(), 1e-5),
        "float64": lambda: ops.rms_norm(x_TH.double(), torch.ones(8).double(), 1e-5),
        "strided": lambda: ops.rms_norm(torch.randn(4, 8)[:, :4], torch.ones(4), 1e-5),
        "weight": lambda: ops.rms_norm(x_TH.half(), torch.ones(8), 1e-5),
        "gate": lambda: ops.silu_mul(x_TH.bfloat16(), torch.empty(2, 4)),
        "positions": lambda: ops.rope_write_kv(
            torch.randn(2, 24), positions_T, angles(4, 8), *caches, positions_T.long(), 1, 1, 8
        ),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            said[name] = str(error)
    return said


def _compile() -> Findings:
    """What 3 tokens launch, in bfloat16 and in float32."""
    from lory_kernels import triton_elementwise as kernels

    found: Findings = {"built": {}}

    def build(key: str, call: Any) -> None:
        for arch in SHARED_MEMORY_LIMIT_BYTES:
            for kernel, sizes in launches_built(call, arch).items():
                found["built"][f"sm_{arch}-{kernel}-{key}"] = asdict(sizes)

    for dtype, width in itertools.product((torch.bfloat16, torch.float32), COMPILED_WIDTHS):
        out_TI, x_TH, residual_TH = torch.empty(3, 3, width, dtype=dtype)
        gate_up_TN = torch.empty(3, 2 * width, dtype=dtype)
        for kind, is_gelu in itertools.product(NORMS, (False, True)):
            in_fp32, adds = kind.endswith("fp32"), kind.startswith("add")
            weight_H = torch.empty(width, dtype=torch.float32 if in_fp32 else dtype)
            norm = (out_TI, x_TH, residual_TH if adds else None, weight_H, 1e-5, in_fp32)
            build(f"{dtype}-{width}-{kind}", lambda norm=norm: kernels.rms_norm(*norm))
            gated = (gate_up_TN, out_TI, is_gelu)
            build(f"{dtype}-{width}-{is_gelu}", lambda gated=gated: kernels.gated(*gated))
    for dtype, shape in itertools.product((torch.bfloat16, torch.float32), COMPILED_ROPES):
        build(f"{dtype}-{shape}", lambda dtype=dtype, shape=shape: _launch_rope(dtype, *shape))
    return found


def _launch_rope(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, rotary_dim: int, normed: bool
) -> None:
    from lory_kernels.triton_elementwise import rope_write_kv

    qkv_TN = torch.empty(3, (heads + 2 * kv_heads) * dim, dtype=dtype)
    k_cache, v_cache = torch.empty(2, 4, kv_heads, 16, dim, dtype=dtype)
    norm_D = torch.empty(dim, dtype=dtype) if normed else None
    tokens_T = torch.empty(3, dtype=torch.int64)
    rope_write_kv(
        qkv_TN, tokens_T, torch.empty(8, rotary_dim), k_cache, v_cache, tokens_T, heads, kv_heads,
        dim, norm_D, norm_D, 1e-6, False,
    )  # fmt: skip


if __name__ == "__main__":
    answer({"interpret": _interpret, "compile": _compile})

"""Programs of recorded C calls: a step that is smaller than what was recorded touches its own rows
alone, and threads of a team wait for each other between calls."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernel_cases import angles, assert_close
from lory_kernels import best_cpu_backend, panels, select
from lory_kernels.calls import Step
from lory_kernels.cpu import CpuOps

pytestmark = pytest.mark.skipif(
    best_cpu_backend() == "torch", reason="no C compiler here: the CPU kernels are not built"
)

MOST = 40
TOKENS = (1, 2, 3, 4, 5, 7, 11, 12, 13, 23, 25, 27, 37, 39, 40)
"""Around the blocks of rows that panels are multiplied by: 12 with AVX-512, 3 with AVX2."""
NAN = float("nan")

needs_panels = pytest.mark.skipif(
    not panels.can_pack(torch.empty((2, 2), dtype=torch.bfloat16)),
    reason="panels need AVX2, and in bfloat16 no AMX",
)


@pytest.fixture(scope="module", params=[1, 2], ids=["1-thread", "2-threads"])
def ops(request: pytest.FixtureRequest) -> CpuOps:
    return CpuOps(threads=request.param)


def check_rows(ops: CpuOps, call: Callable[[], Tensor], expected_TN: Tensor) -> None:
    """`call` is recorded once and run for fewer tokens; what it writes has NaN past them before
    and after."""
    with ops.caller.record(MOST) as program:
        out_TN = call()
        recorded = program()
    for tokens in TOKENS:
        out_TN.fill_(NAN)
        recorded.run(Step(tokens))
        assert_close(out_TN[:tokens], expected_TN[:tokens])
        assert out_TN[tokens:].isnan().all(), tokens


@needs_panels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("out_features", [33, 64])
def test_linears_write_the_rows_of_the_step_alone(
    ops: CpuOps, dtype: torch.dtype, has_bias: bool, out_features: int
) -> None:
    weight_NK, x_TK = torch.randn(out_features, 64).to(dtype), torch.randn(MOST, 64).to(dtype)
    bias_N = torch.randn(out_features).to(dtype) if has_bias else None
    expected_TN = x_TK.double() @ weight_NK.double().T
    if bias_N is not None:
        expected_TN += bias_N.double()
    dense = panels.PanelMultiply(panels.pack(weight_NK), bias_N, ops.caller)
    check_rows(ops, lambda: dense(x_TK), expected_TN)


@needs_panels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_linears_write_the_rows_of_the_step_alone(ops: CpuOps, dtype: torch.dtype) -> None:
    """Few rows are multiplied while they are decoded, more of them by what is kept of that."""
    codes = torch.randint(0, 256, (33 * 128 // 2,), dtype=torch.uint8)
    weight = panels.pack_nf4(codes, torch.rand(33 * 2) + 0.5, 33, 128, dtype)
    (dense_NK,) = panels.row_blocks(weight, range(33), 64 * 128)
    x_TK = torch.randn(MOST, 128).to(dtype)
    nf4 = panels.PanelMultiply(weight, None, ops.caller)
    check_rows(ops, lambda: nf4(x_TK), x_TK.double() @ dense_NK.double().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_activations_write_the_rows_of_the_step_alone(
    ops: CpuOps, dtype: torch.dtype
) -> None:
    reference = select("torch")
    x_TH, weight_H = torch.randn(MOST, 37).to(dtype), torch.randn(37).to(dtype)
    expected_TH = reference.rms_norm(x_TH, weight_H, 1e-6)
    check_rows(ops, lambda: ops.rms_norm(x_TH, weight_H, 1e-6), expected_TH)
    gate_up_TN, out_TI = torch.randn(MOST, 74).to(dtype), torch.empty(MOST, 37, dtype=dtype)

    def gated() -> Tensor:
        ops.silu_mul(gate_up_TN, out_TI)
        return out_TI

    expected_TI = torch.empty_like(out_TI)
    reference.silu_mul(gate_up_TN, expected_TI)
    check_rows(ops, gated, expected_TI)


def test_rope_turns_and_writes_the_rows_of_the_step_alone(ops: CpuOps) -> None:
    """The first slot is written, one that is negative is not."""
    qkv_TN = torch.randn(MOST, 4 * 8)
    before_TN, caches = qkv_TN.clone(), torch.full((2, MOST, 1, 1, 8), NAN)
    positions_T, slots_T = torch.arange(MOST) + 1, torch.arange(MOST)
    slots_T[3] = -1
    with ops.caller.record(MOST) as program:
        ops.rope_write_kv(
            qkv_TN, positions_T, angles(MOST + 1, 8), *caches, slots_T, 2, 1, 8
        )  # fmt: skip
        recorded = program()
    step = Step(13)
    step.positions, step.kv_slots = positions_T.data_ptr(), slots_T.data_ptr()
    recorded.run(step)
    assert torch.equal(qkv_TN[13:], before_TN[13:])
    assert (qkv_TN[:13, :24] != before_TN[:13, :24]).any(1).all()
    written = caches.isnan().logical_not().flatten(2).all(2)
    assert written.tolist() == [[row < 13 and row != 3 for row in range(MOST)]] * 2


@needs_panels
def test_calls_of_a_program_see_what_the_call_before_them_wrote() -> None:
    """Large enough for both threads, each of which reads what the other has just written."""
    ops = CpuOps(threads=2)
    weights = [panels.pack(torch.randn(512, 512) / 512**0.5) for _ in range(12)]
    multiply = [panels.PanelMultiply(weight, None, ops.caller) for weight in weights]
    first_TK = torch.randn(MOST, 512)
    expected_TN = first_TK
    for each in multiply:
        expected_TN = each(expected_TN)
    with ops.caller.record(MOST) as program:
        found_TN = first_TK
        for each in multiply:
            found_TN = each(found_TN)
        recorded = program()
    for _ in range(20):
        found_TN.fill_(NAN)
        recorded.run(Step(MOST))
        assert torch.equal(found_TN, expected_TN)

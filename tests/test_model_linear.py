"""Full-precision linears: every layout agrees with float64, each is chosen in its place."""

import pytest
import torch

from lory_kernels import best_cpu_backend, panels, select
from lory_kernels.build import compiled_library
from lory_kernels.calls import Caller
from lory_server.model.linear import (
    DenseLinear,
    PanelLinear,
    PrepackedLinear,
    can_prepack,
    dense_linear,
)

OPS = select(best_cpu_backend(), threads=2)

needs_prepacking = pytest.mark.skipif(
    not can_prepack(), reason="oneDNN has no bfloat16 linear on this CPU"
)


needs_panels = pytest.mark.skipif(
    not panels.can_pack(torch.empty((2, 2), dtype=torch.bfloat16)),
    reason="panels need AVX2 and a C compiler, and in bfloat16 no AMX",
)


def caller(threads: int) -> Caller:
    return Caller(compiled_library(), threads)


def random(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))


@needs_prepacking
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 7, 64, 133])
def test_prepacked_and_plain_agree_at_any_row_count(bias: bool, rows: int) -> None:
    weight_NK = random(96, 80, 0).bfloat16()
    bias_N = random(1, 96, 1)[0].bfloat16() if bias else None
    x_TK = random(rows, 80, 2).bfloat16()
    plain = DenseLinear(weight_NK, bias_N)(x_TK, None)
    packed = PrepackedLinear(weight_NK, bias_N, 32)(x_TK, None)
    assert torch.allclose(packed.float(), plain.float(), rtol=2**-7, atol=2**-6)
    if rows and bias_N is not None:
        wrong = PrepackedLinear(weight_NK, None, 32)(x_TK, None)
        assert not torch.allclose(wrong.float(), plain.float(), rtol=2**-7, atol=2**-6)


@needs_panels
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 2), (31, 16), (33, 130), (64, 512), (96, 80)])
@pytest.mark.parametrize("rows", [0, 1, 11, 12, 13, 32, 133, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_panels_are_within_the_rounding_of_the_result(
    rows: int, shape: tuple[int, int], bias: bool, dtype: torch.dtype
) -> None:
    weight_NK = random(*shape, 0).to(dtype)
    bias_N = random(1, shape[0], 1)[0].to(dtype) if bias else None
    x_TK = random(rows, shape[1], 2).to(dtype)
    exact_TN = x_TK.double() @ weight_NK.double().T + (0 if bias_N is None else bias_N.double())
    y_TN = PanelLinear(panels.pack(weight_NK), bias_N, caller(2))(x_TK, None).double()
    rtol, atol = (2**-18, 2**-14) if dtype == torch.float32 else (2**-8, 2**-9)
    assert torch.allclose(y_TN, exact_TN, rtol, atol)
    if rows:
        one_weight_off = weight_NK.clone()
        one_weight_off[-1, -1] += 0.5
        assert not torch.allclose(
            PanelLinear(panels.pack(one_weight_off), bias_N, caller(2))(x_TK, None).double(),
            exact_TN,
            rtol,
            atol,
        )


@needs_panels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_in_panels_does_not_depend_on_its_batch_or_on_threads(dtype: torch.dtype) -> None:
    weight_NK, x_TK = random(200, 384, 0).to(dtype), random(77, 384, 1).to(dtype)
    weight = panels.pack(weight_NK)
    y_TN = panels.PanelMultiply(weight, None, caller(2))(x_TK)
    alone = panels.PanelMultiply(weight, None, caller(1))
    for row in range(77):
        assert torch.equal(alone(x_TK[row : row + 1]), y_TN[row : row + 1])


@needs_panels
def test_panels_refuse_rows_of_another_width_or_with_gaps() -> None:
    multiply = panels.PanelMultiply(panels.pack(random(8, 16, 0).bfloat16()), None, caller(1))
    for wrong in (random(3, 18, 0).bfloat16(), random(16, 3, 0).bfloat16().T):
        with pytest.raises(ValueError, match="x_TK"):
            multiply(wrong)


@needs_panels
@pytest.mark.parametrize(
    "wrong", [random(1, 8, 0)[0], random(1, 7, 0)[0].bfloat16(), random(8, 2, 0).bfloat16()[:, 0]]
)
def test_panels_refuse_a_bias_of_another_shape_dtype_or_with_gaps(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="bias_N"):
        PanelLinear(panels.pack(random(8, 16, 0).bfloat16()), wrong, caller(1))


@needs_panels
def test_an_odd_width_has_no_panels() -> None:
    odd_NK = random(8, 15, 0).bfloat16()
    assert not panels.can_pack(odd_NK)
    with pytest.raises(panels.KernelUnavailableError, match="even"):
        panels.pack(odd_NK)
    assert isinstance(dense_linear(odd_NK, None, 4, OPS), PrepackedLinear)


@needs_prepacking
def test_packed_layouts_are_for_float32_and_bfloat16_on_the_cpu_alone() -> None:
    weight_NK = random(8, 16, 0)
    packed = dense_linear(weight_NK.bfloat16(), None, 4, OPS)
    assert isinstance(packed, PanelLinear | PrepackedLinear)
    for other in (weight_NK.half(), weight_NK.bfloat16().to("meta")):
        assert isinstance(dense_linear(other, None, 4, OPS), DenseLinear)


@pytest.mark.parametrize("has_onednn", [True, False])
def test_what_a_cpu_lacks_leads_to_the_next_best_linear(
    has_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lory_kernels.panels.can_pack", lambda _: False)
    monkeypatch.setattr(
        "lory_server.model.linear.can_prepack", lambda: has_onednn and can_prepack()
    )
    expected = PrepackedLinear if has_onednn and can_prepack() else DenseLinear
    assert isinstance(dense_linear(random(8, 16, 0).bfloat16(), None, 4, OPS), expected)


def test_bytes_count_weight_and_bias() -> None:
    weight_NK, bias_N = random(8, 16, 0).bfloat16(), random(1, 8, 0)[0].bfloat16()
    assert DenseLinear(weight_NK, bias_N).num_bytes == 8 * 16 * 2 + 8 * 2
    rows_kept = 32 if panels.can_pack(weight_NK) else 8
    assert dense_linear(weight_NK, bias_N, 4, OPS).num_bytes == rows_kept * 16 * 2 + 8 * 2

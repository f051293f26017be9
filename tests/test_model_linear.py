"""Full-precision linears: pre-packed and torch's own agree, each is chosen in its place."""

import pytest
import torch

from lory_server.model.linear import DenseLinear, PrepackedLinear, can_prepack, dense_linear

needs_prepacking = pytest.mark.skipif(
    not can_prepack(), reason="oneDNN has no bfloat16 linear on this CPU"
)


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


@needs_prepacking
def test_prepacking_is_for_bfloat16_on_the_cpu_alone() -> None:
    weight_NK = random(8, 16, 0)
    assert isinstance(dense_linear(weight_NK.bfloat16(), None, 4), PrepackedLinear)
    for other in (weight_NK, weight_NK.half(), weight_NK.bfloat16().to("meta")):
        assert isinstance(dense_linear(other, None, 4), DenseLinear)


def test_without_the_private_ops_of_torch_the_plain_linear_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lory_server.model.linear.can_prepack", lambda: False)
    assert isinstance(dense_linear(random(8, 16, 0).bfloat16(), None, 4), DenseLinear)


def test_bytes_count_weight_and_bias() -> None:
    weight_NK, bias_N = random(8, 16, 0).bfloat16(), random(1, 8, 0)[0].bfloat16()
    for layer in (DenseLinear(weight_NK, bias_N), dense_linear(weight_NK, bias_N, 4)):
        assert layer.num_bytes == 8 * 16 * 2 + 8 * 2

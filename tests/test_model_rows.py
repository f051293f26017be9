"""Every linear gives back the rows of the weight it multiplies by, in blocks of new memory."""

from collections.abc import Callable

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from lory_kernels import panels
from lory_kernels.build import compiled_library
from lory_kernels.calls import Caller
from lory_server.model import nf4
from lory_server.model.linear import (
    DenseLinear,
    Linear,
    PanelLinear,
    PrepackedLinear,
    can_prepack,
)

N, K = 96, 128
ROWS = (range(N), range(32), range(5, 70), range(33, 34), range(64, 96))

has_panels = panels.can_pack(torch.empty((2, 2), dtype=torch.bfloat16))
needs_panels = pytest.mark.skipif(not has_panels, reason="panels need AVX2, in bfloat16 no AMX")
needs_prepacking = pytest.mark.skipif(not can_prepack(), reason="oneDNN has no bfloat16 linear")
needs_avx512_bf16 = pytest.mark.skipif(
    not bnb.has_avx512bf16(), reason="the packed NF4 kernel needs AVX512 bfloat16"
)


def weight(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn((N, K), generator=generator).to(dtype)


def quantized() -> nf4.NF4Weight:
    return nf4.quantize(weight(torch.float32), "w", double_quant=False)


def caller() -> Caller:
    return Caller(compiled_library(), 1)


def nf4_panels(dtype: torch.dtype) -> PanelLinear:
    source = quantized()
    packed = panels.pack_nf4(source.codes, source.absmax, N, K, dtype)
    return PanelLinear(packed, None, caller())


def rounded_thrice() -> Tensor:
    """NF4 as bitsandbytes' packed kernel has it: codes, scales and their products in bfloat16."""
    source = quantized()
    ones = nf4.NF4Weight(source.codes, torch.ones_like(source.absmax), N, K)
    scales = source.absmax.bfloat16().view(N, -1).repeat_interleave(source.block, dim=1)
    return ones.dequantize(torch.bfloat16) * scales


F32, BF16 = torch.float32, torch.bfloat16
LAYOUTS: list[object] = [
    pytest.param(
        lambda: DenseLinear(weight(F32), None), lambda: weight(F32), F32, id="dense float32"
    ),
    pytest.param(
        lambda: DenseLinear(weight(BF16), None), lambda: weight(BF16), BF16, id="dense bfloat16"
    ),
    pytest.param(
        lambda: PrepackedLinear(weight(BF16), None, 8),
        lambda: weight(BF16),
        BF16,
        marks=needs_prepacking,
        id="oneDNN",
    ),
    *(
        pytest.param(
            lambda dtype=dtype: PanelLinear(panels.pack(weight(dtype)), None, caller()),
            lambda dtype=dtype: weight(dtype),
            dtype,
            marks=needs_panels,
            id=f"panels {dtype}",
        )
        for dtype in (F32, BF16)
    ),
    *(
        pytest.param(
            lambda dtype=dtype: nf4_panels(dtype),
            lambda dtype=dtype: quantized().dequantize(dtype),
            dtype,
            marks=needs_panels,
            id=f"NF4 panels {dtype}",
        )
        for dtype in (F32, BF16)
    ),
    pytest.param(
        lambda: nf4.NF4Linear(quantized(), None),
        lambda: quantized().dequantize(F32),
        F32,
        id="NF4",
    ),
    pytest.param(
        lambda: nf4.PackedNF4Linear(quantized(), None),
        rounded_thrice,
        BF16,
        marks=needs_avx512_bf16,
        id="packed NF4",
    ),
]


@pytest.mark.parametrize(("make", "expected", "dtype"), LAYOUTS)
def test_rows_are_those_of_the_weight(
    make: Callable[[], Linear], expected: Callable[[], Tensor], dtype: torch.dtype
) -> None:
    layer, whole_NK = make(), expected().float()
    for rows in ROWS:
        for max_weights in (1, 40 * K, N * K):
            blocks = list(layer.row_blocks(rows, max_weights))
            assert {block.dtype for block in blocks} == {torch.float32}
            assert torch.equal(torch.cat(blocks), whole_NK[rows.start : rows.stop])
            assert max(block.numel() for block in blocks) <= max(max_weights, 32 * K)


@pytest.mark.parametrize(("make", "expected", "dtype"), LAYOUTS)
def test_the_linear_multiplies_by_these_rows_and_does_not_lose_them(
    make: Callable[[], Linear], expected: Callable[[], Tensor], dtype: torch.dtype
) -> None:
    """Its output for the rows of the identity is the weight, also after a block was overwritten."""
    layer, identity_KK = make(), torch.eye(K).to(dtype)
    before_KN = layer(identity_KK, None)
    blocks = list(layer.row_blocks(range(N), 16 * K))
    assert torch.allclose(before_KN.T.float(), torch.cat(blocks), rtol=1e-6)
    for block in blocks:
        block.fill_(float("nan"))
    assert torch.equal(layer(identity_KK, None), before_KN)

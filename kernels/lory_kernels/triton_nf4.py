"""NF4 matmul in Triton, on the bytes of bitsandbytes: y = x @ dequantize(codes).T + bias.

A weight [N, K] is N*K/2 bytes, row by row, two codes a byte with the first in the high half, and
one float32 scale for every `block` codes along K. They are read once, at 4 bits. A code becomes its
level rounded to the dtype of x; the products of 64 codes are summed in float32, and that sum is
multiplied by their scale. bitsandbytes rounds level * scale to the dtype instead: each weight is
off by at most half a unit in its last place either way, but not by the same amount. In float32 the
weights differ by no more than the rounding of that product.

Decoding stays in registers: byte permutes (PRMT) look the levels up, so that no table lies in
memory for the loop's pipeline to copy. The decoded tile is the right operand of the product: as
wgmma's left operand it would stay in registers while wgmma runs, which ptxas before 13.3 is known
to get wrong. K is cut into splits where rows are few; each writes float32 partial sums, which a
second kernel adds in a fixed order, with the bias. Nothing is zero-filled, nothing is atomic.
This module must not know which shapes it is good for (nf4_choice.py), models or files.

Legend: T tokens, K in features, N out features, S splits.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Triton is optional, and its language is Python in syntax only: its types are not Python's.

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lory_kernels.nf4_choice import GROUP, Tiles

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""What the 16 codes stand for, in float32."""

REDUCE_BLOCK = 512

_LEVELS = tl.constexpr(LEVELS)
_GROUP = tl.constexpr(GROUP)
_GROUP_BYTES = tl.constexpr(GROUP // 2)

# $4 holds 4 bytes, that is 8 codes; $0 to $3 become the two levels of one byte each, the first (the
# high half of the byte) in the low 16 bits. PRMT picks 4 bytes of 8 by the low 3 bits of 4 nibbles,
# so codes are their own selectors: levels 0-7 and 8-15 have a table each for their low bytes, and
# one each for their high bytes. A mask of the codes' top bits (PRMT repeats a byte's sign) tells
# which of the two counts. 21 instructions for 8 codes.
_PRMT_DECODE = """{{
.reg .b32 odd, codes, more, up, up2, a, b, c, d, low, high;
shl.b32 odd, $4, 4;
and.b32 codes, $4, 0x77777777;
shr.u32 more, codes, 16;
prmt.b32 up, $4, odd, 0x9d8c;
prmt.b32 up2, $4, odd, 0xbfae;
prmt.b32 a, {low0}, {low1}, codes;
prmt.b32 b, {low2}, {low3}, codes;
prmt.b32 c, {high0}, {high1}, codes;
prmt.b32 d, {high2}, {high3}, codes;
lop3.b32 low, a, b, up, 0xd8;
lop3.b32 high, c, d, up, 0xd8;
prmt.b32 $0, low, high, 0x4051;
prmt.b32 $1, low, high, 0x6273;
prmt.b32 a, {low0}, {low1}, more;
prmt.b32 b, {low2}, {low3}, more;
prmt.b32 c, {high0}, {high1}, more;
prmt.b32 d, {high2}, {high3}, more;
lop3.b32 low, a, b, up2, 0xd8;
lop3.b32 high, c, d, up2, 0xd8;
prmt.b32 $2, low, high, 0x4051;
prmt.b32 $3, low, high, 0x6273;
}}"""


@cache
def prmt_decode(dtype: torch.dtype) -> str:
    """The PTX that decodes 4 bytes to levels in a 16-bit dtype."""
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"x: {dtype} has no decoder of 16 bits; use bfloat16 or float16")
    bits = torch.tensor(LEVELS).to(dtype).view(torch.int16).tolist()
    words: dict[str, str] = {}
    for place in range(4):
        for name, shift in (("low", 0), ("high", 8)):
            table = [bits[4 * place + i] >> shift & 0xFF for i in range(4)]
            words[f"{name}{place}"] = f"0x{int.from_bytes(bytes(table), 'little'):08x}"
    return _PRMT_DECODE.format_map(words)


@triton.jit
def _level(codes, dtype: tl.constexpr):
    """Levels of codes by comparing: for the interpreter, which knows no PTX."""
    level = tl.full(codes.shape, _LEVELS[0], dtype)
    for code in tl.static_range(1, 16):
        level = tl.where(codes == code, tl.full(codes.shape, _LEVELS[code], dtype), level)
    return level


@triton.jit
def _decode(bytes_NB, dtype: tl.constexpr, PTX: tl.constexpr):
    """[N, 2 B] levels of [N, B] bytes; with PTX or, where that is empty, by comparing."""
    if PTX == "":
        first = _level(bytes_NB >> 4, dtype)
        second = _level(bytes_NB & 15, dtype)
    else:
        pairs = tl.inline_asm_elementwise(
            PTX, "=r,=r,=r,=r,r", [bytes_NB], dtype=tl.int32, is_pure=True, pack=4
        )
        first = pairs.to(tl.int16).to(dtype, bitcast=True)
        second = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.join(first, second).reshape(bytes_NB.shape[0], 2 * bytes_NB.shape[1])


@triton.jit
def _scales(scale_row, group, last, EVERY: tl.constexpr, GROUPS: tl.constexpr):
    """The scales of a group and, if a turn has two, of the next one; never past the last turn."""
    at = tl.minimum(group, last)
    first = tl.load(scale_row + at // EVERY)
    if GROUPS == 1:
        return first, first
    return first, tl.load(scale_row + (at + 1) // EVERY)


@triton.jit(do_not_specialize=["rows"])
def matmul_kernel(
    out_ptr, x_ptr, x_stride, codes_ptr, scale_ptr, bias_ptr, rows, out_features, num_groups,
    split_groups,
    EVERY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr,
    IS_PARTIAL: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rows, tiles of columns, splits); a split sums split_groups groups of 64 codes.

    out is y, or [S, rows, out_features] in float32 if IS_PARTIAL; a scale is for EVERY groups.
    Rows and columns past the end compute the first one again and are not stored, so that no load
    of the loop has a mask. Scales are not among what Triton pipelines: they are a turn ahead here.
    """
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(2)
    row = tl.where(t < rows, t, 0).to(tl.int64)
    column = tl.where(n < out_features, n, 0).to(tl.int64)
    x_row = x_ptr + row[:, None] * x_stride + tl.arange(0, _GROUP)[None, :]
    codes_row = codes_ptr + column[:, None] * (num_groups * _GROUP_BYTES)
    codes_row += tl.arange(0, _GROUP_BYTES)[None, :]
    scale_row = scale_ptr + column * (num_groups // EVERY)
    begin = split * split_groups
    end = tl.minimum(begin + split_groups, num_groups)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    first_ahead, second_ahead = _scales(scale_row, begin, num_groups - GROUPS, EVERY, GROUPS)
    for at in range(begin, end, GROUPS):
        first, second = first_ahead, second_ahead
        first_ahead, second_ahead = _scales(
            scale_row, at + GROUPS, num_groups - GROUPS, EVERY, GROUPS
        )
        for i in tl.static_range(GROUPS):
            codes = tl.load(codes_row + (at + i) * _GROUP_BYTES)
            x = tl.load(x_row + (at + i) * _GROUP)
            levels = _decode(codes, x.dtype, PTX)
            scale = first if i == 0 else second
            sums += tl.dot(x, levels.T, input_precision="ieee") * scale[None, :]
    owned = (t < rows)[:, None] & (n < out_features)[None, :]
    if IS_PARTIAL:
        out_ptr += split.to(tl.int64) * rows * out_features
    elif bias_ptr is not None:
        sums += tl.load(bias_ptr + column).to(tl.float32)[None, :]
    out = out_ptr + t.to(tl.int64)[:, None] * out_features + n[None, :]
    tl.store(out, sums.to(out_ptr.dtype.element_ty), mask=owned)


@triton.jit(do_not_specialize=["size"])
def reduce_kernel(
    y_ptr, partial_ptr, bias_ptr, size, out_features, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """y = the sum over splits, first to last, + bias; grid (blocks of the size = T * N results)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    sums = tl.load(partial_ptr + at, mask=inside, other=0.0)
    size = size.to(tl.int64)
    for split in tl.static_range(1, SPLITS):
        sums += tl.load(partial_ptr + at + split * size, mask=inside, other=0.0)
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + at % out_features, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, sums.to(y_ptr.dtype.element_ty), mask=inside)


def matmul(
    x_TK: Tensor,
    codes: Tensor,
    scales: Tensor,
    out_features: int,
    block: int,
    bias_N: Tensor | None,
    tiles: Tiles,
) -> Tensor:
    """y_TN = x @ dequantize(codes).T + bias in the dtype of x, whose row stride is free.

    codes: uint8, N*K/2 of them; scales: float32, N*K/block; bias: any float dtype. Launches depend
    on shapes alone, so they may be captured once a first call has compiled them. float32 is for the
    interpreter: no GPU multiplies it fast, and whoever wants it there dequantizes instead.
    """
    rows, in_features = x_TK.shape
    num_groups, splits = in_features // GROUP, tiles.splits
    _check(x_TK, codes, scales, out_features, block, tiles)
    split_groups = triton.cdiv(num_groups // tiles.groups, splits) * tiles.groups
    y_TN = torch.empty((rows, out_features), dtype=x_TK.dtype, device=x_TK.device)
    out = y_TN
    if splits > 1:
        shape = (splits, rows, out_features)
        out = torch.empty(shape, dtype=torch.float32, device=x_TK.device)
    grid = (triton.cdiv(rows, tiles.rows), triton.cdiv(out_features, tiles.columns), splits)
    matmul_kernel[grid](
        out, x_TK, x_TK.stride(0), codes, scales, bias_N, rows, out_features, num_groups,
        split_groups,
        EVERY=block // GROUP, ROWS=tiles.rows, COLUMNS=tiles.columns, GROUPS=tiles.groups,
        IS_PARTIAL=splits > 1,
        PTX="" if triton.knobs.runtime.interpret else prmt_decode(x_TK.dtype),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if splits > 1:
        reduce_kernel[(triton.cdiv(y_TN.numel(), REDUCE_BLOCK),)](
            y_TN, out, bias_N, y_TN.numel(), out_features, SPLITS=splits, BLOCK=REDUCE_BLOCK
        )
    return y_TN


def _check(
    x_TK: Tensor, codes: Tensor, scales: Tensor, out_features: int, block: int, tiles: Tiles
) -> None:
    in_features = x_TK.shape[1]
    if not triton.knobs.runtime.interpret and x_TK.dtype == torch.float32:
        raise ValueError("x: float32 is not multiplied by the NF4 kernel on a GPU; dequantize")
    if block % GROUP or in_features % block:
        raise ValueError(
            f"block: {block} codes a scale must be a multiple of {GROUP} that divides the "
            f"{in_features} in features"
        )
    if in_features // GROUP % tiles.groups:
        raise ValueError(f"tiles.groups: {tiles.groups} does not divide {in_features} / {GROUP}")
    if codes.numel() * 2 != out_features * in_features:
        raise ValueError(f"codes: {codes.numel()} bytes for {out_features} x {in_features} codes")
    if scales.numel() * block != out_features * in_features:
        raise ValueError(f"scales: {scales.numel()} for {out_features} x {in_features} codes")
    assert x_TK.stride(1) == 1
    assert codes.is_contiguous()
    assert scales.is_contiguous()

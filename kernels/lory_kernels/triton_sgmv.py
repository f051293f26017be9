"""SGMV in Triton: a shrink and an expand kernel over tiles of rows.

    h[t, k] = x[t] @ A[slot, k].T        shrink, in splits of the in features
    y[t, columns of k] = gain[slot, k] * y + scale[slot, k] * h[t, k] @ B[slot, k] + bias[slot, k]
                                         expand, adds the splits first

Grids come from what the host knows of a step (sgmv_choice.py), never from how many slots exist or
what the segment table holds. Which segment owns a tile is found on the device, so one captured
launch serves any mix; tiles of base rows, slices of rank 0 and tiles nobody owns leave at once. The
pool is one tensor and adapters are offsets of 64 bits into it: no pointer is ever loaded. Factors
come in 16 bytes at once where the site's alignment and widths are whole multiples of that. A split
writes a plane of float32 sums, and the expand adds the planes in a fixed order: nothing is
zero-filled, nothing is atomic, results do not differ from run to run.

The expand multiplies 16-bit B by tensor cores without rounding h to 16 bits, as PEFT does: h is the
sum of two 16-bit parts, h = near + rest, each multiplied, both summed in float32. What is left out
is at most 2^-16 of h in bfloat16 and 2^-22 in float16, against 2^-8 and 2^-11 of one part. (In
float16 it may also be 2^-25, and an h beyond 65504 becomes NaN, where PEFT has infinity.) The price
is a second product in a kernel that moves memory: at rank 64, 8192 rows of an 8B model's qkv make
13 GFLOP and move 0.2 GB. float32 models multiply in float32 ("ieee").

Gains and biases are looked for wherever a site has tables of them, whatever the step's rows: that
is two offsets read beside the rank, and one kernel, compiled and captured once, for every step.

This module must not know the other backends. Contract and legend are in contract.py.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false
# Triton is optional, and its language is Python in syntax only: its types are not Python's.

import torch
import triton
import triton.language as tl
from torch import Tensor

from lory_kernels.contract import MAX_RANK, Segments, SiteTable
from lory_kernels.sgmv_choice import EXPAND_STAGES, Cut, cut_up
from lory_kernels.triton_tiles import BLOCK_RANGES, find_tile


@triton.jit
def _rows_of(
    starts_ptr, slots_ptr, num_segments, tile, TILE: tl.constexpr, BLOCK_G: tl.constexpr
):  # fmt: skip
    """(slot, first row, end row) of a tile; the slot is negative if no adapter owns it."""
    segment, place = find_tile(starts_ptr, num_segments, tile, TILE, BLOCK_G)
    owned = segment < num_segments
    slot = tl.load(slots_ptr + segment, mask=owned, other=-1)
    begin = tl.load(starts_ptr + segment, mask=owned, other=0)
    end = tl.load(starts_ptr + segment + 1, mask=owned, other=0)
    return slot, begin + place * TILE, end


@triton.jit
def _slice_of(out_features_ptr, block, SLICES: tl.constexpr, BLOCK_O: tl.constexpr):
    """(slice, first column in it) of a block of columns; slices stand in a row."""
    k = 0
    for each in tl.static_range(SLICES):
        blocks = (tl.load(out_features_ptr + each).to(tl.int32) + BLOCK_O - 1) // BLOCK_O
        passed = (k == each) & (block >= blocks)
        k = tl.where(passed, k + 1, k)
        block = tl.where(passed, block - blocks, block)
    return k, block * BLOCK_O


@triton.jit
def _sum_of_splits(h_block, plane, num_splits, kept, MAX_SPLITS: tl.constexpr):
    """All planes are loaded at once, and added in an order that is fixed when this is compiled."""
    if MAX_SPLITS == 1:
        return tl.load(h_block, mask=kept, other=0.0)
    split = tl.arange(0, MAX_SPLITS)
    used = (split < num_splits)[:, None, None]
    planes = h_block[None, :, :] + split.to(tl.int64)[:, None, None] * plane
    return tl.sum(tl.load(planes, mask=kept[None, :, :] & used, other=0.0), 0)


@triton.jit
def _add_product(h, b, sums):
    """sums + h @ b; h in two parts of b's dtype, unless that is float32."""
    if b.dtype == tl.float32:
        return tl.dot(h, b, sums, input_precision="ieee")
    near = h.to(b.dtype)
    rest = (h - near.to(tl.float32)).to(b.dtype)
    return tl.dot(near, b, tl.dot(rest, b, sums))


@triton.jit
def _numbers_at(pool_ptr, offset, column, kept, otherwise):
    """float32 numbers of a pool of any dtype by column; `otherwise` where there are none."""
    numbers = (pool_ptr + offset).to(tl.pointer_type(tl.float32), bitcast=True)
    return tl.load(numbers + column, mask=kept & (offset >= 0), other=otherwise)


@triton.jit(
    do_not_specialize=("rows", "rank_blocks", "num_segments"),
    do_not_specialize_on_alignment=(
        "a_offset_ptr", "rank_ptr", "starts_ptr", "slots_ptr",
    ),
)  # fmt: skip
def shrink_kernel(
    h_ptr, x_ptr, x_stride, pool_ptr, a_offset_ptr, rank_ptr, starts_ptr, slots_ptr,
    rows, in_features, split_features, rank_blocks, num_segments,
    SLICES: tl.constexpr, TILE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """h[split, t, k, :rank] = x[t, split] @ A[:, split].T; grid (slices * blocks of rank, splits,
    tiles): programs that read the same x are neighbours. split_features: a multiple of BLOCK_I."""
    tile = tl.program_id(2)
    slot, first, end = _rows_of(starts_ptr, slots_ptr, num_segments, tile, TILE, BLOCK_G)
    if slot < 0:
        return
    k = tl.program_id(0) % SLICES
    first_r = tl.program_id(0) // SLICES * BLOCK_R
    entry = slot * SLICES + k
    rank = tl.load(rank_ptr + entry)
    if first_r >= rank:
        return
    split = tl.program_id(1)
    t = (first + tl.arange(0, TILE)).to(tl.int64)
    r = first_r + tl.arange(0, BLOCK_R)
    i = tl.arange(0, BLOCK_I)
    x_block = x_ptr + t[:, None] * x_stride + i[None, :]
    a_offset = tl.multiple_of(tl.load(a_offset_ptr + entry), VECTOR)
    a_block = pool_ptr + a_offset + r[None, :] * in_features + i[:, None]
    sums = tl.zeros((TILE, BLOCK_R), tl.float32)
    begin = split * split_features
    for at in range(begin, tl.minimum(begin + split_features, in_features), BLOCK_I):
        left = i < in_features - at
        x = tl.load(x_block + at, mask=(t < end)[:, None] & left[None, :], other=0.0)
        a = tl.load(a_block + at, mask=left[:, None] & (r < rank)[None, :], other=0.0)
        sums = tl.dot(x, a, sums, input_precision="ieee")
    line = (split.to(tl.int64) * rows + t) * SLICES + k
    h_block = h_ptr + line[:, None] * (rank_blocks * BLOCK_R) + r[None, :]
    tl.store(h_block, sums, mask=(t < end)[:, None] & (r < rank)[None, :])


@triton.jit(
    do_not_specialize=("rows", "rank_blocks", "num_splits", "num_segments"),
    do_not_specialize_on_alignment=(
        "b_offset_ptr", "rank_ptr", "scale_ptr", "gain_offset_ptr", "bias_offset_ptr",
        "out_offset_ptr", "out_features_ptr", "starts_ptr", "slots_ptr",
    ),
)  # fmt: skip
def expand_kernel(
    y_ptr, y_stride, h_ptr, pool_ptr, b_offset_ptr, rank_ptr, scale_ptr, gain_offset_ptr,
    bias_offset_ptr, out_offset_ptr, out_features_ptr, starts_ptr, slots_ptr, rows, rank_blocks,
    num_splits, num_segments,
    SLICES: tl.constexpr, TILE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr, SHRINK_RANK: tl.constexpr, MAX_SPLITS: tl.constexpr,
    VECTOR: tl.constexpr, HAS_GAINS: tl.constexpr, HAS_BIASES: tl.constexpr,
):  # fmt: skip
    """y[t, columns of k] = gain * y + scale * h[t, k, :rank] @ B + bias; grid (blocks of columns,
    tiles). Without HAS_GAINS and HAS_BIASES there is no table of them."""
    tile = tl.program_id(1)
    slot, first, end = _rows_of(starts_ptr, slots_ptr, num_segments, tile, TILE, BLOCK_G)
    if slot < 0:
        return
    k, first_column = _slice_of(out_features_ptr, tl.program_id(0), SLICES, BLOCK_O)
    entry = slot * SLICES + k
    rank = tl.load(rank_ptr + entry)
    is_changed = rank > 0
    if HAS_GAINS:
        gain_offset = tl.load(gain_offset_ptr + entry)
        is_changed = is_changed | (gain_offset >= 0)
    if HAS_BIASES:
        bias_offset = tl.load(bias_offset_ptr + entry)
        is_changed = is_changed | (bias_offset >= 0)
    if is_changed == 0:
        return
    width = tl.multiple_of(tl.load(out_features_ptr + k), VECTOR)
    t = (first + tl.arange(0, TILE)).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    column = first_column + tl.arange(0, BLOCK_O)
    h_width = rank_blocks * SHRINK_RANK
    plane = rows.to(tl.int64) * SLICES * h_width
    h_block = h_ptr + (t * SLICES + k)[:, None] * h_width + r[None, :]
    b_offset = tl.multiple_of(tl.load(b_offset_ptr + entry), VECTOR)
    b_block = pool_ptr + b_offset + r[:, None] * width + column[None, :]
    sums = tl.zeros((TILE, BLOCK_O), tl.float32)
    for at in range(0, rank, BLOCK_R):
        left = r < rank - at
        kept = (t < end)[:, None] & left[None, :]
        h = _sum_of_splits(h_block + at, plane, num_splits, kept, MAX_SPLITS)
        b = tl.load(b_block + at * width, mask=left[:, None] & (column < width)[None, :], other=0.0)
        sums = _add_product(h, b, sums)
    out_offset = tl.multiple_of(tl.load(out_offset_ptr + k), VECTOR)
    y_block = y_ptr + t[:, None] * y_stride + out_offset + column[None, :]
    owned = (t < end)[:, None] & (column < width)[None, :]
    y = tl.load(y_block, mask=owned, other=0.0).to(tl.float32)
    if HAS_GAINS:
        y *= _numbers_at(pool_ptr, gain_offset, column, column < width, 1.0)[None, :]
    if HAS_BIASES:
        y += _numbers_at(pool_ptr, bias_offset, column, column < width, 0.0)[None, :]
    y += tl.load(scale_ptr + entry) * sums
    tl.store(y_block, y.to(y_ptr.dtype.element_ty), mask=owned)


def sgmv(
    y_TN: Tensor,
    x_TH: Tensor,
    site: SiteTable,
    pool: Tensor,
    segments: Segments,
    columns_2K: Tensor,
) -> None:
    """Ops.sgmv; columns_2K holds the site's out_offsets and out_features as int64 on the device."""
    if not segments.changes_rows:
        return
    if segments.max_rank > MAX_RANK:
        raise ValueError(f"segments.max_rank: {segments.max_rank} is above {MAX_RANK}")
    cut = cut_up(
        x_TH.element_size(), _vector(x_TH, site) > 1, segments.num_rows, segments.num_segments,
        segments.max_rank, site.in_features, len(site.out_offsets),
    )  # fmt: skip
    h = _shrink(x_TH, site, pool, segments, cut)
    _expand(y_TN, h, site, pool, segments, columns_2K, cut)


def _shrink(x_TH: Tensor, site: SiteTable, pool: Tensor, segments: Segments, cut: Cut) -> Tensor:
    rule, slices = cut.rule, len(site.out_offsets)
    shape = (cut.splits, segments.num_rows, slices, cut.h_width)
    h = torch.empty(shape, dtype=torch.float32, device=x_TH.device)
    shrink_kernel[(slices * cut.rank_blocks, cut.splits, cut.tiles)](
        h, x_TH, x_TH.stride(0), pool, site.a_offset_SK, site.rank_SK, segments.starts_G1,
        segments.slots_G, segments.num_rows, site.in_features, cut.split_features, cut.rank_blocks,
        segments.num_segments,
        SLICES=slices, TILE=rule.tile_rows, BLOCK_G=BLOCK_RANGES, BLOCK_R=cut.shrink_rank,
        BLOCK_I=rule.shrink_block, VECTOR=_vector(x_TH, site), num_warps=rule.shrink_warps,
        num_stages=rule.shrink_stages,
    )  # fmt: skip
    return h


def _expand(
    y_TN: Tensor,
    h: Tensor,
    site: SiteTable,
    pool: Tensor,
    segments: Segments,
    columns_2K: Tensor,
    cut: Cut,
) -> None:
    rule, gain_SK, bias_SK = cut.rule, site.gain_offset_SK, site.bias_offset_SK
    blocks = sum(triton.cdiv(width, rule.expand_block) for width in site.out_features)
    expand_kernel[(blocks, cut.tiles)](
        y_TN, y_TN.stride(0), h, pool, site.b_offset_SK, site.rank_SK, site.scale_SK,
        site.b_offset_SK if gain_SK is None else gain_SK,
        site.b_offset_SK if bias_SK is None else bias_SK,
        columns_2K[0], columns_2K[1], segments.starts_G1, segments.slots_G, segments.num_rows,
        cut.rank_blocks, cut.splits, segments.num_segments,
        SLICES=len(site.out_offsets), TILE=rule.tile_rows, BLOCK_G=BLOCK_RANGES,
        BLOCK_R=cut.expand_rank, BLOCK_O=rule.expand_block, SHRINK_RANK=cut.shrink_rank,
        MAX_SPLITS=cut.max_splits, VECTOR=_vector(y_TN, site), HAS_GAINS=gain_SK is not None,
        HAS_BIASES=bias_SK is not None, num_warps=rule.expand_warps, num_stages=EXPAND_STAGES,
    )  # fmt: skip


def _vector(rows: Tensor, site: SiteTable) -> int:
    """Elements that may be read at once from where any row of a factor begins: 16 bytes, or one."""
    vector = 16 // rows.element_size()
    sizes = (site.alignment, site.in_features, *site.out_features, *site.out_offsets)
    return 1 if any(size % vector for size in sizes) else vector

"""SGMV in Triton: a shrink and an expand kernel over tiles of rows.

The grids depend on the number of rows and segments, never on how many slots exist. Which segment
owns a tile is found on the device from the segment table, so one captured launch serves any mix;
tiles of base rows, slices of rank 0 and tiles nobody owns leave at once. The pool is one tensor and
adapters are offsets into it: no pointer is ever loaded. Nothing is zero-filled, every sum has one
order. This module must not know the other backends. Contract and legend are in contract.py.

    tiles of the table  rows 0..40 slot 3 | row 40 slot 1 | rows 41..60 base
                        [0: 0..16) [1: 16..32) [2: 32..40) [3: 40..41) [4, 5: leave)
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Triton is optional, and its language is Python in syntax only: its types are not Python's.

import torch
import triton
import triton.language as tl
from torch import Tensor

from lory_kernels.contract import MAX_RANK, Segments, SiteTable

TILE_ROWS = 16
BLOCK_IN = 64
BLOCK_OUT = 64
MAX_BLOCK_RANK = 64
EXPAND_BLOCK_RANK = 16
"""float32 products spill registers in wider blocks; ahead-of-time compilation checks it."""


@triton.jit
def _find_tile(starts_ptr, num_segments, tile, TILE: tl.constexpr, BLOCK_G: tl.constexpr):
    """(segment, first row, end row) of a tile; segment = num_segments if nobody owns it."""
    g = tl.arange(0, BLOCK_G)
    inside = g < num_segments
    begins = tl.load(starts_ptr + g, mask=inside, other=0)
    ends = tl.load(starts_ptr + g + 1, mask=inside, other=0)
    tiles = tl.where(inside, (ends - begins + TILE - 1) // TILE, 0)
    upto = tl.cumsum(tiles, 0)
    segment = tl.sum(tl.where(inside & (upto <= tile), 1, 0), 0)
    before = tl.sum(tl.where(g < segment, tiles, 0), 0)
    begin = tl.sum(tl.where(g == segment, begins, 0), 0)
    end = tl.sum(tl.where(g == segment, ends, 0), 0)
    return segment, begin + (tile - before) * TILE, end


@triton.jit
def shrink_kernel(
    h_ptr, x_ptr, x_stride, pool_ptr, a_offset_ptr, rank_ptr, scale_ptr, starts_ptr, slots_ptr,
    num_segments, in_features, max_rank,
    SLICES: tl.constexpr, TILE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):  # fmt: skip
    """h[t, k, :rank] = scale * x[t] @ A.T; grid (tiles, slices, blocks of rank)."""
    segment, first, end = _find_tile(starts_ptr, num_segments, tl.program_id(0), TILE, BLOCK_G)
    if segment >= num_segments:
        return
    slot = tl.load(slots_ptr + segment)
    if slot < 0:
        return
    k = tl.program_id(1)
    entry = slot * SLICES + k
    rank = tl.load(rank_ptr + entry)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    if tl.program_id(2) * BLOCK_R >= rank:
        return
    t = (first + tl.arange(0, TILE)).to(tl.int64)
    i = tl.arange(0, BLOCK_I)
    x_block = x_ptr + t[:, None] * x_stride + i[None, :]
    a_block = pool_ptr + tl.load(a_offset_ptr + entry) + r[None, :] * in_features + i[:, None]
    sums = tl.zeros((TILE, BLOCK_R), tl.float32)
    for at in range(0, in_features, BLOCK_I):
        left = i < in_features - at
        x = tl.load(x_block + at, mask=(t < end)[:, None] & left[None, :], other=0.0)
        a = tl.load(a_block + at, mask=left[:, None] & (r < rank)[None, :], other=0.0)
        sums = tl.dot(x, a, sums, input_precision="ieee")
    h_block = h_ptr + (t[:, None] * SLICES + k) * max_rank + r[None, :]
    scaled = sums * tl.load(scale_ptr + entry)
    tl.store(h_block, scaled, mask=(t < end)[:, None] & (r < rank)[None, :])


@triton.jit
def expand_kernel(
    y_ptr, y_stride, h_ptr, pool_ptr, b_offset_ptr, rank_ptr, out_offset_ptr, out_features_ptr,
    starts_ptr, slots_ptr, num_segments, max_rank,
    SLICES: tl.constexpr, TILE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    """y[t, columns of k] += h[t, k, :rank] @ B; grid (tiles, slices, blocks of columns)."""
    segment, first, end = _find_tile(starts_ptr, num_segments, tl.program_id(0), TILE, BLOCK_G)
    if segment >= num_segments:
        return
    slot = tl.load(slots_ptr + segment)
    if slot < 0:
        return
    k = tl.program_id(1)
    entry = slot * SLICES + k
    rank = tl.load(rank_ptr + entry)
    width = tl.load(out_features_ptr + k)
    column = tl.program_id(2) * BLOCK_O + tl.arange(0, BLOCK_O)
    if (rank == 0) | (tl.program_id(2) * BLOCK_O >= width):
        return
    t = (first + tl.arange(0, TILE)).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    h_block = h_ptr + (t[:, None] * SLICES + k) * max_rank + r[None, :]
    b_block = pool_ptr + tl.load(b_offset_ptr + entry) + r[:, None] * width + column[None, :]
    sums = tl.zeros((TILE, BLOCK_O), tl.float32)
    for at in range(0, rank, BLOCK_R):
        left = r < rank - at
        h = tl.load(h_block + at, mask=(t < end)[:, None] & left[None, :], other=0.0)
        b = tl.load(b_block + at * width, mask=left[:, None] & (column < width)[None, :], other=0.0)
        sums = tl.dot(h, b.to(tl.float32), sums, input_precision="ieee")
    y_block = y_ptr + t[:, None] * y_stride + tl.load(out_offset_ptr + k) + column[None, :]
    owned = (t < end)[:, None] & (column < width)[None, :]
    y = tl.load(y_block, mask=owned, other=0.0)
    tl.store(y_block, (y.to(tl.float32) + sums).to(y_ptr.dtype.element_ty), mask=owned)


def sgmv(
    y_TN: Tensor,
    x_TH: Tensor,
    site: SiteTable,
    pool: Tensor,
    segments: Segments,
    columns_2K: Tensor,
) -> None:
    """Ops.sgmv; columns_2K holds the site's out_offsets and out_features as int64 on the device."""
    if segments.adapted_rows == 0 or segments.max_rank == 0:
        return
    if segments.max_rank > MAX_RANK:
        raise ValueError(f"segments.max_rank: {segments.max_rank} is above {MAX_RANK}")
    slices, max_rank = len(site.out_offsets), segments.max_rank
    rows, num_segments = segments.num_rows, segments.num_segments
    tiles = min(rows, triton.cdiv(rows, TILE_ROWS) + num_segments)
    block_g = triton.next_power_of_2(num_segments)
    block_r = min(MAX_BLOCK_RANK, max(16, triton.next_power_of_2(max_rank)))
    h_TKR = torch.empty((x_TH.shape[0], slices, max_rank), dtype=torch.float32, device=x_TH.device)
    shrink_kernel[(tiles, slices, triton.cdiv(max_rank, block_r))](
        h_TKR, x_TH, x_TH.stride(0), pool, site.a_offset_SK, site.rank_SK, site.scale_SK,
        segments.starts_G1, segments.slots_G, num_segments, site.in_features, max_rank,
        SLICES=slices, TILE=TILE_ROWS, BLOCK_G=block_g, BLOCK_R=block_r, BLOCK_I=BLOCK_IN,
    )  # fmt: skip
    expand_kernel[(tiles, slices, triton.cdiv(max(site.out_features), BLOCK_OUT))](
        y_TN, y_TN.stride(0), h_TKR, pool, site.b_offset_SK, site.rank_SK, columns_2K[0],
        columns_2K[1], segments.starts_G1, segments.slots_G, num_segments, max_rank,
        SLICES=slices, TILE=TILE_ROWS, BLOCK_G=block_g, BLOCK_R=EXPAND_BLOCK_RANK,
        BLOCK_O=BLOCK_OUT,
    )  # fmt: skip

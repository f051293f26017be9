"""Paged attention in Triton: one kernel for prefill and decode, and one that joins split contexts.

A program has a tile of one row's query tokens, all heads of a group that share their keys (so that
a decode fills the rows of a matrix product), and walks over keys a tile at a time, whatever the
size of a block. Which row owns a tile is found on the device, grids and scratch come from shapes
alone: nothing waits for the device, and a captured launch serves any mix. A row with one query
token may split its keys over programs; the others leave at once. Every sum has one order.
This module must not know the other backends. Contract and legend are in contract.py.

    one row, context 700, one query token, 3 splits of at least 256 keys
    keys     0 ........ 256 ........ 512 ..... 700
    program  split 0    | split 1    | split 2      -> part, log2 of its weight -> join_kernel
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false
# Triton is optional, and its language is Python in syntax only: its types are not Python's.

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lory_kernels.triton_tiles import BLOCK_RANGES, find_tile

LOG2_E = tl.constexpr(1.4426950408889634)
NO_WINDOW = 2**30
MAX_HEAD_DIM = 256

TARGET_PROGRAMS = 264
"""Decodes split until there are so many: two for each of an H200's 132 processors; not measured."""
MAX_SPLITS = 32
"""What one program of join_kernel holds in registers; not measured."""
MAX_SPLIT_KEYS = 8192
"""However many rows there are: a long one alone would hold up the batch, and splits that a short
one has no use for leave at once; not measured."""
MIN_SPLIT_KEYS = 256
"""A split must be worth its program and its part of the join; not measured."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How one launch is cut up."""

    rows: int
    """Query tokens times heads; products take at least 16."""
    keys: int
    warps: int
    stages: int


# By bytes of an element, and the largest padded head dim: for steps of one token a row, and others.
# Registers and shared memory decide, as ahead-of-time compilation shows; none is measured yet.
TILINGS = {
    # A decode has few rows and waits for memory: wide tiles of keys, three of them on their way.
    # With 64 rows 4 warps, or 3 stages, spill on sm_80.
    (2, 128): (Tiling(16, 64, 4, 3), Tiling(64, 64, 8, 2)),
    # The accumulator is twice as wide, so there are half the keys and twice the warps.
    (2, 256): (Tiling(16, 32, 4, 3), Tiling(64, 32, 8, 2)),
    # float32 products are not made by tensor cores: operands stand in registers, so small tiles.
    # 4 warps spill on sm_90 with 32 keys.
    (4, 128): (Tiling(16, 32, 8, 2), Tiling(16, 32, 8, 2)),
    (4, 256): (Tiling(16, 16, 4, 2), Tiling(16, 16, 4, 2)),
}


@triton.jit
def _split(num_keys, num_splits, BLOCK_N: tl.constexpr, MIN_KEYS: tl.constexpr):
    """(keys of a split, splits in use) of a row with one query token."""
    tiles = (num_keys + num_splits * BLOCK_N - 1) // (num_splits * BLOCK_N)
    length = tl.maximum(tiles * BLOCK_N, MIN_KEYS)
    return length, (num_keys + length - 1) // length


@triton.jit
def _capped(scores, cap):
    """cap * tanh(scores / cap): by its series near zero, where the other form cancels."""
    x = scores / cap
    square = x * x
    series = 2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835))
    near = x * (1.0 + square * (-1.0 / 3 + square * series))
    far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))
    return cap * tl.where(square < 0.0625, near, far)


@triton.jit
def _attend(
    q, position, k_ptr, v_ptr, table_ptr, kv_head, begin, end, window, scale, softcap,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HAS_CAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(softmax(scores) @ V, log2 of the sum of exp(scores)) of a tile over the keys begin .. end.

    What no query of the tile sees is not read. A row that sees nothing gets 0 and -inf.
    """
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    real = d < HEAD_DIM
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for at in range(begin, end, BLOCK_N):
        key = at + n
        live = key < end
        block = tl.load(table_ptr + key // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
        line = (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE
        k_block = k_ptr + line[None, :] * HEAD_DIM + d[:, None]
        k = tl.load(k_block, mask=real[:, None] & live[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if HAS_CAP:
            scores = _capped(scores, softcap)
        seen = (key[None, :] <= position[:, None]) & (key[None, :] > position[:, None] - window)
        scores = tl.where(seen & live[None, :], scores * LOG2_E, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        shares = tl.exp2(scores - safe[:, None])
        kept = tl.exp2(highest - safe)
        total = total * kept + tl.sum(shares, 1)
        v_block = v_ptr + line[:, None] * HEAD_DIM + d[None, :]
        v = tl.load(v_block, mask=live[:, None] & real[None, :], other=0.0)
        mixed = tl.dot(shares.to(v.dtype), v, mixed * kept[:, None], input_precision="ieee")
        highest = higher
    return mixed / tl.where(total == 0.0, 1.0, total)[:, None], highest + tl.log2(total)


@triton.jit(
    do_not_specialize=("table_stride", "num_rows", "num_splits", "window"),
    do_not_specialize_on_alignment=("tables_ptr", "starts_ptr", "lens_ptr"),
)
def attention_kernel(
    out_ptr, out_stride, part_ptr, weight_ptr, q_ptr, q_stride, k_ptr, v_ptr, tables_ptr,
    table_stride, starts_ptr, lens_ptr, num_rows, num_splits, window, scale, softcap,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HAS_CAP: tl.constexpr, TILE_HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    MIN_KEYS: tl.constexpr,
):  # fmt: skip
    """Ops.paged_attention; grid (tiles of queries, tiles of heads, splits).

    A row that splits leaves in part[row, head, split] what its split found, and in weight the log2
    of that part's weight; any other writes out.
    """
    TILE_TOKENS: tl.constexpr = BLOCK_M // TILE_HEADS
    HEAD_TILES: tl.constexpr = (GROUP + TILE_HEADS - 1) // TILE_HEADS
    row, place = find_tile(starts_ptr, num_rows, tl.program_id(0), TILE_TOKENS, BLOCK_R)
    if row >= num_rows:
        return
    begin = tl.load(starts_ptr + row)
    query_len = tl.load(starts_ptr + row + 1) - begin
    context_len = tl.load(lens_ptr + row)
    first = context_len - query_len + place * TILE_TOKENS
    key_begin = tl.maximum(first - window + 1, 0)
    key_end = tl.minimum(first + TILE_TOKENS, context_len)
    length, used = _split(key_end - key_begin, num_splits, BLOCK_N, MIN_KEYS)
    length = tl.where(query_len > 1, key_end - key_begin, length)
    used = tl.where(query_len > 1, 1, used)
    split = tl.program_id(2)
    if (split >= used) | (context_len == 0):
        return
    key_begin += split * length
    key_end = tl.minimum(key_begin + length, key_end)

    m = tl.arange(0, BLOCK_M)
    query = place * TILE_TOKENS + m // TILE_HEADS
    kv_head = tl.program_id(1) // HEAD_TILES
    in_group = tl.program_id(1) % HEAD_TILES * TILE_HEADS + m % TILE_HEADS
    owned = (query < query_len) & (m < TILE_TOKENS * TILE_HEADS) & (in_group < GROUP)
    head = kv_head * GROUP + in_group
    d = tl.arange(0, BLOCK_D)
    kept = owned[:, None] & (d < HEAD_DIM)[None, :]
    token = (begin + query).to(tl.int64)
    columns = head[:, None] * HEAD_DIM + d[None, :]
    q = tl.load(q_ptr + token[:, None] * q_stride + columns, mask=kept, other=0.0)
    mixed, weight = _attend(
        q, context_len - query_len + query, k_ptr, v_ptr,
        tables_ptr + row.to(tl.int64) * table_stride, kv_head, key_begin, key_end, window, scale,
        softcap, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, HAS_CAP, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if used > 1:
        line = (row.to(tl.int64) * NUM_KV_HEADS * GROUP + head) * num_splits + split
        tl.store(part_ptr + line[:, None] * HEAD_DIM + d[None, :], mixed, mask=kept)
        tl.store(weight_ptr + line, weight, mask=owned)
    else:
        out_block = out_ptr + token[:, None] * out_stride + columns
        tl.store(out_block, mixed.to(out_ptr.dtype.element_ty), mask=kept)


@triton.jit(
    do_not_specialize=("num_splits", "window"),
    do_not_specialize_on_alignment=("starts_ptr", "lens_ptr"),
)
def join_kernel(
    out_ptr, out_stride, part_ptr, weight_ptr, starts_ptr, lens_ptr, num_splits, window,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr, MIN_KEYS: tl.constexpr,
):  # fmt: skip
    """out = sum of part * 2^weight over the splits / sum of 2^weight; grid (rows, heads)."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    token = tl.load(starts_ptr + row).to(tl.int64)
    query_len = tl.load(starts_ptr + row + 1) - token
    num_keys = tl.minimum(tl.load(lens_ptr + row), window)
    _, used = _split(num_keys, num_splits, BLOCK_N, MIN_KEYS)
    if (query_len != 1) | (used <= 1):
        return
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    line = (row * NUM_HEADS + head) * num_splits + s
    weight = tl.load(weight_ptr + line, mask=s < used, other=float("-inf"))
    share = tl.exp2(weight - tl.max(weight, 0))
    kept = (s < used)[:, None] & (d < HEAD_DIM)[None, :]
    part = tl.load(part_ptr + line[:, None] * HEAD_DIM + d[None, :], mask=kept, other=0.0)
    mixed = tl.sum(part * share[:, None], 0) / tl.sum(share, 0)
    out_row = out_ptr + token * out_stride + head * HEAD_DIM + d
    tl.store(out_row, mixed.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)


def paged_attention(
    qkv_TN: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables_RM: Tensor,
    query_starts_R1: Tensor,
    context_lens_R: Tensor,
    out_TN: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """Ops.paged_attention."""
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim: {head_dim} is above {MAX_HEAD_DIM}")
    (tokens, rows), block_size = (qkv_TN.shape[0], block_tables_RM.shape[0]), k_cache.shape[2]
    if tokens == 0 or rows == 0:
        return
    group, window = num_heads // num_kv_heads, window or NO_WINDOW
    block_d = max(16, triton.next_power_of_2(head_dim))
    tiling = tiling_for(qkv_TN.element_size(), block_d, tokens <= rows)
    tile_heads = min(group, tiling.rows)
    tile_tokens, head_tiles = tiling.rows // tile_heads, triton.cdiv(group, tile_heads)
    tiles = min(tokens, tokens // tile_tokens + rows)
    max_keys = min(block_tables_RM.shape[1] * block_size, window)
    splits = num_splits_for(rows * num_kv_heads * head_tiles, max_keys)
    parts = (rows, num_heads, splits, head_dim) if splits > 1 else (0, 0, 0, 0)
    part = torch.empty(parts, dtype=torch.float32, device=qkv_TN.device)
    weight = torch.empty(parts[:3], dtype=torch.float32, device=qkv_TN.device)
    attention_kernel[(tiles, num_kv_heads * head_tiles, splits)](
        out_TN, out_TN.stride(0), part, weight, qkv_TN, qkv_TN.stride(0), k_cache, v_cache,
        block_tables_RM, block_tables_RM.stride(0), query_starts_R1, context_lens_R, rows, splits,
        window, scale, softcap, NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size, HAS_CAP=softcap > 0, TILE_HEADS=tile_heads, BLOCK_M=tiling.rows,
        BLOCK_N=tiling.keys, BLOCK_D=block_d, BLOCK_R=BLOCK_RANGES, MIN_KEYS=MIN_SPLIT_KEYS,
        num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    if splits > 1:
        join_kernel[(rows, num_heads)](
            out_TN, out_TN.stride(0), part, weight, query_starts_R1, context_lens_R, splits, window,
            NUM_HEADS=num_heads, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_N=tiling.keys,
            BLOCK_S=MAX_SPLITS, MIN_KEYS=MIN_SPLIT_KEYS,
        )  # fmt: skip


def tiling_for(element_bytes: int, block_d: int, one_token_a_row: bool) -> Tiling:
    decode, other = TILINGS[element_bytes, 128 if block_d <= 128 else MAX_HEAD_DIM]
    return decode if one_token_a_row else other


def num_splits_for(programs: int, max_keys: int) -> int:
    """Splits of a row's keys, if one split each makes `programs` programs."""
    worthwhile = -(-max_keys // MIN_SPLIT_KEYS)
    wanted = max(TARGET_PROGRAMS // programs, -(-max_keys // MAX_SPLIT_KEYS))
    return max(1, min(MAX_SPLITS, wanted, worthwhile))

"""Norms, gated activations and rotary embedding with its cache write, in Triton.

Each kernel reads its rows once where a row fits into registers, rounds where the contract says so,
and changes in place only what the same thread has read. It must not know the other backends.
Contract and legend are in contract.py.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportPossiblyUnboundVariable=false
# Triton is optional, and its language is Python in syntax only: its types are not Python's.

import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK_WIDTH = 8192
"""Widest row that a norm keeps in registers, 32 values a thread; wider ones are read twice."""
NORM_WARPS = {2048: 4, MAX_BLOCK_WIDTH: 8}
"""Warps by the widest block they serve: at most 32 values a thread (2 warps spilled
on sm_80 at a width of 896); not measured."""
GATED_BLOCK = 1024
"""Columns a program of gated_kernel takes: 8 values a thread of each half; not measured."""
ROPE_BLOCK = 1024
"""Values a program of rope_kernel takes, as whole heads; not measured."""

SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)


@triton.jit
def _normed(x, inverse, weight, WEIGHT_IN_FP32: tl.constexpr):
    """x * inverse * weight, rounded as Ops.rms_norm says, in the dtype of x."""
    normed = x.to(tl.float32) * inverse
    if not WEIGHT_IN_FP32:
        normed = normed.to(x.dtype).to(tl.float32)
    return (normed * weight.to(tl.float32)).to(x.dtype)


@triton.jit
def _joined(x_ptr, residual_ptr, at, inside, ADDS: tl.constexpr):
    """x; or residual + x, rounded and kept in residual."""
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    if ADDS:
        residual = tl.load(residual_ptr + at, mask=inside, other=0.0)
        x = (residual.to(tl.float32) + x.to(tl.float32)).to(x.dtype)
        tl.store(residual_ptr + at, x, mask=inside)
    return x


@triton.jit
def norm_kernel(
    out_ptr, x_ptr, residual_ptr, weight_ptr, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr, WEIGHT_IN_FP32: tl.constexpr,
):  # fmt: skip
    """Ops.rms_norm, or with ADDS Ops.add_rms_norm; grid (tokens)."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    column = tl.arange(0, BLOCK)
    if BLOCK >= WIDTH:
        inside = column < WIDTH
        x = _joined(x_ptr, residual_ptr, row + column, inside, ADDS)
        squares = x.to(tl.float32) * x.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
        out = _normed(x, inverse, weight, WEIGHT_IN_FP32)
        tl.store(out_ptr + row + column, out, mask=inside)
    else:
        squares = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, WIDTH, BLOCK):
            inside = begin + column < WIDTH
            x = _joined(x_ptr, residual_ptr, row + begin + column, inside, ADDS).to(tl.float32)
            squares += x * x
        inverse = tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)
        source_ptr = residual_ptr if ADDS else x_ptr
        for begin in range(0, WIDTH, BLOCK):
            at = begin + column
            x = tl.load(source_ptr + row + at, mask=at < WIDTH, other=0.0)
            weight = tl.load(weight_ptr + at, mask=at < WIDTH, other=0.0)
            out = _normed(x, inverse, weight, WEIGHT_IN_FP32)
            tl.store(out_ptr + row + at, out, mask=at < WIDTH)


@triton.jit
def gated_kernel(
    out_ptr, gate_up_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, IS_GELU: tl.constexpr
):
    """Ops.silu_mul or Ops.gelu_tanh_mul; grid (tokens, blocks of columns).

    g / 2 * (1 + tanh(z)) = g / (1 + exp(-2 * z)): exp may overflow to infinity, and the quotient
    is the 0 it should be.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate_row = gate_up_ptr + row * (2 * WIDTH) + column
    gate = tl.load(gate_row, mask=inside, other=0.0)
    up = tl.load(gate_row + WIDTH, mask=inside, other=0.0)
    g = gate.to(tl.float32)
    bend = 2.0 * SQRT_2_OVER_PI * (g + 0.044715 * g * g * g) if IS_GELU else g
    active = (g / (1.0 + tl.exp(-bend))).to(gate.dtype)
    out = active.to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * WIDTH + column, out.to(gate.dtype), mask=inside)


@triton.jit
def _cache_lines(cache_ptr, slot, head, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
                 BLOCK_SIZE: tl.constexpr):  # fmt: skip
    """Where the cache keeps each head of a token: [heads, 1]."""
    block = slot // BLOCK_SIZE * NUM_KV_HEADS + head
    return cache_ptr + ((block * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM)[:, None]


@triton.jit
def _turn_heads(
    heads_ptr, cache_ptr, owned, written, norm_ptr, norm_eps, angles_ptr,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, NORMS: tl.constexpr,
    WEIGHT_IN_FP32: tl.constexpr, WRITES: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Norms and rotates heads in place; with WRITES to the cache, too.

    A head is [first half | second half | rest that does not turn]; each value is read and written
    by one thread.
    """
    p = tl.arange(0, BLOCK_P)[None, :]
    turning = owned & (p < HALF)
    first = tl.load(heads_ptr + p, mask=turning, other=0.0)
    second = tl.load(heads_ptr + HALF + p, mask=turning, other=0.0)
    r = tl.arange(0, BLOCK_REST)[None, :]
    resting = owned & (r < REST)
    if REST > 0:
        rest = tl.load(heads_ptr + 2 * HALF + r, mask=resting, other=0.0)
    if NORMS:
        f, s = first.to(tl.float32), second.to(tl.float32)
        squares = tl.sum(f * f + s * s, 1)
        if REST > 0:
            squares += tl.sum(rest.to(tl.float32) * rest.to(tl.float32), 1)
        inverse = tl.rsqrt(squares / HEAD_DIM + norm_eps)[:, None]
        weight = tl.load(norm_ptr + p, mask=p < HALF, other=0.0)
        first = _normed(first, inverse, weight, WEIGHT_IN_FP32)
        weight = tl.load(norm_ptr + HALF + p, mask=p < HALF, other=0.0)
        second = _normed(second, inverse, weight, WEIGHT_IN_FP32)
        if REST > 0:
            weight = tl.load(norm_ptr + 2 * HALF + r, mask=r < REST, other=0.0)
            rest = _normed(rest, inverse, weight, WEIGHT_IN_FP32)
    cos = tl.load(angles_ptr + p, mask=p < HALF, other=0.0)
    sin = tl.load(angles_ptr + HALF + p, mask=p < HALF, other=0.0)
    f, s = first.to(tl.float32), second.to(tl.float32)
    first = (f * cos - s * sin).to(first.dtype)
    second = (s * cos + f * sin).to(first.dtype)
    tl.store(heads_ptr + p, first, mask=turning)
    tl.store(heads_ptr + HALF + p, second, mask=turning)
    if REST > 0 and NORMS:
        tl.store(heads_ptr + 2 * HALF + r, rest, mask=resting)
    if WRITES:
        tl.store(cache_ptr + p, first, mask=turning & written)
        tl.store(cache_ptr + HALF + p, second, mask=turning & written)
        if REST > 0:
            tl.store(cache_ptr + 2 * HALF + r, rest, mask=resting & written)


@triton.jit(do_not_specialize_on_alignment=("positions_ptr", "slots_ptr"))
def rope_kernel(
    qkv_ptr, qkv_stride, positions_ptr, angles_ptr, k_cache_ptr, v_cache_ptr, slots_ptr,
    q_norm_ptr, k_norm_ptr, norm_eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    WEIGHT_IN_FP32: tl.constexpr, TILE_HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Ops.rope_write_kv; grid (tokens, tiles of q heads, then of k heads, then of v heads)."""
    REST: tl.constexpr = HEAD_DIM - 2 * HALF
    Q_TILES: tl.constexpr = (NUM_HEADS + TILE_HEADS - 1) // TILE_HEADS
    KV_TILES: tl.constexpr = (NUM_KV_HEADS + TILE_HEADS - 1) // TILE_HEADS
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    h = tl.arange(0, TILE_HEADS)
    angles_row = angles_ptr + tl.load(positions_ptr + token) * (2 * HALF)
    slot = tl.load(slots_ptr + token)
    row_ptr = qkv_ptr + token * qkv_stride
    if tile < Q_TILES:
        head = tile * TILE_HEADS + h
        _turn_heads(
            row_ptr + (head * HEAD_DIM)[:, None], k_cache_ptr, (head < NUM_HEADS)[:, None], False,
            q_norm_ptr, norm_eps, angles_row, HEAD_DIM, HALF, REST, Q_NORM, WEIGHT_IN_FP32, False,
            BLOCK_P, BLOCK_REST,
        )  # fmt: skip
    elif tile < Q_TILES + KV_TILES:
        head = (tile - Q_TILES) * TILE_HEADS + h
        lines = _cache_lines(k_cache_ptr, slot, head, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE)
        _turn_heads(
            row_ptr + ((NUM_HEADS + head) * HEAD_DIM)[:, None], lines,
            (head < NUM_KV_HEADS)[:, None], slot >= 0, k_norm_ptr, norm_eps, angles_row, HEAD_DIM,
            HALF, REST, K_NORM, WEIGHT_IN_FP32, True, BLOCK_P, BLOCK_REST,
        )  # fmt: skip
    else:
        head = (tile - Q_TILES - KV_TILES) * TILE_HEADS + h
        d = tl.arange(0, BLOCK_D)[None, :]
        owned = (head < NUM_KV_HEADS)[:, None] & (d < HEAD_DIM) & (slot >= 0)
        v_heads = row_ptr + ((NUM_HEADS + NUM_KV_HEADS + head) * HEAD_DIM)[:, None]
        lines = _cache_lines(v_cache_ptr, slot, head, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE)
        tl.store(lines + d, tl.load(v_heads + d, mask=owned, other=0.0), mask=owned)


def rms_norm(
    out_TH: Tensor,
    x_TH: Tensor,
    residual_TH: Tensor | None,
    weight_H: Tensor,
    eps: float,
    weight_in_fp32: bool,
) -> None:
    """Ops.rms_norm; with a residual Ops.add_rms_norm."""
    tokens, width = x_TH.shape
    if tokens == 0:
        return
    block = min(MAX_BLOCK_WIDTH, triton.next_power_of_2(width))
    adds = residual_TH is not None
    norm_kernel[(tokens,)](
        out_TH, x_TH, residual_TH if adds else x_TH, weight_H, eps, WIDTH=width, BLOCK=block,
        ADDS=adds, WEIGHT_IN_FP32=weight_in_fp32,
        num_warps=next(warps for widest, warps in NORM_WARPS.items() if block <= widest),
    )  # fmt: skip


def gated(gate_up_TN: Tensor, out_TI: Tensor, is_gelu: bool) -> None:
    """Ops.silu_mul or Ops.gelu_tanh_mul."""
    tokens, width = out_TI.shape
    if tokens == 0:
        return
    gated_kernel[(tokens, triton.cdiv(width, GATED_BLOCK))](
        out_TI, gate_up_TN, WIDTH=width, BLOCK=GATED_BLOCK, IS_GELU=is_gelu
    )


def rope_write_kv(
    qkv_TN: Tensor,
    positions_T: Tensor,
    cos_sin_PD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_slots_T: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm_D: Tensor | None,
    k_norm_D: Tensor | None,
    norm_eps: float,
    norm_weight_in_fp32: bool,
) -> None:
    """Ops.rope_write_kv."""
    tokens, half = qkv_TN.shape[0], cos_sin_PD.shape[1] // 2
    if tokens == 0:
        return
    block_d = triton.next_power_of_2(head_dim)
    tile_heads = max(1, min(ROPE_BLOCK // block_d, triton.next_power_of_2(num_heads)))
    tiles = triton.cdiv(num_heads, tile_heads) + 2 * triton.cdiv(num_kv_heads, tile_heads)
    rope_kernel[(tokens, tiles)](
        qkv_TN, qkv_TN.stride(0), positions_T, cos_sin_PD, k_cache, v_cache, kv_slots_T,
        cos_sin_PD if q_norm_D is None else q_norm_D, cos_sin_PD if k_norm_D is None else k_norm_D,
        norm_eps, NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, HALF=half,
        BLOCK_SIZE=k_cache.shape[2], Q_NORM=q_norm_D is not None, K_NORM=k_norm_D is not None,
        WEIGHT_IN_FP32=norm_weight_in_fp32, TILE_HEADS=tile_heads, BLOCK_D=block_d,
        BLOCK_P=triton.next_power_of_2(half),
        BLOCK_REST=max(1, triton.next_power_of_2(head_dim - 2 * half)),
    )  # fmt: skip

"""Every op in plain PyTorch: the specification, and the backend `torch`.

Runs on any device in any float dtype, accumulates in float32, favours plainness over speed. It
must not know the other backends. The contract and the legend of shapes are in contract.py.
"""

from dataclasses import replace

import torch
from torch import Tensor

from lory_kernels.contract import BASE_SLOT, Segments, SiteTable


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_in_fp32: bool) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension; see Ops.rms_norm."""
    x_fp32 = x.float()
    normed = x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
    if weight_in_fp32:
        return (normed * weight.float()).to(x.dtype)
    return weight * normed.to(x.dtype)


def rotate(x_THD: Tensor, cos_T1P: Tensor, sin_T1P: Tensor) -> Tensor:
    """NeoX rotation of the first 2 * P dims of every head, in float32."""
    half = cos_T1P.shape[-1]
    x_fp32 = x_THD.float()
    first, second, rest = x_fp32.split([half, half, x_THD.shape[-1] - 2 * half], dim=-1)
    parts = (first * cos_T1P - second * sin_T1P, second * cos_T1P + first * sin_T1P, rest)
    return torch.cat(parts, dim=-1).to(x_THD.dtype)


def attend(
    q_HQD: Tensor, k_HLD: Tensor, v_HLD: Tensor, scale: float, window: int, softcap: float
) -> Tensor:
    """Causal attention of the last Q of L positions; K and V have one head per query head."""
    scores_HQL = (q_HQD.float() * scale) @ k_HLD.float().transpose(1, 2)
    if softcap > 0:
        scores_HQL = softcap * torch.tanh(scores_HQL / softcap)
    query_len, context_len = scores_HQL.shape[1:]
    key_L = torch.arange(context_len, device=q_HQD.device)
    position_Q1 = key_L[context_len - query_len :, None]
    visible_QL = key_L <= position_Q1
    if window > 0:
        visible_QL &= key_L > position_Q1 - window
    scores_HQL = scores_HQL.masked_fill(~visible_QL, float("-inf"))
    return scores_HQL.softmax(-1) @ v_HLD.float()


class TorchOps:
    """Ops in plain PyTorch."""

    def rms_norm(
        self,
        x_TH: Tensor,
        weight_H: Tensor,
        eps: float,
        out_TH: Tensor | None = None,
        *,
        weight_in_fp32: bool = False,
    ) -> Tensor:
        normed_TH = rms_norm(x_TH, weight_H, eps, weight_in_fp32)
        return normed_TH if out_TH is None else out_TH.copy_(normed_TH)

    def add_rms_norm(
        self,
        residual_TH: Tensor,
        x_TH: Tensor,
        weight_H: Tensor,
        eps: float,
        out_TH: Tensor | None = None,
        *,
        weight_in_fp32: bool = False,
    ) -> Tensor:
        residual_TH.add_(x_TH)
        return self.rms_norm(residual_TH, weight_H, eps, out_TH, weight_in_fp32=weight_in_fp32)

    def rope_write_kv(
        self,
        qkv_TN: Tensor,
        positions_T: Tensor,
        cos_sin_PD: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        kv_slots_T: Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        q_norm_D: Tensor | None = None,
        k_norm_D: Tensor | None = None,
        norm_eps: float = 0.0,
        norm_weight_in_fp32: bool = False,
    ) -> None:
        heads_THD = qkv_TN.unflatten(1, (num_heads + 2 * num_kv_heads, head_dim))
        q_THD, k_THD, v_THD = heads_THD.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        cos_T1P, sin_T1P = cos_sin_PD[positions_T][:, None].chunk(2, dim=-1)
        for part_THD, norm_D in ((q_THD, q_norm_D), (k_THD, k_norm_D)):
            if norm_D is not None:
                part_THD.copy_(rms_norm(part_THD, norm_D, norm_eps, norm_weight_in_fp32))
            part_THD.copy_(rotate(part_THD, cos_T1P, sin_T1P))
        _write_cache(k_cache, k_THD, kv_slots_T)
        _write_cache(v_cache, v_THD, kv_slots_T)

    def paged_attention(
        self,
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
        *,
        window: int = 0,
        softcap: float = 0.0,
    ) -> None:
        group = num_heads // num_kv_heads
        starts, context_lens = query_starts_R1.tolist(), context_lens_R.tolist()
        for row, context_len in enumerate(context_lens):
            begin, end = starts[row], starts[row + 1]
            if begin == end:
                continue
            q_THD = qkv_TN[begin:end, : num_heads * head_dim].unflatten(1, (num_heads, head_dim))
            k_HLD = _read_cache(k_cache, block_tables_RM[row], context_len, group)
            v_HLD = _read_cache(v_cache, block_tables_RM[row], context_len, group)
            mixed_HQD = attend(q_THD.transpose(0, 1), k_HLD, v_HLD, scale, window, softcap)
            out_TN[begin:end] = mixed_HQD.transpose(0, 1).flatten(1).to(out_TN.dtype)

    def silu_mul(self, gate_up_TN: Tensor, out_TI: Tensor) -> None:
        gate_TI, up_TI = gate_up_TN.chunk(2, dim=-1)
        torch.mul(torch.nn.functional.silu(gate_TI), up_TI, out=out_TI)

    def gelu_tanh_mul(self, gate_up_TN: Tensor, out_TI: Tensor) -> None:
        gate_TI, up_TI = gate_up_TN.chunk(2, dim=-1)
        torch.mul(torch.nn.functional.gelu(gate_TI, approximate="tanh"), up_TI, out=out_TI)

    def sgmv(
        self, y_TN: Tensor, x_TH: Tensor, site: SiteTable, pool: Tensor, segments: Segments
    ) -> None:
        if not segments.changes_rows:
            return
        if not segments.has_gain_or_bias:
            site = replace(site, gain_offset_SK=None, bias_offset_SK=None)
        starts, slots = segments.starts_G1.tolist(), segments.slots_G.tolist()
        for segment in range(segments.num_segments):
            begin, end, slot = starts[segment], starts[segment + 1], slots[segment]
            if begin < end and slot != BASE_SLOT:
                _adapt(y_TN[begin:end], x_TH[begin:end], site, pool, slot)


def _adapt(y_TN: Tensor, x_TH: Tensor, site: SiteTable, pool: Tensor, slot: int) -> None:
    """One segment of SGMV, slice by slice."""
    for k, (offset, width) in enumerate(zip(site.out_offsets, site.out_features, strict=True)):
        rank = int(site.rank_SK[slot, k])
        gain_N = _vector(pool, site.gain_offset_SK, slot, k, width)
        bias_N = _vector(pool, site.bias_offset_SK, slot, k, width)
        if rank == 0 and gain_N is None and bias_N is None:
            continue
        columns_TN = y_TN[:, offset : offset + width]
        sums_TN = columns_TN.float() if gain_N is None else columns_TN.float() * gain_N
        if bias_N is not None:
            sums_TN = sums_TN + bias_N
        if rank:
            a_RH = _factor(pool, int(site.a_offset_SK[slot, k]), rank, site.in_features)
            b_RN = _factor(pool, int(site.b_offset_SK[slot, k]), rank, width)
            sums_TN = sums_TN + (x_TH.float() @ a_RH.T) @ b_RN * site.scale_SK[slot, k]
        columns_TN.copy_(sums_TN)


def _vector(pool: Tensor, offset_SK: Tensor | None, slot: int, k: int, width: int) -> Tensor | None:
    """A gain or a bias: float32 numbers in a pool of any dtype."""
    offset = -1 if offset_SK is None else int(offset_SK[slot, k])
    if offset < 0:
        return None
    size = width * torch.float32.itemsize // pool.element_size()
    return pool[offset : offset + size].view(torch.float32)


def _factor(pool: Tensor, offset: int, rank: int, width: int) -> Tensor:
    return pool[offset : offset + rank * width].view(rank, width).float()


def _write_cache(cache: Tensor, heads_THD: Tensor, kv_slots_T: Tensor) -> None:
    block_size = cache.shape[2]
    wanted_T = kv_slots_T >= 0
    slots_T = kv_slots_T[wanted_T]
    cache[slots_T // block_size, :, slots_T % block_size] = heads_THD[wanted_T]


def _read_cache(cache: Tensor, table_M: Tensor, context_len: int, group: int) -> Tensor:
    """K or V of a row as [num_heads, context_len, head_dim]: kv heads repeated `group` times."""
    num_blocks = -(-context_len // cache.shape[2])
    blocks_MHBD = cache[table_M[:num_blocks].long()]
    heads_HLD = blocks_MHBD.transpose(0, 1).flatten(1, 2)[:, :context_len]
    return heads_HLD.repeat_interleave(group, dim=0)

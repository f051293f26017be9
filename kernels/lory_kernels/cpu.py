"""The backend `cpu`: Ops over the C kernels, for float32 and bfloat16 tensors.

float16 has no C kernels: its calls run the reference, for every op alike. This module passes
pointers and sizes; the maths is in csrc/. It must not know models or adapters.
The contract and the legend of shapes are in contract.py.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from lory_kernels.build import compiled_library
from lory_kernels.calls import Attention, Caller, Gated, Norm, Op, Rope, Sgmv, Step, op
from lory_kernels.checks import (
    require_contiguous,
    require_dtype,
    require_norm_weight,
    require_rows,
    require_table,
)
from lory_kernels.contract import MAX_RANK, Segments, SiteTable
from lory_kernels.reference import TorchOps

_MAX_HEAD_DIM = 256
_WEIGHT_AFTER_ROUNDING, _WEIGHT_SAME_DTYPE, _WEIGHT_F32 = 0, 1, 2


class _Site(ctypes.Structure):
    """`sgmv_site` of csrc/sgmv.h."""

    _fields_ = (
        ("pool", ctypes.c_void_p),
        ("in_features", ctypes.c_long),
        ("out_offsets", ctypes.POINTER(ctypes.c_int64)),
        ("out_features", ctypes.POINTER(ctypes.c_int64)),
        ("a_offset", ctypes.c_void_p),
        ("b_offset", ctypes.c_void_p),
        ("rank", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("gain_offset", ctypes.c_void_p),
        ("bias_offset", ctypes.c_void_p),
        ("slices", ctypes.c_long),
    )


class _Rows(ctypes.Structure):
    """`sgmv_rows` of csrc/sgmv.h."""

    _fields_ = (
        ("starts", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("segments", ctypes.c_long),
        ("adapted_rows", ctypes.c_long),
        ("max_rank", ctypes.c_int),
        ("has_gain_or_bias", ctypes.c_int),
    )


@dataclass(frozen=True, slots=True)
class _KnownSite:
    """A site as C reads it; its tensors are rewritten in place, so their addresses stay."""

    pool: Tensor
    address: int
    kept: _Site


@dataclass(frozen=True, slots=True)
class _KnownRows:
    segments: Segments
    address: int
    kept: _Rows


_OPS = (
    "rms_norm",
    "add_rms_norm",
    "silu_mul",
    "gelu_tanh_mul",
    "rope_write_kv",
    "paged_attention",
    "sgmv",
)


@dataclass(frozen=True, slots=True)
class _Kernels:
    """The C ops of one dtype."""

    rms_norm: Op
    add_rms_norm: Op
    silu_mul: Op
    gelu_tanh_mul: Op
    rope_write_kv: Op
    paged_attention: Op
    sgmv: Op


def _kernels(library: ctypes.CDLL, suffix: str) -> _Kernels:
    return _Kernels(**{name: op(library, f"{name}_{suffix}") for name in _OPS})


class CpuOps:
    """Ops in C with vector instructions; `threads` bounds the cores a call may use."""

    def __init__(self, threads: int = 0) -> None:
        library = compiled_library()
        self._kernels = {
            torch.float32: _kernels(library, "f32"),
            torch.bfloat16: _kernels(library, "bf16"),
        }
        self.caller = Caller(library, threads or torch.get_num_threads())
        """Whose calls can be recorded: those of bfloat16 and float32 ops."""
        self._torch_ops = TorchOps()
        self._sites: dict[SiteTable, _KnownSite] = {}
        self._rows: _KnownRows | None = None

    def can_record(self, dtype: torch.dtype, head_dim: int) -> bool:
        """Whether all ops of a model of this dtype and head size are C ops."""
        return dtype in self._kernels and head_dim <= _MAX_HEAD_DIM

    @property
    def _reference(self) -> TorchOps:
        """It computes at once, so that a program would lack what it did."""
        if self.caller.is_recording:
            raise RuntimeError("an op without a C kernel cannot be recorded")
        return self._torch_ops

    def rms_norm(
        self,
        x_TH: Tensor,
        weight_H: Tensor,
        eps: float,
        out_TH: Tensor | None = None,
        *,
        weight_in_fp32: bool = False,
    ) -> Tensor:
        kernels = self._kernels.get(x_TH.dtype)
        if kernels is None:
            return self._reference.rms_norm(
                x_TH, weight_H, eps, out_TH, weight_in_fp32=weight_in_fp32
            )
        return self._norm(kernels.rms_norm, x_TH, weight_H, eps, out_TH, None, weight_in_fp32)

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
        kernels = self._kernels.get(x_TH.dtype)
        if kernels is None:
            return self._reference.add_rms_norm(
                residual_TH, x_TH, weight_H, eps, out_TH, weight_in_fp32=weight_in_fp32
            )
        return self._norm(
            kernels.add_rms_norm, x_TH, weight_H, eps, out_TH, residual_TH, weight_in_fp32
        )

    def _norm(
        self,
        op: Op,
        x_TH: Tensor,
        weight_H: Tensor,
        eps: float,
        out_TH: Tensor | None,
        residual_TH: Tensor | None,
        weight_in_fp32: bool,
    ) -> Tensor:
        rows, width = x_TH.shape
        out = self.caller.empty(rows, width, x_TH.dtype) if out_TH is None else out_TH
        require_contiguous(x_TH=x_TH)
        require_table(x_TH.dtype, out_TH=out)
        require_norm_weight(x_TH.dtype, weight_in_fp32, weight_H=weight_H)
        if residual_TH is not None:
            require_table(x_TH.dtype, residual_TH=residual_TH)
        args = Norm(
            x=x_TH.data_ptr(),
            weight=weight_H.data_ptr(),
            residual=_address(residual_TH),
            out=out.data_ptr(),
            width=width,
            mode=_norm_mode(x_TH, weight_H, weight_in_fp32),
            eps=eps,
        )
        self.caller.call(op, args, Step(rows))
        return out

    def silu_mul(self, gate_up_TN: Tensor, out_TI: Tensor) -> None:
        kernels = self._kernels.get(out_TI.dtype)
        if kernels is None:
            return self._reference.silu_mul(gate_up_TN, out_TI)
        return self._gated(kernels.silu_mul, gate_up_TN, out_TI)

    def gelu_tanh_mul(self, gate_up_TN: Tensor, out_TI: Tensor) -> None:
        kernels = self._kernels.get(out_TI.dtype)
        if kernels is None:
            return self._reference.gelu_tanh_mul(gate_up_TN, out_TI)
        return self._gated(kernels.gelu_tanh_mul, gate_up_TN, out_TI)

    def _gated(self, op: Op, gate_up_TN: Tensor, out_TI: Tensor) -> None:
        require_contiguous(out_TI=out_TI)
        require_table(out_TI.dtype, gate_up_TN=gate_up_TN)
        rows, width = out_TI.shape
        args = Gated(gate_up_TN.data_ptr(), out_TI.data_ptr(), width)
        self.caller.call(op, args, Step(rows))

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
        kernels = self._kernels.get(qkv_TN.dtype)
        if kernels is None:
            return self._reference.rope_write_kv(
                qkv_TN,
                positions_T,
                cos_sin_PD,
                k_cache,
                v_cache,
                kv_slots_T,
                num_heads,
                num_kv_heads,
                head_dim,
                q_norm_D=q_norm_D,
                k_norm_D=k_norm_D,
                norm_eps=norm_eps,
                norm_weight_in_fp32=norm_weight_in_fp32,
            )
        require_rows(qkv_TN=qkv_TN)
        require_table(qkv_TN.dtype, k_cache=k_cache, v_cache=v_cache)
        require_table(torch.int64, positions_T=positions_T, kv_slots_T=kv_slots_T)
        require_table(torch.float32, cos_sin_PD=cos_sin_PD)
        args = Rope(
            qkv=qkv_TN.data_ptr(),
            qkv_stride=qkv_TN.stride(0),
            cos_sin=cos_sin_PD.data_ptr(),
            k_cache=k_cache.data_ptr(),
            v_cache=v_cache.data_ptr(),
            q_norm=_address(q_norm_D),
            k_norm=_address(k_norm_D),
            rotary_dim=cos_sin_PD.shape[1],
            heads=num_heads,
            kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=k_cache.shape[2],
            norm_mode=_norms_mode(qkv_TN, q_norm_D, k_norm_D, norm_weight_in_fp32),
            norm_eps=norm_eps,
        )
        step = Step(qkv_TN.shape[0])
        step.positions, step.kv_slots = positions_T.data_ptr(), kv_slots_T.data_ptr()
        self.caller.call(kernels.rope_write_kv, args, step)

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
        kernels = self._kernels.get(qkv_TN.dtype)
        if kernels is None or head_dim > _MAX_HEAD_DIM:
            return self._reference.paged_attention(
                qkv_TN,
                k_cache,
                v_cache,
                block_tables_RM,
                query_starts_R1,
                context_lens_R,
                out_TN,
                num_heads,
                num_kv_heads,
                head_dim,
                scale,
                window=window,
                softcap=softcap,
            )
        require_rows(qkv_TN=qkv_TN)
        require_table(qkv_TN.dtype, k_cache=k_cache, v_cache=v_cache, out_TN=out_TN)
        _require_tables(block_tables_RM, query_starts_R1, context_lens_R)
        args = Attention(
            qkv=qkv_TN.data_ptr(),
            k_cache=k_cache.data_ptr(),
            v_cache=v_cache.data_ptr(),
            out=out_TN.data_ptr(),
            qkv_stride=qkv_TN.stride(0),
            heads=num_heads,
            kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=k_cache.shape[2],
            window=window,
            scale=scale,
            softcap=softcap,
        )
        step = Step(
            rows=context_lens_R.shape[0],
            max_blocks=block_tables_RM.shape[1],
            block_tables=block_tables_RM.data_ptr(),
            query_starts=query_starts_R1.data_ptr(),
            context_lens=context_lens_R.data_ptr(),
        )
        self.caller.call(kernels.paged_attention, args, step)

    def sgmv(
        self, y_TN: Tensor, x_TH: Tensor, site: SiteTable, pool: Tensor, segments: Segments
    ) -> None:
        if not segments.changes_rows:
            return None
        kernels = self._kernels.get(pool.dtype)
        if kernels is None:
            return self._reference.sgmv(y_TN, x_TH, site, pool, segments)
        require_rows(y_TN=y_TN, x_TH=x_TH)
        require_dtype(pool.dtype, y_TN=y_TN, x_TH=x_TH)
        args = Sgmv(
            self._site_address(site, pool),
            y_TN.data_ptr(),
            x_TH.data_ptr(),
            y_TN.stride(0),
            x_TH.stride(0),
        )
        self.caller.call(kernels.sgmv, args, Step(lora=self._rows_address(segments)))

    def step(
        self,
        positions_T: Tensor,
        kv_slots_T: Tensor,
        block_tables_RM: Tensor,
        query_starts_R1: Tensor,
        context_lens_R: Tensor,
        segments: Segments | None,
    ) -> Step:
        """For a recorded program: what stands here in place of what its ops were recorded with."""
        require_table(torch.int64, positions_T=positions_T, kv_slots_T=kv_slots_T)
        _require_tables(block_tables_RM, query_starts_R1, context_lens_R)
        lora = None
        if segments is not None and segments.changes_rows:
            lora = self._rows_address(segments)
        return Step(
            positions_T.shape[0],
            *block_tables_RM.shape,
            positions_T.data_ptr(),
            kv_slots_T.data_ptr(),
            block_tables_RM.data_ptr(),
            query_starts_R1.data_ptr(),
            context_lens_R.data_ptr(),
            lora,
        )

    def _site_address(self, site: SiteTable, pool: Tensor) -> int:
        known = self._sites.get(site)
        if known is None or known.pool is not pool:
            known = self._sites[site] = _known_site(site, pool)
        return known.address

    def _rows_address(self, segments: Segments) -> int:
        """The same for all sites of a step."""
        known = self._rows
        if known is None or known.segments is not segments:
            if segments.max_rank > MAX_RANK:
                raise ValueError(f"segments.max_rank: {segments.max_rank} is above {MAX_RANK}")
            known = self._rows = _known_rows(segments)
        return known.address


def _known_site(site: SiteTable, pool: Tensor) -> _KnownSite:
    require_table(torch.int64, a_offset_SK=site.a_offset_SK, b_offset_SK=site.b_offset_SK)
    for offset_SK in (site.gain_offset_SK, site.bias_offset_SK):
        if offset_SK is not None:
            require_table(torch.int64, offset_SK=offset_SK)
    require_table(torch.int32, rank_SK=site.rank_SK)
    require_table(torch.float32, scale_SK=site.scale_SK)
    longs = ctypes.c_int64 * len(site.out_offsets)
    struct = _Site(
        pool.data_ptr(),
        site.in_features,
        longs(*site.out_offsets),
        longs(*site.out_features),
        site.a_offset_SK.data_ptr(),
        site.b_offset_SK.data_ptr(),
        site.rank_SK.data_ptr(),
        site.scale_SK.data_ptr(),
        _address(site.gain_offset_SK),
        _address(site.bias_offset_SK),
        len(site.out_offsets),
    )
    return _KnownSite(pool, ctypes.addressof(struct), struct)


def _known_rows(segments: Segments) -> _KnownRows:
    require_table(torch.int32, starts_G1=segments.starts_G1, slots_G=segments.slots_G)
    struct = _Rows(
        segments.starts_G1.data_ptr(),
        segments.slots_G.data_ptr(),
        segments.num_segments,
        segments.adapted_rows,
        segments.max_rank,
        segments.has_gain_or_bias,
    )
    return _KnownRows(segments, ctypes.addressof(struct), struct)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _norm_mode(x: Tensor, weight: Tensor, weight_in_fp32: bool) -> int:
    if not weight_in_fp32:
        return _WEIGHT_AFTER_ROUNDING
    return _WEIGHT_SAME_DTYPE if weight.dtype == x.dtype else _WEIGHT_F32


def _norms_mode(
    x: Tensor, q_norm_D: Tensor | None, k_norm_D: Tensor | None, weight_in_fp32: bool
) -> int:
    """Of both, which must have one dtype."""
    norms = {"q_norm_D": q_norm_D, "k_norm_D": k_norm_D}
    given = {name: norm_D for name, norm_D in norms.items() if norm_D is not None}
    if not given:
        return _WEIGHT_AFTER_ROUNDING
    first_D = next(iter(given.values()))
    require_norm_weight(x.dtype, weight_in_fp32, **given)
    require_dtype(first_D.dtype, **given)
    return _norm_mode(x, first_D, weight_in_fp32)


def _require_tables(
    block_tables_RM: Tensor, query_starts_R1: Tensor, context_lens_R: Tensor
) -> None:
    require_table(
        torch.int32,
        block_tables_RM=block_tables_RM,
        query_starts_R1=query_starts_R1,
        context_lens_R=context_lens_R,
    )

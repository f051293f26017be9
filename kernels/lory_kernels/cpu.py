"""The backend `cpu`: Ops over the C kernels, for float32 and bfloat16 tensors.

float16 has no C kernels: its calls run the reference, for every op alike. This module passes
pointers and sizes; the maths is in csrc/. It must not know models or adapters.
The contract and the legend of shapes are in contract.py.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lory_kernels.build import compiled_library
from lory_kernels.contract import MAX_RANK, Segments, SiteTable
from lory_kernels.reference import TorchOps

_MAX_HEAD_DIM = 256
_WEIGHT_AFTER_ROUNDING, _WEIGHT_SAME_DTYPE, _WEIGHT_F32 = 0, 1, 2

# One letter an argument: p pointer, l long, i int, f float.
_SIGNATURES = {
    "rms_norm": "ppifpll i",
    "add_rms_norm": "pppifpll i",
    "silu_mul": "ppll i",
    "gelu_tanh_mul": "ppll i",
    "rope_write_kv": "pl pp i ppp l iiii pp if i",
    "paged_attention": "pl pp pl pp l p iiii f if i",
    "sgmv": "pp pl pl i",
}
_CTYPES = {
    "p": ctypes.c_void_p,
    "l": ctypes.c_long,
    "i": ctypes.c_int,
    "f": ctypes.c_float,
}


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


@dataclass(frozen=True, slots=True)
class _Kernels:
    """The C functions of one dtype."""

    rms_norm: Callable[..., None]
    add_rms_norm: Callable[..., None]
    silu_mul: Callable[..., None]
    gelu_tanh_mul: Callable[..., None]
    rope_write_kv: Callable[..., None]
    paged_attention: Callable[..., None]
    sgmv: Callable[..., None]


def _bind(library: ctypes.CDLL, suffix: str) -> _Kernels:
    functions = {}
    for name, signature in _SIGNATURES.items():
        function = library[f"{name}_{suffix}"]
        function.argtypes = [_CTYPES[letter] for letter in signature.replace(" ", "")]
        function.restype = None
        functions[name] = function
    return _Kernels(**functions)


class CpuOps:
    """Ops in C with vector instructions; `threads` bounds the cores a call may use."""

    def __init__(self, threads: int = 0) -> None:
        library = compiled_library()
        self._kernels = {
            torch.float32: _bind(library, "f32"),
            torch.bfloat16: _bind(library, "bf16"),
        }
        self._threads = threads or torch.get_num_threads()
        self._reference = TorchOps()
        self._sites: dict[SiteTable, _KnownSite] = {}
        self._rows: _KnownRows | None = None

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
        out = torch.empty_like(x_TH) if out_TH is None else out_TH
        _require_contiguous(x_TH=x_TH, weight_H=weight_H, out_TH=out)
        rows, width = x_TH.shape
        kernels.rms_norm(
            x_TH.data_ptr(),
            weight_H.data_ptr(),
            _norm_mode(x_TH, weight_H, weight_in_fp32),
            eps,
            out.data_ptr(),
            rows,
            width,
            self._threads,
        )
        return out

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
        out = torch.empty_like(x_TH) if out_TH is None else out_TH
        _require_contiguous(residual_TH=residual_TH, x_TH=x_TH, weight_H=weight_H, out_TH=out)
        rows, width = x_TH.shape
        kernels.add_rms_norm(
            residual_TH.data_ptr(),
            x_TH.data_ptr(),
            weight_H.data_ptr(),
            _norm_mode(x_TH, weight_H, weight_in_fp32),
            eps,
            out.data_ptr(),
            rows,
            width,
            self._threads,
        )
        return out

    def silu_mul(self, gate_up_TN: Tensor, out_TI: Tensor) -> None:
        kernels = self._kernels.get(out_TI.dtype)
        if kernels is None:
            return self._reference.silu_mul(gate_up_TN, out_TI)
        _require_contiguous(gate_up_TN=gate_up_TN, out_TI=out_TI)
        rows, width = out_TI.shape
        kernels.silu_mul(gate_up_TN.data_ptr(), out_TI.data_ptr(), rows, width, self._threads)

    def gelu_tanh_mul(self, gate_up_TN: Tensor, out_TI: Tensor) -> None:
        kernels = self._kernels.get(out_TI.dtype)
        if kernels is None:
            return self._reference.gelu_tanh_mul(gate_up_TN, out_TI)
        _require_contiguous(gate_up_TN=gate_up_TN, out_TI=out_TI)
        rows, width = out_TI.shape
        kernels.gelu_tanh_mul(gate_up_TN.data_ptr(), out_TI.data_ptr(), rows, width, self._threads)

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
        _require_contiguous(cos_sin_PD=cos_sin_PD, k_cache=k_cache, v_cache=v_cache)
        norm_mode = _WEIGHT_AFTER_ROUNDING
        if q_norm_D is not None:
            norm_mode = _norm_mode(qkv_TN, q_norm_D, norm_weight_in_fp32)
        kernels.rope_write_kv(
            qkv_TN.data_ptr(),
            qkv_TN.stride(0),
            positions_T.data_ptr(),
            cos_sin_PD.data_ptr(),
            cos_sin_PD.shape[1],
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            kv_slots_T.data_ptr(),
            qkv_TN.shape[0],
            num_heads,
            num_kv_heads,
            head_dim,
            k_cache.shape[2],
            None if q_norm_D is None else q_norm_D.data_ptr(),
            None if k_norm_D is None else k_norm_D.data_ptr(),
            norm_mode,
            norm_eps,
            self._threads,
        )

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
        _require_contiguous(
            k_cache=k_cache, v_cache=v_cache, block_tables_RM=block_tables_RM, out_TN=out_TN
        )
        kernels.paged_attention(
            qkv_TN.data_ptr(),
            qkv_TN.stride(0),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            block_tables_RM.data_ptr(),
            block_tables_RM.shape[1],
            query_starts_R1.data_ptr(),
            context_lens_R.data_ptr(),
            context_lens_R.shape[0],
            out_TN.data_ptr(),
            num_heads,
            num_kv_heads,
            head_dim,
            k_cache.shape[2],
            scale,
            window,
            softcap,
            self._threads,
        )

    def sgmv(
        self, y_TN: Tensor, x_TH: Tensor, site: SiteTable, pool: Tensor, segments: Segments
    ) -> None:
        if segments.adapted_rows == 0 or segments.max_rank == 0:
            return None
        kernels = self._kernels.get(pool.dtype)
        if kernels is None:
            return self._reference.sgmv(y_TN, x_TH, site, pool, segments)
        kernels.sgmv(
            self._site_address(site, pool),
            self._rows_address(segments),
            y_TN.data_ptr(),
            y_TN.stride(0),
            x_TH.data_ptr(),
            x_TH.stride(0),
            self._threads,
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
        len(site.out_offsets),
    )
    return _KnownSite(pool, ctypes.addressof(struct), struct)


def _known_rows(segments: Segments) -> _KnownRows:
    struct = _Rows(
        segments.starts_G1.data_ptr(),
        segments.slots_G.data_ptr(),
        segments.num_segments,
        segments.adapted_rows,
        segments.max_rank,
    )
    return _KnownRows(segments, ctypes.addressof(struct), struct)


def _norm_mode(x: Tensor, weight: Tensor, weight_in_fp32: bool) -> int:
    if not weight_in_fp32:
        return _WEIGHT_AFTER_ROUNDING
    return _WEIGHT_SAME_DTYPE if weight.dtype == x.dtype else _WEIGHT_F32


def _require_contiguous(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, its strides are {tensor.stride()}")

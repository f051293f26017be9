"""The backend `triton`: every op in Triton, for CUDA and for Triton's interpreter.

It checks what kernels cannot (dtypes, strides) and launches; nothing waits for the device, so a
step may be captured in a CUDA graph. bfloat16 is for CUDA alone; the interpreter computes it
wrongly. It must not know models or adapters' files, nor the other backends.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Triton is optional.

import torch
import triton
from torch import Tensor

from lory_kernels import triton_attention, triton_elementwise, triton_sgmv
from lory_kernels.checks import require_dtype, require_norm_weight, require_rows, require_table
from lory_kernels.contract import KernelUnavailableError, Segments, SiteTable

_INTERPRETED_DTYPES = (torch.float32, torch.float16)
_CUDA_DTYPES = (*_INTERPRETED_DTYPES, torch.bfloat16)


class TritonOps:
    """Ops in Triton."""

    def __init__(self) -> None:
        interprets = triton.knobs.runtime.interpret
        if not torch.cuda.is_available() and not interprets:
            raise KernelUnavailableError(
                "the kernel backend 'triton' needs a CUDA device: choose 'cpu' or 'torch'"
            )
        self._dtypes = _INTERPRETED_DTYPES if interprets else _CUDA_DTYPES
        self._columns: dict[tuple[tuple[int, ...], tuple[int, ...], torch.device], Tensor] = {}

    def rms_norm(
        self,
        x_TH: Tensor,
        weight_H: Tensor,
        eps: float,
        out_TH: Tensor | None = None,
        *,
        weight_in_fp32: bool = False,
    ) -> Tensor:
        return self._norm(x_TH, None, weight_H, eps, out_TH, weight_in_fp32)

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
        return self._norm(x_TH, residual_TH, weight_H, eps, out_TH, weight_in_fp32)

    def _norm(
        self,
        x_TH: Tensor,
        residual_TH: Tensor | None,
        weight_H: Tensor,
        eps: float,
        out_TH: Tensor | None,
        weight_in_fp32: bool,
    ) -> Tensor:
        out_TH = torch.empty_like(x_TH) if out_TH is None else out_TH
        self._require_served(x_TH=x_TH)
        require_table(x_TH.dtype, x_TH=x_TH, out_TH=out_TH)
        if residual_TH is not None:
            require_table(x_TH.dtype, residual_TH=residual_TH)
        require_norm_weight(x_TH.dtype, weight_in_fp32, weight_H=weight_H)
        triton_elementwise.rms_norm(out_TH, x_TH, residual_TH, weight_H, eps, weight_in_fp32)
        return out_TH

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
        self._require_served(qkv_TN=qkv_TN)
        require_rows(qkv_TN=qkv_TN)
        require_table(qkv_TN.dtype, k_cache=k_cache, v_cache=v_cache)
        require_table(torch.int64, positions_T=positions_T, kv_slots_T=kv_slots_T)
        require_table(torch.float32, cos_sin_PD=cos_sin_PD)
        for name, norm_D in (("q_norm_D", q_norm_D), ("k_norm_D", k_norm_D)):
            if norm_D is not None:
                require_norm_weight(qkv_TN.dtype, norm_weight_in_fp32, **{name: norm_D})
        triton_elementwise.rope_write_kv(
            qkv_TN, positions_T, cos_sin_PD, k_cache, v_cache, kv_slots_T, num_heads, num_kv_heads,
            head_dim, q_norm_D, k_norm_D, norm_eps, norm_weight_in_fp32,
        )  # fmt: skip

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
        self._require_served(qkv_TN=qkv_TN)
        require_rows(qkv_TN=qkv_TN, block_tables_RM=block_tables_RM, out_TN=out_TN)
        require_table(qkv_TN.dtype, k_cache=k_cache, v_cache=v_cache)
        require_dtype(qkv_TN.dtype, out_TN=out_TN)
        require_dtype(torch.int32, block_tables_RM=block_tables_RM)
        require_table(torch.int32, query_starts_R1=query_starts_R1, context_lens_R=context_lens_R)
        triton_attention.paged_attention(
            qkv_TN, k_cache, v_cache, block_tables_RM, query_starts_R1, context_lens_R, out_TN,
            num_heads, num_kv_heads, head_dim, scale, window, softcap,
        )  # fmt: skip

    def silu_mul(self, gate_up_TN: Tensor, out_TI: Tensor) -> None:
        self._gated(gate_up_TN, out_TI, is_gelu=False)

    def gelu_tanh_mul(self, gate_up_TN: Tensor, out_TI: Tensor) -> None:
        self._gated(gate_up_TN, out_TI, is_gelu=True)

    def _gated(self, gate_up_TN: Tensor, out_TI: Tensor, is_gelu: bool) -> None:
        self._require_served(gate_up_TN=gate_up_TN)
        require_table(gate_up_TN.dtype, gate_up_TN=gate_up_TN, out_TI=out_TI)
        triton_elementwise.gated(gate_up_TN, out_TI, is_gelu)

    def sgmv(
        self, y_TN: Tensor, x_TH: Tensor, site: SiteTable, pool: Tensor, segments: Segments
    ) -> None:
        self._require_served(y_TN=y_TN)
        require_rows(y_TN=y_TN, x_TH=x_TH)
        require_dtype(y_TN.dtype, x_TH=x_TH, pool=pool)
        require_dtype(
            torch.int32, starts_G1=segments.starts_G1, slots_G=segments.slots_G,
            rank_SK=site.rank_SK,
        )  # fmt: skip
        require_dtype(torch.int64, a_offset_SK=site.a_offset_SK, b_offset_SK=site.b_offset_SK)
        for offset_SK in (site.gain_offset_SK, site.bias_offset_SK):
            if offset_SK is not None:
                require_dtype(torch.int64, offset_SK=offset_SK)
        columns_2K = self._columns_of(site, pool.device)
        triton_sgmv.sgmv(y_TN, x_TH, site, pool, segments, columns_2K)

    def _columns_of(self, site: SiteTable, device: torch.device) -> Tensor:
        """out_offsets and out_features on the device; a model has a handful of distinct ones."""
        key = (site.out_offsets, site.out_features, device)
        columns_2K = self._columns.get(key)
        if columns_2K is None:
            columns_2K = torch.tensor(
                [site.out_offsets, site.out_features], dtype=torch.int64, device=device
            )
            self._columns[key] = columns_2K
        return columns_2K

    def _require_served(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            if tensor.dtype not in self._dtypes:
                raise ValueError(
                    f"{name} is {tensor.dtype}: the kernel backend 'triton' serves "
                    + ", ".join(str(dtype) for dtype in self._dtypes)
                    + " here; choose 'torch' for others"
                )

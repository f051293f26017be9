"""The contract of the ops: what every backend computes, in which shapes and dtypes.

Plain data and one Protocol. It must not know how an op is computed, what a model looks like, or
where an adapter came from. All ops are for inference: no gradients, outputs may be reused buffers.

Legend of shape suffixes:
    T tokens of the step     H hidden width          I intermediate width    N packed width
    R rows of the plan       M blocks in a table     D head dim              P positions
    G segments (G1: G + 1)   S adapter slots         K slices of a site
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

Backend = Literal["torch", "cpu", "triton"]

BASE_SLOT = -1
"""The slot of segments that use no adapter."""

MAX_RANK = 256
"""The largest adapter rank that SGMV takes."""


class KernelUnavailableError(RuntimeError):
    """A backend cannot run here; the message names what is missing and the fix."""


@dataclass(frozen=True, slots=True, eq=False)
class SiteTable:
    """Where the adapters of every slot keep their factors for one packed linear.

    Slot s, slice k has A = pool[a : a + rank * in_features] as [rank, in_features] and, stored
    transposed, B = pool[b : b + rank * out_features[k]] as [rank, out_features[k]], where a, b and
    rank are the tables' entries [s, k]. The tensors live on the device and are rewritten in place
    when a slot changes hands.
    """

    in_features: int
    out_offsets: tuple[int, ...]
    """First output column of each slice."""
    out_features: tuple[int, ...]
    """Output columns of each slice."""
    a_offset_SK: Tensor
    """int64, in elements of the pool."""
    b_offset_SK: Tensor
    """int64, in elements of the pool."""
    rank_SK: Tensor
    """int32, at most MAX_RANK; 0 means that the adapter leaves this slice alone."""
    scale_SK: Tensor
    """float32."""
    alignment: int = 1
    """Every offset of A and B, in use or not, is a multiple of so many elements."""
    gain_offset_SK: Tensor | None = None
    """int64, in elements of the pool, where out_features[k] float32 numbers begin, whatever the
    pool's dtype: a gain of 1.003 would be 1 in bfloat16. -1: no gain; None: nowhere any."""
    bias_offset_SK: Tensor | None = None
    """As gain_offset_SK. Slices of rank 0 may have either."""


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Which rows of a step use which slot; one value serves all sites of the step.

    Segment g covers rows [starts_G1[g], starts_G1[g + 1]). Empty segments are allowed anywhere, so
    a table of fixed size can serve any mix. Rows past the last segment are base rows.
    """

    starts_G1: Tensor
    """int32, ascending, on the device."""
    slots_G: Tensor
    """int32, on the device; BASE_SLOT for rows without adapter."""
    num_rows: int
    num_segments: int
    max_rank: int
    """No rank in the tables of the slots named here is larger."""
    adapted_rows: int
    """Rows whose slot is not BASE_SLOT; 0 makes SGMV return at once."""
    has_gain_or_bias: bool = True
    """False: no table has a gain or a bias for the slots named here; none need be looked for."""

    @property
    def changes_rows(self) -> bool:
        """False: SGMV returns at once."""
        return self.adapted_rows > 0 and (self.max_rank > 0 or self.has_gain_or_bias)


class Ops(Protocol):
    """Every op of one backend. An instance may be used by one thread at a time.

    Tensors are contiguous unless strides are stated. Sums are accumulated in float32 and rounded
    to the tensor's dtype where the docstrings say so; results do not differ from run to run.
    """

    def rms_norm(
        self,
        x_TH: Tensor,
        weight_H: Tensor,
        eps: float,
        out_TH: Tensor | None = None,
        *,
        weight_in_fp32: bool = False,
    ) -> Tensor:
        """out = x * rsqrt(mean(x^2) + eps) * weight, per row.

        x_TH, out_TH: one dtype. The normalised row is rounded to it and then multiplied by
        weight_H of the same dtype (Llama, Qwen). With weight_in_fp32 the product is made in
        float32 and rounded once, and weight_H may be float32 too (Gemma, 1 + w folded in).
        out_TH may be x_TH.
        """
        ...

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
        """residual += x (rounded to the dtype); out = rms_norm(residual).

        residual_TH is changed in place. out_TH may be x_TH, not residual_TH.
        """
        ...

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
        """q, k = rope(norm(q), norm(k)) in place; k_cache[slot], v_cache[slot] = k, v.

        qkv_TN: packed rows [q | k | v], row stride free. positions_T: int64. cos_sin_PD: float32,
        a row holds cos of the first rotary_dim / 2 angles, then sin; rotary_dim = its width. Dims
        past rotary_dim are kept (partial rotary); dim i pairs with i + rotary_dim / 2 (NeoX).
        k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim], the dtype of qkv.
        kv_slots_T: int64, block * block_size + offset; a negative slot is not written.
        q_norm_D, k_norm_D: RMSNorm weights per head (Qwen3), rounded as in rms_norm.
        """
        ...

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
        """out = softmax(cap(scale * q @ K.T) + causal mask) @ V, per head, over paged K and V.

        qkv_TN: q is its first num_heads * head_dim columns, row stride free. Row r owns tokens
        [query_starts[r], query_starts[r + 1]); its token j stands at position context_lens[r] -
        query_len + j and sees positions p <= its own, and p > its own - window if window > 0.
        cap(s) = softcap * tanh(s / softcap) if softcap > 0. context_lens_R: int32, tokens in the
        cache after this step. block_tables_RM, query_starts_R1: int32. out_TN: [T, num_heads *
        head_dim]; tokens past query_starts[R] are left as they are. Head h reads K, V of head
        h // (num_heads / num_kv_heads). Decode and prefill rows mix freely.
        """
        ...

    def silu_mul(self, gate_up_TN: Tensor, out_TI: Tensor) -> None:
        """out = silu(gate) * up, gate_up_TN = [gate | up], N = 2 * I.

        silu(gate) is rounded to the dtype before the product, as modules do.
        """
        ...

    def gelu_tanh_mul(self, gate_up_TN: Tensor, out_TI: Tensor) -> None:
        """out = gelu_tanh(gate) * up, gate_up_TN = [gate | up], N = 2 * I.

        gelu_tanh(g) = g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 * g^3))), rounded to the
        dtype before the product, as modules do.
        """
        ...

    def sgmv(
        self, y_TN: Tensor, x_TH: Tensor, site: SiteTable, pool: Tensor, segments: Segments
    ) -> None:
        """y[rows, cols_k] = gain * y[rows, cols_k] + scale * (x[rows] @ A.T) @ B + bias.

        For every segment (rows, slot) and slice k (cols_k = out_offsets[k] .. + out_features[k]),
        all of [slot, k]: scale, A, B, and, where there are, gain and bias; without them gain is 1
        and bias 0. y_TN, x_TH: [T, N], [T, in_features], row strides free. pool: one dimension,
        the dtype of x and y. The whole update is made in float32 and rounded once, with y. Rows of
        BASE_SLOT, and slices of rank 0 without gain and bias, read and write nothing.
        """
        ...

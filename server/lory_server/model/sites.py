"""Where adapters may attach to a base: the geometry that format, pool and kernels share.

A site is one packed linear of one layer (qkv is one site with three slices). This module is
plain data; it must not know torch, files or any architecture.
"""

from dataclasses import dataclass

HEAD_MODULE = "lm_head"
EMBEDDING_MODULE = "model.embed_tokens"
"""The two ends of the model, as checkpoints name them. The embedding is a site as well, its
in_features the vocabulary: what it multiplies is one column for each token."""


@dataclass(frozen=True, slots=True)
class Slice:
    """The part of a packed linear that one checkpoint module fills."""

    module: str
    """Module path in the checkpoint's naming, e.g. 'model.layers.0.self_attn.q_proj'."""
    out_offset: int
    out_features: int


@dataclass(frozen=True, slots=True)
class Site:
    """A packed linear: y_TN = x_TK @ W_NK.T + b_N, N = sum of the slices' out_features."""

    name: str
    """e.g. 'layers.0.qkv'."""
    in_features: int
    slices: tuple[Slice, ...]
    has_bias: bool = False
    """All of its slices have, or none."""

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.slices)

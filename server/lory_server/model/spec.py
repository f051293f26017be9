"""What a decoder looks like: plain numbers and switches that every family is described by.

Read from a checkpoint's configuration by `families`; turned into weights by `weights` and into
computation by `decoder`. This module must not know torch, files, or any family by name.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from lory_server.model.errors import ModelError
from lory_server.model.sites import EMBEDDING_MODULE, HEAD_MODULE, Site, Slice

Activation = Literal["silu", "gelu_tanh"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]

# Kinds whose configured factor stretches the context beyond max_position_embeddings.
_STRETCHING_KINDS = ("linear", "dynamic", "yarn")


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding; `rope` turns it into a table."""

    kind: RopeKind
    rotary_dim: int
    """Leading part of each head that is rotated."""
    max_positions: int
    """max_position_embeddings of the configuration, which some kinds compute with."""
    parameters: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Standardised `rope_parameters`: rope_theta always, the kind's own fields beside it."""

    @property
    def short_tokens(self) -> int:
        """Longest sequence with the short of two sets of factors; 0: there is one set."""
        longrope = self.kind == "longrope"
        return self.parameters["original_max_position_embeddings"] if longrope else 0

    @property
    def longest_context(self) -> int:
        """Most positions this embedding is made for."""
        factor = self.parameters.get("factor")
        if self.kind not in _STRETCHING_KINDS or not factor:
            return self.max_positions
        trained = self.max_positions
        if self.kind == "yarn":
            trained = self.parameters["original_max_position_embeddings"]
        return max(self.max_positions, int(trained * factor))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One decoder-only transformer with pre-norm, rotary positions and a gated MLP."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    activation: Activation
    rope: RopeSpec
    windows: tuple[int | None, ...]
    """Per layer: how many tokens back a query sees, itself included; None: all."""
    attention_scale: float
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norm over each query and key head before the rotation."""
    sandwich_norms: bool = False
    """RMS norm after attention and after the MLP, before each joins the residual."""
    unit_offset_norms: bool = False
    """The checkpoint stores norm weights less one."""
    fused_modules: bool = False
    """The checkpoint itself packs qkv_proj and gate_up_proj."""
    tied_head: bool = False
    """The head is the embedding."""
    eos_token_ids: tuple[int, ...] = ()
    checkpoint_dtype: str = "float32"
    prequantized: bool = False
    """The checkpoint's linears are bitsandbytes NF4 already."""

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def max_positions(self) -> int:
        """The base's own context limit."""
        return self.rope.max_positions

    def resolve_max_model_len(self, requested: int) -> int:
        """The context to serve: `requested`, or the base's own limit for 0."""
        longest = self.rope.longest_context
        if requested < 0 or requested > longest:
            raise ModelError(
                f"--max-model-len {requested} is out of range: this base's rotary embedding "
                f"reaches {longest} positions; give 1 to {longest}, or 0 for its own limit "
                f"({self.max_positions})"
            )
        return requested or self.max_positions

    def kv_bytes_per_block(self, block_size: int, element_bytes: int) -> int:
        """Bytes of one block over all layers, keys and values."""
        return 2 * self.num_layers * self.kv_size * block_size * element_bytes

    def sites(self) -> tuple[Site, ...]:
        """The packed linears of all layers, in the order they run."""
        return tuple(site for layer in range(self.num_layers) for site in self._layer_sites(layer))

    def end_sites(self) -> tuple[Site, Site]:
        """Head and embedding."""
        vocab, hidden = self.vocab_size, self.hidden_size
        return (
            Site("head", hidden, (Slice(HEAD_MODULE, 0, vocab),)),
            Site("embedding", vocab, (Slice(EMBEDDING_MODULE, 0, hidden),)),
        )

    def norms(self) -> tuple[tuple[str, int], ...]:
        """Modules and sizes of all norms, by the checkpoint's names."""
        layers = range(self.num_layers)
        own = [(f"model.layers.{i}.{name}", size) for i in layers for name, size in self._norms()]
        return (*own, ("model.norm", self.hidden_size))

    def _norms(self) -> Iterator[tuple[str, int]]:
        yield "input_layernorm", self.hidden_size
        yield "post_attention_layernorm", self.hidden_size
        if self.sandwich_norms:
            yield "pre_feedforward_layernorm", self.hidden_size
            yield "post_feedforward_layernorm", self.hidden_size
        if self.qk_norm:
            yield "self_attn.q_norm", self.head_dim
            yield "self_attn.k_norm", self.head_dim

    def _layer_sites(self, layer: int) -> tuple[Site, Site, Site, Site]:
        attention = f"model.layers.{layer}.self_attn."
        mlp = f"model.layers.{layer}.mlp."
        hidden, inner = self.hidden_size, self.intermediate_size
        qkv = (("q_proj", self.q_size), ("k_proj", self.kv_size), ("v_proj", self.kv_size))
        gate_up = (("gate_proj", inner), ("up_proj", inner))
        o, down = (("o_proj", hidden),), (("down_proj", hidden),)
        if self.fused_modules:
            qkv = (("qkv_proj", self.q_size + 2 * self.kv_size),)
            gate_up = (("gate_up_proj", 2 * inner),)
        return (
            _site(f"layers.{layer}.qkv", hidden, attention, qkv, self.qkv_bias),
            _site(f"layers.{layer}.o", self.q_size, attention, o, self.o_bias),
            _site(f"layers.{layer}.gate_up", hidden, mlp, gate_up, self.mlp_bias),
            _site(f"layers.{layer}.down", inner, mlp, down, self.mlp_bias),
        )


def _site(
    name: str,
    in_features: int,
    prefix: str,
    modules: tuple[tuple[str, int], ...],
    has_bias: bool,
) -> Site:
    slices: list[Slice] = []
    offset = 0
    for module, out_features in modules:
        slices.append(Slice(prefix + module, offset, out_features))
        offset += out_features
    return Site(name, in_features, tuple(slices), has_bias)

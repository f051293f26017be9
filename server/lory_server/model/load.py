"""From a checkpoint to a decoder: find, read, pack, quantize if asked, place on the device.

Tensor by tensor: at any time there is the model as it will be served, one tensor on its way, and
one shard mapped. It must not know adapters or serving. Legend: H hidden, V vocabulary, N packed
width, K in features.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lory_kernels import Ops
from lory_server.messages import EngineOptions
from lory_server.model.checkpoint import Checkpoint, locate
from lory_server.model.decoder import Decoder, Layer
from lory_server.model.errors import ModelError
from lory_server.model.families import read_spec
from lory_server.model.linear import Linear, dense_linear
from lory_server.model.norms import Norm
from lory_server.model.rope import rope_table
from lory_server.model.sites import Site, Slice
from lory_server.model.spec import ModelSpec


def load(
    options: EngineOptions, device: torch.device | str, dtype: torch.dtype, ops: Ops
) -> Decoder:
    """The base that `options` name; every refusal is a ModelError."""
    folder = locate(options.model)
    spec = read_spec(folder)
    _check_options(options, spec)
    max_model_len = spec.resolve_max_model_len(options.max_model_len)
    with Checkpoint(folder) as checkpoint:
        loader = _Loader(spec, checkpoint, torch.device(device), dtype, options, ops)
        embedding_VH = loader.embedding()
        layers = tuple(loader.layer(number) for number in range(spec.num_layers))
        norm_H = loader.norm("model.norm", spec.hidden_size)
        head = loader.head(embedding_VH)
        checkpoint.finish()
    rope = rope_table(spec.rope, max_model_len, device)
    return Decoder(spec, ops, embedding_VH, layers, norm_H, head, rope)


def _check_options(options: EngineOptions, spec: ModelSpec) -> None:
    if options.double_quant and options.quantize != "nf4":
        raise ModelError("--double-quant needs --quantize nf4")
    if options.double_quant and spec.prequantized:
        raise ModelError(
            "--double-quant: this checkpoint is quantized already, as its own configuration says; "
            "leave it out"
        )


@dataclass(frozen=True, slots=True)
class _Loader:
    spec: ModelSpec
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    options: EngineOptions
    ops: Ops

    def layer(self, number: int) -> Layer:
        spec = self.spec
        qkv, o, gate_up, down = spec.sites()[4 * number : 4 * number + 4]
        prefix = f"model.layers.{number}."
        sandwich = spec.sandwich_norms
        mlp_norm = "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"

        def norm(name: str, size: int = spec.hidden_size) -> Norm:
            return Norm(prefix + name, self.norm(prefix + name, size))

        return Layer(
            qkv=self.linear(qkv),
            o=self.linear(o),
            gate_up=self.linear(gate_up),
            down=self.linear(down),
            attention_norm=norm("input_layernorm"),
            mlp_norm=norm(mlp_norm),
            post_attention_norm=norm("post_attention_layernorm") if sandwich else None,
            post_mlp_norm=norm("post_feedforward_layernorm") if sandwich else None,
            q_norm=norm("self_attn.q_norm", spec.head_dim) if spec.qk_norm else None,
            k_norm=norm("self_attn.k_norm", spec.head_dim) if spec.qk_norm else None,
        )

    def embedding(self) -> Tensor:
        shape = (self.spec.vocab_size, self.spec.hidden_size)
        return self._place(self.checkpoint.take_float("model.embed_tokens.weight", shape))

    def norm(self, module: str, size: int) -> Tensor:
        weight_H = self.checkpoint.take_float(f"{module}.weight", (size,))
        if self.spec.unit_offset_norms:
            return (1.0 + weight_H.float()).to(self.device)
        return self._place(weight_H)

    def head(self, embedding_VH: Tensor) -> Linear:
        """The embedding if tied; but a different lm_head in a tied checkpoint counts, as it
        does in transformers."""
        if self.spec.tied_head and "lm_head.weight" not in self.checkpoint:
            return self._dense(embedding_VH, None)
        part = Slice("lm_head", 0, self.spec.vocab_size)
        if self._is_nf4(part):
            return self._nf4("lm_head", (part,), self.spec.hidden_size, None)
        weight_VH = self._weight(part, self.spec.hidden_size)
        tied = self.spec.tied_head and torch.equal(weight_VH, embedding_VH)
        return self._dense(embedding_VH if tied else weight_VH, None)

    def linear(self, site: Site) -> Linear:
        bias_N = self._bias(site.slices) if site.has_bias else None
        in_nf4 = {self._is_nf4(part) for part in site.slices}
        if len(in_nf4) > 1:
            modules = ", ".join(part.module for part in site.slices)
            raise ModelError(f"{modules}: all or none of them must be in NF4, they are packed")
        wanted = self.options.quantize == "nf4" and not self.spec.prequantized
        if wanted or in_nf4 == {True}:
            return self._nf4(site.name, site.slices, site.in_features, bias_N)
        weight_NK = torch.empty(
            (site.out_features, site.in_features), dtype=self.dtype, device=self.device
        )
        for part in site.slices:
            rows_NK = self._stored(part, site.in_features)
            weight_NK[part.out_offset : part.out_offset + part.out_features].copy_(rows_NK)
        return self._dense(weight_NK, bias_N)

    def _dense(self, weight_NK: Tensor, bias_N: Tensor | None) -> Linear:
        return dense_linear(weight_NK, bias_N, self.options.max_batch_rows, self.ops)

    def _nf4(
        self, name: str, slices: Iterable[Slice], in_features: int, bias_N: Tensor | None
    ) -> Linear:
        # Imported where it is needed: bitsandbytes takes seconds to start.
        from lory_server.model import nf4

        parts: list[nf4.NF4Weight] = []
        for part in slices:
            weight_name = f"{part.module}.weight"
            if self._is_nf4(part):
                names = nf4.tensor_names(weight_name, self.checkpoint.names)
                weight = nf4.read(weight_name, self.checkpoint.take_all(names))
                weight = weight.to(self.device)
            else:
                weight_NK = self._weight(part, in_features)
                weight = nf4.quantize(weight_NK, weight_name, self.options.double_quant)
            weight.require_shape(weight_name, part.out_features, in_features)
            parts.append(weight)
        return nf4.nf4_linear(nf4.pack(name, parts), bias_N, self.dtype, self.ops)

    def _is_nf4(self, part: Slice) -> bool:
        return f"{part.module}.weight.quant_state.bitsandbytes__nf4" in self.checkpoint

    def _bias(self, slices: Iterable[Slice]) -> Tensor:
        parts = [
            self.checkpoint.take_float(f"{part.module}.bias", (part.out_features,))
            for part in slices
        ]
        return self._place(torch.cat(parts))

    def _weight(self, part: Slice, in_features: int) -> Tensor:
        return self._place(self._stored(part, in_features))

    def _stored(self, part: Slice, in_features: int) -> Tensor:
        return self.checkpoint.take_float(f"{part.module}.weight", (part.out_features, in_features))

    def _place(self, tensor: Tensor) -> Tensor:
        """Own memory, not the mapped file's: the shard will be closed."""
        return tensor.to(self.device, self.dtype, copy=True)

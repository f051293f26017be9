"""A base of random NF4 weights, made on the device itself: nothing is downloaded or read.

The shape is that of an 8B Llama, or a tiny one for dry runs. Speed does not depend on what weights
say; that they are random numbers and not zeros it may depend on. It must not know what is measured.

Legend: V vocabulary, H hidden, P positions.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lory_kernels import Ops, select
from lory_server.adapters.format import AdapterManifest, AdapterSlice
from lory_server.adapters.header import TensorSpec
from lory_server.model.decoder import Decoder, Layer
from lory_server.model.linear import Linear, dense_linear
from lory_server.model.nf4 import BLOCK, NF4Weight, nf4_linear
from lory_server.model.norms import Norm
from lory_server.model.rope import rope_table
from lory_server.model.sites import Site
from lory_server.model.spec import ModelSpec, RopeSpec

DTYPE = torch.bfloat16
WEIGHT_STD = 0.02


def llama_8b() -> ModelSpec:
    return ModelSpec(
        architecture="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        norm_eps=1e-5,
        activation="silu",
        rope=RopeSpec("default", 128, 8192, {"rope_theta": 500000.0}),
        windows=(None,) * 32,
        attention_scale=128**-0.5,
    )


def tiny_llama() -> ModelSpec:
    return replace(
        llama_8b(),
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rope=RopeSpec("default", 16, 128, {"rope_theta": 10000.0}),
        windows=(None,) * 2,
        attention_scale=0.25,
    )


@dataclass(frozen=True)
class RandomBase:
    """What to make, and where."""

    spec: ModelSpec
    device: torch.device
    generator: torch.Generator
    max_positions: int
    max_rows: int
    """Of a step."""

    @classmethod
    def of(
        cls, spec: ModelSpec, device: torch.device, max_positions: int, max_rows: int
    ) -> "RandomBase":
        generator = torch.Generator(device).manual_seed(0)
        return cls(spec, device, generator, max_positions, max_rows)

    def decoder(self) -> Decoder:
        """On a CPU, a dry run, plain PyTorch stands in for the kernels."""
        spec = self.spec
        embedding_VH = self.normal(spec.vocab_size, spec.hidden_size)
        head_VH = self.normal(spec.vocab_size, spec.hidden_size)
        sites = spec.sites()
        ops = select("triton" if self.device.type == "cuda" else "torch")
        layers = tuple(self._layer(sites[4 * n : 4 * n + 4], ops) for n in range(spec.num_layers))
        rope = rope_table(spec.rope, self.max_positions, self.device)
        head = dense_linear(head_VH, None, self.max_rows, ops)
        return Decoder(spec, ops, embedding_VH, layers, self._ones(), head, rope)

    def normal(self, *shape: int) -> Tensor:
        weight = torch.empty(shape, dtype=DTYPE, device=self.device)
        return weight.normal_(std=WEIGHT_STD, generator=self.generator)

    def _layer(self, sites: tuple[Site, ...], ops: Ops) -> Layer:
        qkv, o, gate_up, down = (self._linear(site, ops) for site in sites)
        return Layer(qkv, o, gate_up, down, self._norm(), self._norm(), None, None, None, None)

    def _linear(self, site: Site, ops: Ops) -> Linear:
        size = site.in_features * site.out_features
        codes = torch.randint(
            0, 256, (size // 2,), dtype=torch.uint8, device=self.device, generator=self.generator
        )
        absmax = torch.full((size // BLOCK,), 2 * WEIGHT_STD, device=self.device)
        weight = NF4Weight(codes, absmax, site.out_features, site.in_features)
        return nf4_linear(weight, None, DTYPE, ops)

    def _norm(self) -> Norm:
        return Norm("norm", self._ones())

    def _ones(self) -> Tensor:
        return torch.ones(self.spec.hidden_size, dtype=DTYPE, device=self.device)


def manifest_of(sites: tuple[Site, ...], rank: int) -> AdapterManifest:
    """An adapter of one rank on every projection, as if it had been read from a folder."""
    slices = tuple(
        AdapterSlice(
            index,
            k,
            rank,
            2.0,
            TensorSpec("a", "BF16", (rank, site.in_features), 0, 2 * rank * site.in_features),
            TensorSpec("b", "BF16", (part.out_features, rank), 0, 2 * rank * part.out_features),
        )
        for index, site in enumerate(sites)
        for k, part in enumerate(site.slices)
    )
    return AdapterManifest(slices, "", 0, b"")


def linear_weights(spec: ModelSpec) -> int:
    """Numbers in the linears of all layers."""
    return sum(site.in_features * site.out_features for site in spec.sites())


def model_name(spec: ModelSpec) -> str:
    return f"random NF4, {spec.num_layers} layers of hidden {spec.hidden_size}"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

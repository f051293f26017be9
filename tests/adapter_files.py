"""Small adapters on disk without PEFT, for tests of the format, the store and the cache."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lory_server.adapters.fold import BaseFolder
from lory_server.adapters.format import Base
from lory_server.model.linear import DenseLinear
from lory_server.model.sites import Site, Slice

HIDDEN = 16
ALL_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Tensors = dict[str, Tensor]


def make_sites(num_layers: int = 2, hidden: int = HIDDEN) -> tuple[Site, ...]:
    """Llama's packed linears: qkv with half as many columns for k and v, o, gate_up, down."""
    sites: list[Site] = []
    for layer in range(num_layers):
        name = f"model.layers.{layer}"
        kv, inner = hidden // 2, hidden * 3
        sites += [
            _site(
                layer,
                "qkv",
                hidden,
                {f"{name}.self_attn.q_proj": hidden}
                | {f"{name}.self_attn.{part}_proj": kv for part in "kv"},
            ),
            _site(layer, "o", hidden, {f"{name}.self_attn.o_proj": hidden}),
            _site(
                layer,
                "gate_up",
                hidden,
                {f"{name}.mlp.{part}_proj": inner for part in ("gate", "up")},
            ),
            _site(layer, "down", inner, {f"{name}.mlp.down_proj": hidden}),
        ]
    return tuple(sites)


def _site(layer: int, name: str, in_features: int, modules: Mapping[str, int]) -> Site:
    slices: list[Slice] = []
    for module, out_features in modules.items():
        slices.append(Slice(module, sum(s.out_features for s in slices), out_features))
    return Site(f"layers.{layer}.{name}", in_features, tuple(slices))


SITES = make_sites()
BASE = Base(SITES, ("org/Tiny-Base",))


def make_folder(sites: tuple[Site, ...] = SITES) -> BaseFolder:
    """Over a random base."""
    generator = torch.Generator().manual_seed(99)

    def linear(site: Site) -> DenseLinear:
        shape = (site.out_features, site.in_features)
        bias_N = torch.randn(shape[0], generator=generator) if site.has_bias else None
        return DenseLinear(torch.randn(shape, generator=generator), bias_N)

    return BaseFolder(sites, [linear(site) for site in sites], torch.device("cpu"))


def make_tensors(
    rank: int,
    modules: tuple[str, ...] = ALL_MODULES,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    sites: tuple[Site, ...] = SITES,
) -> Tensors:
    """The factors of `modules`."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for prefix, site, part in _modules(sites):
        if part.module.rpartition(".")[2] in modules:
            a = torch.randn(rank, site.in_features, generator=generator)
            b = torch.randn(part.out_features, rank, generator=generator)
            tensors[f"{prefix}.lora_A.weight"] = a.to(dtype)
            tensors[f"{prefix}.lora_B.weight"] = b.to(dtype)
    return tensors


def _modules(sites: tuple[Site, ...]) -> Iterator[tuple[str, Site, Slice]]:
    for site in sites:
        for part in site.slices:
            yield f"base_model.model.{part.module}", site, part


def add_vectors(tensors: Tensors, fields: dict[str, Any], sites: tuple[Site, ...]) -> None:
    """What PEFT saves beside the factors for `fields` of a configuration."""
    generator = torch.Generator().manual_seed(7)
    bias = fields.get("bias", "none")
    for prefix, site, part in _modules(sites):
        has_factors = f"{prefix}.lora_A.weight" in tensors
        trains_bias = site.has_bias and bias in (("all", "lora_only") if has_factors else ("all",))
        wanted = {
            "lora_magnitude_vector": has_factors and fields.get("use_dora"),
            "lora_B.bias": has_factors and fields.get("lora_bias"),
            "base_layer.bias" if has_factors else "bias": trains_bias,
        }
        for name, is_wanted in wanted.items():
            if is_wanted:
                vector = torch.randn(part.out_features, generator=generator)
                tensors[f"{prefix}.{name}"] = vector


def make_config(rank: int, modules: tuple[str, ...] = ALL_MODULES, **fields: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(modules),
        "base_model_name_or_path": "/mnt/models/tiny-base",
    } | fields


def write_adapter(
    folder: Path,
    rank: int = 4,
    modules: tuple[str, ...] = ALL_MODULES,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    change: Callable[[Tensors], object] | None = None,
    sites: tuple[Site, ...] = SITES,
    **fields: Any,
) -> Path:
    """A folder that is valid for `sites`, unless `change` or `fields` make it otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = make_tensors(rank, modules, seed=seed, dtype=dtype, sites=sites)
    add_vectors(tensors, fields, sites)
    if change is not None:
        change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.dumps(make_config(rank, modules, **fields))
    (folder / "adapter_config.json").write_text(config)
    return folder

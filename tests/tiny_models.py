"""Tiny random Hugging Face models and PEFT adapters on disk, for tests; token ids only.

Weights are drawn wide enough that a wrong window, soft cap, rotation or adapter moves the logits
far beyond any tolerance. Nothing is downloaded.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 200

_MODEL_TYPES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "phi3": "phi3",
}
FAMILIES = tuple(_MODEL_TYPES)

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

_FAMILY_SHAPE: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"head_dim": 32},
    "gemma2": {
        "head_dim": 32,
        "sliding_window": 8,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": True,
    },
    "phi3": {},
}


def build(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """A random model of `family` in `folder`; `overrides` are fields of its configuration."""
    model = random_model(family, seed=seed, dtype=dtype, **overrides)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def random_model(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    fields = _SHAPE | _FAMILY_SHAPE[family] | overrides
    config = AutoConfig.for_model(_MODEL_TYPES[family], **fields)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    _randomize(model, seed)
    return model.to(dtype).eval()


def load_reference(folder: Path, dtype: torch.dtype | str = "auto", **kwargs: Any) -> Any:
    """The same folder in transformers, with eager attention."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", **kwargs
    )
    return model.eval()


def save_adapter(
    folder: Path,
    model: PreTrainedModel | Path | str,
    rank: int,
    alpha: float,
    target_modules: Sequence[str] | str,
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    use_rslora: bool = False,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    layers_to_transform: Sequence[int] | None = None,
    scale: float = 0.15,
    **config_overrides: Any,
) -> Path:
    """A PEFT LoRA folder for `model`, all that it trains random; `model` is left as it was.

    `model` is a transformers model or the folder of one. DoRA's magnitudes differ by some tens of
    percent from those it begins with, which are the norms of the base's weights.
    """
    from peft import LoraConfig, get_peft_model

    base = load_reference(Path(model)) if isinstance(model, str | Path) else model
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
        target_modules=targets,
        use_rslora=use_rslora,
        rank_pattern=rank_pattern or {},
        alpha_pattern=alpha_pattern or {},
        layers_to_transform=None if layers_to_transform is None else list(layers_to_transform),
        task_type="CAUSAL_LM",
        **config_overrides,
    )
    with warnings.catch_warnings():
        # peft reads a property that transformers is renaming, and warns of what cannot be merged.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "`lora_bias=True` was passed")
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        adapted = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    trained_biases: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
    with torch.no_grad():
        for name, parameter in sorted(adapted.named_parameters()):
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator) * scale
            if "lora_magnitude_vector" in name:
                parameter.data = (parameter * (1 + 2 * noise)).to(dtype)
            elif "lora_" in name and dtype == parameter.dtype:
                parameter.copy_(noise)  # in place: factors of tied ends are one tensor
            elif "lora_" in name:
                parameter.data = noise.to(dtype)
            else:
                trained_biases.append((parameter, parameter.data))
                parameter.data = parameter.data + 4 * noise.to(parameter.dtype)
    with warnings.catch_warnings():
        # peft takes a bias of B for a damaged B.
        warnings.filterwarnings("ignore", "Adapter 'default': .* have invalid shape")
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers` to `True`")
        adapted.save_pretrained(str(folder))
    adapted.unload()
    for parameter, before in trained_biases:
        parameter.data = before
    if hasattr(base, "peft_config"):
        del base.peft_config
    return folder


def _randomize(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    unit_offset = model.config.model_type == "gemma2"
    narrow = unit_offset or model.config.tie_word_embeddings
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(noise * 0.2 + (0.0 if unit_offset else 1.0))
            elif parameter.ndim == 1:
                parameter.copy_(noise * 0.3)
            elif "embed_tokens" in name:
                parameter.copy_(noise * (0.2 if narrow else 1.0))
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[1] ** 0.5)

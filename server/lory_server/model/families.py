"""Which checkpoints are served: config.json + generation_config.json -> ModelSpec.

One small function per family says how it differs from the plain decoder. Both the flat form of
`rope_parameters` and the older `rope_theta` + `rope_scaling` are understood. Whatever a
configuration asks for that the decoder does not compute is refused, never ignored. This module
must not know torch or weights.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast, get_args

from lory_server.model.errors import ModelError
from lory_server.model.spec import Activation, ModelSpec, RopeKind, RopeSpec

Config = Mapping[str, Any]

_ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
)
_ROPE_FIELDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "yarn": ("factor",),
        "longrope": ("short_factor", "long_factor"),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    }
)
_TRAINED_LENGTH = "original_max_position_embeddings"
_DEFAULT_THETA = 10_000.0
_DEFAULT_HEAD_DIM: Mapping[str, int] = MappingProxyType({"qwen3": 128, "gemma2": 256})
_NOT_SERVED: Mapping[str, str] = MappingProxyType(
    {
        "per_layer_config": "all layers are alike",
        "transformers_weights": "weights are read from model*.safetensors",
        "use_bidirectional_attention": "only causal decoders are served",
    }
)


def read_spec(folder: Path) -> ModelSpec:
    """The spec of the checkpoint in `folder`."""
    config = _read_json(folder / "config.json")
    generation_path = folder / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.exists() else {}
    return parse_spec(config, generation)


def parse_spec(config: Config, generation: Config) -> ModelSpec:
    """The spec of a Hugging Face configuration; refuses what the decoder does not compute."""
    architecture = _architecture(config)
    _refuse_what_is_not_served(config)
    spec: dict[str, Any] = _plain(config) | FAMILIES[architecture](config)
    _check_shapes(spec)
    return ModelSpec(
        architecture=architecture,
        eos_token_ids=_eos_token_ids(config, generation),
        checkpoint_dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        prequantized=_is_nf4(config),
        **spec,
    )


# -- families: how each differs from the plain decoder -----------------------------------------


def _llama(config: Config) -> dict[str, Any]:
    attention_bias = bool(config.get("attention_bias"))
    return {
        "qkv_bias": attention_bias,
        "o_bias": attention_bias,
        "mlp_bias": bool(config.get("mlp_bias")),
    }


def _mistral(config: Config) -> dict[str, Any]:
    return {"windows": _every_layer(config, _window(config, 4096))}


def _qwen2(config: Config) -> dict[str, Any]:
    return {"qkv_bias": True, "windows": _late_windows(config)}


def _qwen3(config: Config) -> dict[str, Any]:
    attention_bias = bool(config.get("attention_bias"))
    return {
        "qk_norm": True,
        "qkv_bias": attention_bias,
        "o_bias": attention_bias,
        "windows": _late_windows(config),
    }


def _gemma2(config: Config) -> dict[str, Any]:
    scalar = config.get("query_pre_attn_scalar", 256)
    if not isinstance(scalar, int | float) or scalar <= 0:
        raise ModelError(f"config.json: query_pre_attn_scalar must be positive, found {scalar!r}")
    attention_bias = bool(config.get("attention_bias"))
    activation = config.get("hidden_activation") or "gelu_pytorch_tanh"
    return {
        "activation": _activation(activation),
        "attention_scale": scalar**-0.5,
        "attention_softcap": config.get("attn_logit_softcapping", 50.0),
        "logit_softcap": config.get("final_logit_softcapping", 30.0),
        "embedding_scale": config["hidden_size"] ** 0.5,
        "qkv_bias": attention_bias,
        "o_bias": attention_bias,
        "sandwich_norms": True,
        "unit_offset_norms": True,
        "tied_head": config.get("tie_word_embeddings") is not False,
        "windows": _alternating_windows(config),
    }


def _phi3(config: Config) -> dict[str, Any]:
    return {
        "fused_modules": True,
        "norm_eps": config.get("rms_norm_eps", 1e-5),
        "windows": _every_layer(config, _window(config, None)),
    }


FAMILIES: Mapping[str, Callable[[Config], dict[str, Any]]] = MappingProxyType(
    {
        "LlamaForCausalLM": _llama,
        "MistralForCausalLM": _mistral,
        "Qwen2ForCausalLM": _qwen2,
        "Qwen3ForCausalLM": _qwen3,
        "Gemma2ForCausalLM": _gemma2,
        "Phi3ForCausalLM": _phi3,
    }
)


# -- what all share ----------------------------------------------------------------------------


def _plain(config: Config) -> dict[str, Any]:
    num_heads = _required(config, "num_attention_heads")
    hidden_size = _required(config, "hidden_size")
    default_dim = _DEFAULT_HEAD_DIM.get(config["model_type"], hidden_size // num_heads)
    head_dim = config.get("head_dim") or default_dim
    return {
        "vocab_size": _required(config, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": _required(config, "intermediate_size"),
        "num_layers": _required(config, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": config.get("num_key_value_heads") or num_heads,
        "head_dim": head_dim,
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "activation": _activation(config.get("hidden_act") or "silu"),
        "rope": _rope(config, head_dim),
        "windows": _every_layer(config, None),
        "attention_scale": head_dim**-0.5,
        "tied_head": bool(config.get("tie_word_embeddings")),
    }


def _architecture(config: Config) -> str:
    names = config.get("architectures") or ["(none)"]
    if len(names) == 1 and names[0] in FAMILIES:
        return _of_its_type(names[0], config)
    raise ModelError(
        f"architecture {', '.join(names)} is not supported; supported: {', '.join(FAMILIES)}"
    )


def _of_its_type(architecture: str, config: Config) -> str:
    """transformers goes by model_type, so both must mean the same."""
    expected, found = architecture.removesuffix("ForCausalLM").lower(), config.get("model_type")
    if found != expected:
        raise ModelError(
            f"config.json: model_type {found!r} is not that of {architecture} ({expected!r})"
        )
    return architecture


def _refuse_what_is_not_served(config: Config) -> None:
    for name, reason in _NOT_SERVED.items():
        if config.get(name):
            raise ModelError(f"config.json: {name} is not supported: {reason}")


def _required(config: Config, name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"config.json: {name} must be a positive integer, found {value!r}")
    return value


def _check_shapes(spec: Mapping[str, Any]) -> None:
    if spec["num_heads"] % spec["num_kv_heads"]:
        raise ModelError(
            f"config.json: num_attention_heads {spec['num_heads']} is not a multiple of "
            f"num_key_value_heads {spec['num_kv_heads']}"
        )
    if spec["rope"].rotary_dim % 2 or spec["head_dim"] % 2:
        raise ModelError(f"config.json: rotary dimension {spec['rope'].rotary_dim} must be even")


def _activation(name: str) -> Activation:
    if name not in _ACTIVATIONS:
        raise ModelError(
            f"config.json: activation {name!r} is not supported; "
            f"supported: {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _eos_token_ids(config: Config, generation: Config) -> tuple[int, ...]:
    eos = generation.get("eos_token_id")
    if eos is None:
        eos = config.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)


def _is_nf4(config: Config) -> bool:
    quantization = config.get("quantization_config")
    if not quantization:
        return False
    method = quantization.get("quant_method", "bitsandbytes")
    kind = quantization.get("bnb_4bit_quant_type", "fp4")
    if method == "bitsandbytes" and quantization.get("load_in_4bit") and kind == "nf4":
        return True
    in_4bit = bool(quantization.get("load_in_4bit"))
    raise ModelError(
        f"quantization_config (quant_method {method!r}, load_in_4bit {in_4bit}, "
        f"bnb_4bit_quant_type {kind!r}) is not supported: "
        "give an unquantized checkpoint or one in bitsandbytes NF4"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: not found; a checkpoint folder needs it") from error
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return content


# -- attention windows -------------------------------------------------------------------------


def _every_layer(config: Config, window: int | None) -> tuple[int | None, ...]:
    return (window,) * _required(config, "num_hidden_layers")


def _window(config: Config, default: int | None) -> int | None:
    window = config.get("sliding_window", default)
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ModelError(
            f"config.json: sliding_window must be a positive integer or null, found {window!r}"
        )
    return window


def _late_windows(config: Config) -> tuple[int | None, ...]:
    """Qwen: a window on the layers from max_window_layers on, if use_sliding_window."""
    window = _window(config, 4096) if config.get("use_sliding_window") else None
    first = config.get("max_window_layers", 28)
    num_layers = _required(config, "num_hidden_layers")
    by_default = [
        "full_attention" if window is None or layer < first else "sliding_attention"
        for layer in range(num_layers)
    ]
    return _windows_by_type(config.get("layer_types") or by_default, window, num_layers)


def _alternating_windows(config: Config) -> tuple[int | None, ...]:
    """Gemma 2: a window on layers 0, 2, 4, ..."""
    num_layers = _required(config, "num_hidden_layers")
    by_default = [
        "full_attention" if layer % 2 else "sliding_attention" for layer in range(num_layers)
    ]
    layer_types = config.get("layer_types") or by_default
    return _windows_by_type(layer_types, _window(config, 4096), num_layers)


def _windows_by_type(
    layer_types: list[str], window: int | None, num_layers: int
) -> tuple[int | None, ...]:
    if len(layer_types) != num_layers:
        raise ModelError(
            f"config.json: layer_types has {len(layer_types)} entries for {num_layers} layers"
        )
    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ModelError(f"config.json: layer_types {', '.join(sorted(unknown))} not supported")
    if window is None and "sliding_attention" in layer_types:
        raise ModelError(
            "config.json: layer_types has sliding_attention but sliding_window is not set"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


# -- rotary positions --------------------------------------------------------------------------


def _rope(config: Config, head_dim: int) -> RopeSpec:
    raw = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = _rope_kind(config, raw)
    partial = raw.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    partial = 1.0 if partial is None else partial
    if partial != 1.0 and config.get("model_type") != "phi3":
        raise ModelError(
            f"config.json: partial_rotary_factor {partial} is supported for phi3 alone"
        )
    max_positions = _required(config, "max_position_embeddings")
    theta = raw.get("rope_theta") or config.get("rope_theta") or _DEFAULT_THETA
    parameters = raw | {"rope_type": kind, "rope_theta": float(theta)}
    parameters["partial_rotary_factor"] = partial
    rotary_dim = int(head_dim * partial)
    if kind in ("llama3", "yarn", "longrope"):
        parameters[_TRAINED_LENGTH] = _trained_length(config, raw, max_positions)
    if kind == "longrope":
        _check_factors(raw, rotary_dim // 2)
    return RopeSpec(kind, rotary_dim, max_positions, MappingProxyType(parameters))


def _check_factors(raw: Config, wanted: int) -> None:
    for name in _ROPE_FIELDS["longrope"]:
        found = len(raw[name]) if isinstance(raw[name], list) else raw[name]
        if found != wanted:
            raise ModelError(f"config.json: {name} must list {wanted} factors, found {found!r}")


def _rope_kind(config: Config, raw: Config) -> RopeKind:
    kind = raw.get("rope_type") or raw.get("type") or "default"
    if config.get("model_type") == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"
    if kind not in get_args(RopeKind) or any(isinstance(value, dict) for value in raw.values()):
        raise ModelError(
            f"config.json: rope type {kind!r} with {sorted(raw)} is not supported; supported, one "
            f"for all layers: {', '.join(get_args(RopeKind))}"
        )
    missing = [name for name in _ROPE_FIELDS.get(kind, ()) if raw.get(name) is None]
    if missing:
        raise ModelError(f"config.json: rope type {kind!r} needs {', '.join(missing)}")
    return cast(RopeKind, kind)


def _trained_length(config: Config, raw: Config, max_positions: int) -> int:
    if config.get("model_type") == "phi3":
        return config.get(_TRAINED_LENGTH) or 4096
    return config.get(_TRAINED_LENGTH) or raw.get(_TRAINED_LENGTH) or max_positions

"""Configurations: what transformers means by one is what the spec says, or it is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import tiny_models
from lory_server.model.errors import ModelError
from lory_server.model.families import FAMILIES, parse_spec, read_spec

PLAIN: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}

LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True}


QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
GEMMA2 = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_defaults_of_each_family_are_those_of_transformers(family: str) -> None:
    theirs = AutoConfig.for_model(family)
    architecture = next(name for name in FAMILIES if name.lower().startswith(family))
    sizes = {
        name: getattr(theirs, name)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        )
    }
    spec = parse_spec({"architectures": [architecture], "model_type": family, **sizes}, {})
    heads = theirs.num_attention_heads
    assert spec.norm_eps == theirs.rms_norm_eps
    assert spec.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // heads)
    assert spec.tied_head == theirs.tie_word_embeddings
    assert spec.rope.parameters["rope_theta"] == theirs.rope_parameters["rope_theta"]
    window = getattr(theirs, "sliding_window", None)
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * spec.num_layers
    assert spec.windows == tuple(window if k == "sliding_attention" else None for k in kinds)
    assert spec.attention_softcap == getattr(theirs, "attn_logit_softcapping", None)
    assert spec.logit_softcap == getattr(theirs, "final_logit_softcapping", None)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM.*LlamaForCausalLM"),
        ({"architectures": None}, r"\(none\)"),
        ({"hidden_act": "relu"}, "relu"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"rope_scaling": {"rope_type": "axial"}}, "axial"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one for all layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"head_dim": 5}, "even"),
        ({"model_type": "mistral"}, "model_type 'mistral' is not that of LlamaForCausalLM"),
        ({"per_layer_config": {"0": {"rms_norm_eps": 1.0}}}, "per_layer_config"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"rope_scaling": LONGROPE | {"long_factor": [1.0] * 7}}, "long_factor.*8 factors.*7"),
        ({"rope_scaling": LONGROPE | {"short_factor": 1.0}}, r"short_factor.*8 factors.*1\.0"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq.*NF4"),
        ({"quantization_config": BITSANDBYTES | {"load_in_4bit": False}}, "load_in_4bit False"),
        ({"quantization_config": BITSANDBYTES | {"bnb_4bit_quant_type": "fp4"}}, "fp4"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        parse_spec(PLAIN | change, {})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layer_types": ["full_attention"]}, "1 entries for 2 layers"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"layer_types": ["sliding_attention"] * 2}, "sliding_window is not set"),
    ],
)
def test_layer_types_that_make_no_sense_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        parse_spec(PLAIN | QWEN2 | change, {})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"query_pre_attn_scalar": None}, "query_pre_attn_scalar must be positive, found None"),
        ({"sliding_window": 0}, "sliding_window must be a positive integer or null, found 0"),
        ({"sliding_window": "4096"}, "sliding_window"),
    ],
)
def test_what_gemma_cannot_be_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        parse_spec(PLAIN | GEMMA2 | change, {})


@pytest.mark.parametrize(("family", "head_dim"), [("Gemma2", 256), ("Qwen3", 128), ("Llama", 16)])
def test_scaling_factors_are_counted_for_the_head_size_of_the_family(
    family: str, head_dim: int
) -> None:
    names = {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower()}
    factors = {name: [1.0] * (head_dim // 2) for name in ("short_factor", "long_factor")}
    spec = parse_spec(PLAIN | names | {"rope_scaling": LONGROPE | factors}, {})
    assert (spec.head_dim, spec.rope.rotary_dim) == (head_dim, head_dim)


@pytest.mark.parametrize(
    ("config_eos", "generation_eos", "expected"),
    [(2, None, (2,)), (2, [5, 6], (5, 6)), ([2, 3], None, (2, 3)), (2, 0, (0,)), (None, None, ())],
)
def test_generation_config_says_which_tokens_end_a_sequence(
    config_eos: Any, generation_eos: Any, expected: tuple[int, ...]
) -> None:
    spec = parse_spec(PLAIN | {"eos_token_id": config_eos}, {"eos_token_id": generation_eos})
    assert spec.eos_token_ids == expected


def test_nf4_checkpoints_are_recognised() -> None:
    config = PLAIN | {"quantization_config": BITSANDBYTES | {"bnb_4bit_quant_type": "nf4"}}
    assert parse_spec(config, {}).prequantized
    assert not parse_spec(PLAIN, {}).prequantized


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_missing_or_damaged_config_is_refused_by_path(
    content: str | None, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_spec(tmp_path)


def test_sites_name_checkpoint_modules_and_tile_the_packed_outputs(tmp_path: Path) -> None:
    spec = read_spec(tiny_models.build("llama", tmp_path / "model"))
    sites = spec.sites()
    assert [site.name for site in sites[4:]] == [
        f"layers.1.{kind}" for kind in ("qkv", "o", "gate_up", "down")
    ]
    modules = [part.module for site in sites[:4] for part in site.slices]
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    assert modules == [
        *(attention + name for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        *(mlp + name for name in ("gate_proj", "up_proj", "down_proj")),
    ]
    for site in sites:
        ends = [part.out_offset + part.out_features for part in site.slices]
        assert [part.out_offset for part in site.slices] == [0, *ends[:-1]]
        assert ends[-1] == site.out_features


def test_fused_modules_are_one_slice_each(tmp_path: Path) -> None:
    sites = read_spec(tiny_models.build("phi3", tmp_path / "model")).sites()
    modules = [part.module.rpartition(".")[2] for site in sites[:4] for part in site.slices]
    assert modules == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def test_the_context_may_be_chosen_up_to_what_the_embedding_reaches() -> None:
    scaled = {"rope_type": "linear", "factor": 2.0}
    spec = parse_spec(PLAIN | {"rope_scaling": scaled}, {})
    assert spec.resolve_max_model_len(0) == 128
    assert spec.resolve_max_model_len(256) == 256
    for wrong in (257, -1):
        with pytest.raises(ModelError, match="--max-model-len"):
            spec.resolve_max_model_len(wrong)


def test_yarn_reaches_from_the_length_it_was_trained_at() -> None:
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert parse_spec(PLAIN | {"rope_scaling": scaled}, {}).rope.longest_context == 256


def test_specs_are_read_without_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PLAIN))
    script = (
        "import sys; from pathlib import Path; from lory_server.model.families import read_spec;"
        "read_spec(Path(sys.argv[1])).sites(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60)

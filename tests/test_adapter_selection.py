"""The modules that any patterns choose, and their ranks and scales, are those of PEFT.

PEFT puts its layers into a Llama of layers 0, 1, 10 and 11, without weights: one must not be taken
for ten. We read the same configuration.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer

from lory_server.adapters.config import AdapterConfig, read_config
from tiny_models import random_model

NUM_LAYERS = 12
KEPT_LAYERS = (0, 1, 10, 11)

Chosen = dict[str, tuple[int, float]]
"""Modules, with rank and scale."""

SUFFIXES = (
    *("q_proj", "k_proj", "o_proj", "up_proj", "down_proj", "proj", "_proj"),
    *("self_attn.q_proj", "mlp.gate_proj", "attn.q_proj", "1.self_attn.v_proj"),
    *("layers.1.self_attn.q_proj", "layers.10.mlp.up_proj", "0.self_attn.k_proj"),
    *("model.layers.1.self_attn.q_proj", "model.layers.11.mlp.down_proj", "model.q_proj"),
)
EXPRESSIONS = (
    *(r".*\.(q|k)_proj", r"model\.layers\.[0-3]\..*_proj", r".*\.1\.(self_attn|mlp)\.\w+_proj"),
    *(r"(?:.*\.)?layers\.(?:1|11)\.mlp\.(?:up|down)_proj", r".*self_attn.[qv]_proj", r"q_proj"),
    *(r"^model\.layers\.\d\.mlp\.gate_proj$", r".*\.\d{2}\..*_proj", r".*[^v]_proj", ".*_proj"),
)
KEYS = (
    *SUFFIXES,
    *EXPRESSIONS,
    *("^q_proj", "^model.layers.1.self_attn.q_proj", "layers.(1|2).self_attn.q_proj"),
    *("^layers.1.mlp.up_proj", ".*", "q_proj|up_proj", r"[qk]_proj", r"layers\.1\..*", "q_proj$"),
)

suffixes = st.lists(st.sampled_from(SUFFIXES), min_size=1, max_size=4, unique=True)
expressions = st.sampled_from(EXPRESSIONS)
layers = st.one_of(
    st.none(), st.integers(0, NUM_LAYERS), st.lists(st.integers(-1, NUM_LAYERS), max_size=3)
)
layer_lists = st.sampled_from([None, "layers", "model.layers", ["h", "layers"], "blocks", [], ""])


def patterns(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(KEYS), values, max_size=3)


configurations = st.fixed_dictionaries(
    {
        "r": st.integers(1, 8),
        "lora_alpha": st.integers(1, 32),
        "use_rslora": st.booleans(),
        "target_modules": st.one_of(suffixes, expressions, st.sampled_from(["all-linear"])),
        "exclude_modules": st.one_of(st.none(), suffixes, expressions, st.sampled_from([[], ""])),
        "layers_to_transform": layers,
        "layers_pattern": layer_lists,
        "rank_pattern": patterns(st.integers(1, 6)),
        "alpha_pattern": patterns(st.one_of(st.integers(1, 32), st.floats(0.5, 8))),
    }
)


@pytest.fixture(scope="module")
def model() -> Any:
    shape: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    model: Any = random_model("llama", num_hidden_layers=NUM_LAYERS, **shape)
    model.to("meta")
    kept = {str(number): model.model.layers[number] for number in KEPT_LAYERS}
    model.model.layers = torch.nn.ModuleDict(kept)
    return model


def pefts_choice(model: Any, config: Any) -> Chosen:
    """Raises ValueError where PEFT finds nothing to change, or something it cannot."""
    tuned = LoraModel(model, config, "default", low_cpu_mem_usage=True)
    try:
        return {
            name.removeprefix(
                "model.",
            ): (layer.r["default"], layer.scaling["default"])
            for name, layer in tuned.named_modules()
            if isinstance(layer, LoraLayer)
        }
    finally:
        tuned.unload()
        if hasattr(model, "peft_config"):
            del model.peft_config


def our_choice(config: AdapterConfig, model: Any) -> Chosen:
    linears = [name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)]
    return {
        name: config.rank_and_scale(name)
        for name in linears
        if name != "lm_head" and config.is_selected(name)
    }


def check(fields: dict[str, Any], model: Any) -> bool:
    """Whether there was anything to compare."""
    if isinstance(fields["target_modules"], str):
        fields |= {"layers_to_transform": None, "layers_pattern": None}
    elif fields["layers_to_transform"] is None:
        fields |= {"layers_pattern": None}
    config = LoraConfig(task_type="CAUSAL_LM", **fields)
    written = json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", **fields}).encode()
    ours = our_choice(read_config(written), model)
    if not ours:
        with pytest.raises(ValueError, match=r"not found in the base|were excluded|were targeted"):
            pefts_choice(model, config)
        return False
    expected = pefts_choice(model, config)
    assert ours == expected
    return True


def run_check(fields: dict[str, Any], model: Any) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return check(dict(fields), model)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(fields=configurations)
def test_any_patterns_choose_what_they_choose_in_peft(fields: dict[str, Any], model: Any) -> None:
    run_check(fields, model)


@pytest.mark.full
@settings(
    max_examples=1500,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(fields=configurations)
def test_many_patterns_choose_what_they_choose_in_peft(fields: dict[str, Any], model: Any) -> None:
    run_check(fields, model)


def plain(**fields: Any) -> dict[str, Any]:
    return {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": False,
        "target_modules": ["q_proj", "up_proj"],
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    } | fields


@pytest.mark.parametrize(
    "fields",
    [
        plain(rank_pattern={r"^model\.layers\.\d\.self_attn\.q_proj$": 2, r"1\d\..*\.q_proj": 3}),
        plain(alpha_pattern={r"mlp.up\wproj": 3, "layers.1.mlp.up_proj": 5, r"q\_proj": 1}),
        plain(layers_to_transform=1),
        plain(layers_to_transform=[1, 11], layers_pattern="layers"),
        plain(target_modules=["model.layers.0.self_attn.q_proj", "k_proj"], layers_to_transform=1),
        plain(exclude_modules=["1.self_attn.q_proj"], rank_pattern={"1.mlp.up_proj": 2}),
        plain(rank_pattern={"q_proj": 2, "layers.1.self_attn.q_proj": 3}),  # the first one wins
        plain(alpha_pattern={"q_proj|up_proj": 3}),  # an alternative of its own
        plain(target_modules="all-linear", exclude_modules=r".*\.1\..*"),
    ],
)
def test_what_people_write_chooses_what_it_chooses_in_peft(
    fields: dict[str, Any], model: Any, tmp_path: Path
) -> None:
    assert run_check(fields, model)
    config = LoraConfig(task_type="CAUSAL_LM", **fields)
    config.save_pretrained(str(tmp_path))
    saved = (tmp_path / "adapter_config.json").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = pefts_choice(model, LoraConfig.from_pretrained(str(tmp_path)))
    assert our_choice(read_config(saved), model) == expected

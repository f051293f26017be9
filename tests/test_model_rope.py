"""Rotary tables against transformers, for every kind of scaling and both forms of configuration."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import lory_kernels
import tiny_models
from lory_server.messages import EngineOptions
from lory_server.model.families import read_spec
from lory_server.model.load import load
from lory_server.model.rope import rope_table
from lory_server.model.spec import RopeSpec
from packed_steps import random_ids, run

ATOL = 2e-5
TRAINED: dict[str, Any] = {"original_max_position_embeddings": 32}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHORT = [1.0, 1.1, 1.2, 1.4, 1.5, 1.7, 1.8, 2.0]
LONG = [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 9.0]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}

# family, rope_parameters, other fields, served length, length of the sequence
CASES = {
    "default": ("llama", {"rope_type": "default", "rope_theta": 500.0}, {}, 128, 50),
    "linear": ("llama", {"rope_type": "linear", "factor": 2.0}, {}, 256, 200),
    "dynamic, fits": ("llama", {"rope_type": "dynamic", "factor": 2.0}, {}, 128, 50),
    "dynamic, longer": ("llama", {"rope_type": "dynamic", "factor": 2.0}, {}, 200, 200),
    "llama3": ("llama", {"rope_type": "llama3", **LLAMA3, **TRAINED}, {}, 128, 100),
    "yarn": ("llama", {"rope_type": "yarn", "factor": 4.0, **TRAINED}, {}, 128, 100),
    "yarn, gpt-oss style": (
        "qwen3",
        {"rope_type": "yarn", "factor": 4.0, "truncate": False, "beta_fast": 16.0, **TRAINED},
        {},
        128,
        100,
    ),
    "longrope, short": ("llama", LONGROPE | TRAINED, {}, 32, 30),
    "longrope, long": ("llama", LONGROPE | TRAINED, {}, 128, 100),
    "phi3, short": ("phi3", LONGROPE, TRAINED, 32, 30),
    "phi3, long": ("phi3", LONGROPE, TRAINED, 128, 100),
    "phi3, partial": (
        "phi3",
        LONGROPE
        | {"partial_rotary_factor": 0.5, "short_factor": SHORT[:4], "long_factor": LONG[:4]},
        TRAINED,
        128,
        100,
    ),
    "phi3, partial, unscaled": (
        "phi3",
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        {},
        128,
        60,
    ),
}


def rows(rope: RopeSpec, max_model_len: int) -> torch.Tensor:
    return rope_table(rope, max_model_len, "cpu").rows_PD


def logits(folder: Path, max_model_len: int, ids: list[int]) -> torch.Tensor:
    options = EngineOptions(model=str(folder), max_model_len=max_model_len)
    decoder = load(options, "cpu", torch.float32, lory_kernels.select("torch"))
    return run(decoder, [ids], [(len(ids) - 3,)], is_long=len(ids) > decoder.short_tokens)[0]


def reference(folder: Path, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return tiny_models.load_reference(folder)(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("case", CASES)
def test_every_scaling_equals_transformers_and_matters(case: str, tmp_path: Path) -> None:
    family, rope, fields, served, length = CASES[case]
    rope = {"rope_theta": 10_000.0} | rope
    folder = tiny_models.build(family, tmp_path / "scaled", rope_parameters=rope, **fields)
    ids = random_ids(length, tiny_models.VOCAB_SIZE, 5)
    expected = reference(folder, ids)
    assert (logits(folder, served, ids) - expected).abs().max() < ATOL
    if case not in ("dynamic, fits",):
        plain = reference(tiny_models.build(family, tmp_path / "plain"), ids)
        assert (plain - expected).abs().max() > 100 * ATOL


@pytest.mark.parametrize("kind_key", ["type", "rope_type"])
def test_the_older_form_of_configuration_means_the_same(kind_key: str, tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 700.0, "factor": 2.0}
    folder = tiny_models.build("llama", tmp_path / "model", rope_parameters=rope)
    new = read_spec(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    older = {"rope_theta": 700.0, "rope_scaling": {kind_key: "linear", "factor": 2.0}}
    (folder / "config.json").write_text(json.dumps(config | older))
    old = read_spec(folder)
    assert torch.equal(rows(old.rope, 64), rows(new.rope, 64))
    ids = random_ids(40, tiny_models.VOCAB_SIZE, 5)
    assert (logits(folder, 0, ids) - reference(folder, ids)).abs().max() < ATOL


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_phi3_calls_longrope_by_older_names(name: str, tmp_path: Path) -> None:
    rope = LONGROPE | {"rope_theta": 10_000.0}
    folder = tiny_models.build("phi3", tmp_path / "m", rope_parameters=rope, **TRAINED)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    factors = {"short_factor": SHORT, "long_factor": LONG}
    config |= {"rope_theta": 10_000.0, "rope_scaling": {"type": name, **factors}}
    expected = rows(read_spec(folder).rope, 128)
    (folder / "config.json").write_text(json.dumps(config))
    assert read_spec(folder).rope.kind == "longrope"
    assert torch.equal(rows(read_spec(folder).rope, 128), expected)


def test_longrope_has_rows_for_sequences_of_either_length(tmp_path: Path) -> None:
    rope = LONGROPE | TRAINED | {"rope_theta": 10_000.0}
    spec = read_spec(tiny_models.build("llama", tmp_path / "model", rope_parameters=rope)).rope
    short, both = rope_table(spec, 32, "cpu"), rope_table(spec, 50, "cpu")
    assert (short.short_tokens, short.max_model_len) == (0, 32)
    assert (both.short_tokens, both.max_model_len) == (32, 50)
    assert torch.equal(both.rows_PD[:32], short.rows_PD)
    assert not torch.allclose(both.rows_PD[32:64], short.rows_PD)


@pytest.mark.parametrize("limit", [0, 4096])
def test_phi3_reads_where_its_short_factors_end_beside_the_scaling_alone(
    limit: int, tmp_path: Path
) -> None:
    """As transformers does, which has 4096 where the configuration itself has nothing."""
    rope = LONGROPE | {"rope_theta": 10_000.0, **TRAINED}
    folder = tiny_models.build("phi3", tmp_path / "m", rope_parameters=rope, **TRAINED)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= TRAINED
    if limit:
        del config["original_max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    expected = AutoConfig.from_pretrained(folder).rope_parameters
    assert expected["original_max_position_embeddings"] == (limit or 32)
    assert read_spec(folder).rope.short_tokens == (limit or 32)

"""DoRA, trained biases and plain LoRA in one running batch: every answer equals PEFT's."""

from pathlib import Path
from typing import Any

import pytest
import torch

from parity_world import SPLIT, ParityWorld, Reference, compare, save_adapters
from test_engine_parity import nf4_reference, run


def make_adapters(family: str, base: Path, folder: Path) -> dict[str, Path]:
    """Gains, biases, both, neither; biases of linears with factors and of linears without."""
    all_linears, dora = SPLIT["all"], {"use_dora": True}
    recipes: dict[str, dict[str, Any]] = {
        "plain-8": {"rank": 8, "alpha": 16, "target_modules": all_linears},
        "dora-8": {"rank": 8, "alpha": 16, "target_modules": all_linears, **dora},
        "dora-1": {"rank": 1, "alpha": 2, "target_modules": SPLIT["qv"], **dora},
        "dora-pattern": {
            "rank": 5,
            "alpha": 4,
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 33, "down_proj": 2},
            "use_rslora": True,
            "dtype": torch.bfloat16,
            **dora,
        },
        "dora-bias": {
            "rank": 3,
            "alpha": 6,
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "bias": "lora_only",
            **dora,
        },
        "dora-bias-all": {
            "rank": 4,
            "alpha": 8,
            "target_modules": ["k_proj", "down_proj"],
            "bias": "all",
            "layers_to_transform": [1],
            **dora,
        },
        "bias-all": {"rank": 4, "alpha": 8, "target_modules": ["o_proj", "q_proj"], "bias": "all"},
        "lora-bias": {
            "rank": 16,
            "alpha": 8,
            "target_modules": SPLIT["attention"],
            "lora_bias": True,
            "bias": "lora_only",
            "use_rslora": True,
        },
    }
    return save_adapters(recipes, base, folder)


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ParityWorld:
    """Qwen2's query, key and value have biases; nothing of Llama has."""
    return ParityWorld.make(request.param, tmp_path_factory.mktemp(request.param), make_adapters)


def test_float32(world: ParityWorld) -> None:
    compare(run(world), Reference(world.base), world.adapters).check()


def test_nf4(world: ParityWorld) -> None:
    session = run(world, quantize="nf4")
    compare(session, Reference(world.base, nf4_reference), world.adapters).check()

"""Adapters of a checkpoint that packs its projections (Phi-3): every answer equals PEFT's.

Each is trained on qkv_proj and gate_up_proj as PEFT finds them; names of the other kind of
checkpoint are refused, in either direction.
"""

from pathlib import Path
from typing import Any

import pytest

import tiny_models
from lory_server.adapters.format import Base
from lory_server.model.families import read_spec
from parity_world import FUSED, SPLIT, ParityWorld, Reference, Session, compare, save_adapters
from test_adapter_format import manifest_of, refusal_of
from test_engine_parity import nf4_reference, run


def make_adapters(family: str, base: Path, folder: Path) -> dict[str, Path]:
    every = FUSED["all"]
    recipes: dict[str, dict[str, Any]] = {
        "plain": {"rank": 8, "alpha": 16, "target_modules": every},
        "all-linear": {"rank": 5, "alpha": 4, "target_modules": "all-linear"},
        "rslora": {"rank": 16, "alpha": 4, "target_modules": every, "use_rslora": True},
        "pattern": {
            "rank": 4,
            "alpha": 8,
            "target_modules": every,
            "rank_pattern": {"qkv_proj": 33, "layers.1.mlp.gate_up_proj": 2},
            "alpha_pattern": {"gate_up_proj": 3},
        },
        "dora": {"rank": 8, "alpha": 16, "target_modules": every, "use_dora": True},
        "dora-linear-pattern": {
            "rank": 3,
            "alpha": 6,
            "target_modules": "all-linear",
            "rank_pattern": {"qkv_proj": 12, "down_proj": 1},
            "use_dora": True,
            "use_rslora": True,
        },
        "lora-bias": {
            "rank": 4,
            "alpha": 8,
            "target_modules": ["qkv_proj", "gate_up_proj"],
            "lora_bias": True,
        },
        "bias-all": {"rank": 4, "alpha": 8, "target_modules": ["qkv_proj"], "bias": "all"},
        "one-layer": {
            "rank": 6,
            "alpha": 12,
            "target_modules": ["gate_up_proj", "qkv_proj"],
            "layers_to_transform": [1],
            "exclude_modules": ["mlp.gate_up_proj"],
        },
    }
    return save_adapters(recipes, base, folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> ParityWorld:
    return ParityWorld.make("phi3", tmp_path_factory.mktemp("phi3"), make_adapters)


def test_float32(world: ParityWorld) -> None:
    compare(run(world), Reference(world.base), world.adapters).check()


def test_nf4(world: ParityWorld) -> None:
    session = run(world, quantize="nf4")
    compare(session, Reference(world.base, nf4_reference), world.adapters).check()


@pytest.mark.parametrize(
    ("trained_on", "served", "targets", "says"),
    [
        ("llama", "phi3", ["q_proj"], "packs q_proj into qkv_proj"),
        ("llama", "phi3", ["up_proj"], "packs up_proj into gate_up_proj"),
        ("llama", "phi3", SPLIT["all"], "packs"),
        ("phi3", "llama", ["qkv_proj"], "has q_proj, k_proj and v_proj in place of qkv_proj"),
        ("phi3", "llama", ["gate_up_proj"], "has gate_proj and up_proj in place of gate_up_proj"),
    ],
)
def test_names_of_the_other_kind_of_checkpoint_are_refused(
    trained_on: str, served: str, targets: list[str], says: str, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    tiny_models.save_adapter(folder, tiny_models.random_model(trained_on), 4, 8, targets, 1)
    message = refusal_of(folder, Base(sites_of(served, tmp_path)))
    assert says in message
    assert "train it on the checkpoint that is served" in message
    assert manifest_of(folder, Base(sites_of(trained_on, tmp_path))).slices


def sites_of(family: str, folder: Path) -> Any:
    return read_spec(tiny_models.build(family, folder / family)).sites()


def test_a_server_says_so_to_the_caller(world: ParityWorld, tmp_path: Path) -> None:
    model = tiny_models.random_model("llama")
    tiny_models.save_adapter(tmp_path / "split", model, 4, 8, ["q_proj"], 1)
    session = Session(world.options(adapters_dir=str(tmp_path)))
    session.submit(0, [5], "split")
    session.run()
    finished = session.answers[0].finished
    assert finished is not None
    assert finished.failure is not None
    assert finished.failure.code == "adapter_invalid"
    assert "packs q_proj into qkv_proj" in finished.failure.message
    session.close()

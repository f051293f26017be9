"""Ways an adapter can begin: those that leave the base as it was are served as PEFT computes them.

Each folder is saved by PEFT after its own initialisation. Those that take a part out of the base's
weights are refused, and served once PEFT has converted them.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights

import tiny_models
from lory_server.adapters.format import Base
from lory_server.model.families import read_spec
from parity_world import SPLIT, ParityWorld, Reference, Session, compare
from test_adapter_format import manifest_of, refusal_of
from test_engine_parity import run

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TARGETS = SPLIT["all"]
SELF_CONTAINED: dict[str, dict[str, Any]] = {
    "default": {"init_lora_weights": True},
    "random-b": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "eva": {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=2.0)},
}
CONVERTED: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa-fast": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora", "rank_pattern": {"q_proj": 2}},
    "olora-rs": {"init_lora_weights": "olora", "use_rslora": True},
}


def begin(base: Path, **fields: Any) -> Any:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", **fields)
    torch.manual_seed(3)
    model = get_peft_model(tiny_models.load_reference(base), config)
    if fields["init_lora_weights"] == "eva":
        tokens = torch.randint(3, tiny_models.VOCAB_SIZE, (4, 16))
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        initialize_lora_eva_weights(model, [batch])
    return model


def train(model: Any) -> Any:
    """Not what training does, but as far from the beginning."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and parameter.requires_grad:
                parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    return model


def save_converted(folder: Path, base: Path, **fields: Any) -> None:
    """As PEFT's guide has it: the beginning is kept aside, as if it were plain LoRA."""
    model = begin(base, **fields)
    model.peft_config["default"].init_lora_weights = True
    beginning = folder.parent / f"{folder.name}-beginning"
    model.save_pretrained(beginning)
    train(model).save_pretrained(folder, path_initial_model_for_weight_conversion=str(beginning))


def make_adapters(family: str, base: Path, folder: Path) -> dict[str, Path]:
    for name, fields in SELF_CONTAINED.items():
        train(begin(base, **fields)).save_pretrained(folder / name)
    for name, fields in CONVERTED.items():
        save_converted(folder / name, base, **fields)
    return {name: folder / name for name in (*SELF_CONTAINED, *CONVERTED)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ParityWorld]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield ParityWorld.make("llama", tmp_path_factory.mktemp("forms"), make_adapters)


def test_float32(world: ParityWorld) -> None:
    compare(run(world), Reference(world.base), world.adapters).check()


def test_the_ranks_that_eva_gave_its_layers_are_served(world: ParityWorld) -> None:
    """It spends one budget of ranks where it explains most, and says so in rank_pattern."""
    sites = read_spec(world.base).sites()
    ranks = {part.rank for part in manifest_of(world.adapters["eva"], Base(sites)).slices}
    assert len(ranks) > 1


def test_a_converted_adapter_is_the_trained_one_on_the_base_as_it_was(world: ParityWorld) -> None:
    """Of twice the rank; the trained one itself computes on what was left of the base."""
    tokens = torch.tensor([[5, 6, 7, 8]])
    for name, fields in CONVERTED.items():
        trained = train(begin(world.base, **fields))
        expected = trained(tokens).logits[0]
        actual = Reference(world.base).logits(tokens[0].tolist(), world.adapters[name])
        assert torch.allclose(actual, expected, atol=2e-3), name


@pytest.mark.parametrize("name", CONVERTED)
def test_one_that_changed_the_base_is_refused_with_the_way_out(
    name: str, world: ParityWorld, tmp_path: Path
) -> None:
    fields = CONVERTED[name]
    train(begin(world.base, **fields)).save_pretrained(tmp_path / "adapter")
    message = refusal_of(tmp_path / "adapter", Base(read_spec(world.base).sites()))
    assert f"init_lora_weights is {fields['init_lora_weights']!r}" in message
    assert "path_initial_model_for_weight_conversion" in message


def test_a_server_says_so_to_the_caller(world: ParityWorld, tmp_path: Path) -> None:
    train(begin(world.base, init_lora_weights="pissa")).save_pretrained(tmp_path / "raw")
    session = Session(world.options(adapters_dir=str(tmp_path)))
    session.submit(0, [5], "raw")
    session.run()
    finished = session.answers[0].finished
    assert finished is not None
    assert finished.failure is not None
    assert finished.failure.code == "adapter_invalid"
    assert "init_lora_weights is 'pissa'" in finished.failure.message
    session.close()

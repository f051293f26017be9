"""The models that are measured: what their makers promise, read back by those who serve them."""

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import peft_peer
from benchmarks.models import SHAPES, Adapters, ensure_adapters, ensure_base

TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def base(root: Path) -> Path:
    return ensure_base(TINY, root)


@pytest.fixture(scope="module")
def adapters(root: Path) -> Path:
    return ensure_adapters(Adapters(TINY, 4, 3), root)


def test_shapes_are_those_of_the_peers() -> None:
    small, tinyllama = SHAPES["small"], SHAPES["tinyllama"]
    assert (small.hidden_size, small.num_layers, small.num_heads, small.num_kv_heads) == (
        *(512, 8, 8, 4),
    )
    weights = sum(n * k for _, n, k in tinyllama.modules)
    weights += 2 * tinyllama.vocab_size * tinyllama.hidden_size
    assert weights == pytest.approx(1.1e9, rel=0.01)


def test_transformers_loads_the_base_in_bfloat16(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == TINY.vocab_size
    assert float(model.model.layers[0].mlp.up_proj.weight.detach().float().std()) == pytest.approx(
        0.02, rel=0.05
    )


def test_any_token_ids_survive_the_tokenizer(base: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    ids = list(range(TINY.vocab_size))
    assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) == ids


def test_a_model_is_made_once_and_again_when_its_description_changes(root: Path) -> None:
    folder = ensure_base(replace(TINY, name="again"), root)
    file = folder / "model.safetensors"
    first, written = file.read_bytes(), file.stat().st_mtime_ns
    ensure_base(replace(TINY, name="again"), root)
    assert file.stat().st_mtime_ns == written
    ensure_base(replace(TINY, name="again", seed=1), root)
    assert file.read_bytes() != first
    ensure_base(replace(TINY, name="again"), root)
    assert file.read_bytes() == first, "the same seed makes the same weights"


def test_adapters_differ_and_sit_on_all_seven_projections(adapters: Path) -> None:
    config = json.loads((adapters / "a00" / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 7
    weights = [(adapters / f"a0{i}" / "adapter_model.safetensors").read_bytes() for i in range(3)]
    assert len(set(weights)) == 3


def test_the_peer_runs_every_row_with_its_own_adapter(base: Path, adapters: Path) -> None:
    """A mixed batch answers as each row does alone; in float32, where sums hardly matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = peft_peer.load(base, adapters, ["a00", "a01", "a02"], "none").float()
    prompts = [[5, 6, 7, 8]] * 4
    names = ["a00", "a01", "", "a02"]
    _, mixed_RT = peft_peer.run_batch(model, prompts, names, 6)
    assert mixed_RT.shape == (4, 6)
    for row, name in enumerate(names):
        _, alone_RT = peft_peer.run_batch(model, prompts[:1], [name], 6)
        assert alone_RT[0].tolist() == mixed_RT[row].tolist(), name
    assert len({tuple(row) for row in mixed_RT.tolist()}) > 1

"""DoRA, trained biases and plain LoRA in one running batch: every answer equals PEFT's."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lory_kernels import Segments
from lory_server.adapters.pool import AdapterPool, SlotRow
from lory_server.model import runner as runner_module
from parity_world import SPLIT, ParityWorld, Reference, Session, compare, save_adapters
from test_engine_parity import nf4_reference, run, submit_all


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


def test_bfloat16_is_within_its_rounding_of_peft(world: ParityWorld) -> None:
    """And a wrong adapter, or one without its gains and biases, is far from it."""
    session = Session(world.options(dtype="bfloat16"))
    prompt = list(range(3, 60))
    for request_id, name in enumerate(world.adapters):
        session.submit(request_id, prompt, name, prompt_logprobs=True, max_new_tokens=0)
    session.run()
    session.close()
    reference = Reference(world.base)

    def logprobs(adapter: Path | None) -> torch.Tensor:
        every = torch.log_softmax(reference.logits(prompt, adapter), -1)
        return every[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]

    names = list(world.adapters)
    for request_id, name in enumerate(names):
        actual = torch.tensor(session.answers[request_id].prompt_logprobs)
        error = (actual - logprobs(world.adapters[name])).abs().mean()
        others = [world.adapters[other] for other in names if other != name]
        nearest = min((actual - logprobs(other)).abs().mean() for other in (None, *others))
        assert error < 0.15 < 3 * 0.15 < nearest, name


def test_answers_stay_after_eviction_from_the_device_and_the_host(world: ParityWorld) -> None:
    """Gains are computed anew for what is read anew."""
    session = Session(world.options(max_resident_adapters=2, adapter_host_bytes=128 << 10))
    for seed in range(2):
        submit_all(session, world, seed)
        session.run()
    session.close()
    assert session.moves("evict", "device") > 0
    assert session.moves("evict", "host") > 0
    compare(session, Reference(world.base), world.adapters).check()


@pytest.mark.parametrize("left_out", ["gain", "bias"])
def test_the_comparison_catches_a_gain_or_a_bias_that_is_left_out(
    left_out: str, world: ParityWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = AdapterPool.row

    def without(pool: AdapterPool, *args: Any) -> SlotRow:
        columns = list(row(pool, *args).columns)
        columns[{"gain": 2, "bias": 3}[left_out]].fill_(-1)
        return SlotRow(tuple(columns))

    monkeypatch.setattr(AdapterPool, "row", without)
    wrong = compare(run(world), Reference(world.base), world.adapters).wrong
    has_bias = world.family == "qwen2"
    expected = {name for name in world.adapters if "dora" in name}
    if left_out == "bias":
        expected = {"lora-bias"} | ({*expected, "bias-all"} if has_bias else set())
    assert {text.split(":")[0] for text in wrong} == expected


def test_only_steps_with_a_gain_or_a_bias_look_for_any(
    world: ParityWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    made = runner_module._segments

    def segments(*args: Any) -> Segments:
        seen.append(made(*args).has_gain_or_bias)
        return made(*args)

    monkeypatch.setattr(runner_module, "_segments", segments)
    session = Session(world.options())
    for request_id, (name, looks) in enumerate((("plain-8", False), ("lora-bias", True))):
        seen.clear()
        session.submit(request_id, [5, 6], name)
        session.run()
        assert set(seen) == {looks}
    session.close()

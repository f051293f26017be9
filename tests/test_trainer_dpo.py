"""Preference pairs: the loss is DPO's own, and what is learned is what the model says."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lory_trainer.config import DpoOptions
from lory_trainer.data import Example, Pair, collate
from lory_trainer.objective import accumulate, evaluate
from lory_trainer.preference import Preference
from lory_trainer.reference import with_reference
from pairs_world import CONFIG, PAIRS, make_pairs_world, model_of, stirred
from trainer_world import events, train, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def world(tmp_path) -> Path:
    return make_pairs_world(tmp_path)


def test_the_first_loss_is_the_logarithm_of_two(world):
    train(world, CONFIG)
    first = events(world, "step")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["reward_margin"] == pytest.approx(0, abs=1e-4)


def test_the_better_answer_becomes_the_likelier_one(world):
    result = train(world, CONFIG + "eval_data: pairs.jsonl\n")
    last = events(world, "step")[-1]
    assert result.losses[-1] < 0.4
    assert last["reward_accuracy"] == 1
    assert last["reward_margin"] > 0.5
    assert events(world, "eval")[-1]["reward_accuracy"] == 1


def test_going_on_from_an_adapter_starts_at_the_logarithm_of_two_too(world):
    """The reference is the start, not the base; with `reference: base` it is the base."""
    train(world, CONFIG)
    more = CONFIG.replace("r: 4", "r: 4, start_from: adapters/mine")
    places = {"output": world / "adapters" / "more", "run": world / "runs" / "more"}
    assert train(world, more, **places).losses[0] == pytest.approx(math.log(2), abs=1e-4)
    base = more + "dpo: {reference: base}\n"
    assert train(world, base, replace=True, **places).losses[0] < 0.6


def pair_loss(model: Any, pairs: list[Pair], **options: Any) -> float:
    return accumulate(model, [collate(pairs)], Preference(DpoOptions(**options))).loss


def by_hand(model: Any, base: Any, pairs: list[Pair]) -> list[tuple[float, float, int, int]]:
    """Of each pair: both log-ratios and both answers' lengths, with transformers alone."""

    def log_probability(of: Any, example: Example) -> float:
        ids = torch.tensor([example.ids])
        logits = of(input_ids=ids).logits[0, :-1].log_softmax(-1)
        said = logits.gather(1, ids[0, 1:, None])[:, 0]
        return float(said[example.num_prompt_tokens - 1 :].sum())

    with torch.no_grad():
        return [
            (
                log_probability(model, p.chosen) - log_probability(base, p.chosen),
                log_probability(model, p.rejected) - log_probability(base, p.rejected),
                p.chosen.num_answer_tokens,
                p.rejected.num_answer_tokens,
            )
            for p in pairs
        ]


def test_every_loss_is_its_formula(world):
    base = AutoModelForCausalLM.from_pretrained(world / "tiny")
    model = model_of(world)
    pairs = with_reference(model, PAIRS, rows=3, base_alone=True)
    stirred(model)
    ratios = by_hand(model, base, PAIRS)

    def mean(of: Any) -> float:
        return sum(of(*ratio) for ratio in ratios) / len(ratios)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    plain = mean(lambda c, r, _m, _n: -math.log(sigmoid(0.3 * (c - r))))
    assert pair_loss(model, pairs, beta=0.3) == pytest.approx(plain, rel=1e-4)
    smooth = mean(
        lambda c, r, _m, _n: (
            -0.9 * math.log(sigmoid(0.3 * (c - r))) - 0.1 * math.log(sigmoid(-0.3 * (c - r)))
        )
    )
    found = pair_loss(model, pairs, beta=0.3, label_smoothing=0.1)
    assert found == pytest.approx(smooth, rel=1e-4)
    ipo = mean(lambda c, r, m, n: (c / m - r / n - 1 / 0.6) ** 2)
    assert pair_loss(model, pairs, beta=0.3, loss="ipo") == pytest.approx(ipo, rel=1e-4)
    labels = collate([pair.chosen for pair in PAIRS])
    own = model(input_ids=labels.ids, labels=labels.labels).loss.item()
    weighted = pair_loss(model, pairs, beta=0.3, sft_weight=2.0)
    assert weighted == pytest.approx(plain + 2 * own, rel=1e-4)


def test_pairs_accumulate_exactly(world):
    """Two by two is eight at once, with the better answers' own loss too."""
    objective = Preference(DpoOptions(sft_weight=1.0))

    def gradients(width: int) -> tuple[float, torch.Tensor]:
        model = model_of(world)
        pairs = with_reference(model, PAIRS, rows=8, base_alone=True)
        stirred(model)
        batches = [collate(pairs[i : i + width]) for i in range(0, 8, width)]
        loss = accumulate(model, batches, objective).loss
        found = [tensor.grad for tensor in model.parameters() if tensor.grad is not None]
        return loss, torch.cat([gradient.flatten() for gradient in found])

    (loss, whole), (split_loss, split) = gradients(8), gradients(2)
    assert math.isclose(loss, split_loss, rel_tol=1e-5)
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-6)


def test_the_reference_is_taken_without_dropout_and_draws_nothing(world):
    text = CONFIG.replace("r: 4", "r: 4, dropout: 0.5")
    model = stirred(model_of(world, text)).train()
    state = torch.get_rng_state()
    first = with_reference(model, PAIRS, rows=2, base_alone=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    again = with_reference(model, PAIRS, rows=2, base_alone=False)
    assert [pair.reference for pair in first] == [pair.reference for pair in again]
    loss = evaluate(model, [collate(first)], Preference(DpoOptions())).loss
    assert loss == pytest.approx(math.log(2), abs=1e-5)


def test_a_folder_of_openai_pairs_trains(world):
    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    rows = [
        {
            "input": {"messages": [{"role": "user", "content": a}]},
            "preferred_output": said("y"),
            "non_preferred_output": said("z"),
        }
        for a in "abcdefgh"
    ]
    write_rows(world / "pairs.jsonl", *rows)
    text = "".join(line + "\n" for line in CONFIG.splitlines() if "template" not in line)
    result = train(world, text)
    assert result.losses[-1] < result.losses[0]
    manifest = json.loads((result.output / "adapter_manifest.json").read_text())
    assert (manifest["chat"], manifest["template"]) == (True, None)


@pytest.mark.full
def test_what_the_model_says_changes_with_the_answers_own_loss(tmp_path):
    """On the demo's base, which repeats a phrase: it learns to thank for it."""
    import sys

    demo = Path(__file__).parents[1] / "demo"
    sys.path.insert(0, str(demo))
    import pig_latin

    phrases = [row["phrase"] for row in pig_latin.rows(420)]
    rows = [{"prompt": p, "chosen": f"{p}, thanks!", "rejected": p} for p in phrases]
    write_rows(tmp_path / "pairs.jsonl", *rows[:400])
    text = CONFIG.replace("base: tiny", f"base: {demo / 'base'}").replace(
        "{prompt}>", "{prompt} ->"
    )
    text = text.replace("epochs: 4", "epochs: 1").replace("batch_size: 4", "batch_size: 8")
    text = text.replace("r: 4", "r: 8") + "dpo: {sft_weight: 1.0}\n"
    output = train(tmp_path, text.replace("1e-2", "5e-3")).output

    sys.path.remove(str(demo))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo / "base")
    plain = AutoModelForCausalLM.from_pretrained(demo / "base")
    model = PeftModel.from_pretrained(plain, output).eval()
    said = []
    for row in rows[400:]:
        ids = torch.tensor([tokenizer.encode(f"{row['prompt']} ->")])
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=80,
        )
        said.append(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))
    assert sum(text.endswith(", thanks!") for text in said) >= 18, said

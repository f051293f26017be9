"""DPO's relatives: each loss is its formula, and TRL's on the same rows, gradients and all."""

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoModelForCausalLM

from lory_trainer.config import USUAL_OF_LOSS, DpoOptions, PairLoss, parse_options
from lory_trainer.data import Example, Pair, collate
from lory_trainer.errors import ConfigError
from lory_trainer.objective import accumulate
from lory_trainer.preference import LOSSES, Preference
from lory_trainer.reference import with_reference
from pairs_world import CONFIG, PAIRS, make_pairs_world, model_of, stirred
from trainer_world import char_tokenizer, events, train

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
ASKED_NOTHING = [Pair(Example(pair.chosen.ids, 1), Example(pair.rejected.ids, 1)) for pair in PAIRS]
"""TRL's ORPO learns the prompt too; of these the prompt is the beginning alone, never learned."""
B, S = 0.3, 0.1
W, L = (-0.5, -2.0, 0.2), (-1.5, -0.7, 0.1)


def sig(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def nats(x: float) -> float:
    return -math.log(sig(x))


def odds(x: float) -> float:
    return x - math.log(1 - math.exp(x))


FORMULAS: dict[str, Any] = {
    "sigmoid": lambda w, v: 0.9 * nats(B * (w - v)) + 0.1 * nats(-B * (w - v)),
    "sigmoid_norm": lambda w, v: 0.9 * nats(B * (w - v)) + 0.1 * nats(-B * (w - v)),
    "simpo": lambda w, v: 0.9 * nats(B * (w - v) - 0.5) + 0.1 * nats(0.5 - B * (w - v)),
    "robust": lambda w, v: (0.9 * nats(B * (w - v)) - 0.1 * nats(-B * (w - v))) / 0.8,
    "hinge": lambda w, v: max(0.0, 1 - B * (w - v)),
    "ipo": lambda w, v: (w - v - 1 / (2 * B)) ** 2,
    "exo_pair": lambda w, v: (
        sig(B * (w - v)) * math.log(sig(B * (w - v)) / 0.9)
        + sig(B * (v - w)) * math.log(sig(B * (v - w)) / 0.1)
    ),
    "nca_pair": lambda w, v: nats(B * w) + nats(-B * w) / 2 + nats(-B * v) / 2,
    "bco_pair": lambda w, v: nats(B * w) + nats(-B * v),
    "sppo_hard": lambda w, v: (w - 1 / (2 * B)) ** 2 + (v + 1 / (2 * B)) ** 2,
    "apo_zero": lambda w, v: 1 - sig(B * w) + sig(B * v),
    "apo_down": lambda w, v: sig(B * w) + 1 - sig(B * (w - v)),
    "orpo": lambda w, v: B * nats(odds(w) - odds(v)),
}
"""Of the better answer's score and the worse one's."""


@pytest.fixture
def world(tmp_path) -> Path:
    return make_pairs_world(tmp_path)


def gradients(model: Any) -> torch.Tensor:
    return torch.cat([t.grad.flatten() for t in model.parameters() if t.grad is not None])


# -- formulas ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", get_args(PairLoss))
def test_a_loss_is_its_formula(loss):
    """Scores of log-probabilities per token are below 0, which odds need."""
    better, worse = (-abs(torch.tensor(x)) if loss == "orpo" else torch.tensor(x) for x in (W, L))
    options = DpoOptions(beta=B, label_smoothing=S, gamma=0.5 if loss == "simpo" else 0.0)
    found = LOSSES[loss](better, worse, options)
    wanted = [FORMULAS[loss](w, v) for w, v in zip(better.tolist(), worse.tolist(), strict=True)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)


def test_there_is_a_formula_for_every_name():
    assert set(LOSSES) == set(get_args(PairLoss)) == set(FORMULAS)


def test_odds_of_what_is_certain_are_finite_and_so_are_their_gradients():
    certain = torch.tensor([0.0, -1e-9, -0.7, -80.0], requires_grad=True)
    LOSSES["orpo"](certain, certain.flip(0), DpoOptions()).sum().backward()
    assert certain.grad is not None
    assert torch.isfinite(certain.grad).all()


@pytest.mark.parametrize(("loss", "usual"), USUAL_OF_LOSS.items())
def test_a_loss_has_its_authors_numbers_unless_a_file_has_others(loss, usual):
    found = parse_options(f"{CONFIG}dpo: {{loss: {loss}}}\n").dpo
    assert {name: getattr(found, name) for name in usual} == usual
    own = parse_options(f"{CONFIG}dpo: {{loss: {loss}, beta: 0.7, sft_weight: 0.5}}\n").dpo
    assert (own.beta, own.sft_weight) == (0.7, 0.5)


def test_simpo_looks_at_tokens_and_at_no_reference(world):
    """A reference, were there one, changes nothing; longer answers weigh no more."""
    model = stirred(model_of(world))
    objective = Preference(DpoOptions(loss="simpo"))
    alone = accumulate(model, [collate(PAIRS)], objective).loss
    referred = with_reference(model, PAIRS, rows=8, base_alone=True)
    assert accumulate(model, [collate(referred)], objective).loss == pytest.approx(alone)
    with pytest.raises(ValueError, match="need reference"):
        accumulate(model, [collate(PAIRS)], Preference(DpoOptions()))


@pytest.mark.parametrize("loss", ["apo_zero", "orpo"])
def test_pairs_accumulate_exactly(world, loss):
    objective = Preference(DpoOptions(loss=loss))

    def taken(width: int) -> tuple[float, torch.Tensor]:
        model = model_of(world)
        pairs = with_reference(model, PAIRS, rows=8, base_alone=True)
        stirred(model)
        batches = [collate(pairs[i : i + width]) for i in range(0, 8, width)]
        return accumulate(model, batches, objective).loss, gradients(model)

    (loss_at_once, at_once), (loss_in_parts, in_parts) = taken(8), taken(2)
    assert math.isclose(loss_at_once, loss_in_parts, rel_tol=1e-5)
    torch.testing.assert_close(in_parts, at_once, rtol=1e-4, atol=1e-6)


# -- runs ----------------------------------------------------------------------------------------


def full(names: Any) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.full) for name in names]


@pytest.mark.parametrize("loss", ["orpo", *full(name for name in LOSSES if name != "orpo")])
def test_the_better_answer_becomes_the_likelier_one(world, loss):
    """apo_down lowers both answers, the worse one more."""
    train(world, f"{CONFIG}schedule: constant\ndpo: {{loss: {loss}}}\n")
    steps = events(world, "step")
    assert steps[-1]["reward_margin"] > steps[0]["reward_margin"]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[-1]["reward_accuracy"] >= 0.75


def test_a_run_without_a_reference_takes_none(world, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("a reference was taken")

    monkeypatch.setattr("lory_trainer.train.with_reference", fail)
    train(world, CONFIG + "dpo: {reference: none, sft_weight: 1}\nmax_steps: 2\n")


@pytest.mark.parametrize(
    ("dpo", "message"),
    [
        ("{loss: hinge, label_smoothing: 0.1}", "dpo.label_smoothing: is for sigmoid, "),
        ("{loss: exo_pair, label_smoothing: 0}", "above 0 for exo_pair"),
        ("{gamma: 1}", "dpo.gamma: is for simpo"),
        ("{loss: simpo, reference: base}", "simpo refers to no other model"),
        ("{loss: apo_zero, reference: none}", "apo_zero is measured against one"),
        ("{loss: aot}", "others of its batch"),
        ("{loss: kto_pair}", "nca_pair and apo_zero"),
        ("{loss: discopop}", "a mixture found by search"),
        ("{loss: cpo}", "dpo.reference: none"),
        ("{loss: [sigmoid, sft]}", "dpo.sft_weight beside it"),
        ("{loss: sft}", "dpo.sft_weight"),
        ("{loss: sigmoidal}", "dpo.loss: "),
        ("{loss: 3}", "dpo.loss: "),
    ],
)
def test_what_goes_not_together_says_why(dpo, message):
    with pytest.raises(ConfigError) as caught:
        parse_options(f"{CONFIG}dpo: {dpo}\n")
    assert message in str(caught.value)


# -- TRL -----------------------------------------------------------------------------------------


def trainer_of(kind: Any, config: Any, world: Path, tmp_path: Path, **more: Any) -> Any:
    """One of TRL's, on rows that are not looked at: what it is asked of is given it as ids."""
    datasets = pytest.importorskip("datasets")
    from lory_trainer.base import lora_config

    torch.manual_seed(0)
    arguments = config(output_dir=str(tmp_path / "trl"), use_cpu=True, report_to=[], **more)
    return kind(
        model=AutoModelForCausalLM.from_pretrained(world / "tiny"),
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=char_tokenizer(),
        peft_config=lora_config(parse_options(CONFIG).lora),
    )


def check_against(model: Any, loss: float, theirs: Any, ask: Any) -> None:
    """`ask` gives their loss, of a model with our adapter."""
    with torch.no_grad():
        for mine, other in zip(model.parameters(), theirs.parameters(), strict=True):
            other.copy_(mine)
    found = ask()
    found.backward()
    assert loss == pytest.approx(found.item(), rel=1e-5)
    mine, others = gradients(model), gradients(theirs)
    torch.testing.assert_close(mine, others, rtol=1e-4, atol=1e-5 * others.abs().max().item())


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {"loss_type": ["sigmoid"]}),
        ({"sft_weight": 0.5}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
        *(
            ({"loss": loss}, {"loss_type": [loss]})
            for loss in (
                "hinge",
                "ipo",
                "nca_pair",
                "bco_pair",
                "sppo_hard",
                "apo_zero",
                "apo_down",
            )
        ),
        ({"loss": "sigmoid_norm"}, {"loss_type": ["sigmoid_norm"]}),
        *(
            ({"loss": loss, "label_smoothing": S}, {"loss_type": [loss], "label_smoothing": S})
            for loss in ("robust", "exo_pair")
        ),
    ],
)
def test_loss_and_gradients_are_trls(world, tmp_path, ours, theirs):
    trl = pytest.importorskip("trl")
    model = model_of(world)
    pairs = with_reference(model, PAIRS, rows=8, base_alone=True)
    stirred(model)
    objective = Preference(DpoOptions(beta=0.2, **ours))
    loss = accumulate(model, [collate(pairs)], objective).loss
    trainer = trainer_of(trl.DPOTrainer, trl.DPOConfig, world, tmp_path, beta=0.2, **theirs)
    rows = [
        {
            "prompt_ids": list(p.chosen.ids[: p.chosen.num_prompt_tokens]),
            "chosen_ids": list(p.chosen.ids[p.chosen.num_prompt_tokens :]),
            "rejected_ids": list(p.rejected.ids[p.rejected.num_prompt_tokens :]),
        }
        for p in PAIRS
    ]

    def ask() -> torch.Tensor:
        return trainer.compute_loss(trainer.model, trainer.data_collator(rows))

    check_against(model, loss, trainer.model, ask)


def sides(pairs: list[Pair]) -> dict[str, torch.Tensor]:
    """A batch as TRL's trainers without a reference take it."""
    found: dict[str, torch.Tensor] = {}
    for name, examples in (
        ("chosen", [pair.chosen for pair in pairs]),
        ("rejected", [pair.rejected for pair in pairs]),
    ):
        batch = collate(examples)
        mask = torch.zeros_like(batch.ids)
        for row, example in enumerate(examples):
            mask[row, : len(example.ids)] = 1
        found |= {f"{name}_input_ids": batch.ids, f"{name}_attention_mask": mask}
        found[f"{name}_labels"] = batch.labels
    return found


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"loss": "simpo", "gamma": 0.4}, {"loss_type": "simpo", "simpo_gamma": 0.4}),
        (
            {"loss": "simpo", "label_smoothing": S, "sft_weight": 0.5},
            {"loss_type": "simpo", "simpo_gamma": 1.0, "label_smoothing": S, "cpo_alpha": 0.5},
        ),
        ({"sft_weight": 1.0}, {"loss_type": "sigmoid", "cpo_alpha": 1.0}),
        ({"loss": "hinge"}, {"loss_type": "hinge"}),
        ({"loss": "ipo"}, {"loss_type": "ipo"}),
    ],
)
def test_without_a_reference_they_are_those_of_trls_cpo(world, tmp_path, ours, theirs):
    pytest.importorskip("trl")
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    model = stirred(model_of(world))
    objective = Preference(DpoOptions(beta=0.2, reference="none", **ours))
    loss = accumulate(model, [collate(PAIRS)], objective).loss
    more = {"cpo_alpha": 0.0, "beta": 0.2} | theirs
    trainer = trainer_of(CPOTrainer, CPOConfig, world, tmp_path, **more)

    def ask() -> torch.Tensor:
        return trainer.get_batch_loss_metrics(trainer.model, sides(PAIRS))[0]

    check_against(model, loss, trainer.model, ask)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_orpo_is_trls(world, tmp_path):
    pytest.importorskip("trl")
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    model = stirred(model_of(world))
    objective = Preference(DpoOptions(loss="orpo", beta=0.2))
    loss = accumulate(model, [collate(ASKED_NOTHING)], objective).loss
    trainer = trainer_of(ORPOTrainer, ORPOConfig, world, tmp_path, beta=0.2)

    def ask() -> torch.Tensor:
        return trainer.get_batch_loss_metrics(trainer.model, sides(ASKED_NOTHING))[0]

    check_against(model, loss, trainer.model, ask)

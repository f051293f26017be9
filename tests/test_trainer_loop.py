"""What a run must never change: gradients, sums, steps, whatever is cut, kept or evaluated."""

import json
import math
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lory_trainer import loop
from lory_trainer.base import attach, find_base, load_base
from lory_trainer.checkpoint import checkpoints
from lory_trainer.config import parse_options
from lory_trainer.data import Example, collate, pack
from lory_trainer.errors import ConfigError, OutOfMemoryError, OutputError, TrainingError
from lory_trainer.loop import has_diverged, split_batch
from lory_trainer.objective import Answers, accumulate
from trainer_world import CONFIG, events, make_world, tensor_bytes, train, write_rows

# peft still reads a name that transformers is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
EXAMPLES = [Example((0, *range(3, 4 + length), 1), 2) for length in range(2, 10)]
ANSWERS = Answers()


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


def model_of(world, text: str = CONFIG) -> PeftModel:
    options = parse_options(text)
    return attach(load_base(find_base("tiny", world), options), options)


def gradients(model: PeftModel) -> torch.Tensor:
    found = [tensor.grad for tensor in model.parameters() if tensor.grad is not None]
    return torch.cat([gradient.flatten() for gradient in found])


def test_a_steps_gradients_are_those_of_plain_transformers_and_peft(world):
    """Their own loss, by their own labels and attention mask, on the same rows."""
    model = model_of(world)
    batch = collate(EXAMPLES)
    loss = accumulate(model, [batch], ANSWERS).loss

    base = AutoModelForCausalLM.from_pretrained(world / "tiny")
    torch.manual_seed(0)
    plain = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    mask = torch.zeros_like(batch.ids)
    for row, example in enumerate(EXAMPLES):
        mask[row, : len(example.ids)] = 1
    theirs = plain(input_ids=batch.ids, attention_mask=mask, labels=batch.labels).loss
    theirs.backward()
    assert math.isclose(loss, theirs.item(), rel_tol=1e-5)
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-4, atol=1e-6)


def test_packed_rows_do_not_see_each_other(world):
    """Loss and gradients of packs are those of the rows one by one."""
    apart, together = model_of(world), model_of(world)
    loss = accumulate(apart, [collate([example]) for example in EXAMPLES], ANSWERS).loss
    packs = pack(EXAMPLES, 24)
    assert len(packs) < len(EXAMPLES)
    packed = accumulate(together, [collate(packs)], ANSWERS).loss
    assert math.isclose(loss, packed, rel_tol=1e-5)
    torch.testing.assert_close(gradients(together), gradients(apart), rtol=1e-4, atol=1e-6)


def test_computing_activations_twice_changes_no_gradient(world):
    from lory_trainer.base import spare_memory

    plain, spared = model_of(world), model_of(world)
    assert spare_memory(spared, parse_options(CONFIG + "gradient_checkpointing: true\n"))
    batch = collate(EXAMPLES)
    for model in (plain.train(), spared.train()):
        accumulate(model, [batch], ANSWERS)
    torch.testing.assert_close(gradients(spared), gradients(plain), rtol=1e-5, atol=1e-7)


def test_a_batch_that_is_split_keeps_every_row_in_order():
    assert [list(part) for part in split_batch(EXAMPLES[:5], 2)] == [EXAMPLES[:3], EXAMPLES[3:5]]
    assert split_batch(EXAMPLES[:3], 8) == [[example] for example in EXAMPLES[:3]]


# -- evaluation, stopping, diverging ---------------------------------------------------------------

DROPOUT = "lora: {r: 4, dtype: float32, dropout: 0.2}\nneftune_noise_alpha: 5\n"
STEPS = CONFIG.replace("lora: {r: 4, dtype: float32}\n", DROPOUT)


def held_out(world) -> str:
    write_rows(
        world / "held.jsonl", {"text": "ab", "completion": "y"}, {"text": "b", "completion": "z"}
    )
    return "eval_data: held.jsonl\n"


def test_evaluating_in_the_middle_changes_no_byte(world):
    train(world, STEPS)
    plain = tensor_bytes(world)
    train(world, STEPS + held_out(world) + "eval_steps: 1\n", replace=True)
    assert len(events(world, "eval")) == 8
    assert tensor_bytes(world) == plain


def test_evaluations_tell_the_mean_loss_of_the_held_out_rows(world):
    train(world, CONFIG + held_out(world))
    told = events(world, "eval")
    assert [event["step"] for event in told] == [2, 4, 6, 8]
    assert told[0]["rows"] == 2
    assert events(world, "finished")[0]["eval_loss"] == told[-1]["loss"]


def test_early_stopping_keeps_the_best_adapter(world):
    write_rows(world / "held.jsonl", {"text": "ay", "completion": "z"})
    text = CONFIG.replace("epochs: 4", "epochs: 30") + "eval_data: held.jsonl\nearly_stop: 2\n"
    result = train(world, text)
    told = events(world, "eval")
    best = min(told, key=lambda event: event["loss"])
    assert result.num_steps == told[-1]["step"] == best["step"] + 4 < 60
    assert f"that of step {best['step']}" in events(world, "message")[-1]["text"]
    assert result.eval_loss == best["loss"]
    losses = [event["loss"] for event in told]
    assert losses[-1] > min(losses)


def test_a_run_that_diverges_ends_and_keeps_its_last_good_checkpoint(world, monkeypatch):
    text = CONFIG.replace("epochs: 4", "epochs: 40") + "checkpoint_steps: 5\n"
    monkeypatch.setattr(loop, "learning_rate_at", lambda i, *_: 2e-2 if i < 40 else 5.0)
    with pytest.raises(TrainingError, match=r"runs away.*last good checkpoint is .*step-0000"):
        train(world, text)
    assert not (world / "adapters" / "mine").exists()
    failed = events(world)[-1]
    assert (failed["type"], failed["code"]) == ("failed", "training")
    assert (world / "runs" / "mine" / failed["checkpoint"] / "adapter_config.json").exists()
    monkeypatch.undo()
    train(world, text + "divergence_factor: null\n", resume=True)


def test_only_a_loss_far_above_its_best_and_its_start_diverges():
    falling = [4.0 / (step + 1) for step in range(40)]
    assert not has_diverged(falling, 3.0)
    assert not has_diverged([*falling, *[0.5] * 10], 3.0), "above the best, below the start"
    assert has_diverged([*falling, *[6.0] * 10], 3.0)
    assert not has_diverged([9.0] * 10, 3.0)


# -- memory ----------------------------------------------------------------------------------------


def out_of_memory_above(monkeypatch, rows: int) -> list[int]:
    """Forward passes with more rows fail as an allocator does."""
    tried: list[int] = []
    share = Answers.share

    def failing(self: Answers, model: Any, batch: Any, counts: Any) -> Any:
        tried.append(len(batch.ids))
        if len(batch.ids) > rows:
            raise torch.OutOfMemoryError("out of memory")
        return share(self, model, batch, counts)

    monkeypatch.setattr(Answers, "share", failing)
    return tried


def test_out_of_memory_halves_the_batch_and_keeps_what_is_learned(world, monkeypatch):
    plain = train(world, CONFIG).losses
    tried = out_of_memory_above(monkeypatch, 1)
    halved = train(world, CONFIG, replace=True).losses
    assert tried[:3] == [4, 2, 1]
    assert set(tried[3:]) == {1}
    assert halved == pytest.approx(plain, rel=1e-4)
    texts = [event["text"] for event in events(world, "message") if "memory" in event["text"]]
    assert ["from now on 2" in texts[0], "from now on 1" in texts[1]] == [True, True]


def test_out_of_memory_with_one_row_names_the_five_remedies(world, monkeypatch):
    out_of_memory_above(monkeypatch, 0)
    with pytest.raises(OutOfMemoryError) as caught:
        train(world, CONFIG)
    keys = ("batch_size", "max_length", "gradient_checkpointing", "quantization.bits", "lora.r")
    assert [f"  {n}. {key}:" in str(caught.value) for n, key in enumerate(keys, 1)] == [True] * 5
    assert events(world)[-1]["code"] == "out_of_memory"


@pytest.mark.parametrize("what", ["load_base", "make_optimizer", "probe"])
def test_out_of_memory_anywhere_else_names_them_too(world, monkeypatch, what):
    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 7 bytes")

    monkeypatch.setattr(f"lory_trainer.train.{what}", failing)
    with pytest.raises(
        OutOfMemoryError, match=r"(?s)you tried 7 bytes\nWhat helps:\n  1\. batch_s"
    ):
        train(world, CONFIG)
    assert events(world)[-1]["code"] == "out_of_memory"


def test_another_error_is_not_taken_for_out_of_memory(world, monkeypatch):
    def broken(*_: Any) -> Any:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Answers, "share", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(world, CONFIG)
    assert events(world)[-1]["code"] == "internal"


def test_auto_settles_batch_accumulation_and_learning_rate(world):
    text = CONFIG.replace("batch_size: 4", "batch_size: auto\neffective_batch_size: 8")
    train(world, text.replace("2e-2", "auto"))
    [started] = events(world, "started")
    assert (started["batch_size"], started["gradient_accumulation_steps"]) == (8, 1)
    assert started["learning_rate"] == 5e-3  # a base this narrow meets the upper bound
    half = text.replace("2e-2", "auto\nlearning_rate_multiplier: 0.5")
    train(world, half, replace=True)
    assert events(world, "started")[0]["learning_rate"] == 2.5e-3
    with pytest.raises(ConfigError, match="no multiple of batch_size"):
        train(world, CONFIG + "effective_batch_size: 6\n", replace=True)


def test_rows_longer_than_the_base_reads_are_refused_and_packs_of_short_ones_are_not(world):
    write_rows(world / "long.jsonl", {"text": "a" * 80, "completion": "b"})
    text = CONFIG.replace("rows.jsonl", "long.jsonl")
    with pytest.raises(ConfigError, match="a row has 84 tokens and the base reads 64; give max_le"):
        train(world, text)
    rows = [{"text": "ab" * 8, "completion": "b"}] * 9
    write_rows(world / "long.jsonl", *rows)
    train(world, text + "packing: true\nmax_length: 128\nmax_steps: 1\n", replace=True)


# -- methods ---------------------------------------------------------------------------------------


def full(*values: str) -> list[Any]:
    return [pytest.param(value, marks=pytest.mark.full) for value in values]


@pytest.mark.parametrize(
    "extra",
    [
        "lora: {r: 4, use_dora: true, lora_plus_ratio: 4}",
        "packing: true\nmax_length: 24\nneftune_noise_alpha: 5",
        "optimizer: paged_adamw_8bit\nquantization: {bits: 8}",
        "method: pretrain\ntemplate: '{text}'\nmax_steps: 11\ngradient_checkpointing: true",
        *full(
            "lora: {r: 4, use_rslora: true, init: gaussian}",
            "lora: {r: 4, init: orthogonal}",
            "lora: {r: 4, rank_pattern: {q_proj: 2}, alpha_pattern: {q_proj: 2.0}}",
            "optimizer: adamw_8bit",
            "optimizer: paged_adamw",
            "optimizer: sgd",
            "train_on_prompt: true",
            "quantization: {bits: 4, type: fp4, double: false}",
        ),
    ],
)
def test_every_method_learns_and_writes_a_servable_folder(world, extra):
    base = CONFIG
    for line in extra.split("\n"):
        key = line.split(":")[0]
        base = "".join(f"{old}\n" for old in base.splitlines() if not old.startswith(f"{key}:"))
    result = train(world, f"{base}{extra}\nschedule: constant\n")
    assert result.losses[-1] < result.losses[0]
    plain = AutoModelForCausalLM.from_pretrained(world / "tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PeftModel.from_pretrained(plain, result.output)


def test_long_texts_are_learned_piece_by_piece(world):
    write_rows(world / "rows.jsonl", {"text": "abcdefghij"}, {"text": "xy"})
    text = CONFIG.replace('template: "{text}>"\n', "method: pretrain\nmax_length: 5\n")
    result = train(world, text)
    assert (result.num_rows, result.num_dropped_rows) == (2, 0)
    manifest = json.loads((result.output / "adapter_manifest.json").read_text())
    rows = [row["ids"] for row in manifest["probe"]["rows"]]
    assert rows == [[0, 3, 4, 5, 6], [6, 7, 8, 9, 10], [10, 11, 12, 1], [0, 26, 27, 1]]


def test_a_base_whose_rows_see_each_other_is_not_packed(world, monkeypatch):
    from transformers import LlamaForCausalLM

    real = LlamaForCausalLM.forward

    def forgetful(self: Any, *, position_ids: Any = None, **more: Any) -> Any:
        return real(self, **more)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forgetful)
    with pytest.raises(ConfigError, match="see each other"):
        train(world, CONFIG + "packing: true\n")


def test_lora_plus_lets_b_learn_faster(world):
    from lory_trainer.optimizer import make_optimizer, set_learning_rate

    options = parse_options(CONFIG.replace("r: 4", "r: 4, lora_plus_ratio: 16"))
    optimizer = make_optimizer(model_of(world), options, "cpu")
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 8.0]
    assert len({len(group["params"]) for group in optimizer.param_groups}) == 1


def test_noise_falls_on_training_alone(world):
    from lory_trainer.base import add_noise

    model = model_of(world)
    add_noise(model, 5.0)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)


def test_an_adapter_goes_on_from_another(world):
    train(world, CONFIG)
    more = CONFIG.replace("r: 4", "r: 4, start_from: adapters/mine")
    result = train(world, more, output=world / "adapters" / "more", run=world / "runs" / "more")
    assert result.losses[0] < 0.7 * events(world, "step")[0]["loss"]
    wrong = more.replace("r: 4", "r: 8")
    with pytest.raises(ConfigError, match="is of another shape"):
        train(world, wrong, output=world / "adapters" / "w", run=world / "runs" / "w")
    (world / "broken").mkdir()
    (world / "broken" / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(ConfigError, match="cannot be read"):
        train(world, more.replace("adapters/mine", "broken"), output=world / "x", run=world / "y")
    with pytest.raises(ConfigError, match="is no adapter folder"):
        train(world, more.replace("adapters/mine", "tiny"), output=world / "x", run=world / "y")


def test_checkpoints_are_adapters_and_only_the_newest_stay(world):
    train(world, CONFIG + "checkpoint_steps: 1\nkeep_checkpoints: 3\n")
    kept = checkpoints(world / "runs" / "mine")
    assert [path.name for path in kept] == [f"step-0000000{n}" for n in (5, 6, 7)]
    told = [event["path"] for event in events(world, "checkpoint")]
    assert told[-1] == "checkpoints/step-00000007"
    manifest = json.loads((kept[-1] / "adapter_manifest.json").read_text())
    assert (manifest["template"], manifest["base"]) == ("{text}>", "tiny")
    plain = AutoModelForCausalLM.from_pretrained(world / "tiny")
    PeftModel.from_pretrained(plain, kept[-1])


def test_another_runs_checkpoints_are_never_mixed_or_lost_unasked(world):
    train(world, CONFIG + "checkpoint_steps: 1\n")
    other = {"output": world / "adapters" / "other"}
    with pytest.raises(OutputError, match="--resume to go on with it, --replace"):
        train(world, CONFIG, **other)
    with pytest.raises(OutputError, match="holds a run with other seed; give another --run"):
        train(world, CONFIG + "seed: 1\n", resume=True, **other)
    more = CONFIG.replace("epochs: 4", "epochs: 5").replace("r: 4", "r: 4, alpha: 3")
    with pytest.raises(OutputError, match="with other lora, epochs; give"):
        train(world, more, resume=True, **other)
    train(world, CONFIG, replace=True, **other)
    assert len(events(world, "started")) == 1


def test_a_loss_step_is_looked_at_before_the_weights_are_touched(world, monkeypatch):
    """The step whose loss is no number leaves the adapter as it was."""
    seen: list[float] = []
    real = loop.accumulate

    def poisoned(model: Any, batches: Any, objective: Any) -> Any:
        outcome = real(model, batches, objective)
        seen.append(len(batches))
        if len(seen) == 4:
            outcome.loss = math.nan
        return outcome

    monkeypatch.setattr(loop, "accumulate", poisoned)
    with pytest.raises(TrainingError, match="the loss is nan at step 3 of 8"):
        train(world, CONFIG)

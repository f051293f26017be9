"""Supervised fine-tuning of a LoRA adapter: load, attach, loop, write.

The loss is the mean over the answers' tokens of a whole optimizer step, so accumulating four
batches of 2 is exactly one batch of 8. This module must not know YAML, servers or registries.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from time import perf_counter
from typing import cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lory_trainer.config import TrainOptions
from lory_trainer.data import (
    IGNORED,
    Batch,
    Example,
    collate,
    encode,
    epoch_batches,
    file_digest,
    fit_length,
    read_rows,
)
from lory_trainer.destination import check_output
from lory_trainer.errors import ConfigError, TrainingError
from lory_trainer.export import AdapterFacts, write_adapter
from lory_trainer.template import template_fields


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step did."""

    step: int
    num_steps: int
    loss: float
    learning_rate: float
    num_tokens: int
    """Tokens read so far, padding not counted."""
    elapsed_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.elapsed_s


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a finished run leaves behind."""

    output: Path
    num_steps: int
    num_rows: int
    num_dropped_rows: int
    num_trainable: int
    num_parameters: int
    losses: tuple[float, ...]
    """One a step."""
    elapsed_s: float


Watcher = Callable[[StepReport], None]


def train_adapter(
    options: TrainOptions, *, folder: Path, output: Path, replace: bool, watch: Watcher
) -> TrainResult:
    """Trains one adapter and writes its folder; paths in `options` are relative to `folder`."""
    check_output(output, replace=replace)
    base, data_path = resolve_base(options.base, folder), folder / options.data
    columns = (*template_fields(options.template), options.completion)
    rows = read_rows(data_path, columns)
    tokenizer = load_tokenizer(base)
    encoded = encode(rows, tokenizer, options.template, options.completion)
    examples = fit_length(encoded, options.max_length, options.overlong)

    model = attach(load_base(base, options), options)
    started_s = perf_counter()
    losses = fit(model, examples, options, watch)
    num_trainable, num_parameters = model.get_nb_trainable_parameters()
    result = TrainResult(
        output=output,
        num_steps=len(losses),
        num_rows=len(examples),
        num_dropped_rows=len(encoded) - len(examples),
        num_trainable=num_trainable,
        num_parameters=num_parameters,
        losses=losses,
        elapsed_s=perf_counter() - started_s,
    )
    facts = _facts(options, tokenizer, base, data_path, result)
    write_adapter(model, facts, output, dtype=options.lora.dtype, replace=replace)
    return result


def resolve_base(base: str, folder: Path) -> str:
    """The base's folder if there is one, else the text as a hub id."""
    local = folder / base
    if local.is_dir():
        return str(local.resolve())
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise ConfigError(f"base: no folder {base!r} beside the configuration")
    return base


def load_tokenizer(base: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ConfigError(f"base: no tokenizer could be loaded from {base!r}: {error}") from error


def load_base(base: str, options: TrainOptions) -> torch.nn.Module:
    device = _device(options)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=options.dtype, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"base: no model could be loaded from {base!r}: {error}") from error
    return cast(torch.nn.Module, model).to(device)


def _device(options: TrainOptions) -> str:
    if options.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for and this machine has none; use auto or cpu")
    return options.device


def attach(base: torch.nn.Module, options: TrainOptions) -> PeftModel:
    """The base with a fresh adapter on the chosen linears; only the adapter is trainable."""
    torch.manual_seed(options.seed)
    lora = options.lora
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.r,
        lora_alpha=lora.resolved_alpha,  # pyright: ignore[reportArgumentType] -- a float is fine
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.use_rslora,
    )
    try:
        with warnings.catch_warnings():
            # peft still reads a name that transformers is about to rename.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            return get_peft_model(base, config)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {error}") from error


def fit(
    model: PeftModel, examples: list[Example], options: TrainOptions, watch: Watcher
) -> tuple[float, ...]:
    """The training loop; returns the loss of every optimizer step."""
    model.train()
    steps = plan_steps(examples, options)
    parameters = [tensor for tensor in model.parameters() if tensor.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=options.weight_decay)
    losses: list[float] = []
    num_tokens, started_s = 0, perf_counter()
    for index, step in enumerate(steps):
        learning_rate = learning_rate_at(index, len(steps), options)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        loss = accumulate(model, [collate(rows) for rows in step])
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {index + 1} of {len(steps)}; nothing was written. "
                f"Lower learning_rate ({options.learning_rate:g}) or lora.alpha, or use float32"
            )
        torch.nn.utils.clip_grad_norm_(parameters, options.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
        num_tokens += sum(len(example.ids) for rows in step for example in rows)
        elapsed_s = perf_counter() - started_s
        watch(StepReport(index + 1, len(steps), loss, learning_rate, num_tokens, elapsed_s))
    return tuple(losses)


def plan_steps(examples: list[Example], options: TrainOptions) -> list[list[list[Example]]]:
    """Every optimizer step of the run, each a list of batches; an epoch's last may be short."""
    rng, width = Random(options.seed), options.gradient_accumulation_steps
    steps: list[list[list[Example]]] = []
    for _ in range(options.epochs):
        batches = epoch_batches(examples, options.batch_size, rng)
        steps += [batches[i : i + width] for i in range(0, len(batches), width)]
    return steps


def accumulate(model: PeftModel, batches: list[Batch]) -> float:
    """Adds the gradients of one optimizer step; returns its mean loss over answer tokens."""
    total = sum(batch.num_answer_tokens for batch in batches)
    loss = 0.0
    for batch in batches:
        share = answer_loss_sum(model, batch) / total
        share.backward()
        loss += float(share.detach())
    return loss


def answer_loss_sum(model: PeftModel, batch: Batch) -> torch.Tensor:
    """Summed next-token loss of the answers' tokens."""
    device = next(model.parameters()).device
    logits = model(input_ids=batch.ids.to(device)).logits[:, :-1]
    labels = batch.labels[:, 1:].to(device)
    return cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def learning_rate_at(index: int, num_steps: int, options: TrainOptions) -> float:
    """Linear warm-up to the peak, then the schedule down to zero after the last step."""
    warmup = math.ceil(num_steps * options.warmup_fraction)
    if index < warmup:
        return options.learning_rate * (index + 1) / warmup
    turn = (index - warmup) / max(1, num_steps - warmup)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - turn,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * turn)),
    }[options.schedule]
    return options.learning_rate * factor


def _facts(
    options: TrainOptions,
    tokenizer: PreTrainedTokenizerBase,
    base: str,
    data_path: Path,
    result: TrainResult,
) -> AdapterFacts:
    base_name = Path(base).name if Path(base).is_dir() else base
    tail = result.losses[-20:]
    lora = options.lora.model_dump(mode="json") | {"alpha": options.lora.resolved_alpha}
    config = options.model_dump(mode="json")
    config |= {"base": base_name, "data": data_path.name, "lora": lora}
    return AdapterFacts(
        base_name=base_name,
        template=options.template,
        fields=template_fields(options.template),
        eos_token=str(tokenizer.eos_token),
        config=config,
        data={
            "file": data_path.name,
            "sha256": file_digest(data_path),
            "rows": result.num_rows,
            "dropped_rows": result.num_dropped_rows,
        },
        training={
            "steps": result.num_steps,
            "final_loss": round(sum(tail) / len(tail), 5),
            "trainable_parameters": result.num_trainable,
        },
    )

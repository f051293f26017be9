"""QLoRA on an 8B-shaped base: tokens a second and memory of the trainer, of PEFT alone and of TRL.

All three take the same steps on one base, quantized once, each with a fresh adapter: 8-bit AdamW,
activations computed twice, the same rows of ids. TRL is left out, and said to be, where it is not
installed. It must not know where results are kept.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from bitsandbytes.optim.adamw import AdamW8bit
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.deadline import Deadline
from lory_trainer.base import lora_config, spare_memory
from lory_trainer.config import LoraOptions, TrainOptions
from lory_trainer.data import Example, collate
from lory_trainer.objective import Answers, accumulate
from lory_trainer.optimizer import make_optimizer, set_learning_rate, trainable

RATE = 1e-4
TOLERANCE = 0.05
"""Of the loss: all three learn from the same rows."""


@dataclass(frozen=True)
class Scale:
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    rows: int
    length: int
    warm_up: int
    steps: int
    rank: int = 16
    budget_s: float = 330.0
    """No contender beyond it starts."""


FULL = Scale(4096, 14336, 32, 32, 8, 128256, rows=4, length=1024, warm_up=3, steps=12)
TINY = Scale(64, 128, 2, 2, 1, 512, rows=2, length=32, warm_up=1, steps=2, rank=4)

Batches = list[list[Example]]
Run = Callable[[PeftModel, Batches], list[tuple[float, float]]]
"""Takes every batch; of each step the loss, and the time when it had ended."""


def measure(
    scale: Scale,
    device: torch.device,
    deadline: Deadline,
    keep: Callable[[dict[str, Any]], None],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """`keep` is given all there is after each contender; who does not begin in time is named."""
    base = nf4_base(scale, device)
    batches = list(rows_of(scale))
    is_installed = find_spec("trl") is not None
    contenders = {"lory": ours, "peft": peft_alone} | ({"trl": trl} if is_installed else {})
    told: dict[str, dict[str, Any]] = {}
    not_reached: list[str] = []
    found = {
        "passed": False,
        "trl_is_installed": is_installed,
        "contenders": told,
        "not_reached": not_reached,
    }
    for name, run in contenders.items():
        if deadline.is_over:
            not_reached.append(name)
            continue
        one = told[name] = _measured(run, base, batches, scale, device)
        gib = one["peak_bytes"] / 2**30
        say(f"{name:5s} {one['tokens_per_s']:10,.1f} tokens/s, {gib:6.2f} GiB at most")
        keep(found)
    return found | {"passed": len(told) > 1 and _agree(told)}


def _agree(told: Mapping[str, Mapping[str, Any]]) -> bool:
    first = told["lory"]["losses"][0]
    return all(abs(one["losses"][0] - first) < TOLERANCE * first for one in told.values())


def _measured(
    run: Run,
    base: LlamaForCausalLM,
    batches: Batches,
    scale: Scale,
    device: torch.device,
) -> dict[str, Any]:
    torch.manual_seed(0)
    options = LoraOptions(r=scale.rank)
    model: Any = get_peft_model(base, lora_config(options))
    spare_memory(model, TrainOptions(base="", data="", gradient_checkpointing=True))
    model.train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = run(model, batches)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    _keep_activations(model.get_base_model())
    model.unload()
    tokens = scale.steps * scale.rows * scale.length
    seconds = taken[-1][1] - taken[scale.warm_up - 1][1]
    return {
        "tokens_per_s": round(tokens / seconds, 1),
        "peak_bytes": peak,
        "losses": [round(loss, 4) for loss, _ in taken],
    }


def _keep_activations(base: Any) -> None:
    """What `spare_memory` did, undone; transformers has renamed it."""
    if hasattr(base, "activation_checkpointing_disable"):
        base.activation_checkpointing_disable()
    else:
        base.gradient_checkpointing_disable()


def nf4_base(scale: Scale, device: torch.device) -> LlamaForCausalLM:
    """Random, and its linears in NF4 with double quantization."""
    config = LlamaConfig(
        hidden_size=scale.hidden_size,
        intermediate_size=scale.intermediate_size,
        num_hidden_layers=scale.num_layers,
        num_attention_heads=scale.num_heads,
        num_key_value_heads=scale.num_kv_heads,
        vocab_size=scale.vocab_size,
        max_position_embeddings=2 * scale.length,
        use_cache=False,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with device:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    setattr(part, name, _quantized(linear, dtype))
    model.is_loaded_in_4bit = True
    return model


def _quantized(linear: torch.nn.Linear, dtype: torch.dtype) -> Linear4bit:
    out = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    weight = linear.weight.detach()
    out.weight = Params4bit(
        weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
    ).to(weight.device)
    out.support_avx512bf16_for_cpu = False
    return out


def rows_of(scale: Scale) -> Iterator[list[Example]]:
    rng = Random(0)
    for _ in range(scale.warm_up + scale.steps):
        yield [
            Example(tuple(rng.randrange(3, scale.vocab_size) for _ in range(scale.length)), 1)
            for _ in range(scale.rows)
        ]


def ours(model: PeftModel, batches: Batches) -> list[tuple[float, float]]:
    """The parts of lory_trainer.loop, without its events and checkpoints."""
    options = TrainOptions(base="", data="", optimizer="adamw_8bit")
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, options, device.type)
    set_learning_rate(optimizer, RATE)

    def step(batch: list[Example]) -> float:
        outcome = accumulate(model, [collate(batch)], Answers())
        torch.nn.utils.clip_grad_norm_(trainable(model), options.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return outcome.loss

    return _timed(step, batches)


def peft_alone(model: PeftModel, batches: Batches) -> list[tuple[float, float]]:
    """transformers' own loss, and nothing else."""
    device = next(model.parameters()).device
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW8bit(parameters, lr=RATE)

    def step(batch: list[Example]) -> float:
        ids = torch.tensor([example.ids for example in batch], device=device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return _timed(step, batches)


def _timed(step: Callable[[list[Example]], float], batches: Batches) -> list[tuple[float, float]]:
    """A loss is a number on the host, so every step has ended when the clock is read."""
    return [(step(batch), time.perf_counter()) for batch in batches]


def trl(model: PeftModel, batches: Batches) -> list[tuple[float, float]]:
    """TRL's SFTTrainer on the same ids, in their order."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    taken: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                taken.append((float(logs["loss"]), time.perf_counter()))

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)

    device = next(model.parameters()).device
    rows = [{"input_ids": list(example.ids)} for batch in batches for example in batch]
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=len(batches[0]),
            max_steps=len(batches),
            learning_rate=RATE,
            lr_scheduler_type="constant",
            optim="adamw_8bit",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            max_length=None,
            use_cpu=device.type == "cpu",
            bf16=device.type == "cuda",
            disable_tqdm=True,
        )
        trainer = InOrder(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=_tokenizer(Path(folder)),
            callbacks=[Clock()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return taken


def _tokenizer(folder: Path) -> Any:
    """It is asked for, and never used: the rows are ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    Tokenizer(models.WordLevel(words, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<eos>", pad_token="<pad>"
    )

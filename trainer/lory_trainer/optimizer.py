"""The optimizer of a run and its learning rate at every step.

This module must not know data, losses or checkpoints.
"""

import math
from typing import Any

import torch
from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW, PagedAdamW8bit
from peft import PeftModel

from lory_trainer.config import TrainOptions
from lory_trainer.errors import ConfigError

AUTO_RATE_LOWEST, AUTO_RATE_HIGHEST = 5e-5, 5e-3
RATE_FACTOR = "rate_factor"
"""Of a parameter group: how much faster than the schedule it learns."""


def trainable(model: PeftModel) -> list[torch.nn.Parameter]:
    return [tensor for tensor in model.parameters() if tensor.requires_grad]


def make_optimizer(model: PeftModel, options: TrainOptions, device: str) -> torch.optim.Optimizer:
    """8-bit and paged states are bitsandbytes'."""
    groups = _groups(model, options.lora.lora_plus_ratio)
    kind = unpaged(options.optimizer) if device == "cpu" else options.optimizer
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.0, weight_decay=options.weight_decay)
    adam: dict[str, Any] = {
        "betas": (options.betas[0], options.betas[1]),
        "eps": options.epsilon,
        "weight_decay": options.weight_decay,
    }
    kinds: dict[str, Any] = {
        "adamw": torch.optim.AdamW,
        "adamw_8bit": AdamW8bit,
        "paged_adamw": PagedAdamW,
        "paged_adamw_8bit": PagedAdamW8bit,
    }
    return kinds[kind](groups, **adam)


def unpaged(kind: str) -> str:
    """A CPU has no memory to page out of."""
    return kind.removeprefix("paged_")


def _groups(model: PeftModel, ratio: float | None) -> list[Any]:
    if ratio is None:
        return trainable(model)
    fast, slow = [], []
    for name, tensor in model.named_parameters():
        if tensor.requires_grad:
            (fast if ".lora_B." in name else slow).append(tensor)
    return [{"params": slow, RATE_FACTOR: 1.0}, {"params": fast, RATE_FACTOR: float(ratio)}]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get(RATE_FACTOR, 1.0)


def resolve_learning_rate(options: TrainOptions, base_config: Any) -> float:
    return options.learning_rate_multiplier * (
        auto_learning_rate(base_config)
        if options.learning_rate == "auto"
        else options.learning_rate
    )


def auto_learning_rate(base_config: Any) -> float:
    """5e-4 (2000 / width) ^ 0.781, Tinker's rule for LoRA on Llama, within bounds."""
    width = getattr(base_config, "hidden_size", None)
    if not isinstance(width, int):
        raise ConfigError("learning_rate: auto needs the base's hidden_size; give a number")
    rate = 5e-4 * (2000 / width) ** 0.781
    return min(max(rate, AUTO_RATE_LOWEST), AUTO_RATE_HIGHEST)


def learning_rate_at(index: int, num_steps: int, options: TrainOptions, peak: float) -> float:
    """Linear warm-up to the peak, then the schedule down to its end after the last step."""
    warmup = options.warmup_steps
    if warmup is None:
        warmup = math.ceil(num_steps * options.warmup_fraction)
    if index < warmup:
        return peak * (index + 1) / warmup
    turn = (index - warmup) / max(1, num_steps - warmup)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - turn,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * turn)),
    }[options.schedule]
    lowest = options.learning_rate_min
    return lowest + (peak - lowest) * factor

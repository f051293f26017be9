"""How much memory a run needs, part by part, and how much there is.

The arithmetic is of shapes alone; what it leaves out (fragmentation, kernels' work space) is why
it is an estimate. This module must not know data files or the terminal.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from lory_trainer.config import TrainOptions
from lory_trainer.errors import OutOfMemoryError

GIB = 1 << 30
OVERHEAD = 0.06
"""What allocators lose, as a share of the rest."""
NF4_BLOCK, DOUBLE_BLOCK = 64, 256

REMEDIES = (
    ("batch_size", "fewer rows at a time, with gradient_accumulation_steps to make up for it"),
    ("max_length", "shorter rows (overlong: drop leaves the long ones out)"),
    ("gradient_checkpointing", "true: keep few activations and compute them twice"),
    ("quantization.bits", "4: hold the base in a quarter of its memory (QLoRA)"),
    ("lora.r", "a smaller rank, or fewer lora.target_modules; optimizer: paged_adamw_8bit"),
)
"""The five things that help, and the keys to do them with."""


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """Bytes."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        parts = (self.weights, self.adapter, self.gradients, self.optimizer)
        return int((sum(parts) + self.activations + self.logits) * (1 + OVERHEAD))


def num_weight_bytes(num_parameters: int, num_linear: int, bits: int | None, width: int) -> int:
    """`num_linear` of the parameters are in linears that quantization packs; `width` is the bytes
    of the others."""
    others = (num_parameters - num_linear) * width
    if bits is None:
        return others + num_linear * width
    if bits == 8:
        return others + num_linear
    scales = num_linear / NF4_BLOCK
    return others + num_linear // 2 + int(scales + 4 * scales / DOUBLE_BLOCK)


def estimate(model: PeftModel, options: TrainOptions, *, rows: int, length: int) -> MemoryParts:
    """Of a step with `rows` rows of `length` tokens; the model may be one without weights."""
    config = text_config(model)
    base = [(n, p) for n, p in model.named_parameters() if "lora_" not in n]
    num_trainable = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    width = max((p.element_size() for _, p in base), default=4)
    linear = sum(p.numel() for n, p in base if p.dim() == 2 and not _is_table(n))
    total = sum(p.numel() for _, p in base)
    weights = num_weight_bytes(total, linear, options.quantization.bits, width)
    per_value = 4 if width == 4 else 2
    tokens = rows * length
    return MemoryParts(
        weights=weights,
        adapter=4 * num_trainable,
        gradients=4 * num_trainable,
        optimizer=_optimizer_bytes(options.optimizer, num_trainable),
        activations=tokens * _values_per_token(config, length, options) * per_value,
        logits=tokens * config.vocab_size * (8 + per_value),
    )


def text_config(model: PeftModel) -> Any:
    """The base's shape."""
    base: Any = model.get_base_model()
    return base.config.get_text_config()


def _is_table(name: str) -> bool:
    return "embed" in name or "lm_head" in name


def _optimizer_bytes(kind: str, num_trainable: int) -> int:
    per_parameter = {"sgd": 0, "adamw": 8, "paged_adamw": 8}
    return num_trainable * per_parameter.get(kind, 2)


def _values_per_token(config: Any, length: int, options: TrainOptions) -> int:
    """Kept for the backward pass: the whole of a layer, or each layer's input and one layer."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", 4 * hidden)
    layer = 10 * hidden + 4 * inner
    wished = options.gradient_checkpointing
    is_spared = (
        (options.device != "cpu" and torch.cuda.is_available()) if wished == "auto" else wished
    )
    return layers * hidden + layer if is_spared else layers * layer


def available_bytes(device: str) -> int:
    """Free memory of the device."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(device: torch.device) -> int:
    """The most that the process has held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def remedies() -> str:
    lines = (f"  {number}. {key}: {what}" for number, (key, what) in enumerate(REMEDIES, start=1))
    return "\n".join(lines)


@contextmanager
def telling_remedies() -> Iterator[None]:
    """What runs out of memory where nothing can be halved ends with what helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"out of memory: {error}\nWhat helps:\n{remedies()}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """CPU allocations fail with a plain RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)

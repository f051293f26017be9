"""Preference pairs on the trainer's tiny base: a configuration, rows, and a model to ask."""

from pathlib import Path
from typing import Any

import torch

from lory_trainer.base import attach, find_base, load_base
from lory_trainer.config import parse_options
from lory_trainer.data import Example, Pair
from trainer_world import make_world, write_rows

CONFIG = """
base: tiny
data: pairs.jsonl
method: dpo
template: "{prompt}>"
lora: {r: 4, dtype: float32}
epochs: 4
batch_size: 4
learning_rate: 1e-2
"""
PAIRS = [
    Pair(
        Example((0, *range(3, 6 + n), 7, 1), 3 + n),
        Example((0, *range(3, 6 + n), 8, 9 + n, 1), 3 + n),
    )
    for n in range(8)
]


def make_pairs_world(folder: Path) -> Path:
    make_world(folder)
    rows = [{"prompt": a + b, "chosen": b, "rejected": a} for a in "abcd" for b in "yz"]
    write_rows(folder / "pairs.jsonl", *rows)
    return folder


def model_of(world: Path, text: str = CONFIG) -> Any:
    options = parse_options(text)
    return attach(load_base(find_base("tiny", world), options), options, world)


def stirred(model: Any) -> Any:
    """With an adapter that says something else than the base."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.add_(torch.randn_like(tensor) * 0.05)
    return model

"""What `auto` comes to, once the base and the rows are known.

This module must not know loops or files of rows.
"""

from collections.abc import Sequence

from peft import PeftModel

from lory_trainer.base import choose_device
from lory_trainer.config import TrainOptions
from lory_trainer.data import Item, longest, rows_of
from lory_trainer.errors import ConfigError
from lory_trainer.memory import available_bytes, estimate, text_config
from lory_trainer.optimizer import resolve_learning_rate

AUTO_EFFECTIVE = 16
MEMORY_SHARE = 0.8
"""Of the free memory, that an automatic batch may fill by the estimate."""


def settle(
    options: TrainOptions, model: PeftModel, items: Sequence[Item], *, loaded: bool
) -> TrainOptions:
    """The options with numbers in place of auto; `loaded`: the weights are in memory already.
    Raises ConfigError for what this base, or these numbers, cannot do."""
    _check_context(model, items)
    rows, steps = _batch(options, model, items, loaded=loaded)
    return options.model_copy(
        update={
            "learning_rate": resolve_learning_rate(options, text_config(model)),
            "learning_rate_multiplier": 1.0,
            "batch_size": rows,
            "gradient_accumulation_steps": steps,
            "effective_batch_size": None,
        }
    )


def _check_context(model: PeftModel, items: Sequence[Item]) -> None:
    """Places past a base's last say nothing, and no server goes there."""
    places = getattr(text_config(model), "max_position_embeddings", None)
    most = max(len(row.ids) for item in items for row in rows_of(item))
    if isinstance(places, int) and most > places:
        raise ConfigError(
            f"max_length: a row has {most} tokens and the base reads {places}; give max_length: "
            f"{places}, and overlong: drop or cut_prompt"
        )


def _batch(
    options: TrainOptions, model: PeftModel, items: Sequence[Item], *, loaded: bool
) -> tuple[int, int]:
    if options.batch_size == "auto":
        wanted = options.effective_batch_size or AUTO_EFFECTIVE
        wanted *= options.gradient_accumulation_steps or 1
        rows = largest_batch(options, model, items, wanted, loaded=loaded)
        return rows, wanted // rows
    if options.effective_batch_size is None:
        return options.batch_size, options.gradient_accumulation_steps or 1
    steps, rest = divmod(options.effective_batch_size, options.batch_size)
    if rest or not steps:
        raise ConfigError(
            f"effective_batch_size: {options.effective_batch_size} is no multiple of batch_size "
            f"{options.batch_size}"
        )
    return options.batch_size, steps


def largest_batch(
    options: TrainOptions, model: PeftModel, items: Sequence[Item], wanted: int, *, loaded: bool
) -> int:
    """Halves until the estimate fits; what it misses, the preflight of the run finds."""
    room = MEMORY_SHARE * available_bytes(choose_device(options))
    length = max(map(longest, items))
    sequences = 2 if options.method == "dpo" else 1
    rows = wanted
    while rows > 1 and rows % 2 == 0:
        parts = estimate(model, options, rows=rows * sequences, length=length)
        if parts.total - (parts.weights if loaded else 0) <= room:
            break
        rows //= 2
    return rows

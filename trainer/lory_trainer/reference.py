"""What the model says of preference pairs before the run: DPO's reference.

Taken once and kept as two numbers a pair, so that no second model is held in memory and a
resumed run has the same reference. This module must not know loops or optimizers.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from peft import PeftModel

from lory_trainer.data import Pair, collate, longest
from lory_trainer.errors import StoppedError
from lory_trainer.memory import is_out_of_memory
from lory_trainer.objective import row_log_probabilities


@torch.no_grad()
def with_reference(
    model: PeftModel,
    pairs: Sequence[Pair],
    *,
    rows: int,
    base_alone: bool,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Pair]:
    """The pairs with the model's log-probabilities; base_alone: without its adapter. Raises
    StoppedError when asked to stop: there is no checkpoint of this yet."""
    was_training = model.training
    model.eval()
    with model.disable_adapter() if base_alone else nullcontext():
        found = _log_probabilities(model, pairs, rows, should_stop)
    model.train(was_training)
    return [replace(pair, reference=found[id(pair)]) for pair in pairs]


def _log_probabilities(
    model: PeftModel, pairs: Sequence[Pair], rows: int, should_stop: Callable[[], bool]
) -> dict[int, tuple[float, float]]:
    device = next(model.parameters()).device
    found: dict[int, tuple[float, float]] = {}
    waiting = sorted(pairs, key=longest)
    while waiting:
        if should_stop():
            raise StoppedError("stopped before the first step")
        batch = waiting[:rows]
        try:
            sums, _ = row_log_probabilities(model, collate(batch).to(device))
        except (RuntimeError, MemoryError) as error:
            if rows == 1 or not is_out_of_memory(error):
                raise
            rows = max(1, rows // 2)
            continue
        chosen, rejected = (half.tolist() for half in sums.chunk(2))
        for pair, better, worse in zip(batch, chosen, rejected, strict=True):
            found[id(pair)] = (better, worse)
        waiting = waiting[rows:]
    return found

"""What a run makes small: the answers' loss; preference.py has those of pairs.

Each objective is a sum over tokens or pairs, divided by the count of a whole optimizer step, so
accumulating four batches of 2 is exactly one batch of 8. This module must not know the
configuration, optimizers or schedules.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from lory_trainer.data import IGNORED, Batch


@dataclass(frozen=True, slots=True)
class Counts:
    """Of a whole optimizer step, or of all rows of an evaluation."""

    tokens: int
    """That are learned; of pairs, those of the better answers."""
    rows: int


@dataclass(slots=True)
class Outcome:
    """The loss of a step, and what else there is to tell of it."""

    loss: float = 0.0
    more: dict[str, float] = field(default_factory=dict)

    def add(self, loss: float, more: dict[str, float]) -> None:
        self.loss += loss
        for name, value in more.items():
            self.more[name] = self.more.get(name, 0.0) + value


class Objective(Protocol):
    """What is asked of a method."""

    def count(self, batches: Sequence[Batch]) -> Counts: ...

    def share(
        self, model: PeftModel, batch: Batch, counts: Counts
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The batch's part of the step's loss, and of what else is told."""
        ...


def logits_of(model: PeftModel, batch: Batch) -> torch.Tensor:
    """For every token but the first, what was predicted for it."""
    packed: dict[str, Any] = {} if batch.positions is None else {"position_ids": batch.positions}
    return model(input_ids=batch.ids, use_cache=False, **packed).logits[:, :-1]


def answer_loss_sum(model: PeftModel, batch: Batch) -> torch.Tensor:
    """Summed next-token loss of the answers' tokens."""
    logits = logits_of(model, batch)
    labels = batch.labels[:, 1:]
    return cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def row_log_probabilities(model: PeftModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row's learned tokens: their log-probability together, and how many they are."""
    labels = batch.labels[:, 1:]
    losses = cross_entropy(
        logits_of(model, batch).float().transpose(1, 2),
        labels,
        ignore_index=IGNORED,
        reduction="none",
    )
    return -losses.sum(dim=1), (labels != IGNORED).sum(dim=1)


class Answers:
    """Supervised fine-tuning, and pre-training where every token is learned."""

    def count(self, batches: Sequence[Batch]) -> Counts:
        tokens = sum(batch.num_answer_tokens for batch in batches)
        return Counts(tokens, sum(len(batch.ids) for batch in batches))

    def share(
        self, model: PeftModel, batch: Batch, counts: Counts
    ) -> tuple[torch.Tensor, dict[str, float]]:
        return answer_loss_sum(model, batch) / counts.tokens, {}


def accumulate(model: PeftModel, batches: Sequence[Batch], objective: Objective) -> Outcome:
    """Adds the gradients of one optimizer step; its mean loss."""
    device = next(model.parameters()).device
    counts = objective.count(batches)
    outcome = Outcome()
    for batch in batches:
        share, more = objective.share(model, batch.to(device), counts)
        share.backward()
        outcome.add(float(share.detach()), more)
    return outcome


@torch.no_grad()
def evaluate(model: PeftModel, batches: Sequence[Batch], objective: Objective) -> Outcome:
    """The mean loss of rows that are not trained on; the model and its draws stay as they were."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    counts = objective.count(batches)
    outcome = Outcome()
    for batch in batches:
        share, more = objective.share(model, batch.to(device), counts)
        outcome.add(float(share), more)
    model.train(was_training)
    return outcome

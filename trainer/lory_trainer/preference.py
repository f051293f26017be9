"""Preference pairs: DPO and its relatives, each a loss of what a pair's two answers score.

A score is log pi(answer) - log pi_ref(answer), or log pi(answer) alone where nothing is referred
to; for some losses it is taken per token of the answer. With w the better answer's score, l the
worse one's, b = beta, s = label_smoothing, sig the logistic function, the loss of a pair is

    sigmoid       -(1 - s) log sig(b (w - l)) - s log sig(-b (w - l))           Rafailov 2023, cDPO
    sigmoid_norm  the same, per token
    simpo         the same of b (w - l) - gamma, per token, no reference        Meng 2024
    robust        (-(1 - s) log sig(b (w - l)) + s log sig(-b (w - l))) / (1 - 2 s)
                                                                                Chowdhury 2024
    hinge         max(0, 1 - b (w - l))                                         Zhao 2023, SLiC
    ipo           (w - l - 1 / (2 b))^2, per token                              Azar 2023
    exo_pair      q (log q - log(1 - s)) + (1 - q) (log(1 - q) - log s), q = sig(b (w - l))
                                                                                Ji 2024
    nca_pair      -log sig(b w) - log sig(-b w) / 2 - log sig(-b l) / 2         Chen 2024
    bco_pair      -log sig(b w) - log sig(-b l)                 Jung 2024, without its running mean
    sppo_hard     (w - 1 / (2 b))^2 + (l + 1 / (2 b))^2                         Wu 2024
    apo_zero      1 - sig(b w) + sig(b l)                                       D'Oosterlinck 2024
    apo_down      sig(b w) + 1 - sig(b (w - l))                                 the same
    orpo          -b log sig(o(w) - o(l)), o(x) = x - log(1 - exp x), per token, no reference
                                                                                Hong 2024

A loss that compares a pair with the others of its batch (aot) is not here: four batches of two
would not be one of eight. This module must not know the configuration's file or optimizers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch.nn.functional import logsigmoid

from lory_trainer.config import DpoOptions
from lory_trainer.data import Batch
from lory_trainer.objective import Counts, row_log_probabilities

Loss = Callable[[torch.Tensor, torch.Tensor, DpoOptions], torch.Tensor]
"""Of the better answers' scores and of the worse ones', pair by pair."""

PER_TOKEN = frozenset({"sigmoid_norm", "simpo", "ipo", "orpo"})
NEVER_CERTAIN = -1e-6
"""Highest log-probability of which odds are taken: those of 1 are infinite."""


def _sigmoid(better: torch.Tensor, worse: torch.Tensor, options: DpoOptions) -> torch.Tensor:
    margin, smoothing = options.beta * (better - worse) - options.gamma, options.label_smoothing
    return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)


def _robust(better: torch.Tensor, worse: torch.Tensor, options: DpoOptions) -> torch.Tensor:
    margin, smoothing = options.beta * (better - worse), options.label_smoothing
    both = -(1 - smoothing) * logsigmoid(margin) + smoothing * logsigmoid(-margin)
    return both / (1 - 2 * smoothing)


def _hinge(better: torch.Tensor, worse: torch.Tensor, options: DpoOptions) -> torch.Tensor:
    return torch.relu(1 - options.beta * (better - worse))


def _ipo(better: torch.Tensor, worse: torch.Tensor, options: DpoOptions) -> torch.Tensor:
    return (better - worse - 1 / (2 * options.beta)) ** 2


def _exo_pair(better: torch.Tensor, worse: torch.Tensor, options: DpoOptions) -> torch.Tensor:
    margin, smoothing = options.beta * (better - worse), options.label_smoothing
    right = margin.sigmoid() * (logsigmoid(margin) - math.log1p(-smoothing))
    return right + (-margin).sigmoid() * (logsigmoid(-margin) - math.log(smoothing))


def _nca_pair(better: torch.Tensor, worse: torch.Tensor, options: DpoOptions) -> torch.Tensor:
    good, bad = options.beta * better, options.beta * worse
    return -logsigmoid(good) - 0.5 * logsigmoid(-good) - 0.5 * logsigmoid(-bad)


def _bco_pair(better: torch.Tensor, worse: torch.Tensor, options: DpoOptions) -> torch.Tensor:
    return -logsigmoid(options.beta * better) - logsigmoid(-options.beta * worse)


def _sppo_hard(better: torch.Tensor, worse: torch.Tensor, options: DpoOptions) -> torch.Tensor:
    wanted = 1 / (2 * options.beta)
    return (better - wanted) ** 2 + (worse + wanted) ** 2


def _apo_zero(better: torch.Tensor, worse: torch.Tensor, options: DpoOptions) -> torch.Tensor:
    return 1 - (options.beta * better).sigmoid() + (options.beta * worse).sigmoid()


def _apo_down(better: torch.Tensor, worse: torch.Tensor, options: DpoOptions) -> torch.Tensor:
    margin = options.beta * (better - worse)
    return (options.beta * better).sigmoid() + 1 - margin.sigmoid()


def _orpo(better: torch.Tensor, worse: torch.Tensor, options: DpoOptions) -> torch.Tensor:
    return -options.beta * logsigmoid(_log_odds(better) - _log_odds(worse))


def _log_odds(log_probability: torch.Tensor) -> torch.Tensor:
    """Each branch where it does not cancel."""
    x = log_probability.clamp(max=NEVER_CERTAIN)
    return x - torch.where(x < -0.7, torch.log1p(-x.exp()), torch.log(-torch.expm1(x)))


LOSSES: Mapping[str, Loss] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid,
    "simpo": _sigmoid,
    "robust": _robust,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "orpo": _orpo,
}


@dataclass(frozen=True, slots=True)
class Preference:
    """The objective of pairs; log-probabilities that are referred to were taken before the run."""

    options: DpoOptions

    def count(self, batches: Sequence[Batch]) -> Counts:
        chosen = sum(batch.chosen_half().num_answer_tokens for batch in batches)
        return Counts(chosen, sum(len(batch.ids) // 2 for batch in batches))

    def share(
        self, model: PeftModel, batch: Batch, counts: Counts
    ) -> tuple[torch.Tensor, dict[str, float]]:
        found, lengths = row_log_probabilities(model, batch)
        better, worse = self._scores(found, lengths, batch.reference).chunk(2)
        losses = LOSSES[self.options.loss](better, worse, self.options)
        loss = losses.sum() / counts.rows
        if self.options.sft_weight:
            chosen_loss = -found.chunk(2)[0].sum() / counts.tokens
            loss = loss + self.options.sft_weight * chosen_loss
        margin = self.options.beta * (better - worse).detach()
        return loss, {
            "reward_accuracy": float((margin > 0).sum()) / counts.rows,
            "reward_margin": float(margin.sum()) / counts.rows,
        }

    def _scores(
        self, found: torch.Tensor, lengths: torch.Tensor, reference: torch.Tensor | None
    ) -> torch.Tensor:
        """Of every better answer, then of every worse one."""
        if self.options.reference != "none":
            if reference is None:
                raise ValueError("pairs need reference log-probabilities")
            found = found - reference
        return found / lengths.clamp(min=1) if self.options.loss in PER_TOKEN else found

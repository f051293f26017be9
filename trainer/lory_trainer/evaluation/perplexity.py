"""Perplexity: how surprised a variant is by the wanted answer, token for token.

Of the tokens that training would have learned, prompt and answer tokenised apart; the end of
sequence is not among them. It must not know how log-probabilities are had.
"""

import math
from collections.abc import Sequence

from lory_trainer.evaluation.metrics import Metric

MOST_NATS = 700.0
"""A token; what is beyond has no number."""

Surprise = tuple[float, int]
"""Of one row: the negative log-probability of its answer, and how many tokens that is of."""


def surprise(logprobs: Sequence[float], wanted: str) -> Surprise:
    return -sum(logprobs), len(logprobs)


def perplexity(rows: Sequence[Surprise]) -> float:
    num_tokens = sum(num for _, num in rows)
    nats_a_token = sum(nats for nats, _ in rows) / max(1, num_tokens)
    return math.exp(min(nats_a_token, MOST_NATS))


def _row_score(row: Surprise) -> float:
    return -row[0] / row[1] if row[1] else 0.0


PERPLEXITY = Metric(
    "perplexity",
    surprise,
    perplexity,
    _row_score,
    is_better_high=False,
    scale="free",
    source="logprobs",
)

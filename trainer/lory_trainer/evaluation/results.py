"""What came of an evaluation: plain values, from which table, page, JSON and gates are made.

It must not know how answers were had or are shown.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lory_trainer.evaluation.statistics import Estimate, Pairing

Confusion = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class Spent:
    """Of one variant: what its answers took, asked `concurrency` at once."""

    latency_p50_s: float
    latency_p95_s: float
    prompt_tokens: int
    generated_tokens: int
    wall_s: float
    cost_per_million_tokens: float | None
    """None: no price was given."""
    cost_per_correct: float | None
    """By the first metric; None also where nothing was."""


@dataclass(frozen=True, slots=True)
class VariantResult:
    name: str
    kind: str
    revision: str
    """Of an adapter; empty for the base."""
    scores: Mapping[str, Estimate]
    spent: Spent
    num_cut: int
    """Answers that reached the limit."""
    confusion: Confusion | None

    def figure(self, name: str) -> float | None:
        """A score, or one of what was spent, by its name."""
        if name in self.scores:
            return self.scores[name].value
        if name == "cost_per_correct" and self.spent.cost_per_million_tokens is not None:
            return self.spent.cost_per_correct or math.inf
        return getattr(self.spent, name, None)


@dataclass(frozen=True, slots=True)
class RowResult:
    place: str
    values: Mapping[str, str]
    wanted: str
    answers: Mapping[str, str]
    """By variant."""
    scores: Mapping[str, float]
    """By variant, by the first metric."""


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """What a judge said of two variants, each pair shown in both orders."""

    judge: str
    first: str
    second: str
    wins: int
    """Rows on which it preferred the first, both times."""
    ties: int
    """It said so, or changed its mind with the order."""
    losses: int
    unreadable: int
    """Rows left out, for its verdict made no sense."""
    p: float


@dataclass(frozen=True, slots=True)
class GateResult:
    condition: str
    holds: bool
    explanation: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    data: str
    data_sha256: str
    server: str
    base: str
    base_matches: bool | None
    seed: int
    is_greedy: bool
    max_new_tokens: int
    concurrency: int
    price_per_hour: float
    candidate: str
    """The variant that gates are about."""
    main_metric: str
    lower_is_better: tuple[str, ...]
    """Metrics of which less is better."""
    variants: tuple[VariantResult, ...]
    pairings: tuple[Pairing, ...]
    """Of the candidate with every other variant."""
    judged: tuple[JudgedPair, ...]
    judge_error: str
    """Why it was asked no further; empty: it was heard out."""
    rows: tuple[RowResult, ...]

    def variant(self, name: str) -> VariantResult | None:
        return next((one for one in self.variants if one.name == name), None)

    def worst(self, most: int) -> list[RowResult]:
        """Rows on which the candidate is worst, those first on which others are better."""
        wrong = [row for row in self.rows if row.answers[self.candidate] != row.wanted]
        return sorted(wrong, key=self._standing)[:most]

    def _standing(self, row: RowResult) -> tuple[float, float]:
        own = row.scores[self.candidate]
        return own, own - max(row.scores.values())

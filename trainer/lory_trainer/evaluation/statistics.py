"""How sure is a figure? Bootstrap intervals, and pairs of variants row by row.

Pure arithmetic from a seed. It must not know what was measured.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

NUM_RESAMPLES = 1000
SHARE_OUTSIDE = 0.05


@dataclass(frozen=True, slots=True)
class Estimate:
    """A total over rows, and where it lies in 95 of 100 resamples of them."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Pairing:
    """Two variants on the same rows, by one metric."""

    metric: str
    first: str
    second: str
    wins: int
    """Rows on which the first is better."""
    ties: int
    losses: int
    p: float
    """Of the sign test: how likely so uneven a count is, were both equally good."""


def estimate(
    measured: Sequence[Any], total: Callable[[Sequence[Any]], float], seed: int
) -> Estimate:
    rng = Random(seed)
    resampled = sorted(total(rng.choices(measured, k=len(measured))) for _ in range(NUM_RESAMPLES))
    outside = SHARE_OUTSIDE / 2
    low, high = percentile(resampled, outside), percentile(resampled, 1 - outside)
    return Estimate(total(measured), low, high)


def percentile(ordered: Sequence[float], share: float) -> float:
    """Between the two nearest values, by distance."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    if ordered[below] == ordered[above]:
        return ordered[below]
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def pair(metric: str, first: str, second: str, scores: Sequence[tuple[float, float]]) -> Pairing:
    """`scores` are those of the two on each row, higher is better."""
    wins = sum(a > b for a, b in scores)
    losses = sum(a < b for a, b in scores)
    ties = len(scores) - wins - losses
    return Pairing(metric, first, second, wins, ties, losses, sign_test(wins, losses))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided and exact; ties tell nothing."""
    num = wins + losses
    ways = tail = 1
    for k in range(min(wins, losses)):
        ways = ways * (num - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**num)

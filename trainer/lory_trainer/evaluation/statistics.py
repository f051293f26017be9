"""How sure is a figure? Intervals, and pairs of variants row by row.

A share of rows has Wilson's interval, every other figure that of resampled rows, which knows
nothing where all rows are alike: there a figure of 0 or 1 has Wilson's, too. Pure arithmetic from a
seed. It must not know what was measured.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

NUM_RESAMPLES = 1000
SHARE_OUTSIDE = 0.05
NORMAL_QUANTILE = 1.959963984540054
"""Of half of SHARE_OUTSIDE."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A total over rows, and the 95% interval around it."""

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
    measured: Sequence[Any],
    total: Callable[[Sequence[Any]], float],
    seed: int,
    *,
    scores: Sequence[float] = (),
    is_bounded: bool = False,
) -> Estimate:
    """`scores`: of the rows, if the total is their mean; `is_bounded`: it is between 0 and 1."""
    value = total(measured)
    is_share = bool(scores) and all(score in (0, 1) for score in scores)
    if is_share or (is_bounded and value in (0, 1)):
        return Estimate(value, *wilson(value, len(measured)))
    rng = Random(seed)
    resampled = sorted(total(rng.choices(measured, k=len(measured))) for _ in range(NUM_RESAMPLES))
    outside = SHARE_OUTSIDE / 2
    low, high = percentile(resampled, outside), percentile(resampled, 1 - outside)
    return Estimate(value, low, high)


def wilson(share: float, num: int) -> tuple[float, float]:
    """The shares that are not surprised, at SHARE_OUTSIDE, by one of `share` in `num` rows (Wilson
    1927)."""
    square = NORMAL_QUANTILE**2
    middle = (share + square / (2 * num)) / (1 + square / num)
    spread = share * (1 - share) / num + square / (4 * num * num)
    around = NORMAL_QUANTILE * math.sqrt(spread) / (1 + square / num)
    low = 0.0 if share == 0 else max(0.0, middle - around)
    return low, 1.0 if share == 1 else min(1.0, middle + around)


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

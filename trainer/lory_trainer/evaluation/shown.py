"""Figures as people read them: one row a figure, one column a variant; for terminal and page alike.

It must not know colours or markup.
"""

from dataclasses import dataclass

from lory_trainer.evaluation.results import Evaluation, VariantResult
from lory_trainer.evaluation.statistics import Pairing

NONE = "-"
FEW_ROWS = 20
FEW = "; so few rows tell little"
UNBOUNDED = ("perplexity",)
"""Metrics that are no shares."""


@dataclass(frozen=True, slots=True)
class Line:
    """A figure of every variant."""

    name: str
    cells: tuple[str, ...]


def score_lines(result: Evaluation) -> list[Line]:
    """Each with its interval."""
    names = dict.fromkeys(name for variant in result.variants for name in variant.scores)
    return [
        Line(name, tuple(_score(name, variant) for variant in result.variants)) for name in names
    ]


def spent_lines(result: Evaluation) -> list[Line]:
    variants = result.variants
    lines = [
        Line("latency p50", tuple(_seconds(v.spent.latency_p50_s) for v in variants)),
        Line("latency p95", tuple(_seconds(v.spent.latency_p95_s) for v in variants)),
        Line("tokens in", tuple(f"{v.spent.prompt_tokens:,}" for v in variants)),
        Line("tokens out", tuple(f"{v.spent.generated_tokens:,}" for v in variants)),
    ]
    if result.price_per_hour:
        per_million = tuple(_cost(v.spent.cost_per_million_tokens) for v in variants)
        per_correct = tuple(_cost(v.spent.cost_per_correct) for v in variants)
        lines.append(Line("cost, 1M tokens", per_million))
        lines.append(Line("cost, correct one", per_correct))
    if any(variant.num_cut for variant in variants):
        lines.append(Line("cut at the limit", tuple(str(v.num_cut) for v in variants)))
    return lines


def duel(pairing: Pairing) -> tuple[str, ...]:
    """Metric, with whom, counts, and how sure it is."""
    counts = (pairing.wins, pairing.ties, pairing.losses)
    return (pairing.metric, pairing.second, *map(str, counts), chance(pairing.p))


def chance(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def how(result: Evaluation) -> str:
    """What was done, in a line."""
    sampling = "greedy" if result.is_greedy else "as each adapter's defaults say"
    return (
        f"{len(result.rows)} rows of {result.data}, {sampling}, seed {result.seed}, at most"
        f" {result.max_new_tokens} new tokens, {result.concurrency} at once, base {result.base};"
        " in brackets: 95% intervals" + (FEW if len(result.rows) < FEW_ROWS else "")
    )


def base_warning(result: Evaluation) -> str:
    """Empty, or that figures are of another base."""
    if result.base_matches is not False:
        return ""
    return f"{result.candidate} was trained on another base than the one that answered here"


def _score(name: str, variant: VariantResult) -> str:
    found = variant.scores.get(name)
    if found is None:
        return NONE
    if name in UNBOUNDED:
        return f"{_number(found.value)} ({_number(found.low)}-{_number(found.high)})"
    return f"{found.value:.1%} ({found.low * 100:.0f}-{found.high * 100:.0f})"


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:.3g}"


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 10 else f"{value:.1f} s"


def _cost(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}"

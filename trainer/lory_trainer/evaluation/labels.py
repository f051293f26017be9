"""Answers that are labels: accuracy, macro F1, and what was taken for what.

It must not know texts beyond their ends: a label is the whole answer without white space around.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

from lory_trainer.evaluation.metrics import Metric, mean

OTHER = "(other)"
"""An answer that is nobody's label; in more brackets where that is a label itself."""

Labelled = tuple[str, str]
"""The label that was given, and the wanted one."""


def label_metrics(wanted: Sequence[str]) -> list[Metric]:
    """Of a set whose labels are those wanted of its rows."""
    labels, other = frozenset(text.strip() for text in wanted), OTHER
    while other in labels:
        other = f"({other})"
    measure = partial(_labelled, labels=labels, other=other)
    return [
        Metric("label.accuracy", measure, _accuracy, _is_right, scale="rows"),
        Metric("label.macro_f1", measure, macro_f1, _is_right),
    ]


def confusion(rows: Sequence[Labelled]) -> Mapping[str, Mapping[str, int]]:
    """How often each wanted label was taken for which."""
    found: dict[str, Counter[str]] = {label: Counter() for label in sorted({w for _, w in rows})}
    for given, wanted in rows:
        found[wanted][given] += 1
    return {wanted: dict(sorted(counts.items())) for wanted, counts in found.items()}


def macro_f1(rows: Sequence[Labelled]) -> float:
    """The mean over wanted labels, rare ones counting as much as frequent ones."""
    given, wanted = Counter(g for g, _ in rows), Counter(w for _, w in rows)
    right = Counter(w for g, w in rows if g == w)
    return mean([2 * right[label] / (given[label] + num) for label, num in wanted.items()])


def _labelled(answer: str, wanted: str, labels: frozenset[str], other: str) -> Labelled:
    given = answer.strip()
    return given if given in labels else other, wanted.strip()


def _accuracy(rows: Sequence[Labelled]) -> float:
    return mean([_is_right(row) for row in rows])


def _is_right(row: Labelled) -> float:
    return float(row[0] == row[1])

"""Which metrics there are, by the names that flags, YAML and gates call them.

    exact_match  normalized_match  contains  regex=PATTERN  label  rouge_l  bleu  perplexity
    json_valid  json_fields  json_schema=FILE

It must not know how answers come about.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from lory_trainer.evaluation import json_answers, labels, overlap, perplexity
from lory_trainer.evaluation.errors import EvaluationError
from lory_trainer.evaluation.metrics import (
    Metric,
    averaged,
    contains,
    exact_match,
    matches,
    normalized_match,
)

PLAIN: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        averaged("exact_match", exact_match),
        averaged("normalized_match", normalized_match),
        averaged("contains", contains),
        json_answers.JSON_VALID,
        json_answers.JSON_FIELDS,
        overlap.ROUGE_L,
        overlap.BLEU,
        perplexity.PERPLEXITY,
    )
}
NAMES = (*PLAIN, "label", "regex=PATTERN", "json_schema=FILE")


def make_metrics(specs: Sequence[str], wanted: Sequence[str]) -> list[Metric]:
    """The metrics that were asked for, in that order; `wanted` are the answers of all rows."""
    metrics = [metric for spec in specs for metric in _metrics(spec, wanted)]
    names = [metric.name for metric in metrics]
    for name in names:
        if names.count(name) > 1:
            raise EvaluationError(f"metric {name} is asked for twice")
    return metrics


def _metrics(spec: str, wanted: Sequence[str]) -> list[Metric]:
    name, _, argument = spec.partition("=")
    if spec in PLAIN:
        return [PLAIN[spec]]
    if spec == "label":
        return labels.label_metrics(wanted)
    if name == "regex" and argument:
        return [averaged("regex", _compiled(argument))]
    if name == "json_schema" and argument:
        return [json_answers.json_schema(Path(argument))]
    near = difflib.get_close_matches(name, [known.partition("=")[0] for known in NAMES], n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(NAMES)}"
    raise EvaluationError(f"no metric is called {spec!r}; {hint}")


def _compiled(pattern: str) -> Callable[[str, str], float]:
    try:
        return matches(pattern)
    except re.error as error:
        raise EvaluationError(f"regex={pattern}: not a regular expression: {error}") from error

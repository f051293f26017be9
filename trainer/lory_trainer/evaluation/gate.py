"""Gates: conditions on figures that have to hold, or nothing is published.

    exact_match >= 0.9      exact_match > base      perplexity < base      latency_p95_s <= 0.5
    json_schema.valid >= base + 0.05      label.macro_f1 > support@prod

A gate is about the candidate, the first adapter. It must not know how figures came about.
"""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from lory_trainer.evaluation.errors import EvaluationError
from lory_trainer.evaluation.results import Evaluation, GateResult

Compare = Callable[[float, float], bool]

_OPERATORS: dict[str, Compare] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
_NUMBER = r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
_GATE = re.compile(
    rf"\s*(?P<figure>[a-z_0-9.]+)\s*(?P<sign>>=|<=|==|>|<)\s*"
    rf"(?:(?P<number>{_NUMBER})"
    rf"|(?P<variant>[A-Za-z][^\s]*)(?:\s+(?P<plus>[+-])\s+(?P<offset>{_NUMBER}))?)\s*"
)


@dataclass(frozen=True, slots=True)
class Gate:
    text: str
    figure: str
    sign: str
    variant: str
    """Empty: it is compared with `number` alone."""
    number: float
    """Or what is added to the variant's figure."""

    def check(self, result: Evaluation) -> GateResult:
        """Raises EvaluationError for a figure or a variant that there is not."""
        got = _figure(result, result.candidate, self.figure)
        limit, shown = self.number, f"{self.number:g}"
        if self.variant:
            limit += _figure(result, self.variant, self.figure)
            shown = f"{limit:.4g} ({self.variant})"
        holds = _OPERATORS[self.sign](got, limit)
        return GateResult(self.text, holds, f"{self.figure} is {got:.4g}, against {shown}")


def parse_gate(text: str) -> Gate:
    found = _GATE.fullmatch(text)
    if found is None:
        raise EvaluationError(
            f"gate {text!r}: write FIGURE SIGN NUMBER or FIGURE SIGN VARIANT, such as"
            " 'exact_match >= 0.9' or 'exact_match > base + 0.05'"
        )
    number = float(found["number"] or found["offset"] or 0)
    signed = -number if found["plus"] == "-" else number
    return Gate(text.strip(), found["figure"], found["sign"], found["variant"] or "", signed)


def _figure(result: Evaluation, variant: str, name: str) -> float:
    found = result.variant(variant)
    if found is None:
        known = ", ".join(one.name for one in result.variants)
        raise EvaluationError(f"gate: there is no variant {variant!r}; there are {known}")
    value = found.figure(name)
    if not isinstance(value, int | float):
        known = ", ".join((*found.scores, "latency_p95_s", "cost_per_million_tokens"))
        raise EvaluationError(f"gate: {variant} has no figure {name!r}; there are {known}")
    return value

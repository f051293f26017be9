"""Gates: conditions on figures that have to hold, or nothing is published.

    exact_match >= 0.9      exact_match > base      perplexity < base      latency_p95_s <= 0.5
    json_schema.valid >= base + 0.05      label.macro_f1 > support@prod
    exact_match > base (p < 0.05)

The last one asks as well that more rows are won than lost, by more than chance. A gate is about the
candidate, the first adapter. It must not know how figures came about.
"""

import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from lory_trainer.evaluation.errors import EvaluationError
from lory_trainer.evaluation.results import Evaluation, GateResult
from lory_trainer.evaluation.statistics import Pairing

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
    rf"|(?P<variant>(?!(?:{_NUMBER})(?!\S))[^\s<>=()]+)"
    rf"(?:\s+(?P<plus>[+-])\s+(?P<offset>{_NUMBER}))?"
    rf"(?:\s+\(\s*p\s*<\s*(?P<chance>{_NUMBER})\s*\))?)\s*"
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
    chance: float | None = None
    """The sign test's p must be below; None: rows are not compared."""

    def check_names(self, candidate: str, figures: Mapping[str, Collection[str]]) -> None:
        """`figures`: which there will be, by variant. Raises EvaluationError for any other."""
        for variant in filter(None, (candidate, self.variant)):
            if variant not in figures:
                raise _no_variant(variant, figures)
            if self.figure not in figures[variant]:
                raise _no_figure(variant, self.figure, figures[variant])

    def check(self, result: Evaluation) -> GateResult:
        """Raises EvaluationError for a figure or a variant that there is not."""
        got = _figure(result, result.candidate, self.figure)
        limit, shown = self.number, f"{self.number:g}"
        if self.variant:
            limit += _figure(result, self.variant, self.figure)
            shown = f"{limit:.4g} ({self.variant})"
        holds = _OPERATORS[self.sign](got, limit)
        told = f"{self.figure} is {got:.4g}, against {shown}"
        if self.chance is not None:
            pairing = _pairing(result, self.figure, self.variant)
            holds = holds and pairing.wins > pairing.losses and pairing.p < self.chance
            told += f"; {pairing.wins} rows won, {pairing.losses} lost, p {pairing.p:.3g}"
        return GateResult(self.text, holds, told)


def parse_gate(text: str) -> Gate:
    found = _GATE.fullmatch(text)
    if found is None:
        raise EvaluationError(
            f"gate {text!r}: write FIGURE SIGN NUMBER or FIGURE SIGN VARIANT, such as"
            " 'exact_match >= 0.9' or 'exact_match > base + 0.05'"
        )
    number = float(found["number"] or found["offset"] or 0)
    signed = -number if found["plus"] == "-" else number
    variant, chance = found["variant"] or "", found["chance"]
    return Gate(
        text.strip(),
        found["figure"],
        found["sign"],
        variant,
        signed,
        float(chance) if chance else None,
    )


def _figure(result: Evaluation, variant: str, name: str) -> float:
    found = result.variant(variant)
    if found is None:
        raise _no_variant(variant, [one.name for one in result.variants])
    value = found.figure(name)
    if not isinstance(value, int | float):
        raise _no_figure(variant, name, found.scores)
    return value


def _pairing(result: Evaluation, metric: str, other: str) -> Pairing:
    for pairing in result.pairings:
        if (pairing.metric, pairing.second) == (metric, other):
            return pairing
    raise EvaluationError(
        f"gate: rows are not compared by {metric!r} with {other!r}; leave (p < ...) out"
    )


def _no_variant(name: str, known: Collection[str]) -> EvaluationError:
    return EvaluationError(f"gate: there is no variant {name!r}; there are {', '.join(known)}")


def _no_figure(variant: str, name: str, known: Collection[str]) -> EvaluationError:
    listed = ", ".join(dict.fromkeys((*known, "latency_p95_s", "cost_per_million_tokens")))
    hint = "; costs need --price-per-hour" if name.startswith("cost_") else ""
    return EvaluationError(f"gate: {variant} has no figure {name!r}; there are {listed}{hint}")

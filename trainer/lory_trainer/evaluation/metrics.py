"""How good is an answer? Text metrics, and what any metric is: measured by row, totalled over rows.

What is measured of a row is kept, so that totals of resampled rows cost no second look at texts.
It must not know prompts or servers.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Measured = Any
"""Of one row: a number, or what a total needs."""
Source = Literal["answer", "logprobs"]
Scale = Literal["rows", "bounded", "free"]
"""The total is the mean of row scores between 0 and 1; is between 0 and 1; may be anything."""


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    measure: Callable[[Any, str], Measured]
    """What was got of a row (its answer; or log-probabilities of the wanted one), and what was
    wanted."""
    total: Callable[[Sequence[Measured]], float]
    row_score: Callable[[Measured], float]
    """Of one row alone, higher is better: for comparing two variants row by row."""
    is_better_high: bool = True
    scale: Scale = "bounded"
    may_refuse: bool = False
    """`measure` raises EvaluationError for wanted answers that it cannot take."""
    source: Source = "answer"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def averaged(name: str, score: Callable[[str, str], float], *, may_refuse: bool = False) -> Metric:
    """A metric whose total is the mean over rows."""
    return Metric(name, score, mean, float, scale="rows", may_refuse=may_refuse)


def exact_match(answer: str, wanted: str) -> float:
    return float(answer == wanted)


def normalized(text: str) -> str:
    """Without case, punctuation, and differences in white space."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    bare = "".join(" " if unicodedata.category(c)[0] == "P" else c for c in folded)
    return " ".join(bare.split())


def normalized_match(answer: str, wanted: str) -> float:
    """Of a wanted answer that is punctuation alone nothing would be left to compare."""
    bare = normalized(wanted)
    return float(normalized(answer) == bare if bare else answer.strip() == wanted.strip())


def contains(answer: str, wanted: str) -> float:
    return float(wanted in answer)


def matches(pattern: str) -> Callable[[str, str], float]:
    """Whether a regular expression is found in the answer; what is wanted does not matter."""
    compiled = re.compile(pattern, re.DOTALL)
    return lambda answer, wanted: float(compiled.search(answer) is not None)

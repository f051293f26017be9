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
    source: Source = "answer"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def averaged(name: str, score: Callable[[str, str], float]) -> Metric:
    """A metric whose total is the mean over rows."""
    return Metric(name, score, mean, float)


def exact_match(answer: str, wanted: str) -> float:
    return float(answer == wanted)


def normalized(text: str) -> str:
    """Without case, punctuation, and differences in white space."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    bare = "".join(" " if unicodedata.category(c)[0] == "P" else c for c in folded)
    return " ".join(bare.split())


def normalized_match(answer: str, wanted: str) -> float:
    return float(normalized(answer) == normalized(wanted))


def contains(answer: str, wanted: str) -> float:
    return float(wanted in answer)


def matches(pattern: str) -> Callable[[str, str], float]:
    """Whether a regular expression is found in the answer; what is wanted does not matter."""
    compiled = re.compile(pattern, re.DOTALL)
    return lambda answer, wanted: float(compiled.search(answer) is not None)

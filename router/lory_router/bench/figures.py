"""From outcomes to figures: percentiles, rates, and medians over repetitions.

It must not know where outcomes come from or how figures are shown.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lory_router.bench.load import Outcome

PERCENTILES = (50, 90, 99)

DEFINITIONS = {
    "output_tokens_per_s": "tokens counted from the replies' usage / wall_s, prompts not counted",
    "wall_s": "from the first request sent to the last reply received",
    "latency_s": "from before the connection is opened to the end of the reply",
    "ttft_s": "from before the connection is opened to the first event with text",
    "tpot_s": "per request: (last event - first event) / (output tokens - 1)",
    "itl_s": "gaps between events with text, of all requests together",
    "late_s": "open loop: how long after its time a request was sent",
    "percentiles": "nearest rank",
    "clean": "whether other processes used less than 0.2 cores; null where nobody can say",
}


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[max(math.ceil(percent / 100 * len(ordered)), 1) - 1]


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Percentiles and the largest; None where there are none."""
    found = list(values)
    if not found:
        return None
    shown = {f"p{percent}": percentile(found, percent) for percent in PERCENTILES}
    return {name: round(value, 5) for name, value in (shown | {"max": max(found)}).items()}


def summarise(outcomes: Sequence[Outcome], wall_s: float) -> dict[str, Any]:
    """One repetition in figures. Failed requests count in `failures` and nowhere else."""
    answered = [outcome for outcome in outcomes if not outcome.failure]
    output_tokens = sum(outcome.usage.output_tokens for outcome in answered)
    return {
        "wall_s": round(wall_s, 4),
        "requests": len(outcomes),
        "answered": len(answered),
        "failures": dict(Counter(outcome.failure for outcome in outcomes if outcome.failure)),
        "base_requests": sum(not outcome.adapter for outcome in outcomes),
        "adapters_used": len({outcome.adapter for outcome in outcomes if outcome.adapter}),
        "prompt_tokens": sum(outcome.usage.prompt_tokens for outcome in answered),
        "output_tokens": output_tokens,
        "output_tokens_per_s": round(output_tokens / wall_s, 2),
        "requests_per_s": round(len(answered) / wall_s, 3),
        "latency_s": spread(outcome.latency_s for outcome in answered),
        "ttft_s": spread(o.ttft_s for o in answered if o.ttft_s is not None),
        "tpot_s": spread(o.tpot_s for o in answered if o.tpot_s is not None),
        "itl_s": spread(gap for outcome in answered for gap in outcome.gaps_s),
        "late_s": spread(outcome.late_s for outcome in outcomes),
    }


def medians(repetitions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The median of every figure that each repetition has, nested ones too."""
    found: dict[str, Any] = {}
    for name, first in repetitions[0].items():
        values = [repetition[name] for repetition in repetitions]
        if isinstance(first, Mapping):
            if name != "failures" and all(isinstance(value, Mapping) for value in values):
                found[name] = medians(values)
        elif all(_is_number(value) for value in values):
            found[name] = round(statistics.median(values), 5)
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

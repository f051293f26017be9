"""Findings as lines of text, and as what JSON can hold.

A line is one contender of one case; a case's limit stands with each. It must not know how anything
was measured.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from lory_kernels.bench.clock import Times
from lory_kernels.bench.limits import Limits
from lory_kernels.bench.measure import CaseFindings, Finding

HEADS = (
    "op", "shape", "rows", "ranks", "popularity", "who", "median us", "p10..p90", "warm us", "MB",
    "of limit", "to ref.", "error", "allowed",
)  # fmt: skip
NOTE_CHARACTERS = 200
_WIDTHS = (10, 34, 5, 16, 10, 31, 10, 20, 9, 9, 8, 8, 8, 8)


def heading() -> str:
    return _line(HEADS)


def lines(case: CaseFindings) -> Iterator[str]:
    for finding in case.findings:
        yield _line(_cells(case, finding))
        if finding.note:
            first = finding.note.splitlines()[0]
            yield f"    {finding.contender} failed: {first[:NOTE_CHARACTERS]}"
        if finding.per_step is not None:
            micros = finding.per_step.median_s * 1e6
            yield f"    {finding.contender}: {micros:.1f} us more for each step's metadata"
    if not case.is_proved:
        yield f"    unproved: a spoiled input gives an error of {case.wrong_error:.1e} only"


def described_limits(limits: Limits) -> str:
    return (
        f"limits: copy {limits.copy_bytes_per_s / 1e9:.1f} GB/s, read "
        f"{limits.read_bytes_per_s / 1e9:.1f} GB/s, products {limits.flops_per_s / 1e9:.0f} "
        "GFLOP/s; a case's limit is the larger of its bytes over the better rate and its products "
        "over theirs"
    )


def limits_json(limits: Limits) -> dict[str, float]:
    return asdict(limits) | {"bytes_per_s": limits.bytes_per_s}


def as_json(case: CaseFindings) -> dict[str, Any]:
    """Seconds, bytes, plain names; null for what is not finite."""
    return {
        **asdict(case.label),
        "num_bytes": case.num_bytes,
        "flops": case.flops,
        "limit_s": case.limit_s,
        "tolerance": case.tolerance,
        "wrong_error": _finite(case.wrong_error),
        "facts": dict(case.facts),
        "passed": case.passed,
        "contenders": [_finding_json(case, finding) for finding in case.findings],
    }


def _finding_json(case: CaseFindings, finding: Finding) -> dict[str, Any]:
    found = asdict(finding) | {"error": _finite(finding.error)}
    return found | {"of_limit": _of_limit(case, finding)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _main_times(finding: Finding) -> Times | None:
    """Cold where there is a cold figure."""
    if finding.timing is None:
        return None
    return finding.timing.cold or finding.timing.warm


def _of_limit(case: CaseFindings, finding: Finding) -> float | None:
    times = _main_times(finding)
    return None if times is None else case.limit_s / times.median_s


def _cells(case: CaseFindings, finding: Finding) -> Iterable[str]:
    label = case.label
    yield from (label.op, label.shape, str(label.rows))
    yield from (label.ranks, label.popularity, finding.contender)
    times, timing = _main_times(finding), finding.timing
    if times is None or timing is None:
        yield from (finding.status.upper(), "", "")
    else:
        mark = "" if timing.cold is not None else " warm"
        spread = f"{times.p10_s * 1e6:.1f}..{times.p90_s * 1e6:.1f}{mark}"
        yield from (f"{times.median_s * 1e6:.1f}", spread, f"{timing.warm.median_s * 1e6:.1f}")
    yield f"{case.num_bytes / 1e6:.3f}"
    share, reference_s = _of_limit(case, finding), case.time_of("reference")
    yield "" if share is None else f"{share:.2f}"
    yield "" if times is None or reference_s is None else f"{reference_s / times.median_s:.2f}x"
    yield f"{finding.error:.1e}"
    yield f"{case.tolerance:.0e}"


def _line(cells: Iterable[str]) -> str:
    return " ".join(
        cell.ljust(width) if i < 6 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, _WIDTHS, strict=True))
    ).rstrip()

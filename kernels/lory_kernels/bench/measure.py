"""One case after the other: is each contender's answer right, and only then how long it takes.

A case proves itself first: a spoiled input must give an answer far outside the tolerance. A wrong
answer is called wrong and has no time. It must not know any op, nor what is done with findings.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lory_kernels.bench.case import Case, Contender, Label, Role, cloned
from lory_kernels.bench.clock import Clock, Times, Timing
from lory_kernels.bench.limits import Limits

CAUGHT_FACTOR = 3.0
"""A spoiled answer must be this much further off than the tolerance."""

Status = Literal["right", "wrong", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one contender did in one case."""

    contender: str
    role: Role
    status: Status
    error: float = math.nan
    note: str = ""
    """Why it failed."""
    timing: Timing | None = None
    per_step: Times | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CaseFindings:
    label: Label
    num_bytes: int
    flops: int
    limit_s: float
    tolerance: float
    wrong_error: float
    """What the spoiled input gives; infinite where nothing may change."""
    findings: tuple[Finding, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_proved(self) -> bool:
        """Whether a wrong answer would have been seen."""
        return self.wrong_error > CAUGHT_FACTOR * self.tolerance

    @property
    def passed(self) -> bool:
        """Ours and the reference are right; peers may be what they are."""
        own = [one for one in self.findings if one.role != "peer"]
        return self.is_proved and all(one.status == "right" for one in own)

    def time_of(self, role: Role) -> float | None:
        """The median of the first of this role that was right: cold where there is one."""
        for one in self.findings:
            if one.role == role and one.timing is not None:
                return (one.timing.cold or one.timing.warm).median_s
        return None


@torch.inference_mode()
def measure(case: Case[Any], limits: Limits, clock: Clock) -> CaseFindings:
    inputs = case.make_inputs()
    expected = case.expected(cloned(inputs))
    wrong_error = math.inf
    if case.spoiled is not None:
        wrong_error = error_of(case.expected(case.spoiled(cloned(inputs))), expected)
    findings = tuple(
        _finding(case, contender, inputs, expected, clock) for contender in case.contenders
    )
    return CaseFindings(
        case.label,
        case.num_bytes,
        case.flops,
        limits.of(case),
        case.tolerance,
        wrong_error,
        findings,
        case.facts,
    )


def _finding(
    case: Case[Any],
    contender: Contender[Any],
    inputs: Any,
    expected: tuple[Tensor, ...],
    clock: Clock,
) -> Finding:
    unproved = Finding(contender.name, contender.role, "failed", facts=contender.facts)
    try:
        error = error_of(contender.prepare(cloned(inputs))(), expected)
        if not error <= case.tolerance:
            return replace(unproved, status="wrong", error=error)
        timing = clock.measure(contender, inputs)
        per_step = None
        if contender.per_step is not None:
            per_step = clock.per_step(contender.per_step(cloned(inputs)))
    except Exception as failure:  # noqa: BLE001 - a kernel that fails is a finding, told as such
        return replace(unproved, note=f"{type(failure).__name__}: {failure}")
    return replace(unproved, status="right", error=error, timing=timing, per_step=per_step)


def error_of(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Largest difference over largest magnitude, of the worst tensor; NaN anywhere makes it NaN."""
    errors = [_error_of(*pair) for pair in zip(actual, expected, strict=True)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _error_of(actual: Tensor, expected: Tensor) -> float:
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        raise ValueError(
            f"the answer is {tuple(actual.shape)} of {actual.dtype}, not "
            f"{tuple(expected.shape)} of {expected.dtype}"
        )
    largest = expected.double().abs().max().clamp_min(sys.float_info.min)
    return float((actual.double() - expected.double()).abs().max() / largest)

"""A run: what the machine can do, who is absent, then case after case until the time is used up.

What it finds is said line by line, and given as JSON can hold it. It must not know which cases
there are, nor who asks for them.
"""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lory_kernels.bench import table
from lory_kernels.bench.case import Case, Place
from lory_kernels.bench.clock import Clock, CpuClock, CudaClock, Effort
from lory_kernels.bench.limits import measured_limits
from lory_kernels.bench.measure import measure
from lory_kernels.bench.peers import Peers, find_peers

Say = Callable[[str], None]
Keep = Callable[[dict[str, Any]], None]


def run(
    place: Place,
    effort: Effort,
    peers_folder: Path | None,
    cases_with: Callable[[Peers], Iterable[Case[Any]]],
    say: Say,
    budget_s: float = math.inf,
    keep: Keep = lambda _found: None,
) -> dict[str, Any]:
    """The findings, passed if there are any and all did. No case starts after `budget_s`; those
    not reached are named. `keep` is given all there is after each case, not passed yet."""
    began_s = time.monotonic()
    limits = measured_limits(place)
    peers = find_peers(peers_folder, place)
    _introduce(place, peers, say)
    say(table.described_limits(limits))
    say(table.heading())
    clock = make_clock(place, effort)
    found: list[dict[str, Any]] = []
    not_reached: list[str] = []
    facts = {
        "passed": False,
        "backend": place.backend,
        "dtype": str(place.dtype).removeprefix("torch."),
        "is_interpreted": place.is_interpreted,
        "limits": table.limits_json(limits),
        "absent": list(peers.absent),
        "not_reached": not_reached,
        "cases": found,
    }
    passed = True
    for case in cases_with(peers):
        if time.monotonic() - began_s >= budget_s:
            not_reached.append(str(case.label))
            say(f"not reached within {budget_s:g} s: {case.label}")
            continue
        findings = measure(case, limits, clock)
        for line in table.lines(findings):
            say(line)
        passed = passed and findings.passed
        found.append(table.as_json(findings))
        keep(facts)
    return facts | {"passed": passed and bool(found)}


def make_clock(place: Place, effort: Effort) -> Clock:
    if place.device.type == "cuda":
        return CudaClock(effort, place.device)
    return CpuClock(effort, can_be_cold=not place.is_interpreted)


def _introduce(place: Place, peers: Peers, say: Say) -> None:
    if place.is_interpreted:
        say("Triton's interpreter: its answers count, its times mean nothing")
    for absent in peers.absent:
        say(f"skipped: {absent}")

"""What a device does in some steps, kernel by kernel, and to which part of a step each belongs.

A profiler tells kernels by name. Ours have names of their own; products of cuBLAS and what torch
launches are told apart by where they stand: after the last norm of a step come head and sampler.
It must not know what the steps are.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import torch

from benchmarks.gpu_base import synchronize

PARTS = ("linears", "head", "lora", "attention", "elementwise", "sampling", "copies")
"""`head` is the product of the logits. `elementwise`: norms, rotary embedding with the write of
keys and values, activations, and the embedding."""

KERNELS = {
    "shrink_kernel": "lora",
    "expand_kernel": "lora",
    "attention_kernel": "attention",
    "join_kernel": "attention",
    "norm_kernel": "elementwise",
    "gated_kernel": "elementwise",
    "rope_kernel": "elementwise",
    "matmul_kernel": "linears",
    "reduce_kernel": "linears",
}
"""Ours, by their whole names: C++ has a reduce_kernel of its own, with a signature behind it."""
NORM = "norm_kernel"
PRODUCTS = (
    "gemm", "gemv", "nvjet", "cutlass", "cublas", "xmma", "splitk", "dequantize",
    "aten::linear", "aten::mm", "bitsandbytes::",
)  # fmt: skip
"""Parts of the names of products that are not ours, in small letters."""
COPIES = ("memcpy", "memset")
STARTS_WITH = "spin_kernel"
"""The mark before each step: the device is held up (torch.cuda._sleep). It is no part of any."""
HEAD_START_CYCLES = 2_000_000
"""About a millisecond, four times what the host takes to send a step."""
SHOWN_KERNELS = 12
SHOWN_CHARS = 80


@dataclass(frozen=True, slots=True)
class Span:
    """A kernel or a copy on the device; on a CPU, an op."""

    name: str
    began_us: float
    ended_us: float

    @property
    def ms(self) -> float:
        return (self.ended_us - self.began_us) / 1e3


@dataclass(frozen=True)
class Trace:
    """All that was done in so many steps."""

    spans: tuple[Span, ...]
    """In order of their beginnings."""
    steps: int

    def parts_ms(self) -> dict[str, float]:
        """Of one step on the average."""
        found: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        for step in _cut(self.spans):
            for span, part in _with_parts(step):
                found[part] += span.ms / self.steps
        return {part: round(value, 4) for part, value in found.items()}

    def busy_ms(self) -> float:
        """In which anything of a step runs; what runs side by side counts once."""
        busy_us, reached_us = 0.0, float("-inf")
        for span in self._own():
            busy_us += max(0.0, span.ended_us - max(span.began_us, reached_us))
            reached_us = max(reached_us, span.ended_us)
        return busy_us / 1e3 / self.steps

    def span_ms(self) -> float:
        """From the first beginning to the last end."""
        own = self._own()
        if not own:
            return 0.0
        return (max(span.ended_us for span in own) - own[0].began_us) / 1e3 / self.steps

    def largest_ms(self) -> dict[str, float]:
        """Of each name, the largest first."""
        times: dict[str, float] = defaultdict(float)
        for span in self._own():
            times[span.name[:SHOWN_CHARS]] += span.ms / self.steps
        largest = sorted(times.items(), key=lambda item: item[1], reverse=True)[:SHOWN_KERNELS]
        return {name: round(value, 4) for name, value in largest if value > 0}

    def _own(self) -> list[Span]:
        return [span for span in self.spans if STARTS_WITH not in span.name]


class NoMarksError(RuntimeError):
    """The profile does not show where steps begin."""


def traced(run: Callable[[], object], device: torch.device, steps: int) -> Trace:
    """Steps that follow each other as they come."""
    with _profile(device) as profile:
        for _ in range(steps):
            run()
        synchronize(device)
    return Trace(_spans(profile, device), steps)


def traced_apart(
    runs: Sequence[Callable[[], object]], device: torch.device, steps: int
) -> list[Trace]:
    """Each run so many times. The device waits before each until the host has sent all of it.

    All in one profile: with CUDA graphs a second one may crash. Raises NoMarksError.
    """
    with _profile(device) as profile:
        for run in runs:
            for _ in range(steps):
                _mark(device)
                run()
        synchronize(device)
    _, *apart = _cut(_spans(profile, device))
    if len(apart) != len(runs) * steps:
        raise NoMarksError(f"{len(apart)} steps in a profile of {len(runs) * steps}")
    return [
        Trace(tuple(chain.from_iterable(_marked(apart[at : at + steps]))), steps)
        for at in range(0, len(apart), steps)
    ]


def _mark(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda._sleep(HEAD_START_CYCLES)
    else:
        with torch.profiler.record_function(STARTS_WITH):
            return


def _marked(steps: Sequence[Sequence[Span]]) -> Iterator[tuple[Span, ...]]:
    """With a mark before each, so that they can be cut again."""
    for step in steps:
        began_us = step[0].began_us if step else 0.0
        yield (Span(STARTS_WITH, began_us, began_us), *step)


def _profile(device: torch.device) -> torch.profiler.profile:
    activity = torch.profiler.ProfilerActivity
    synchronize(device)
    kind = activity.CUDA if device.type == "cuda" else activity.CPU
    return torch.profiler.profile(activities=[kind], acc_events=True)


def _spans(profile: torch.profiler.profile, device: torch.device) -> tuple[Span, ...]:
    found: list[Span] = []
    for event in profile.events() or ():
        on_device = event.device_type.name == "CUDA"
        if on_device if device.type == "cuda" else event.cpu_parent is None:
            found.append(Span(event.name, event.time_range.start, event.time_range.end))
    return tuple(sorted(found, key=lambda span: span.began_us))


def _cut(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """At the marks; all in one where there are none."""
    step: list[Span] = []
    for span in spans:
        if STARTS_WITH in span.name:
            yield step
            step = []
        else:
            step.append(span)
    yield step


def _with_parts(step: Sequence[Span]) -> Iterator[tuple[Span, str]]:
    """After the last norm products are the head's, and all else is sampling."""
    ends_at = _ends(step)
    is_past_layers = False
    for place, span in enumerate(step):
        if span.name in KERNELS:
            is_past_layers = place in ends_at
            yield span, KERNELS[span.name]
        elif any(known in span.name.lower() for known in COPIES):
            yield span, "copies"
        elif any(known in span.name.lower() for known in PRODUCTS):
            yield span, "head" if is_past_layers else "linears"
        else:
            yield span, "sampling" if is_past_layers else "elementwise"


def _ends(step: Sequence[Span]) -> set[int]:
    """Places of norms that no kernel of a layer follows before the next norm: the last of steps.
    Within a layer a norm is followed by rotary embedding or an activation."""
    others = (*(name for name in KERNELS if KERNELS[name] != "linears" and name != NORM),)
    marks = [(i, span.name) for i, span in enumerate(step) if span.name in (NORM, *others)]
    followed = [*pairwise(marks), *([(marks[-1], (-1, NORM))] if marks else [])]
    return {i for (i, name), (_, following) in followed if name == NORM and following == NORM}

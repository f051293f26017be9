"""For the tests of the kernel bench: places, ops that are wrong everywhere, and quick measuring."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lory_kernels import Backend, Ops, TorchOps
from lory_kernels.bench.case import Case, Place
from lory_kernels.bench.clock import CpuClock, Effort
from lory_kernels.bench.limits import Limits
from lory_kernels.bench.measure import CaseFindings, measure
from lory_kernels.bench.popularity import POPULARITIES
from lory_kernels.bench.selection import Selection, cases_of
from lory_kernels.bench.sgmv import Ranks
from lory_kernels.bench.shapes import MODELS

LIMITS = Limits(copy_bytes_per_s=1e9, read_bytes_per_s=2e9, flops_per_s=1e10)
ONCE = Effort(seconds=0.0, fewest=1, most=1)


class WrongOps(TorchOps):
    """A tenth too much, or one too many, in every op."""

    def add_rms_norm(self, *arguments: Any, **options: Any) -> Tensor:
        return super().add_rms_norm(*arguments, **options).mul_(1.1)

    def rope_write_kv(self, *arguments: Any, **options: Any) -> None:
        super().rope_write_kv(*arguments, **options)
        arguments[3].mul_(1.1)

    def paged_attention(self, *arguments: Any, **options: Any) -> None:
        super().paged_attention(*arguments, **options)
        arguments[6].mul_(1.1)

    def silu_mul(self, *arguments: Any, **options: Any) -> None:
        super().silu_mul(*arguments, **options)
        arguments[1].mul_(1.1)

    def sgmv(self, *arguments: Any, **options: Any) -> None:
        super().sgmv(*arguments, **options)
        arguments[0][-1].add_(1)


def place(
    backend: Backend = "torch",
    dtype: torch.dtype = torch.float32,
    new_ops: Callable[[], Ops] | None = None,
) -> Place:
    """On the CPU."""
    there = Place.at(backend, torch.device("cpu"), dtype)
    return there if new_ops is None else replace(there, new_ops=new_ops)


def tiny_cases(there: Place, *ops: str, rows: tuple[int, ...] = (5,)) -> Iterator[Case[Any]]:
    selection = Selection(
        models=(MODELS["tiny"],),
        ops=ops,
        rows=rows,
        ranks=(Ranks.parse("mixed"),),
        popularities=tuple(POPULARITIES.values()),
        contexts=(40,),
        prefill=20,
    )
    return cases_of(selection, there)


def quickly(case: Case[Any]) -> CaseFindings:
    """Once, and never cold."""
    return measure(case, LIMITS, CpuClock(ONCE, can_be_cold=False))

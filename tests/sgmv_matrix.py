"""The whole matrix of SGMV: its cells, exact answers, and what backends made of them.

A cell is a workload at a number of rows, over adapters of one rank (or mixed ranks) for one packed
linear. Expected values are made in float64, apart from every backend. A cell counts as right if it
is near them, and as telling if it is far from the answer in which one segment had the adapter of
another slot. This module must not know pytest, nor how a backend is made.
"""

import itertools
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernel_cases import WORKLOADS, SgmvCase, dealt, segments_of, site_table
from lory_kernels import BASE_SLOT, Ops, Segments, SiteTable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROWS = (1, 7, 33, 133, 512)
SHAPES = {
    "896-4864": (896, (4864,)),
    "4864-896": (4864, (896,)),
    "576-960+192+192": (576, (960, 192, 192)),
    "960-576": (960, (576,)),
}
"""(in features, out features of each slice)."""
RANKS = {str(rank): (rank,) for rank in (1, 3, 8, 16, 33, 64, 100, 256)} | {
    "mixed": (16, 1, 64, 3, 0, 8, 256, 33, 100)
}
PROPERTY = "sgmv_matrix"
"""Under which a test hands over what it found, for --record-matrix."""
NUM_SLOTS = max(ROWS)
NUM_ADAPTERS = 9
"""Slots share so many sets of factors; every slot has a scale of its own."""


@dataclass(frozen=True)
class Adapters:
    """What the slots hold, for the backends and in float64."""

    site: SiteTable
    pool: Tensor
    max_rank: int
    factors: Sequence[Sequence[tuple[Tensor, Tensor]]]
    """A and B by adapter and slice."""

    def update(self, x_TH: Tensor, slot_T: Tensor) -> Tensor:
        """What the slots' adapters add, in float64."""
        added_TN = torch.zeros(x_TH.shape[0], sum(self.site.out_features), dtype=torch.float64)
        for adapter, slices in enumerate(self.factors):
            rows = ((slot_T != BASE_SLOT) & (slot_T % NUM_ADAPTERS == adapter)).nonzero()[:, 0]
            for k, (a_RH, b_RN) in enumerate(slices if len(rows) else ()):
                scale_T1 = self.site.scale_SK[slot_T[rows], k].double()[:, None]
                columns = slice(self.site.out_offsets[k], self.site.out_offsets[k] + b_RN.shape[1])
                added_TN[rows, columns] = x_TH[rows].double() @ a_RH.T @ b_RN * scale_T1
        return added_TN


def adapters_for(shape: str, rank: str, dtype: torch.dtype) -> Adapters:
    in_features, out_features = SHAPES[shape]
    ranks = RANKS[rank]
    generator = torch.Generator().manual_seed(len(shape) + max(ranks))
    ranks_SK = dealt(ranks, NUM_ADAPTERS, len(out_features))
    few, pool = site_table(generator, dtype, in_features, out_features, ranks_SK)
    factors = [
        [_factors(few, pool, adapter, k) for k in range(len(out_features))]
        for adapter in range(NUM_ADAPTERS)
    ]
    shared = torch.arange(NUM_SLOTS) % NUM_ADAPTERS
    site = replace(
        few,
        a_offset_SK=few.a_offset_SK[shared],
        b_offset_SK=few.b_offset_SK[shared],
        rank_SK=few.rank_SK[shared],
        scale_SK=torch.rand(NUM_SLOTS, len(out_features), generator=generator) + 0.5,
    )
    return Adapters(site, pool, max(ranks), factors)


def _factors(site: SiteTable, pool: Tensor, slot: int, k: int) -> tuple[Tensor, Tensor]:
    rank, width = int(site.rank_SK[slot, k]), site.out_features[k]
    a, b = int(site.a_offset_SK[slot, k]), int(site.b_offset_SK[slot, k])
    return (
        pool[a : a + rank * site.in_features].view(rank, site.in_features).double(),
        pool[b : b + rank * width].view(rank, width).double(),
    )


@dataclass(frozen=True)
class Cell:
    """One case, its exact answer, and the rows of one segment as another adapter has them."""

    case: SgmvCase
    expected_TN: Tensor
    swapped_rows: slice
    swapped_TN: Tensor
    base_T: Tensor

    @classmethod
    def draw(cls, adapters: Adapters, workload: str, rows: int, dtype: torch.dtype) -> "Cell":
        """x is NaN in base rows: nobody reads them."""
        site, generator = adapters.site, torch.Generator().manual_seed(rows)
        segments = segments_of(workload, rows, NUM_SLOTS, adapters.max_rank, generator)
        x_TH = torch.randn(rows, site.in_features, generator=generator).to(dtype)
        y_TN = torch.randn(rows, sum(site.out_features), generator=generator).to(dtype)
        slot_T = segments.slots_G.long().repeat_interleave(segments.starts_G1.diff())
        chosen = _segment_to_swap(segments)
        other_T = (slot_T[chosen] + 1) % NUM_SLOTS
        case = SgmvCase(
            y_TN,
            torch.where((slot_T == BASE_SLOT)[:, None], math.nan, x_TH),
            site,
            adapters.pool,
            segments,
        )
        return cls(
            case,
            y_TN.double() + adapters.update(x_TH, slot_T),
            chosen,
            y_TN[chosen].double() + adapters.update(x_TH[chosen], other_T),
            slot_T == BASE_SLOT,
        )

    def error_of(self, actual_TN: Tensor) -> float:
        return _distance(actual_TN, self.expected_TN, self.expected_TN)

    def swapped_error_of(self, actual_TN: Tensor) -> float:
        return _distance(actual_TN[self.swapped_rows], self.swapped_TN, self.expected_TN)

    def keeps_base_rows(self, actual_TN: Tensor) -> bool:
        return torch.equal(actual_TN[self.base_T], self.case.y_TN[self.base_T])


def _segment_to_swap(segments: Segments) -> slice:
    """The shortest that has rows and an adapter, or else rows."""
    starts = segments.starts_G1.tolist()
    spans = [
        (slot == BASE_SLOT, end - begin, begin)
        for slot, begin, end in zip(segments.slots_G.tolist(), starts, starts[1:], strict=False)
        if end > begin
    ]
    _, length, begin = min(spans)
    return slice(begin, begin + length)


def _distance(actual: Tensor, expected: Tensor, scale: Tensor) -> float:
    """Largest difference, as a fraction of the largest magnitude; NaN stays NaN."""
    return float((actual.double() - expected).abs().max() / scale.abs().max())


@dataclass
class Tally:
    """What one backend made of some cells."""

    cells: int = 0
    largest_error: float = 0.0
    smallest_swapped_error: float = math.inf
    changed_base_rows: int = 0
    repeated: int = 0
    unequal_repeats: int = 0
    seconds: float = 0.0

    def add(self, cell: Cell, ops: Ops, repeats: bool) -> None:
        begun = time.perf_counter()
        actual_TN = cell.case.run_apart(ops)
        self.seconds += time.perf_counter() - begun
        error = cell.error_of(actual_TN)
        self.cells += 1
        self.largest_error = max(self.largest_error, math.inf if math.isnan(error) else error)
        self.smallest_swapped_error = min(
            self.smallest_swapped_error, cell.swapped_error_of(actual_TN)
        )
        self.changed_base_rows += not cell.keeps_base_rows(actual_TN)
        if repeats:
            self.repeated += 1
            self.unequal_repeats += not torch.equal(cell.case.run_apart(ops), actual_TN)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


Choice = tuple[str, int, str]
"""Workload, rows and rank."""


def every_choice() -> list[Choice]:
    return list(itertools.product(WORKLOADS, ROWS, RANKS))


def tallies(
    backends: Mapping[str, Ops],
    dtype: torch.dtype,
    shape: str,
    choices: Sequence[Choice],
    repeated_rows: Sequence[int],
) -> dict[str, Tally]:
    """Cells of one shape; those with repeated_rows are computed twice."""
    found = {name: Tally() for name in backends}
    for rank in RANKS:
        mine = [(workload, rows) for workload, rows, of in choices if of == rank]
        adapters = adapters_for(shape, rank, dtype) if mine else None
        for workload, rows in mine:
            assert adapters is not None
            cell = Cell.draw(adapters, workload, rows, dtype)
            for name, ops in backends.items():
                found[name].add(cell, ops, rows in repeated_rows)
    return found


def summary(pieces: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each backend and dtype."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for piece in pieces:
        for backend, found in piece["backends"].items():
            row = rows.setdefault((backend, piece["dtype"]), {})
            for key, value in found.items():
                join = {"largest_error": max, "smallest_swapped_error": min}.get(key, _plus)
                row[key] = join(row[key], value) if key in row else value
    return [
        {"backend": backend, "dtype": dtype, **row}
        for (backend, dtype), row in sorted(rows.items())
    ]


def _plus(a: float, b: float) -> float:
    return round(a + b, 3)

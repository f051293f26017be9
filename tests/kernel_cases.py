"""Inputs for the kernel tests: SGMV by workload, paged attention by shape, and the tolerances.

Everything is drawn from a seed. What no kernel may read is NaN, so that a stray read shows.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lory_kernels import BASE_SLOT, Ops, Segments, SiteTable

# Largest error allowed, as a fraction of the largest magnitude in the expected result.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}

WORKLOADS = ("distinct", "identical", "uniform", "zipf", "skewed", "base_only", "half_base")
ROWS = (1, 7, 33, 133)


def error_of(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over largest magnitude; NaN in either makes it NaN."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    error = error_of(actual, expected)
    assert error <= TOLERANCE[actual.dtype], f"error {error:.2e}"


@dataclass(frozen=True)
class SgmvCase:
    y_TN: Tensor
    x_TH: Tensor
    site: SiteTable
    pool: Tensor
    segments: Segments

    def run(self, ops: Ops) -> Tensor:
        y_TN = self.y_TN.clone()
        ops.sgmv(y_TN, self.x_TH, self.site, self.pool, self.segments)
        return y_TN

    def run_apart(self, ops: Ops) -> Tensor:
        """As `run`; rows of x and y lie apart, and the NaN between those of y stays."""
        x_TH, (y_TN, wide) = _apart(self.x_TH)[0], _apart(self.y_TN)
        ops.sgmv(y_TN, x_TH, self.site, self.pool, self.segments)
        assert int(wide.isnan().sum()) == wide.numel() - y_TN.numel()
        return y_TN


def _apart(rows_TN: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of the rows within NaN, and all of it."""
    rows, width = rows_TN.shape
    wide = torch.full((rows + 2, width + 16), float("nan"), dtype=rows_TN.dtype)
    inside = wide[1:-1, :width]
    inside.copy_(rows_TN)
    return inside, wide


def row_counts(workload: str, rows: int) -> tuple[list[int], list[int]]:
    """(rows of each segment, its slot); slots count from 0, BASE_SLOT stands in between."""
    if workload == "distinct":
        return [1] * rows, list(range(rows))
    if workload == "identical":
        return [rows], [0]
    if workload == "base_only":
        return [rows], [BASE_SLOT]
    if workload == "half_base":
        half = rows // 2
        return [half, rows - half], [BASE_SLOT, 0]
    if workload == "uniform":
        shares = [1.0] * max(1, round(rows**0.5))
    elif workload == "zipf":
        shares = [rank**-1.5 for rank in range(1, min(rows, 20) + 1)]
    else:
        shares = [20.0, 1.0, 1.0]
    counts = [int(rows * share / sum(shares)) for share in shares]
    counts[0] += rows - sum(counts)
    return counts, list(range(len(counts)))


def site_table(
    generator: torch.Generator,
    dtype: torch.dtype,
    in_features: int,
    out_features: Sequence[int],
    ranks_SK: Sequence[Sequence[int]],
) -> tuple[SiteTable, Tensor]:
    """A table over a pool in which adapters lie at true rank with NaN gaps between them."""
    slots, slices, gap = len(ranks_SK), len(out_features), 8
    a_offset, b_offset = torch.zeros(2, slots, slices, dtype=torch.int64)
    chunks, place = [torch.full((gap,), float("nan"))], gap
    for slot, ranks in enumerate(ranks_SK):
        for k, rank in enumerate(ranks):
            a_offset[slot, k], b_offset[slot, k] = place, place + rank * in_features
            size = rank * (in_features + out_features[k])
            values = torch.randn(size, generator=generator) * max(size, 1) ** -0.25
            chunks += [values, torch.full((gap,), float("nan"))]
            place += size + gap
    offsets = [sum(out_features[:k]) for k in range(slices)]
    scale_SK = torch.rand(slots, slices, generator=generator) + 0.5
    rank_SK = torch.tensor(ranks_SK, dtype=torch.int32)
    site = SiteTable(
        in_features,
        tuple(offsets),
        tuple(out_features),
        a_offset,
        b_offset,
        rank_SK,
        scale_SK,
        alignment=math.gcd(gap, in_features, *out_features),
    )
    return site, torch.cat(chunks).to(dtype)


def sgmv_case(
    workload: str,
    rows: int,
    dtype: torch.dtype,
    *,
    in_features: int = 96,
    out_features: Sequence[int] = (64, 32, 32),
    ranks: Sequence[int] = (8,),
    seed: int = 0,
) -> SgmvCase:
    """`ranks` are dealt to the slots in turn, shifted by one per slice; empty segments are mixed in
    and the slots stand in a shuffled order."""
    generator = torch.Generator().manual_seed(seed)
    num_slots = max(max(row_counts(workload, rows)[1]) + 1, 2)
    segments = segments_of(workload, rows, num_slots, max(ranks), generator)
    site, pool = site_table(
        generator, dtype, in_features, out_features, dealt(ranks, num_slots, len(out_features))
    )
    x_TH = torch.randn(rows, in_features, generator=generator).to(dtype)
    y_TN = torch.randn(rows, sum(out_features), generator=generator).to(dtype)
    return SgmvCase(y_TN, x_TH, site, pool, segments)


OUTPUTS = ("both", "gain", "none", "bias")


def with_outputs(case: SgmvCase, kinds: Sequence[str] = OUTPUTS, seed: int = 1) -> SgmvCase:
    """Gains and biases of `kinds`, dealt to the slices of each slot in turn, NaN between them."""
    generator = torch.Generator().manual_seed(seed)
    dtype, site = case.pool.dtype, case.site
    gap = torch.full((4,), float("nan")).view(dtype)
    pieces = [case.pool, case.pool.new_full((case.pool.numel() % 2,), 0), gap]
    place = sum(len(piece) for piece in pieces)
    offsets_SK = {name: torch.full_like(site.a_offset_SK, -1) for name in ("gain", "bias")}
    for slot, k in itertools.product(range(len(site.rank_SK)), range(len(site.out_features))):
        kind = kinds[(slot + k) % len(kinds)]
        for name, offset_SK in offsets_SK.items():
            if kind in (name, "both"):
                vector = torch.randn(site.out_features[k], generator=generator).view(dtype)
                offset_SK[slot, k] = place
                pieces += [vector, gap]
                place += len(vector) + len(gap)
    outputs = {f"{name}_offset_SK": offset_SK for name, offset_SK in offsets_SK.items()}
    return replace(case, site=replace(site, **outputs), pool=torch.cat(pieces))


def dealt(ranks: Sequence[int], num_slots: int, num_slices: int) -> list[list[int]]:
    return [
        [ranks[(slot + k) % len(ranks)] for k in range(num_slices)] for slot in range(num_slots)
    ]


def segments_of(
    workload: str, rows: int, num_slots: int, max_rank: int, generator: torch.Generator
) -> Segments:
    """An empty segment first and last; the slots stand in a shuffled order."""
    counts, slots = row_counts(workload, rows)
    order = torch.randperm(num_slots, generator=generator).tolist()
    slots = [slot if slot == BASE_SLOT else order[slot] for slot in slots]
    counts, slots = [0, *counts, 0], [0, *slots, BASE_SLOT]
    return Segments(
        torch.tensor([0, *counts]).cumsum(0).int(),
        torch.tensor(slots).int(),
        rows,
        len(counts),
        max_rank,
        adapted_rows=sum(n for n, slot in zip(counts, slots, strict=True) if slot != BASE_SLOT),
    )


def every_pair(factors: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Few choices, one of each factor, in which any two values of two factors meet."""
    places = [range(len(values)) for values in factors]
    left = {
        (i, a, j, b)
        for i, j in itertools.combinations(range(len(factors)), 2)
        for a, b in itertools.product(places[i], places[j])
    }

    def new_pairs(choice: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        pairs = itertools.combinations(enumerate(choice), 2)
        return left & {(i, a, j, b) for (i, a), (j, b) in pairs}

    chosen = []
    while left:
        best = max(itertools.product(*places), key=lambda choice: len(new_pairs(choice)))
        left -= new_pairs(best)
        chosen.append(tuple(values[at] for values, at in zip(factors, best, strict=True)))
    return chosen


@dataclass(frozen=True)
class AttentionCase:
    qkv_TN: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables_RM: Tensor
    query_starts_R1: Tensor
    context_lens_R: Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int
    softcap: float

    def run(self, ops: Ops) -> Tensor:
        tokens, width = self.qkv_TN.shape[0], self.num_heads * self.head_dim
        out_TN = torch.full((tokens, width), float("nan"), dtype=self.qkv_TN.dtype)
        ops.paged_attention(
            self.qkv_TN,
            self.k_cache,
            self.v_cache,
            self.block_tables_RM,
            self.query_starts_R1,
            self.context_lens_R,
            out_TN,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.head_dim**-0.5,
            window=self.window,
            softcap=self.softcap,
        )
        return out_TN


MIXED_ROWS = ((1, 1), (1, 70), (5, 5), (40, 43), (0, 0), (3, 129), (1, 300))
"""(query_len, context_len) of each row: decode, whole prompts, later chunks, an empty row."""


def attention_case(
    dtype: torch.dtype,
    *,
    group: int = 2,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
    window: int = 0,
    softcap: float = 0.0,
    rows: Sequence[tuple[int, int]] = MIXED_ROWS,
    seed: int = 0,
) -> AttentionCase:
    """Blocks in a shuffled order; the cache past a context is NaN; rows of qkv are strided."""
    generator = torch.Generator().manual_seed(seed)
    blocks_R = [-(-context // block_size) for _, context in rows]
    num_blocks = sum(blocks_R) + 3
    free = torch.randperm(num_blocks, generator=generator).tolist()
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    caches = [torch.full(shape, float("nan")) for _ in range(2)]
    tables_RM = torch.zeros(len(rows), max(blocks_R), dtype=torch.int32)
    for row, (_, context) in enumerate(rows):
        for place in range(blocks_R[row]):
            block = free.pop()
            tables_RM[row, place] = block
            filled = min(block_size, context - place * block_size)
            for cache in caches:
                cache[block, :, :filled] = torch.randn(
                    num_kv_heads, filled, head_dim, generator=generator
                )
    tokens, num_heads = sum(query for query, _ in rows), group * num_kv_heads
    wide_TN = torch.randn(
        tokens, (num_heads + 2 * num_kv_heads) * head_dim + 7, generator=generator
    )
    return AttentionCase(
        wide_TN.to(dtype)[:, :-7],
        caches[0].to(dtype),
        caches[1].to(dtype),
        tables_RM,
        torch.tensor([0, *(query for query, _ in rows)]).cumsum(0).int(),
        torch.tensor([context for _, context in rows]).int(),
        num_heads,
        num_kv_heads,
        head_dim,
        window,
        softcap,
    )


def angles(max_positions: int, rotary_dim: int, theta: float = 10000.0) -> Tensor:
    """cos_sin_PD of the contract."""
    inverse = theta ** (-torch.arange(0, rotary_dim, 2).double() / rotary_dim)
    angle_PD = torch.arange(max_positions).double()[:, None] * inverse
    return torch.cat((angle_PD.cos(), angle_PD.sin()), dim=1).float()

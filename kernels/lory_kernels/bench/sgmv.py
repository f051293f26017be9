"""Cases of SGMV: the sites of a model, mixes of rows and ranks, adapters at their true rank.

The update is made onto zeros: what a base would add could hide an error. It must not know how peers
compute, nor how calls are timed. Legend in contract.py.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lory_kernels.bench.case import Case, Contender, Label, Place, Run, cloned
from lory_kernels.bench.popularity import Mix, Popularity
from lory_kernels.bench.shapes import LinearShape
from lory_kernels.contract import BASE_SLOT, MAX_RANK, Ops, Segments, SiteTable
from lory_kernels.reference import TorchOps

SCALE = 2.0
"""Of every adapter; a power of two, so that those who fold it into B lose nothing."""
MIXED_RANKS = (8, 16, 32, 64)


@dataclass(frozen=True, slots=True, eq=False)
class SgmvInputs:
    y_TN: Tensor
    x_TH: Tensor
    site: SiteTable
    pool: Tensor
    segments: Segments
    mix: Mix
    ranks: tuple[int, ...]
    """Of each slot."""

    def factors(self, slot: int, k: int) -> tuple[Tensor, Tensor]:
        """(A [rank, in], B [rank, out]) of one slot and slice, as they lie in the pool."""
        rank, width = self.ranks[slot], self.site.out_features[k]
        a, b = int(self.site.a_offset_SK[slot, k]), int(self.site.b_offset_SK[slot, k])
        a_RH = self.pool[a : a + rank * self.site.in_features].view(rank, -1)
        return a_RH, self.pool[b : b + rank * width].view(rank, width)


@dataclass(frozen=True, slots=True)
class Ranks:
    """How ranks are dealt to slots, in turn."""

    label: str
    dealt: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "Ranks":
        """`16`, or `mixed`."""
        if text == "mixed":
            return cls("mixed " + "/".join(map(str, MIXED_RANKS)), MIXED_RANKS)
        if not text.isdecimal() or not 0 < int(text) <= MAX_RANK:
            raise ValueError(f"ranks: {text!r} is neither a number of 1 to {MAX_RANK} nor 'mixed'")
        return cls(text, (int(text),))

    def of(self, num_slots: int) -> tuple[int, ...]:
        return tuple(self.dealt[slot % len(self.dealt)] for slot in range(num_slots))


def sgmv_case(
    place: Place,
    shape: LinearShape,
    rows: int,
    ranks: Ranks,
    popularity: Popularity,
    peers: Sequence[Contender[SgmvInputs]] = (),
) -> Case[SgmvInputs]:
    mix = popularity.mix(rows)
    used = [ranks.of(max(mix.used_slots, default=0) + 1)[slot] for slot in mix.used_slots]
    widths = [shape.in_features + width for width in shape.slices]
    factors = sum(used) * sum(widths)
    label = Label(
        "sgmv", shape.label, rows, ranks.label, popularity.name, distinct=len(mix.used_slots)
    )
    activations = mix.adapted_rows * (shape.in_features + 2 * shape.out_features)
    return Case(
        label,
        place.dtype,
        make_inputs=lambda: _inputs(place, shape, rows, ranks, mix),
        expected=_expected,
        spoiled=_mixed_up if mix.adapted_rows else None,
        contenders=(
            *place.contenders(_bind, reference_waits=True),
            Contender("peft's form", "peer", _mixed_batch),
            *peers,
        ),
        num_bytes=(factors + activations) * place.itemsize,
        flops=_flops(mix, ranks, sum(widths)),
    )


def _flops(mix: Mix, ranks: Ranks, width: int) -> int:
    pairs = [(count, slot) for count, slot in zip(mix.counts, mix.slots, strict=True) if slot >= 0]
    dealt = ranks.of(len(pairs) + 1)
    return sum(2 * count * dealt[slot] * width for count, slot in pairs)


def sgmv_cases(
    place: Place,
    shapes: Iterable[LinearShape],
    rows: Iterable[int],
    ranks: Iterable[Ranks],
    popularities: Sequence[Popularity],
    peers: Sequence[Contender[SgmvInputs]] = (),
) -> Iterator[Case[SgmvInputs]]:
    """All of them, but popularities that deal these rows alike only once."""
    shapes, ranks = tuple(shapes), tuple(ranks)
    for num_rows in rows:
        different: dict[Mix, Popularity] = {}
        for popularity in popularities:
            different.setdefault(popularity.mix(num_rows), popularity)
        for shape in shapes:
            for rank in ranks:
                for popularity in different.values():
                    yield sgmv_case(place, shape, num_rows, rank, popularity, peers)


def _inputs(place: Place, shape: LinearShape, rows: int, ranks: Ranks, mix: Mix) -> SgmvInputs:
    num_slots = max(mix.used_slots, default=0) + 2
    dealt = ranks.of(num_slots)
    site, size = _table(place, shape, dealt)
    starts = torch.tensor([0, *mix.counts]).cumsum(0)
    largest = max((dealt[slot] for slot in mix.used_slots), default=0)
    segments = Segments(
        starts_G1=place.integers(starts, torch.int32),
        slots_G=place.integers(mix.slots, torch.int32),
        num_rows=rows,
        num_segments=len(mix.slots),
        max_rank=largest,
        adapted_rows=mix.adapted_rows,
    )
    x_TH = place.normal(rows, shape.in_features)
    y_TN = torch.zeros((rows, shape.out_features), dtype=place.dtype, device=place.device)
    pool = place.normal(size, std=shape.in_features**-0.5)
    return SgmvInputs(y_TN, x_TH, site, pool, segments, mix, dealt)


def _table(place: Place, shape: LinearShape, dealt: Sequence[int]) -> tuple[SiteTable, int]:
    """Slots side by side in a pool of so many elements, every slice's A before its B: aligned, and
    with tables of gains and biases, as those that are served."""
    a_offset: list[list[int]] = []
    b_offset: list[list[int]] = []
    at = 0
    for rank in dealt:
        a_offset.append([])
        b_offset.append([])
        for width in shape.slices:
            a_offset[-1].append(at)
            b_offset[-1].append(at + rank * shape.in_features)
            at += rank * (shape.in_features + width)
    slices = len(shape.slices)
    gain_offset_SK, bias_offset_SK = (
        place.integers([[-1] * slices for _ in dealt], torch.int64) for _ in range(2)
    )
    site = SiteTable(
        in_features=shape.in_features,
        out_offsets=shape.out_offsets,
        out_features=shape.slices,
        a_offset_SK=place.integers(a_offset, torch.int64),
        b_offset_SK=place.integers(b_offset, torch.int64),
        rank_SK=place.integers([[rank] * slices for rank in dealt], torch.int32),
        scale_SK=torch.full((len(dealt), slices), SCALE, device=place.device),
        alignment=math.gcd(shape.in_features, *shape.slices),
        gain_offset_SK=gain_offset_SK,
        bias_offset_SK=bias_offset_SK,
    )
    return site, at


def _bind(ops: Ops, inputs: SgmvInputs) -> Run:
    y_TN, x_TH, site, pool = inputs.y_TN, inputs.x_TH, inputs.site, inputs.pool
    segments = inputs.segments

    def run() -> tuple[Tensor, ...]:
        ops.sgmv(y_TN, x_TH, site, pool, segments)
        return (y_TN,)

    return run


def _expected(inputs: SgmvInputs) -> tuple[Tensor, ...]:
    return _bind(TorchOps(), inputs)()


def _mixed_up(inputs: SgmvInputs) -> SgmvInputs:
    """Every adapted segment uses the next slot."""
    slots_G, num_slots = inputs.segments.slots_G, inputs.site.rank_SK.shape[0]
    following = torch.where(slots_G == BASE_SLOT, slots_G, (slots_G + 1) % num_slots)
    spoiled = cloned(inputs)
    most = max(inputs.ranks)
    segments = replace(spoiled.segments, slots_G=following.int(), max_rank=most)
    return replace(spoiled, segments=segments)


def _mixed_batch(inputs: SgmvInputs) -> Run:
    """The form of PEFT's mixed batch: for each slice and adapter, its rows are taken out, go
    through A and B in the dtype, are scaled and added back."""
    y_TN, x_TH, site = inputs.y_TN, inputs.x_TH, inputs.site
    slot_of_row = torch.tensor(inputs.mix.slot_of_row)
    parts = [
        (
            (slot_of_row == slot).nonzero()[:, 0].to(x_TH.device),
            *(factor.contiguous() for factor in inputs.factors(slot, k)),
            site.out_offsets[k],
            site.out_features[k],
        )
        for k in range(len(site.out_features))
        for slot in inputs.mix.used_slots
    ]

    def run() -> tuple[Tensor, ...]:
        for rows, a_RH, b_RN, offset, width in parts:
            delta = (x_TH[rows] @ a_RH.T) @ b_RN * SCALE
            y_TN[:, offset : offset + width].index_add_(0, rows, delta)
        return (y_TN,)

    return run

"""How SGMV is cut up on a GPU: by bytes of an element, rows, segments and rank of a step.

Plain data, and arithmetic on what the host knows of a step, never on what a table on the device
holds: grids come from shapes, so a captured launch serves every mix of its size. What was measured
on a GPU would stand beside RULES by that GPU's name; RULES holds what was reasoned and what
compiling ahead of time showed to fit. It must not know torch, Triton or models.

Two regimes. Where rows are few, or segments so many that a tile has few rows, factors are what is
read: 16-row tiles, wide blocks of memory, and K cut into splits until the device is full. Where
rows are many, x and y are what is read: larger tiles, so that each factor is read less often.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ANY_ROWS = 2**31
TARGET_PROGRAMS = 264
"""K is split until the shrink has so many: two for each of an H200's 132 processors. Not measured
yet."""
MIN_SPLIT_FEATURES = 256
"""A split must be worth its program and its plane of sums. Not measured yet."""
MAX_SPLITS = 16
"""A program of the expand reads that many planes of sums at once. Not measured yet."""
SUMMED_VALUES = 4096
"""Of all planes that one program of the expand adds, for each 4 warps: 32 registers a thread."""
MIN_BLOCK_RANK = 16
"""The least that a tensor core multiplies along."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A regime: up to max_rows, or fewer rows a segment than max_segment_rows on the average."""

    max_rows: int
    max_segment_rows: int
    reason: str
    tile_rows: int
    shrink_block: int
    """In features of one turn of the shrink's loop."""
    shrink_warps: int
    shrink_stages: int
    expand_block: int
    """Out columns of a program of the expand."""
    expand_warps: int
    max_shrink_rank: int = 64
    """Largest block of rank; what is above it is another program's."""
    max_expand_rank: int = 64
    """Largest block of rank; what is above it is another turn's."""


EXPAND_STAGES = 1
"""The sums of the shrink are in registers when they are multiplied. As wgmma's left operand in a
pipelined loop they may be overwritten before they are read: ptxas before CUDA 13.3 is known to get
that wrong. One stage waits for each product."""

RULES: Mapping[int, Sequence[Rule]] = {
    2: (
        Rule(
            256,
            16,
            "A decode, up to every row with an adapter of its own: factors are read once each "
            "whatever the tile, 16 rows are the least a tensor core multiplies, and 4 stages of "
            "128 features keep 20 KB to 80 KB on their way. Not measured yet.",
            tile_rows=16,
            shrink_block=128,
            shrink_warps=4,
            shrink_stages=4,
            expand_block=128,
            expand_warps=4,
        ),
        Rule(
            4096,
            128,
            "A prefill, or one with decodes beside it: 64 rows are what wgmma multiplies, and "
            "more would leave processors idle; 64 ranks at once spill on sm_80. Not measured yet.",
            tile_rows=64,
            shrink_block=64,
            shrink_warps=4,
            shrink_stages=4,
            expand_block=128,
            expand_warps=4,
            max_expand_rank=32,
        ),
        Rule(
            ANY_ROWS,
            ANY_ROWS,
            "Thousands of rows of few adapters: tiles enough to fill the device at 128 rows, "
            "which halves how often factors are read. Not measured yet.",
            tile_rows=128,
            shrink_block=64,
            shrink_warps=8,
            shrink_stages=3,
            expand_block=128,
            expand_warps=8,
            max_expand_rank=32,
        ),
    ),
    4: (
        Rule(
            256,
            16,
            "float32 is exact, so no tensor core multiplies it: operands stand in registers, and "
            "wider blocks of rank spill. Not measured yet.",
            tile_rows=16,
            shrink_block=64,
            shrink_warps=4,
            shrink_stages=3,
            expand_block=64,
            expand_warps=4,
            max_shrink_rank=32,
            max_expand_rank=16,
        ),
        Rule(
            ANY_ROWS,
            ANY_ROWS,
            "Twice the rows a factor read serves, and half the rank, so that registers hold it. "
            "Not measured yet.",
            tile_rows=32,
            shrink_block=32,
            shrink_warps=4,
            shrink_stages=3,
            expand_block=64,
            expand_warps=4,
            max_shrink_rank=32,
            max_expand_rank=16,
        ),
    ),
}
"""By bytes of an element, then by ascending max_rows; the last is for all that is left."""

UNALIGNED = Rule(
    ANY_ROWS,
    ANY_ROWS,
    "Widths that are no multiple of 8, as no common model has: elements of 2 bytes come one by "
    "one, with an address each, and larger blocks spill. Not measured yet.",
    tile_rows=16,
    shrink_block=64,
    shrink_warps=4,
    shrink_stages=4,
    expand_block=64,
    expand_warps=4,
    max_shrink_rank=32,
    max_expand_rank=32,
)
"""For elements of 2 bytes where factors do not begin at multiples of 16 bytes."""


@dataclass(frozen=True, slots=True)
class Cut:
    """One call of SGMV, cut up."""

    rule: Rule
    tiles: int
    """Of rows; some belong to nobody."""
    shrink_rank: int
    rank_blocks: int
    expand_rank: int
    splits: int
    split_features: int
    max_splits: int
    """Planes of sums that the expand is compiled for; splits is at most that."""

    @property
    def h_width(self) -> int:
        """Floats that a row and slice has in a plane of sums."""
        return self.shrink_rank * self.rank_blocks


def rule_for(element_bytes: int, is_aligned: bool, num_rows: int, num_segments: int) -> Rule:
    """The regime of a step. Segments count even if they are empty: the host does not know."""
    if element_bytes == 2 and not is_aligned:
        return UNALIGNED
    for rule in RULES[element_bytes]:
        if num_rows <= rule.max_rows or num_rows < rule.max_segment_rows * num_segments:
            return rule
    raise ValueError(f"num_rows: {num_rows} is above {ANY_ROWS}")


def cut_up(
    element_bytes: int,
    is_aligned: bool,
    num_rows: int,
    num_segments: int,
    max_rank: int,
    in_features: int,
    num_slices: int,
) -> Cut:
    """How to launch one call, from host-known sizes alone."""
    rule = rule_for(element_bytes, is_aligned, num_rows, num_segments)
    tiles = min(num_rows, _ceil(num_rows, rule.tile_rows) + num_segments)
    shrink_rank, expand_rank = (
        min(most, max(MIN_BLOCK_RANK, _power_of_two(max_rank)))
        for most in (rule.max_shrink_rank, rule.max_expand_rank)
    )
    rank_blocks = max(1, _ceil(max_rank, shrink_rank))
    summed = SUMMED_VALUES * rule.expand_warps // 4
    max_splits = max(1, min(MAX_SPLITS, summed // (rule.tile_rows * expand_rank)))
    splits = min(
        max_splits,
        _ceil(TARGET_PROGRAMS, tiles * num_slices * rank_blocks),
        max(1, in_features // MIN_SPLIT_FEATURES),
    )
    turns = _ceil(in_features, rule.shrink_block)
    turns_a_split = _ceil(turns, splits)
    return Cut(
        rule,
        tiles,
        shrink_rank,
        rank_blocks,
        expand_rank,
        _ceil(turns, turns_a_split),
        turns_a_split * rule.shrink_block,
        max_splits,
    )


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _ceil(size: int, part: int) -> int:
    return -(-size // part)

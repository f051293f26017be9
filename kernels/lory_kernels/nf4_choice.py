"""Which way an NF4 product takes on a GPU: by GPU, shape and number of rows.

Plain data, fixed before anything runs. Three paths: `triton` (triton_nf4.py, with tiles),
`bitsandbytes` (its op, which fuses or decodes by a rule of its own), `dequantize` (the weight is
written out, then cuBLAS multiplies). What was measured on a GPU stands in MEASURED, by that GPU's
name, and wins; RULES holds what was reasoned for an architecture. It must not know torch, Triton or
models.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Path = Literal["triton", "bitsandbytes", "dequantize"]

GROUP = 64
"""Codes along K in one product of tiles; no more of them have a scale of their own."""

ANY_ROWS = sys.maxsize
MAX_SPLITS = 16

_WIDE = 12288
_PROGRAMS = 264
_TURNS = 4


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the Triton kernel is launched."""

    rows: int
    columns: int
    groups: int
    """Groups of 64 codes that one turn of the loop brings, 1 or 2; they divide K / 64."""
    warps: int
    stages: int
    splits: int = 1
    """Parts of K that are summed apart."""


@dataclass(frozen=True, slots=True)
class Choice:
    max_rows: int
    path: Path
    reason: str
    """A sentence, or what was measured."""
    tiles: Tiles | None = None
    """With the path `triton` alone, and always."""

    def __post_init__(self) -> None:
        if (self.tiles is not None) != (self.path == "triton"):
            raise ValueError(f"tiles: {self.tiles} do not go with the path {self.path!r}")


@dataclass(frozen=True, slots=True)
class Rule:
    """A choice for every shape; the tiles are those for few and for many out features."""

    max_rows: int
    path: Path
    reason: str
    narrow: Tiles | None = None
    wide: Tiles | None = None


MEASURED: Mapping[str, Mapping[tuple[int, int], Sequence[Choice]]] = {}
"""GPU name, as torch.cuda.get_device_name tells it, to (out features, in features) to its choices,
by ascending max_rows, the last for ANY_ROWS. Tiles are taken as they stand."""

RULES: Mapping[tuple[int, int], Sequence[Rule]] = {
    (9, 0): (
        Rule(
            4,
            "bitsandbytes",
            "Its kernel is fused for every shape of an 8B model up to 4 rows, and was tuned by its "
            "authors on H200. Not measured yet.",
        ),
        Rule(
            16,
            "triton",
            "From 5 rows on bitsandbytes writes 'down' and from 8 rows most weights of an 8B model "
            "out in 16 bits, 8 times the bytes. Not measured yet.",
            Tiles(rows=16, columns=64, groups=2, warps=4, stages=4),
            Tiles(rows=16, columns=128, groups=2, warps=8, stages=4),
        ),
        Rule(
            32,
            "triton",
            "Still bound by the weight's bytes and its decoding, which more rows do not repeat. "
            "Not measured yet.",
            Tiles(rows=32, columns=64, groups=2, warps=4, stages=4),
            Tiles(rows=32, columns=128, groups=2, warps=8, stages=4),
        ),
        Rule(
            64,
            "triton",
            "64 rows let wgmma multiply; the levels pass through shared memory. Not measured yet.",
            Tiles(rows=64, columns=64, groups=1, warps=4, stages=4),
            Tiles(rows=64, columns=128, groups=1, warps=8, stages=4),
        ),
        Rule(
            128,
            "triton",
            "One tile of rows: every code is still decoded once. Not measured yet.",
            Tiles(rows=128, columns=64, groups=1, warps=8, stages=4),
        ),
        Rule(
            256,
            "triton",
            "Two tiles of rows decode each code twice, less than writing it out costs at the "
            "crossover that others report at 256 to 512 rows. Not measured yet.",
            Tiles(rows=128, columns=64, groups=1, warps=8, stages=4),
        ),
        Rule(
            ANY_ROWS,
            "dequantize",
            "Writing the weight out once is small beside the product. Not measured yet.",
        ),
    ),
}
"""By compute capability. Elsewhere bitsandbytes decides."""

ELSEWHERE = Rule(
    ANY_ROWS,
    "bitsandbytes",
    "Its rule was tuned on T4 to B200 by its authors; the Triton kernel was not measured here.",
)
ODD_BLOCKS = Choice(
    ANY_ROWS, "bitsandbytes", "The Triton kernel takes multiples of 64 codes a scale."
)


def choices_for(
    gpu: str, capability: tuple[int, int], out_features: int, in_features: int, block: int
) -> Sequence[Choice]:
    """The choices for a weight with `block` codes a scale, by ascending max_rows."""
    if block % GROUP or in_features % block:
        return (ODD_BLOCKS,)
    measured = MEASURED.get(gpu, {}).get((out_features, in_features))
    if measured is not None:
        return measured
    rules = RULES.get(capability, (ELSEWHERE,))
    return tuple(_applied(rule, out_features, in_features) for rule in rules)


def choose(choices: Sequence[Choice], rows: int) -> Choice:
    return next(choice for choice in choices if rows <= choice.max_rows)


def fitted(tiles: Tiles, out_features: int, in_features: int, rows: int) -> Tiles:
    """Groups that divide K, and splits enough for two programs on each of 132 processors."""
    num_groups = in_features // GROUP
    groups = tiles.groups if num_groups % tiles.groups == 0 else 1
    programs = _ceil(rows, tiles.rows) * _ceil(out_features, tiles.columns)
    most = min(MAX_SPLITS, num_groups // (groups * _TURNS))
    splits = 1
    while splits * programs < _PROGRAMS and 2 * splits <= most:
        splits *= 2
    return replace(tiles, groups=groups, splits=splits)


def _applied(rule: Rule, out_features: int, in_features: int) -> Choice:
    tiles = rule.wide if rule.wide is not None and out_features >= _WIDE else rule.narrow
    if tiles is not None:
        tiles = fitted(tiles, out_features, in_features, rule.max_rows)
    return Choice(rule.max_rows, rule.path, rule.reason, tiles)


def _ceil(size: int, part: int) -> int:
    return -(-size // part)

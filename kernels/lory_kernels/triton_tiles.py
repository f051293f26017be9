"""Which range of a table owns a tile: how Triton kernels find their rows on the device.

A table of starts cuts rows into ranges (segments, rows of a plan), every range into tiles of equal
size, the last of a range cut short; empty ranges own none. Grids come from shapes alone, so a
launch has some tiles that nobody owns. This module must not know what the ranges stand for.

    starts 0 40 41 61, tiles of 16   [0: 0..16) [1: 16..32) [2: 32..40) [3: 40..41) [4: 41..57) ...
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
# Triton is optional, and its language is Python in syntax only: its types are not Python's.

import triton
import triton.language as tl

BLOCK_RANGES = 256
"""Ranges looked at together when a tile looks for its own; a table may have any number."""


@triton.jit
def find_tile(starts_ptr, num_ranges, tile, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """(range, place among the range's tiles) of a tile; range = num_ranges if nobody owns it."""
    owner = 0
    before = 0
    counted = 0
    for at in range(0, num_ranges, BLOCK):
        r = at + tl.arange(0, BLOCK)
        inside = r < num_ranges
        begins = tl.load(starts_ptr + r, mask=inside, other=0)
        ends = tl.load(starts_ptr + r + 1, mask=inside, other=0)
        tiles = (ends - begins + TILE - 1) // TILE
        upto = counted + tl.cumsum(tiles, 0)
        passed = inside & (upto <= tile)
        owner += tl.sum(tl.where(passed, 1, 0), 0)
        before = tl.maximum(before, tl.max(tl.where(passed, upto, 0), 0))
        counted += tl.sum(tiles, 0)
    return owner, tile - before

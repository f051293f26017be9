"""Lays a step's rows end to end: from a plan to the integer arrays a forward pass reads.

Rows of one adapter are put side by side, base rows first, so that each adapter is one segment.
Host side only, in numpy; it must not know torch, weights or sampling.

Shapes: T tokens, R rows, M blocks of the longest row, G segments, L tokens whose logits are
wanted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lory_server.plan import BASE_SLOT, PENDING, PlanRow, SampleRow, StepPlan

Array = NDArray[Any]
IntArray = NDArray[np.int64]
Int32Array = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PackedSegments:
    starts_G1: Int32Array
    """Segment g covers tokens [starts[g], starts[g + 1])."""
    slots_G: Int32Array
    adapted_tokens: int
    max_rank: int
    has_gain_or_bias: bool = False


@dataclass(frozen=True, slots=True)
class PackedStep:
    """A plan's rows in the order in which they are computed."""

    order: tuple[int, ...]
    """order[i] is the place in the plan of packed row i."""
    token_ids_T: IntArray
    positions_T: IntArray
    """In the table of rotations, where long sequences have rows of their own."""
    kv_slots_T: IntArray
    """block * block_size + offset of each token's place in the KV cache."""
    query_starts_R1: Int32Array
    context_lens_R: Int32Array
    block_tables_RM: Int32Array
    segments: PackedSegments | None
    """None when every row is a base row."""
    pending_P: IntArray
    """Tokens whose ids are still on the device, as indices into T, ..."""
    pending_lanes_P: IntArray
    """... and the lanes they are in."""
    sampled_rows: tuple[int, ...]
    """Packed rows that sample; their logits come first."""
    sampled_lanes_S: IntArray
    samples: tuple[SampleRow, ...]
    target_rows: tuple[int, ...]
    """Packed rows whose prompt tokens are scored; their logits follow, row after row."""
    target_counts: tuple[int, ...]
    targets_L: IntArray
    """The scored tokens of all target rows."""
    target_tops: tuple[int, ...]
    """Alternatives wanted beside each scored token."""
    logit_rows_L: IntArray

    @property
    def num_rows(self) -> int:
        return len(self.order)

    @property
    def is_decode(self) -> bool:
        """Every row computes one token and samples the next; nothing else is wanted."""
        rows = self.num_rows
        return len(self.token_ids_T) == len(self.samples) == rows and not self.target_rows

    def arrays(self) -> dict[str, Array]:
        """All that the device needs to know, by the names of the fields."""
        arrays: dict[str, Array] = {
            "token_ids_T": self.token_ids_T,
            "positions_T": self.positions_T,
            "kv_slots_T": self.kv_slots_T,
            "query_starts_R1": self.query_starts_R1,
            "context_lens_R": self.context_lens_R,
            "block_tables_RM": self.block_tables_RM,
            "pending_P": self.pending_P,
            "pending_lanes_P": self.pending_lanes_P,
            "sampled_lanes_S": self.sampled_lanes_S,
            "targets_L": self.targets_L,
            "logit_rows_L": self.logit_rows_L,
        }
        if self.segments is not None:
            arrays |= {"starts_G1": self.segments.starts_G1, "slots_G": self.segments.slots_G}
        return arrays


class BlockTables:
    """The block tables of all lanes, kept from step to step and extended as sequences grow."""

    def __init__(self, num_lanes: int, max_blocks: int) -> None:
        self._table_LM: Int32Array = np.zeros((num_lanes, max_blocks), dtype=np.int32)
        self._seen: list[Sequence[int] | None] = [None] * num_lanes
        self._lengths = [0] * num_lanes

    def update(self, row: PlanRow) -> int:
        """Copies what is new of a row's table; its length. Tables only grow while they live."""
        lane, length = row.lane, len(row.blocks)
        if self._seen[lane] is not row.blocks:
            self._seen[lane] = row.blocks
            self._lengths[lane] = 0
        known = self._lengths[lane]
        if known < length:
            self._table_LM[lane, known:length] = row.blocks[known:length]
            self._lengths[lane] = length
        return length

    def rows(self, lanes: Sequence[int], width: int) -> Int32Array:
        return self._table_LM[list(lanes), :width]


class Packer:
    def __init__(self, num_lanes: int, max_blocks: int, block_size: int) -> None:
        self.max_blocks = max_blocks
        """Of the longest sequence."""
        self._tables = BlockTables(num_lanes, max_blocks)
        self._block_size = block_size

    def pack(self, plan: StepPlan) -> PackedStep:
        order = tuple(sorted(range(len(plan.rows)), key=lambda i: plan.rows[i].slot))
        rows = [plan.rows[i] for i in order]
        lengths = [len(row.token_ids) for row in rows]
        ends = np.cumsum(lengths, dtype=np.int64)
        token_ids_T = np.array([t for row in rows for t in row.token_ids], dtype=np.int64)
        positions_T = _positions(rows, lengths)
        width = max(self._tables.update(row) for row in rows)
        tables_RM = self._tables.rows([row.lane for row in rows], width)
        pending_P = np.flatnonzero(token_ids_T == PENDING)
        token_ids_T[pending_P] = 0
        row_of_token_T = np.repeat(np.arange(len(rows)), lengths)
        sampled = tuple(i for i, row in enumerate(rows) if row.sample is not None)
        targets = tuple(i for i, row in enumerate(rows) if row.targets)
        starts = ends - lengths
        return PackedStep(
            order=order,
            token_ids_T=token_ids_T,
            positions_T=_rope_rows(positions_T, rows, lengths),
            kv_slots_T=self._kv_slots(positions_T, row_of_token_T, tables_RM),
            query_starts_R1=np.concatenate(([0], ends)).astype(np.int32),
            context_lens_R=np.array(
                [row.start + n for row, n in zip(rows, lengths, strict=True)], dtype=np.int32
            ),
            block_tables_RM=tables_RM,
            segments=_segments(rows, ends),
            pending_P=pending_P,
            pending_lanes_P=np.array(
                [rows[i].lane for i in row_of_token_T[pending_P]], dtype=np.int64
            ),
            sampled_rows=sampled,
            sampled_lanes_S=np.array([rows[i].lane for i in sampled], dtype=np.int64),
            samples=tuple(row.sample for row in rows if row.sample is not None),
            target_rows=targets,
            target_counts=tuple(len(rows[i].targets) for i in targets),
            targets_L=np.array([t for i in targets for t in rows[i].targets], dtype=np.int64),
            target_tops=tuple(rows[i].num_target_top for i in targets for _ in rows[i].targets),
            logit_rows_L=_logit_rows(rows, starts, ends, sampled, targets),
        )

    def _kv_slots(
        self, positions_T: IntArray, row_of_token_T: IntArray, tables_RM: Int32Array
    ) -> IntArray:
        index_T, offset_T = np.divmod(positions_T, self._block_size)
        return tables_RM[row_of_token_T, index_T].astype(np.int64) * self._block_size + offset_T


def _positions(rows: Sequence[PlanRow], lengths: Sequence[int]) -> IntArray:
    if len(rows) == sum(lengths):
        return np.array([row.start for row in rows], dtype=np.int64)
    return np.concatenate(
        [
            np.arange(row.start, row.start + n, dtype=np.int64)
            for row, n in zip(rows, lengths, strict=True)
        ]
    )


def _rope_rows(positions_T: IntArray, rows: Sequence[PlanRow], lengths: Sequence[int]) -> IntArray:
    offsets_R = [row.rope_offset for row in rows]
    return positions_T + np.repeat(offsets_R, lengths) if any(offsets_R) else positions_T


def _segments(rows: Sequence[PlanRow], ends: IntArray) -> PackedSegments | None:
    starts, slots, adapted, start = [0], [], 0, 0
    for row, end in zip(rows, ends.tolist(), strict=True):
        if slots and slots[-1] == row.slot:
            starts[-1] = end
        else:
            slots.append(row.slot)
            starts.append(end)
        adapted += end - start if row.slot != BASE_SLOT else 0
        start = end
    if adapted == 0:
        return None
    return PackedSegments(
        np.array(starts, np.int32),
        np.array(slots, np.int32),
        adapted,
        max(row.rank for row in rows),
        any(row.has_gain_or_bias for row in rows),
    )


def _logit_rows(
    rows: Sequence[PlanRow],
    starts: IntArray,
    ends: IntArray,
    sampled: Sequence[int],
    targets: Sequence[int],
) -> IntArray:
    parts = [ends[list(sampled)] - 1]
    parts += [np.arange(starts[i], starts[i] + len(rows[i].targets)) for i in targets]
    return np.concatenate(parts).astype(np.int64)

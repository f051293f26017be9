"""Adapters' own embeddings, norms and heads, applied to the rows of a step that use them.

    token rows   | base ... | a | b |      embedding, norms: run by run, op by op
    logit rows   | base | a | b | a |      heads: a dense product a run, then token rows, then LoRA

A step none of whose rows has any carries none of this and is computed as if it did not exist. This
module must not know where weights come from, nor schedules.

Legend: T tokens of the step, L rows with logits, H hidden, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from lory_kernels import BASE_SLOT, Segments
from lory_server.adapters.ends import Ends, Lookup, TokenRows
from lory_server.model.packing import IntArray, PackedSegments, PackedStep

BySlot = Mapping[int, Ends]


@dataclass(frozen=True, slots=True)
class Run:
    """Rows side by side that use one adapter, or the base."""

    start: int
    stop: int
    ends: Ends | None


@dataclass(frozen=True, slots=True)
class NormRuns:
    """All rows of a step, in order, some with norms of their own."""

    tokens: tuple[Run, ...]
    logits: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class StepEnds:
    embedding: tuple[Run, ...]
    """Token rows whose embedding is not the base's."""
    norms: NormRuns | None
    head: tuple[Run, ...]
    """Logit rows whose head is not the base's, or not all of it."""
    head_segments: PackedSegments | None
    """Of the logit rows; None: no LoRA on any row's head."""

    @property
    def widest_vocabulary(self) -> int:
        """Tokens of the largest embedding of an adapter's own; 0: there is none."""
        own = [run.ends.embedding_VH for run in self.embedding if run.ends]
        return max((one.shape[0] for one in own if one is not None), default=0)

    @property
    def changes_layers(self) -> bool:
        """Whether more than the head is to be computed otherwise."""
        return bool(self.embedding or self.norms)


@dataclass(frozen=True, slots=True)
class HeadRows:
    """What `Decoder.logits` takes of it."""

    runs: tuple[Run, ...]
    lora: Segments | None


# -- which rows -----------------------------------------------------------------------------


def step_ends(packed: PackedStep, by_slot: BySlot) -> StepEnds | None:
    """None: no row of the step has any."""
    segments = packed.segments
    if not by_slot or segments is None or by_slot.keys().isdisjoint(segments.slots_G.tolist()):
        return None
    tokens = _runs(_slots(segments, np.arange(len(packed.token_ids_T))), by_slot)
    slots_L = _slots(segments, packed.logit_rows_L)
    logits = _runs(slots_L, by_slot)
    has_norms = any(run.ends and run.ends.norms for run in tokens)
    return StepEnds(
        embedding=tuple(run for run in tokens if run.ends and run.ends.changes_embedding),
        norms=NormRuns(tokens, logits) if has_norms else None,
        head=tuple(run for run in logits if run.ends and run.ends.changes_head),
        head_segments=_head_segments(slots_L, by_slot),
    )


def _slots(segments: PackedSegments, rows: IntArray) -> IntArray:
    """The slot of each row."""
    which = np.searchsorted(segments.starts_G1, rows, side="right") - 1
    return np.append(segments.slots_G, BASE_SLOT)[which].astype(np.int64)


def _bounds(slots: IntArray) -> list[int]:
    """Where rows of one slot begin, and the end of all."""
    changes = np.flatnonzero(np.diff(slots)) + 1
    return [0, *changes.tolist(), len(slots)] if len(slots) else [0]


def _runs(slots: IntArray, by_slot: BySlot) -> tuple[Run, ...]:
    bounds = _bounds(slots)
    return tuple(
        Run(start, stop, by_slot.get(int(slots[start]))) for start, stop in pairwise(bounds)
    )


def _head_segments(slots_L: IntArray, by_slot: BySlot) -> PackedSegments | None:
    adapting = [ends for slot in set(slots_L.tolist()) if (ends := by_slot.get(slot))]
    adapting = [ends for ends in adapting if ends.adapts_head]
    if not adapting:
        return None
    bounds = _bounds(slots_L)
    return PackedSegments(
        np.array(bounds, np.int32),
        slots_L[bounds[:-1]].astype(np.int32),
        int((slots_L != BASE_SLOT).sum()),
        max(ends.head_rank for ends in adapting),
        any(ends.head_has_gain_or_bias for ends in adapting),
    )


# -- embeddings -----------------------------------------------------------------------------


def embed_own(token_ids_T: Tensor, out_TH: Tensor, runs: Sequence[Run]) -> None:
    """Over the base's embedding, before a family's scale."""
    for run in runs:
        assert run.ends is not None
        ids_T, rows_TH = token_ids_T[run.start : run.stop], out_TH[run.start : run.stop]
        if run.ends.embedding_VH is not None:
            torch.index_select(run.ends.embedding_VH, 0, ids_T, out=rows_TH)
        if run.ends.embedding_rows is not None:
            _put_rows(ids_T, rows_TH, run.ends.embedding_rows)
        if run.ends.lookup is not None:
            _add_lookup(ids_T, rows_TH, run.ends.lookup)


def _put_rows(ids_T: Tensor, rows_TH: Tensor, own: TokenRows) -> None:
    place_T = torch.searchsorted(own.sorted_N, ids_T).clamp_max_(len(own.sorted_N) - 1)
    is_own_T = own.sorted_N[place_T] == ids_T
    own_TH = own.rows_NH[own.order_N[place_T]]
    torch.where(is_own_T[:, None], own_TH, rows_TH, out=rows_TH)


def _add_lookup(ids_T: Tensor, rows_TH: Tensor, own: Lookup) -> None:
    """The sum in float32, rounded once."""
    sum_TH = rows_TH.float() if own.gain_H is None else rows_TH * own.gain_H
    a_TR = own.a_VR.index_select(0, ids_T).float()
    rows_TH.copy_(torch.addmm(sum_TH, a_TR, own.b_RH.float(), alpha=own.scale))


# -- norms ----------------------------------------------------------------------------------


def norm_weights(
    runs: Sequence[Run], module: str, base_H: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a step and the weight that norms them."""
    for run in runs:
        own_H = run.ends.norms.get(module) if run.ends else None
        yield slice(run.start, run.stop), base_H if own_H is None else own_H


# -- heads ----------------------------------------------------------------------------------


def own_products(hidden_LH: Tensor, logits_LV: Tensor, runs: Sequence[Run]) -> None:
    """Rows with a head of their own, in place of the base's product; one of another size than the
    base's is not for these logits (`own_vocabulary`)."""
    for run in runs:
        if run.ends is not None and run.ends.head_VH is not None:
            if run.ends.head_VH.shape[0] != logits_LV.shape[1]:
                continue
            rows = slice(run.start, run.stop)
            logits_LV[rows] = linear(hidden_LH[rows], run.ends.head_VH)


def own_tokens(hidden_LH: Tensor, logits_LV: Tensor, runs: Sequence[Run]) -> None:
    """The logits of tokens whose rows of the head were trained."""
    for run in runs:
        own = run.ends.head_rows if run.ends else None
        if own is not None:
            rows = slice(run.start, run.stop)
            logits_LV[rows].index_copy_(1, own.ids_N, linear(hidden_LH[rows], own.rows_NH))

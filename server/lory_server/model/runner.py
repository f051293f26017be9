"""Turns a plan into tensors, runs the model and the sampler, and gives back plain values.

`submit` never waits for the device: sampled tokens stay there, in their sequence's lane, where the
next plan finds them; `collect` waits and brings them to the host. On a CPU the work is done by the
time `submit` returns. Decode steps are replayed where they have been captured. This module must not
know requests, queues or where adapters come from.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from lory_kernels.contract import Segments
from lory_server.model.batch import ForwardBatch
from lory_server.model.decoder import Decoder
from lory_server.model.ends import BySlot, HeadRows, StepEnds, step_ends
from lory_server.model.graphs import Capture, DecodeGraphs, padded_rows, variants
from lory_server.model.kv import KVCache
from lory_server.model.own_vocabulary import Piece, narrow_rows, put, wide_pieces
from lory_server.model.packing import Array, PackedSegments, PackedStep, Packer
from lory_server.model.sampler import Samples, sample, score
from lory_server.model.staging import sender
from lory_server.plan import INVALID_TOKEN, SampledToken, StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class Ticket:
    """A submitted step whose results may still be on their way to the host."""

    packed: PackedStep
    samples: Samples | None
    scored: Samples | None
    done: torch.cuda.Event | None


@dataclass(frozen=True, slots=True)
class Computed:
    """What the layers leave, and what is done with it, on the device."""

    hidden_LH: Tensor
    """Rows to sample, then rows to score."""
    sampled_lanes_S: Tensor
    targets_L: Tensor | None
    """The tokens to score; None: nobody asked."""
    head: HeadRows | None = None
    """What rows have of their own in the head; None: nothing."""


class Runner:
    def __init__(
        self,
        decoder: Decoder,
        kv: KVCache,
        packer: Packer,
        num_lanes: int,
        device: torch.device,
        ends_by_slot: BySlot | None = None,
    ) -> None:
        """`ends_by_slot`: what adapters on the device have beside the layers' linears, as it is at
        each step."""
        self._ends_by_slot: BySlot = {} if ends_by_slot is None else ends_by_slot
        self._decoder = decoder
        self._kv = kv
        self._packer = packer
        self._device = device
        self._lane_tokens = torch.zeros(num_lanes, dtype=torch.int64, device=device)
        self._send = sender(device)
        self._graphs: DecodeGraphs | None = None

    def capture(self, capture: Capture, has_adapters: bool) -> int:
        """Have decode steps replayed from now on; how many graphs that took.

        Once adapters are attached, and before the first step.
        """
        self._graphs = DecodeGraphs(
            self._decoder,
            self._kv,
            self._lane_tokens,
            capture,
            sizes=padded_rows(len(self._lane_tokens)),
            max_ranks=variants(has_adapters),
            max_blocks=self._packer.max_blocks,
        )
        return len(self._graphs)

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> Ticket:
        packed = self._packer.pack(plan)
        computed = self._compute(packed)
        samples, scored = self._choose(packed, computed)
        if samples is not None:
            self._lane_tokens.index_copy_(0, computed.sampled_lanes_S, samples.token_ids_S)
        if self._device.type != "cuda":
            return Ticket(packed, samples, scored, done=None)
        samples, scored = _to_host(samples), _to_host(scored)
        done = torch.cuda.Event()
        done.record()
        return Ticket(packed, samples, scored, done)

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> Tensor:
        """logits_LV of a step, without the sampler: what there is to measure on a device."""
        computed = self._compute(self._packer.pack(plan))
        return self._decoder.logits(computed.hidden_LH, computed.head)

    def collect(self, ticket: Ticket) -> StepResult:
        """The results in the plan's own order."""
        if ticket.done is not None:
            ticket.done.synchronize()
        packed = ticket.packed
        sampled: list[SampledToken | None] = [None] * len(packed.order)
        if ticket.samples is not None:
            tops = [row.sampling.num_top_logprobs for row in packed.samples]
            tokens = _tokens(ticket.samples, tops)
            for row, token in zip(packed.sampled_rows, tokens, strict=True):
                sampled[packed.order[row]] = token
        return StepResult(tuple(sampled), _scored_by_row(ticket))

    # -- the tokens -------------------------------------------------------------------------

    def _choose(
        self, packed: PackedStep, computed: Computed
    ) -> tuple[Samples | None, Samples | None]:
        """What is sampled, and what is scored."""
        num_sampled, pieces = len(packed.samples), self._wide_pieces(packed, computed)
        logits_LV = self._decoder.logits(computed.hidden_LH, computed.head)
        samples = scored = None
        if num_sampled:
            rows = narrow_rows(packed.samples, pieces)
            samples = sample(logits_LV[:num_sampled], rows, self._send)
        if computed.targets_L is not None:
            targets_L = computed.targets_L
            known_L = targets_L.clamp_max(logits_LV.shape[1] - 1) if pieces else targets_L
            scored = score(logits_LV[num_sampled:], known_L, max(packed.target_tops))
        del logits_LV
        for piece in pieces:
            self._choose_own(packed, computed, piece, samples, scored)
        return samples, scored

    def _wide_pieces(self, packed: PackedStep, computed: Computed) -> list[Piece]:
        if computed.head is None:
            return []
        num_rows, width = computed.hidden_LH.shape[0], self._decoder.spec.vocab_size
        return wide_pieces(computed.head.runs, len(packed.samples), num_rows, width)

    def _choose_own(
        self,
        packed: PackedStep,
        computed: Computed,
        piece: Piece,
        samples: Samples | None,
        scored: Samples | None,
    ) -> None:
        rows, num_sampled = piece.rows, len(packed.samples)
        logits_PW = self._decoder.own_logits(computed.hidden_LH[rows], piece.head_WH)
        if rows.start < num_sampled:
            assert samples is not None
            put(samples, rows.start, sample(logits_PW, packed.samples[rows], self._send))
        elif computed.targets_L is not None:
            assert scored is not None
            start = rows.start - num_sampled
            targets_P = computed.targets_L[start : rows.stop - num_sampled]
            put(scored, start, score(logits_PW, targets_P, max(packed.target_tops)))

    # -- the layers -------------------------------------------------------------------------

    def _compute(self, packed: PackedStep) -> Computed:
        graphs, ends = self._graphs, step_ends(packed, self._ends_by_slot)
        inputs = None if graphs is None else graphs.inputs_for(packed)
        if graphs is None or inputs is None or (ends is not None and ends.changes_layers):
            return self._op_by_op(packed, ends)
        hidden_SH = graphs.hidden(packed, inputs)
        lanes_S = inputs.tensors["sampled_lanes_S"][: packed.num_rows]
        head_arrays = _head_arrays(ends)
        there = self._send(head_arrays) if head_arrays else {}
        return Computed(hidden_SH, lanes_S, targets_L=None, head=_head(ends, there))

    def _op_by_op(self, packed: PackedStep, ends: StepEnds | None) -> Computed:
        there = self._send(packed.arrays() | _head_arrays(ends))
        if packed.pending_P.size:
            pending = self._lane_tokens.index_select(0, there["pending_lanes_P"])
            there["token_ids_T"].index_copy_(0, there["pending_P"], pending)
        return Computed(
            hidden_LH=self._decoder.hidden(_batch(packed, there, ends), self._kv),
            sampled_lanes_S=there["sampled_lanes_S"],
            targets_L=there["targets_L"] if packed.target_rows else None,
            head=_head(ends, there),
        )


def _head_arrays(ends: StepEnds | None) -> dict[str, Array]:
    segments = None if ends is None else ends.head_segments
    if segments is None:
        return {}
    return {"head_starts_G1": segments.starts_G1, "head_slots_G": segments.slots_G}


def _head(ends: StepEnds | None, there: Mapping[str, Tensor]) -> HeadRows | None:
    if ends is None or not ends.head:
        return None
    segments = ends.head_segments
    lora = None if segments is None else _segments(segments, there, of="head_")
    return HeadRows(ends.head, lora)


def _batch(packed: PackedStep, there: Mapping[str, Tensor], ends: StepEnds | None) -> ForwardBatch:
    """`there`: the step's arrays on the device."""
    segments = packed.segments
    return ForwardBatch(
        token_ids_T=there["token_ids_T"],
        positions_T=there["positions_T"],
        kv_slots_T=there["kv_slots_T"],
        query_starts_R1=there["query_starts_R1"],
        context_lens_R=there["context_lens_R"],
        block_tables_RM=there["block_tables_RM"],
        logit_rows_L=there["logit_rows_L"],
        lora=None if segments is None else _segments(segments, there),
        ends=ends,
    )


def _segments(segments: PackedSegments, there: Mapping[str, Tensor], of: str = "") -> Segments:
    return Segments(
        starts_G1=there[f"{of}starts_G1"],
        slots_G=there[f"{of}slots_G"],
        num_rows=int(segments.starts_G1[-1]),
        num_segments=len(segments.slots_G),
        max_rank=segments.max_rank,
        adapted_rows=segments.adapted_tokens,
        has_gain_or_bias=segments.has_gain_or_bias,
    )


def _scored_by_row(ticket: Ticket) -> tuple[tuple[SampledToken, ...], ...]:
    if ticket.scored is None:
        return ()
    packed = ticket.packed
    tokens = iter(_tokens(ticket.scored, packed.target_tops))
    per_row: list[tuple[SampledToken, ...]] = [()] * len(packed.order)
    for row, count in zip(packed.target_rows, packed.target_counts, strict=True):
        per_row[packed.order[row]] = tuple(islice(tokens, count))
    return tuple(per_row)


def _tokens(samples: Samples, tops: Sequence[int]) -> list[SampledToken]:
    """Plain values; tops[i] says how many alternatives token i was asked to have."""
    token_ids = samples.token_ids_S.tolist()
    logprobs = samples.logprobs_S.tolist()
    top_ids = [] if samples.top_ids_SK is None else samples.top_ids_SK.tolist()
    top_logprobs = [] if samples.top_logprobs_SK is None else samples.top_logprobs_SK.tolist()
    tokens: list[SampledToken] = []
    for i, (token_id, logprob) in enumerate(zip(token_ids, logprobs, strict=True)):
        if math.isnan(logprob):
            tokens.append(SampledToken(INVALID_TOKEN, 0.0))
            continue
        count = tops[i]
        top = tuple(zip(top_ids[i][:count], top_logprobs[i][:count], strict=True)) if count else ()
        tokens.append(SampledToken(token_id, logprob, top))
    return tokens


def _to_host(samples: Samples | None) -> Samples | None:
    """Starts the copies; they are done when an event recorded after them is."""
    if samples is None:
        return None
    return Samples(
        token_ids_S=_copied(samples.token_ids_S),
        logprobs_S=_copied(samples.logprobs_S),
        top_ids_SK=None if samples.top_ids_SK is None else _copied(samples.top_ids_SK),
        top_logprobs_SK=(
            None if samples.top_logprobs_SK is None else _copied(samples.top_logprobs_SK)
        ),
    )


def _copied(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)

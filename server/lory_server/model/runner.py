"""Turns a plan into tensors, runs the model and the sampler, and gives back plain values.

`submit` never waits for the device: sampled tokens stay there, in their sequence's lane, where the
next plan finds them; `collect` waits and brings them to the host. On a CPU the work is done by the
time `submit` returns. This module must not know requests, queues or where adapters come from.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from lory_kernels.contract import Segments
from lory_server.model.batch import ForwardBatch
from lory_server.model.decoder import Decoder
from lory_server.model.kv import KVCache
from lory_server.model.packing import PackedSegments, PackedStep, Packer
from lory_server.model.sampler import Samples, sample, score
from lory_server.plan import INVALID_TOKEN, SampledToken, StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class Ticket:
    """A submitted step whose results may still be on their way to the host."""

    packed: PackedStep
    samples: Samples | None
    scored: Samples | None
    done: torch.cuda.Event | None


class Runner:
    def __init__(
        self,
        decoder: Decoder,
        kv: KVCache,
        packer: Packer,
        num_lanes: int,
        device: torch.device,
    ) -> None:
        self._decoder = decoder
        self._kv = kv
        self._packer = packer
        self._device = device
        self._lane_tokens = torch.zeros(num_lanes, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> Ticket:
        packed = self._packer.pack(plan)
        logits_LV = self._decoder.forward(self._batch(packed), self._kv)
        num_sampled = len(packed.samples)
        samples = sample(logits_LV[:num_sampled], packed.samples) if num_sampled else None
        if samples is not None:
            self._lane_tokens[self._to_device(packed.sampled_lanes_S)] = samples.token_ids_S
        scored = self._score(packed, logits_LV[num_sampled:])
        if self._device.type != "cuda":
            return Ticket(packed, samples, scored, done=None)
        samples, scored = _to_host(samples), _to_host(scored)
        done = torch.cuda.Event()
        done.record()
        return Ticket(packed, samples, scored, done)

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

    # -- inputs -----------------------------------------------------------------------------

    def _batch(self, packed: PackedStep) -> ForwardBatch:
        token_ids_T = self._to_device(packed.token_ids_T)
        if packed.pending_P.size:
            lanes_P = self._to_device(packed.pending_lanes_P)
            token_ids_T[self._to_device(packed.pending_P)] = self._lane_tokens[lanes_P]
        return ForwardBatch(
            token_ids_T=token_ids_T,
            positions_T=self._to_device(packed.positions_T),
            kv_slots_T=self._to_device(packed.kv_slots_T),
            query_starts_R1=self._to_device(packed.query_starts_R1),
            context_lens_R=self._to_device(packed.context_lens_R),
            block_tables_RM=self._to_device(packed.block_tables_RM),
            logit_rows_L=self._to_device(packed.logit_rows_L),
            lora=None if packed.segments is None else self._segments(packed.segments),
        )

    def _segments(self, packed: PackedSegments) -> Segments:
        return Segments(
            starts_G1=self._to_device(packed.starts_G1),
            slots_G=self._to_device(packed.slots_G),
            num_rows=int(packed.starts_G1[-1]),
            num_segments=len(packed.slots_G),
            max_rank=packed.max_rank,
            adapted_rows=packed.adapted_tokens,
        )

    def _to_device(self, array: object) -> Tensor:
        tensor = torch.as_tensor(array)
        if self._device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _score(self, packed: PackedStep, logits_LV: Tensor) -> Samples | None:
        """The prompt tokens whose log-probabilities were asked for, row after row."""
        if not packed.target_rows:
            return None
        return score(logits_LV, self._to_device(packed.targets_L), max(packed.target_tops))


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

"""Decides what each step computes. Pure Python over integers; the same trace gives the same plans.

There are no phases: every sequence has tokens computed and tokens wanted, and a step hands out a
token budget. Decode, chunked prefill, prefix hits and recompute after preemption all follow.

    plan(residency) -> StepPlan, AdapterDemand     what to compute, what the device tier should hold
    commit(plan, result) -> [Committed]            what came of it, in the order of submission
    add, cancel                                    between steps

Plans may be made before earlier ones are committed: a token sampled but not seen yet is PENDING.
This module must not know torch, time, files, or how adapters are stored.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain, islice

from lory_server.blocks import BlockPool
from lory_server.head_turns import HeadTurns
from lory_server.messages import CancelReason, FinishReason
from lory_server.plan import (
    BASE_SLOT,
    INVALID_TOKEN,
    PENDING,
    AdapterDemand,
    PlanRow,
    Residency,
    SampledToken,
    SampleRow,
    StepPlan,
    StepResult,
)
from lory_server.sequence import NO_LANE, Sequence

MAX_PREFETCH = 16
"""How many waiting adapters are asked for ahead of their turn."""

LOOK_AHEAD = 256
"""How far into the queue adapters are looked for: bounds the work of a plan."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    max_batch_rows: int
    max_step_tokens: int
    prefix_caching: bool = True
    max_overtakes: int = 32
    """Admissions that may pass a sequence that waits for its adapter before room is made for it."""
    max_step_heads: int = 8
    """Most heads of adapters' own that one step reads; more take turns."""

    def __post_init__(self) -> None:
        if self.max_step_tokens < self.max_batch_rows:
            raise ValueError("max_step_tokens must be at least max_batch_rows")


@dataclass(frozen=True, slots=True)
class Committed:
    """What one row of a committed step meant for its sequence."""

    sequence: Sequence
    token: SampledToken | None
    finish_reason: FinishReason | None
    scored: tuple[SampledToken, ...] = ()
    """Prompt tokens, if their log-probabilities were asked for."""


@dataclass(frozen=True, slots=True)
class _Flight:
    """A row that has been submitted: whose it is, and in which of its lives."""

    sequence: Sequence
    epoch: int
    num_tokens: int
    samples: bool


@dataclass(frozen=True, slots=True)
class StepCounts:
    """What planning one step met with."""

    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0


class Scheduler:
    def __init__(
        self, pool: BlockPool, limits: SchedulerLimits, eos_token_ids: Iterable[int]
    ) -> None:
        self.pool = pool
        self.limits = limits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._eos = frozenset(eos_token_ids)
        self._sequences: dict[int, Sequence] = {}
        self._free_lanes = list(range(limits.max_batch_rows - 1, -1, -1))
        self._in_flight: dict[int, tuple[_Flight, ...]] = {}
        self._next_step = 0
        self.counts = StepCounts()
        self._heads = HeadTurns(limits.max_step_heads)

    # -- between steps ----------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence whose adapter has been validated and is held.

        Raises ValueError if it could never run, even alone.
        """
        longest = sequence.prompt_len + max(sequence.sampling.max_new_tokens - 1, 0)
        if self.pool.blocks_for(longest) > self.pool.num_blocks:
            capacity = self.pool.num_blocks * self.pool.block_size
            raise ValueError(
                f"prompt and answer need KV for {longest} tokens, the pool holds {capacity}; "
                "lower max_new_tokens or raise --kv-memory"
            )
        if sequence.request_id in self._sequences:
            raise ValueError(f"request {sequence.request_id} is already known")
        self._sequences[sequence.request_id] = sequence
        self.waiting.append(sequence)

    def cancel(self, request_id: int, reason: CancelReason) -> Sequence | None:
        """Ends a sequence now; its rows in flight are dropped when they commit."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return None
        if sequence.lane == NO_LANE:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
        self._finish(sequence, reason)
        return sequence

    # -- plan -------------------------------------------------------------------------------

    def plan(self, residency: Residency) -> tuple[StepPlan, AdapterDemand]:
        """The next step, possibly empty, and what the device tier should hold."""
        self.counts = StepCounts()
        rows: list[PlanRow] = []
        flights: list[_Flight] = []
        for sequence in [s for s in self.running if s.outgrows]:
            self._put_back(sequence)  # computed anew, as soon as it is admitted
        budget = self._plan_running(residency, rows, flights)
        draining = self._draining(residency)
        if self.counts.preemptions == 0:
            self._admit(residency, draining, budget, rows, flights)
        demand = self._demand(residency, draining)
        plan = StepPlan(
            step=self._next_step,
            rows=tuple(rows),
            needs_host_tokens=any(flight.sequence.needs_history for flight in flights),
        )
        if rows:
            self._in_flight[plan.step] = tuple(flights)
            self._next_step += 1
        return plan, demand

    def _plan_running(
        self, residency: Residency, rows: list[PlanRow], flights: list[_Flight]
    ) -> int:
        """Rows for running sequences, decodes before chunks of prefill; the budget left."""
        budget = self.limits.max_step_tokens
        # Nor may a long prompt keep those out that could be admitted: half is left to them.
        chunk = budget // 2 if self._someone_may_join(residency) else budget
        planned: set[int] = set()
        # A long prompt must not take the budget from sequences that need one token each.
        for sequence in self._heads.begin(sorted(self.running, key=lambda s: s.num_wanted > 1)):
            if sequence.lane == NO_LANE or budget == 0 or not self._heads.admits(sequence):
                continue  # preempted by an earlier one, no budget left, or not its head's turn
            num_tokens = min(sequence.num_wanted, budget, max(chunk, 1))
            if num_tokens <= 0 or not self._grow(sequence, num_tokens, planned):
                continue
            planned.add(sequence.request_id)
            self._append_row(sequence, num_tokens, residency, rows, flights)
            budget -= num_tokens
        return budget

    def _someone_may_join(self, residency: Residency) -> bool:
        if not self._free_lanes:
            return False
        ahead = islice(self.waiting, LOOK_AHEAD)
        return any(self._may_run(sequence, residency, frozenset()) for sequence in ahead)

    def _append_row(
        self,
        sequence: Sequence,
        num_tokens: int,
        residency: Residency,
        rows: list[PlanRow],
        flights: list[_Flight],
    ) -> None:
        """One row; or two where its adapter begins to act: the base's, and the adapter's."""
        for run in sequence.runs(num_tokens):
            row = self._row(sequence, run, residency)
            rows.append(row)
            flights.append(_Flight(sequence, sequence.epoch, run, row.sample is not None))
            sequence.num_computed += run
            sequence.num_pending += row.sample is not None
        self._heads.note(sequence)

    def _row(self, sequence: Sequence, num_tokens: int, residency: Residency) -> PlanRow:
        start = sequence.num_computed
        end = start + num_tokens
        token_ids: list[int] = sequence.tokens[start:end]
        if len(token_ids) < num_tokens:
            token_ids.append(PENDING)
        targets: list[int] = []
        if sequence.sampling.prompt_logprobs and end > sequence.num_scored:
            targets = sequence.tokens[start + 1 : min(end + 1, sequence.prompt_len)]
        acts = bool(sequence.revision) and start >= sequence.activation
        adapter = residency.resident[sequence.revision] if acts else None
        return PlanRow(
            sequence_id=sequence.request_id,
            lane=sequence.lane,
            start=start,
            token_ids=token_ids,
            blocks=sequence.blocks,
            slot=adapter.slot if adapter else BASE_SLOT,
            rank=adapter.max_rank if adapter else 0,
            has_gain_or_bias=adapter.has_gain_or_bias if adapter else False,
            rope_offset=sequence.rope_offset,
            sample=self._sample_row(sequence) if end == sequence.num_total else None,
            targets=targets,
            num_target_top=sequence.sampling.num_top_logprobs,
        )

    def _sample_row(self, sequence: Sequence) -> SampleRow | None:
        if not sequence.samples_after:
            return None
        history = sequence.tokens if sequence.needs_history else None
        return SampleRow(sequence.sampling, sequence.num_total, history, sequence.prompt_len)

    # -- blocks and preemption --------------------------------------------------------------

    def _grow(self, sequence: Sequence, num_tokens: int, planned: set[int]) -> bool:
        """Gives a running sequence blocks for `num_tokens` more, preempting later ones if need be.

        A sequence that is already part of this step keeps its blocks. False: it gave way itself.
        """
        missing = self.pool.blocks_for(sequence.num_computed + num_tokens) - len(sequence.blocks)
        while missing > 0:
            blocks = self.pool.allocate(missing)
            if blocks is not None:
                sequence.blocks.extend(blocks)
                return True
            victim = next(s for s in reversed(self.running) if s.request_id not in planned)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._put_back(sequence)
        counts = self.counts
        self.counts = StepCounts(counts.prefix_queries, counts.prefix_hits, counts.preemptions + 1)

    def _put_back(self, sequence: Sequence) -> None:
        """Takes a sequence's blocks; it is recomputed later, from tokens it already has."""
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = 0
        sequence.num_committed = 0
        if sequence.lane != NO_LANE:
            self._free_lanes.append(sequence.lane)
            sequence.lane = NO_LANE

    # -- admission --------------------------------------------------------------------------

    def _admit(
        self,
        residency: Residency,
        draining: frozenset[str],
        budget: int,
        rows: list[PlanRow],
        flights: list[_Flight],
    ) -> None:
        """Moves waiting sequences into the batch, in order; those without their adapter wait."""
        passed: list[Sequence] = []
        for sequence in list(self.waiting) if self._free_lanes else ():
            if budget == 0 or not self._free_lanes:
                break
            if not self._may_run(sequence, residency, draining):
                passed.append(sequence)
                continue
            num_tokens = self._start(sequence, budget)
            if num_tokens == 0:
                break  # no blocks: nobody behind it may take the ones it waits for
            self.waiting.remove(sequence)
            self.running.append(sequence)
            if self._heads.admits(sequence):  # else its head has the next step's turn
                self._append_row(sequence, num_tokens, residency, rows, flights)
                budget -= num_tokens
            for waiting in passed:
                waiting.overtaken += 1

    @staticmethod
    def _may_run(sequence: Sequence, residency: Residency, draining: frozenset[str]) -> bool:
        if sequence.num_pending:
            return False  # preempted while a token was in flight: it must be seen first
        revision = sequence.revision
        return not revision or (revision in residency.resident and revision not in draining)

    def _start(self, sequence: Sequence, budget: int) -> int:
        """Gives a waiting sequence its lane and first blocks; how many tokens it may compute."""
        if sequence.outgrows:
            sequence.lengthen()
        hits = self._prefix_hits(sequence)
        num_cached = len(hits) * self.pool.block_size
        num_tokens = min(sequence.num_total - num_cached, budget)
        needed = self.pool.blocks_for(num_cached + num_tokens) - len(hits)
        # One block a running sequence stays free, so that admission does not cause preemption.
        reserve = len(self.running)
        if needed + self.pool.num_free_among(hits) + reserve > self.pool.num_free and self.running:
            return 0
        self.pool.hold(hits)
        blocks = self.pool.allocate(needed)
        if blocks is None:
            self.pool.release(hits)
            return 0
        sequence.blocks = hits + blocks
        self._open(sequence, num_cached)
        return num_tokens

    def _open(self, sequence: Sequence, num_cached: int) -> None:
        sequence.num_computed = sequence.num_committed = num_cached
        sequence.lane = self._free_lanes.pop()
        sequence.epoch += 1
        if not sequence.started:
            sequence.num_cached = min(num_cached, sequence.prompt_len)
        looked_up = sequence.num_total if self._may_reuse(sequence) else 0
        self.counts = replace(
            self.counts,
            prefix_queries=self.counts.prefix_queries + looked_up,
            prefix_hits=self.counts.prefix_hits + num_cached,
        )
        sequence.started = True

    def _may_reuse(self, sequence: Sequence) -> bool:
        return self.limits.prefix_caching and not sequence.sampling.prompt_logprobs

    def _prefix_hits(self, sequence: Sequence) -> list[int]:
        if not self._may_reuse(sequence):
            return []
        # At least one token is computed, so that there are logits to sample from.
        hashes = sequence.full_block_hashes(self.pool.block_size, sequence.num_total - 1)
        return self.pool.find(hashes)

    # -- adapters ---------------------------------------------------------------------------

    def _draining(self, residency: Residency) -> frozenset[str]:
        """Resident adapters that admit nobody until a sequence passed over too often gets in."""
        ahead: set[str] = set()
        for head in self.waiting:
            if self._is_starved(head, residency):
                break
            ahead.add(head.revision)
        else:
            return frozenset()
        running: dict[str, int] = {}
        for sequence in self.running:
            running[sequence.revision] = running.get(sequence.revision, 0) + 1
        free_bytes, free_slots = residency.free_bytes, residency.free_slots
        free_full = residency.free_full_bytes
        chosen: list[str] = []
        resident = residency.resident
        # The idle ones as they come: of thousands, no more are looked at than are needed.
        idle = (r for r in resident if r not in running)
        busy = sorted(running.keys() & resident.keys(), key=lambda r: (running[r], r))
        for revision in (r for r in chain(idle, busy) if r not in ahead):
            fits = free_bytes >= head.adapter_bytes and free_slots >= 1
            if fits and free_full >= head.full_bytes:
                break
            if fits and not resident[revision].full_bytes:
                continue  # it has nothing of what is short
            chosen.append(revision)
            free_bytes += resident[revision].num_bytes
            free_full += resident[revision].full_bytes
            free_slots += 1
        return frozenset(chosen)

    def _is_starved(self, sequence: Sequence, residency: Residency) -> bool:
        return (
            sequence.overtaken >= self.limits.max_overtakes
            and bool(sequence.revision)
            and sequence.revision not in residency.resident
            and sequence.revision not in residency.loading
        )

    def _demand(self, residency: Residency, draining: frozenset[str]) -> AdapterDemand:
        in_use = {s.revision for s in self.running if s.revision}
        for flights in self._in_flight.values():
            in_use.update(f.sequence.revision for f in flights if f.sequence.revision)
        line: dict[str, None] = {}
        num_loads = 0
        for sequence in islice(self.waiting, LOOK_AHEAD):
            revision = sequence.revision
            if not revision or revision in line:
                continue
            if revision not in residency.resident:
                if num_loads < MAX_PREFETCH:
                    num_loads += 1
                    line[revision] = None
            elif line or revision in draining:
                line[revision] = None
            else:
                in_use.add(revision)  # its turn comes before anybody's who needs a load
        return AdapterDemand(frozenset(in_use), tuple(line))

    # -- commit -----------------------------------------------------------------------------

    def commit(self, plan: StepPlan, result: StepResult) -> list[Committed]:
        """Applies a step's result. Steps commit in the order in which they were planned."""
        flights = self._in_flight.pop(plan.step)
        committed: list[Committed] = []
        for i, (flight, token) in enumerate(zip(flights, result.sampled, strict=True)):
            sequence = flight.sequence
            sequence.num_pending -= flight.samples
            if sequence.finish_reason is not None:
                continue  # it ended while this row was in flight
            scored = _not_known(sequence, plan.rows[i].start, result.scored[i : i + 1])
            self._commit_computed(flight)
            reason = self._commit_token(sequence, token)
            committed.append(Committed(sequence, token, reason, scored))
        return committed

    def _commit_computed(self, flight: _Flight) -> None:
        """Publishes the blocks that this row filled, unless it was preempted since."""
        sequence = flight.sequence
        if flight.epoch != sequence.epoch or sequence.lane == NO_LANE:
            return
        before = sequence.num_committed // self.pool.block_size
        sequence.num_committed += flight.num_tokens
        if not self.limits.prefix_caching:
            return
        hashes = sequence.full_block_hashes(self.pool.block_size, sequence.num_committed)
        for index in range(before, len(hashes)):
            self.pool.publish(sequence.blocks[index], hashes[index])

    def _commit_token(self, sequence: Sequence, token: SampledToken | None) -> FinishReason | None:
        if token is not None and token.token_id != INVALID_TOKEN:
            sequence.tokens.append(token.token_id)
        reason = self._finish_reason(sequence, token)
        if reason is not None:
            if sequence.lane == NO_LANE:
                self.waiting.remove(sequence)  # preempted while its last token was in flight
            else:
                self.running.remove(sequence)
            self._finish(sequence, reason)
        return reason

    def _finish_reason(self, sequence: Sequence, token: SampledToken | None) -> FinishReason | None:
        sampling = sequence.sampling
        if token is None:
            scored = sampling.max_new_tokens == 0 and sequence.num_committed >= sequence.prompt_len
            return "length" if scored else None
        if token.token_id == INVALID_TOKEN:
            return "error"
        if token.token_id in self._eos and not sampling.ignore_eos:
            return "eos"
        if token.token_id in sampling.stop_token_ids:
            return "stop_token"
        return "length" if sequence.num_generated >= sampling.max_new_tokens else None

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        del self._sequences[sequence.request_id]
        self._release(sequence)
        sequence.finish_reason = reason

    def check(self) -> None:
        """Raises AssertionError unless every lane and block is accounted for."""
        self.pool.check()
        lanes = [s.lane for s in self.running] + self._free_lanes
        if sorted(lanes) != list(range(self.limits.max_batch_rows)):
            raise AssertionError("lanes are lost or shared")
        if any(s.lane != NO_LANE or s.blocks for s in self.waiting):
            raise AssertionError("a waiting sequence holds a lane or blocks")
        held = sum(len(s.blocks) for s in self.running)
        if held < self.pool.num_used:
            raise AssertionError("blocks are held by nobody")


def _not_known(
    sequence: Sequence, start: int, row_scored: tuple[tuple[SampledToken, ...], ...]
) -> tuple[SampledToken, ...]:
    """A row's scores, less those that were told before the sequence was preempted."""
    scored = row_scored[0] if row_scored else ()
    fresh = scored[max(sequence.num_scored - start, 0) :]
    sequence.num_scored += len(fresh)
    return fresh

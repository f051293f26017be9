"""A simulated device for tests of the scheduler and engine: no torch, every KV entry remembered.

The "model" is a hash of everything a position can see, so a token is right only if every block
held exactly what the sequence's own tokens put there. Each row's view is checked as it is computed.
Weights that act from a position on are another model from there, and the base before it; so are
all positions of a sequence that has outgrown the first of two sets of rotations.
"""

import hashlib
from dataclasses import dataclass, field

from lory_server.messages import Sampling
from lory_server.plan import (
    BASE_SLOT,
    PENDING,
    Residency,
    ResidentAdapter,
    SampledToken,
    StepPlan,
    StepResult,
)
from lory_server.scheduler import Committed, Scheduler
from lory_server.sequence import Sequence

VOCAB = 50
EOS = 0


def computer(position: int, weights: str, activation: int, is_long: bool) -> str:
    """What computes a position; KV of one may stand for another's only if this is the same."""
    by = f"{weights} from {activation}" if activation else weights
    return ("base" if position < activation else by) + (" long" if is_long else "")


def next_token(tokens: list[int], weights: str) -> int:
    """What the simulated model says after `tokens`."""
    digest = hashlib.blake2b(repr((tokens, weights)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % VOCAB


def alone(
    prompt: list[int], sampling: Sampling, weights: str, activation: int = 0, short_tokens: int = 0
) -> list[int]:
    """The answer that a request gets when nothing else runs."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < sampling.max_new_tokens:
        is_long = 0 < short_tokens < len(tokens)
        tokens.append(next_token(tokens, computer(len(tokens) - 1, weights, activation, is_long)))
        if tokens[-1] == EOS and not sampling.ignore_eos:
            break
    return tokens[len(prompt) :]


@dataclass
class SimulatedRunner:
    """Implements the runner's two calls over remembered KV entries."""

    block_size: int
    weights_of: dict[int, str] = field(default_factory=dict)
    """By request id."""
    activation_of: dict[int, int] = field(default_factory=dict)
    short_of: dict[int, int] = field(default_factory=dict)
    """Most tokens that each has with the first set of rotations; 0: there is one set."""
    slot_of: dict[str, int] = field(default_factory=dict)
    """By weights; checked against every row."""
    kv: dict[int, tuple[int, int, str]] = field(default_factory=dict)
    lanes: dict[int, int] = field(default_factory=dict)

    def submit(self, plan: StepPlan) -> StepResult:
        ends: dict[int, tuple[int, int]] = {}
        for row in plan.rows:
            goes_on = ends.get(row.lane, (row.sequence_id, row.start)) == (
                row.sequence_id,
                row.start,
            )
            assert goes_on, "two rows share a lane"
            ends[row.lane] = (row.sequence_id, row.start + len(row.token_ids))
        sampled = tuple(self._compute(row) for row in plan.rows)
        scored = tuple(tuple(SampledToken(t, -1.0) for t in row.targets) for row in plan.rows)
        return StepResult(sampled, scored if any(scored) else ())

    def collect(self, ticket: object) -> StepResult:
        assert isinstance(ticket, StepResult)
        return ticket

    def check_still_there(self, plan: StepPlan) -> None:
        """A device works on a step until it is collected, and reads its adapters until then."""
        for row in plan.rows:
            assert self._slot(row) == row.slot, "an adapter was evicted under a step in flight"

    def _compute(self, row) -> SampledToken | None:
        weights, activation = self.weights_of[row.sequence_id], self._activation(row)
        token_ids = [self.lanes[row.lane] if t == PENDING else t for t in row.token_ids]
        end = row.start + len(token_ids)
        is_long, short = row.rope_offset > 0, self.short_of.get(row.sequence_id, 0)
        assert row.rope_offset in (0, short)
        assert is_long or not 0 < short < end, "short beyond its time"
        assert not is_long or row.sample is None or end > short, "long before its time"
        assert row.slot == self._slot(row), "row computed with another adapter"
        assert row.start >= activation or end <= activation, "a row of base and adapter"
        for i, token in enumerate(token_ids, row.start):
            self.kv[self._place(row, i)] = (token, i, computer(i, weights, activation, is_long))
        seen = []
        for position in range(end):
            token, at, by = self.kv[self._place(row, position)]
            expected = computer(position, weights, activation, is_long)
            assert (at, by) == (position, expected), f"foreign KV at {position}: {(at, by)}"
            seen.append(token)
        if row.sample is None:
            return None
        assert row.sample.position == len(seen)
        if row.sample.history is not None:
            assert list(row.sample.history) == seen, "a history that lags"
        self.lanes[row.lane] = next_token(seen, computer(end - 1, weights, activation, is_long))
        return SampledToken(self.lanes[row.lane], -1.0)

    def _activation(self, row) -> int:
        return self.activation_of.get(row.sequence_id, 0)

    def _slot(self, row) -> int:
        if row.start < self._activation(row):
            return BASE_SLOT
        return self.slot_of.get(self.weights_of[row.sequence_id], BASE_SLOT)

    def _place(self, row, position: int) -> int:
        return row.blocks[position // self.block_size] * self.block_size + (
            position % self.block_size
        )


@dataclass
class SimulatedTier:
    """A device tier of `num_slots` equal adapters, which loads what is demanded, one a step."""

    num_slots: int
    resident: dict[str, int] = field(default_factory=dict)
    loading: list[str] = field(default_factory=list)
    loads: int = 0

    def residency(self) -> Residency:
        return Residency(
            resident={r: ResidentAdapter(slot, 1, 1) for r, slot in self.resident.items()},
            loading=frozenset(self.loading),
            free_bytes=self._free,
            free_slots=self._free,
        )

    def demand(self, demand) -> None:
        for revision in self.loading:
            slot = min(set(range(self.num_slots)) - set(self.resident.values()))
            self.resident[revision] = slot
        self.loading.clear()
        for place, revision in enumerate(demand.wanted):
            if revision in self.resident or revision in self.loading:
                continue
            if not self._free:
                idle = [r for r in self.resident if r not in (*demand.in_use, *demand.wanted)]
                behind = [r for r in reversed(demand.wanted[place:]) if r in self.resident]
                may_go = [r for r in (*idle, *behind) if r not in demand.in_use]
                if not may_go:
                    return
                del self.resident[may_go[0]]
            self.loading.append(revision)
            self.loads += 1

    @property
    def _free(self) -> int:
        return self.num_slots - len(self.resident) - len(self.loading)


@dataclass
class World:
    """Scheduler, simulated device and tier, stepped as the engine does."""

    scheduler: Scheduler
    runner: SimulatedRunner
    tier: SimulatedTier
    depth: int = 0
    in_flight: list[tuple[StepPlan, StepResult]] = field(default_factory=list)
    answers: dict[int, list[int]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    scored: dict[int, list[int]] = field(default_factory=dict)
    preemptions: int = 0
    hits: int = 0

    def add(self, sequence: Sequence) -> None:
        self.runner.weights_of[sequence.request_id] = sequence.weights
        self.runner.activation_of[sequence.request_id] = sequence.activation
        self.runner.short_of[sequence.request_id] = sequence.short_tokens
        self.answers[sequence.request_id] = []
        self.scheduler.add(sequence)

    def cancel(self, request_id: int) -> None:
        if self.scheduler.cancel(request_id, "cancelled") is not None:
            self._end(request_id, "cancelled")

    def step(self) -> bool:
        """One step; whether anything ran or committed."""
        self.runner.slot_of = dict(self.tier.resident)
        plan, demand = self.scheduler.plan(self.tier.residency())
        self.preemptions += self.scheduler.counts.preemptions
        self.hits += self.scheduler.counts.prefix_hits
        assert plan.num_tokens <= self.scheduler.limits.max_step_tokens
        sequences = {row.sequence_id for row in plan.rows}
        assert len(sequences) <= self.scheduler.limits.max_batch_rows
        self.tier.demand(demand)
        if plan.rows:
            self.in_flight.append((plan, self.runner.submit(plan)))
        self.runner.slot_of = dict(self.tier.resident)
        for submitted, _ in self.in_flight:
            self.runner.check_still_there(submitted)
        progressed = bool(self.in_flight) or bool(self.tier.loading)
        depth = self.depth if plan.rows and not plan.needs_host_tokens else 0
        while len(self.in_flight) > depth:
            for committed in self.scheduler.commit(*self.in_flight.pop(0)):
                self._take(committed)
        self.scheduler.check()
        return progressed

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    def run(self, max_steps: int = 10_000) -> int:
        """Steps until all is done; how many it took."""
        for step in range(max_steps):
            if not self.has_work and not self.in_flight:
                return step
            self.step()
        raise AssertionError(f"not done after {max_steps} steps")

    def _take(self, committed: Committed) -> None:
        request_id = committed.sequence.request_id
        assert request_id not in self.reasons, "an event after the terminal one"
        self.scored.setdefault(request_id, []).extend(t.token_id for t in committed.scored)
        if committed.token is not None:
            self.answers[request_id].append(committed.token.token_id)
        if committed.finish_reason is not None:
            self._end(request_id, committed.finish_reason)

    def _end(self, request_id: int, reason: str) -> None:
        assert request_id not in self.reasons, "two terminal events"
        self.reasons[request_id] = reason

"""The engine of one device: requests in, tokens out, one step at a time.

    step = scheduler.plan(residency) -> runner.submit(plan) -> scheduler.commit(result) -> events

The loop is pipelined: with depth 1 a plan is submitted before the one before it is committed.
A request's life here: accepted -> its adapter resolved (off the step) -> queued -> running ->
exactly one Finished. This module must not know sockets, tensors, tokenizers or HTTP.
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from lory_server.accounting import NO_WORK, AdapterWork, CostModel, charge, row_share
from lory_server.adapters.cache import AdapterCache
from lory_server.adapters.orders import Orders
from lory_server.adapters.outcomes import Listed, Resolved, ResolveFailed
from lory_server.messages import (
    AdapterEntry,
    AdapterList,
    AdapterOrder,
    Cancel,
    CancelReason,
    Charge,
    Failure,
    FailureCode,
    Finished,
    FinishReason,
    ListAdapters,
    OrderDone,
    PromptLogprobs,
    Resolution,
    StepEvents,
    StepReport,
    Submit,
    Token,
    Usage,
)
from lory_server.plan import SampledToken, StepPlan, StepResult
from lory_server.scheduler import Committed, Scheduler
from lory_server.sequence import BASE_WEIGHTS, Sequence, activation_of

Holders = Counter[tuple[str, str]]
NO_ADAPTERS = "this server serves the base alone; start it with --adapters"
MANNER_CHANGED = "the adapter was replaced while the request waited for it; send it again"


class StepRunner(Protocol):
    """What computes a plan: the model on its device, or a stand-in in tests."""

    def submit(self, plan: StepPlan) -> Any: ...

    def collect(self, ticket: Any) -> StepResult: ...


@dataclass(frozen=True, slots=True)
class EngineLimits:
    vocab_size: int
    max_model_len: int
    max_queued: int
    pipeline_depth: int
    """Steps submitted but not committed when `step` returns: 0 or 1."""
    serves_adapters: bool
    short_tokens: int = 0  # as in Sequence


@dataclass(slots=True, eq=False)
class _Request:
    """What the engine keeps of a request from acceptance to its terminal event."""

    command: Submit
    arrived: float
    resolved: float = 0.0
    first_planned: float = 0.0
    seconds: float = 0.0
    adapter: Resolved | None = None
    """What it holds from then on."""
    sequence: Sequence | None = None
    scored: list[SampledToken] = field(default_factory=list)

    @property
    def revision(self) -> str:
        return self.adapter.revision if self.adapter else ""

    @property
    def adapter_work(self) -> AdapterWork:
        adapter = self.adapter
        return AdapterWork(adapter.token_params, adapter.head_params) if adapter else NO_WORK


@dataclass(frozen=True, slots=True)
class _InFlight:
    plan: StepPlan
    ticket: Any
    requests: tuple[_Request, ...]


@dataclass(slots=True)
class _Outbox:
    """What one turn of the loop has to say."""

    resolved: list[Resolution] = field(default_factory=list)
    prompts: list[PromptLogprobs] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    charges: list[Charge] = field(default_factory=list)
    wall_seconds: float = 0.0
    """Between commits, while something ran."""
    idle_seconds: float = 0.0
    num_rows: int = 0
    num_prompt_tokens: int = 0
    num_sampled: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0


class Engine:
    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        adapters: AdapterCache,
        cost_model: CostModel,
        limits: EngineLimits,
        clock: Callable[[], float],
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._adapters = adapters
        self._orders = Orders(adapters)
        self._cost_model = cost_model
        self._limits = limits
        self._clock = clock
        self._requests: dict[int, _Request] = {}
        self._resolving: dict[int, _Request] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._outbox = _Outbox()
        self._answers: list[AdapterList | OrderDone] = []
        self._steps = 0
        self._progressed = False
        self._last_commit = clock()

    # -- commands ---------------------------------------------------------------------------

    def submit(self, command: Submit) -> None:
        """Accepts a request; whatever is wrong with it becomes its terminal event."""
        request = _Request(command, arrived=self._clock())
        if failure := self._refusal(command):
            self._end(request, "error", failure)
            return
        self._requests[command.request_id] = request
        if command.adapter_id:
            self._resolving[command.request_id] = request
            self._adapters.resolve(command.request_id, command.adapter_id, command.adapter_revision)
        else:
            self._enqueue(request)

    def cancel(self, command: Cancel) -> None:
        request = self._requests.get(command.request_id)
        if request is None:
            return
        if self._resolving.pop(command.request_id, None) is not None:
            self._adapters.cancel(command.request_id)
        else:
            self._scheduler.cancel(command.request_id, command.reason)
        self._end(request, command.reason)

    def cancel_all(self, reason: CancelReason) -> None:
        for request_id in list(self._requests):
            self.cancel(Cancel(request_id=request_id, reason=reason))

    def list_adapters(self, command: ListAdapters) -> None:
        if not self._limits.serves_adapters:
            self._answers.append(AdapterList(call_id=command.call_id, adapters=()))
            return
        self._adapters.request_list(command.call_id)

    def obey(self, order: AdapterOrder) -> None:
        if self._limits.serves_adapters:
            self._orders.take(order)
        else:
            failure = _failure("adapter_not_found", NO_ADAPTERS)
            self._answers.append(OrderDone(call_id=order.call_id, entry=None, failure=failure))

    def close(self) -> None:
        """Stops the loader threads."""
        self._adapters.close()

    def check(self) -> None:
        """Raises AssertionError unless free + used = total everywhere."""
        self._scheduler.check()
        self._adapters.device.check()

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    @property
    def can_step(self) -> bool:
        """Whether the next step has something to do that no command or adapter must bring first."""
        return self._progressed

    # -- the step ---------------------------------------------------------------------------

    def step(self) -> None:
        """One turn of the loop; what it has to say is fetched with `events`."""
        self._take_resolved()
        residency = self._adapters.residency()
        self._orders.settle()
        plan, demand = self._scheduler.plan(residency)
        self._adapters.demand(self._orders.added_to(demand))
        self._orders.let_go(demand.in_use)
        if plan.rows:
            self._submit_plan(plan)
        self._progressed = bool(self._in_flight)
        depth = self._limits.pipeline_depth if plan.rows and not plan.needs_host_tokens else 0
        while len(self._in_flight) > depth:
            self._commit(self._in_flight.popleft())

    def events(self) -> StepEvents:
        """Everything since the last call, with a report. Empty of events: a heartbeat."""
        outbox, self._outbox = self._outbox, _Outbox()
        if not self._progressed:
            outbox.idle_seconds += self._elapsed()
        return StepEvents(
            report=self._report(outbox),
            resolved=tuple(outbox.resolved),
            prompts=tuple(outbox.prompts),
            tokens=tuple(outbox.tokens),
            finished=tuple(outbox.finished),
        )

    def adapter_answers(self) -> list[AdapterList | OrderDone]:
        """To lists and orders since the last call."""
        answers, self._answers = [*self._answers, *self._orders.drain()], []
        holders = self._holders() if answers else Holders()
        return [_with_requests(answer, holders) for answer in answers]

    def _holders(self) -> Holders:
        """How many requests of each name hold each of its revisions, or none yet."""
        requests = self._requests.values()
        return Counter((r.command.adapter_id, r.revision) for r in requests if r.command.adapter_id)

    @property
    def has_events(self) -> bool:
        outbox = self._outbox
        return bool(outbox.finished or outbox.tokens or outbox.prompts or outbox.num_rows)

    def _submit_plan(self, plan: StepPlan) -> None:
        if not self._progressed:
            self._outbox.idle_seconds += self._elapsed()
        now = self._clock()
        requests = tuple(self._requests[row.sequence_id] for row in plan.rows)
        for request in requests:
            request.first_planned = request.first_planned or now
        counts = self._scheduler.counts
        self._outbox.prefix_queries += counts.prefix_queries
        self._outbox.prefix_hits += counts.prefix_hits
        self._outbox.preemptions += counts.preemptions
        self._in_flight.append(_InFlight(plan, self._runner.submit(plan), requests))

    def _commit(self, flight: _InFlight) -> None:
        result = self._runner.collect(flight.ticket)
        wall = self._elapsed()
        self._charge(flight, wall)
        self._steps += 1
        for committed in self._scheduler.commit(flight.plan, result):
            self._report_committed(committed)

    def _report_committed(self, committed: Committed) -> None:
        sequence = committed.sequence
        request = self._requests[sequence.request_id]
        request.scored.extend(committed.scored)
        token = committed.token
        if token is not None:
            self._tell_scored(request)
            if committed.finish_reason != "error":
                self._outbox.tokens.append(
                    Token(sequence.request_id, token.token_id, token.logprob, token.top)
                )
                self._outbox.num_sampled += 1
        if committed.finish_reason is not None:
            self._tell_scored(request)
            self._end(request, committed.finish_reason, _numerical_failure(committed))

    def _tell_scored(self, request: _Request) -> None:
        if request.scored:
            with_top = request.command.sampling.num_top_logprobs > 0
            scored = PromptLogprobs(
                request_id=request.command.request_id,
                logprobs=tuple(token.logprob for token in request.scored),
                top=tuple(token.top for token in request.scored) if with_top else (),
            )
            self._outbox.prompts.append(scored)
            request.scored = []

    # -- requests ---------------------------------------------------------------------------

    def _refusal(self, command: Submit) -> Failure | None:
        """What makes a request impossible, if anything; the router checks everything else."""
        limits, sampling = self._limits, command.sampling
        if len(self._requests) >= limits.max_queued:
            return _failure("overloaded", f"the queue of {limits.max_queued} requests is full")
        if command.adapter_id and not limits.serves_adapters:
            return _failure("adapter_not_found", NO_ADAPTERS)
        if not command.prompt_ids:
            return _failure("bad_request", "the prompt has no tokens")
        if not command.adapter_id and (failure := _outside(command, limits.vocab_size)):
            return failure
        longest = len(command.prompt_ids) + sampling.max_new_tokens
        if longest > limits.max_model_len:
            return _failure(
                "context_too_long",
                f"{len(command.prompt_ids)} prompt tokens and max_new_tokens "
                f"{sampling.max_new_tokens} exceed the context of {limits.max_model_len}",
            )
        return None

    def _take_resolved(self) -> None:
        for outcome in self._adapters.poll():
            if isinstance(outcome, Listed):
                listed = AdapterList(call_id=outcome.call_id, adapters=outcome.adapters)
                self._answers.append(listed)
            elif self._orders.owns(outcome.ticket):
                self._orders.take_outcome(outcome)
            else:
                self._take_adapter(self._resolving.pop(outcome.ticket), outcome)

    def _take_adapter(self, request: _Request, outcome: Resolved | ResolveFailed) -> None:
        """Queues a request with its adapter, or ends it with the reason why it has none."""
        if isinstance(outcome, ResolveFailed):
            self._end(request, "error", _failure(outcome.code, outcome.message, outcome.source))
            return
        self._orders.follow(outcome)
        if failure := self._misfit(request.command, outcome):
            self._adapters.release(outcome.revision)
            self._end(request, "error", failure)
            return
        request.resolved = self._clock()
        request.adapter = outcome
        self._outbox.resolved.append(Resolution(outcome.ticket, outcome.revision))
        self._enqueue(request)

    def _misfit(self, command: Submit, found: Resolved) -> Failure | None:
        told = found.manner
        if told.digest != command.manner:
            return Failure(code="manner_changed", message=MANNER_CHANGED, tokenizer=told.tokenizer)
        return _outside(command, found.vocab_size or self._limits.vocab_size)

    def _enqueue(self, request: _Request) -> None:
        sequence = request.sequence = _sequence(request.command, request.adapter, self._limits)
        try:
            self._scheduler.add(sequence)
        except ValueError as error:
            self._end(request, "error", _failure("context_too_long", str(error)))

    def _end(self, request: _Request, reason: FinishReason, failure: Failure | None = None) -> None:
        """The one place where a request gets its terminal event and lets go of its adapter."""
        request_id = request.command.request_id
        self._requests.pop(request_id, None)
        if request.revision:
            self._adapters.release(request.revision)
        self._outbox.finished.append(
            Finished(
                request_id=request_id,
                reason=reason,
                usage=self._usage(request),
                adapter_revision=request.revision,
                failure=failure,
            )
        )

    def _usage(self, request: _Request) -> Usage:
        sequence = request.sequence
        started = request.first_planned or self._clock()
        return Usage(
            prompt_tokens=len(request.command.prompt_ids),
            generated_tokens=0 if sequence is None else sequence.num_generated,
            cached_tokens=0 if sequence is None else sequence.num_cached,
            queue_seconds=started - request.arrived,
            load_seconds=max(request.resolved - request.arrived, 0.0),
            engine_seconds=request.seconds,
        )

    # -- cost and reports -------------------------------------------------------------------

    def _elapsed(self) -> float:
        now = self._clock()
        elapsed, self._last_commit = now - self._last_commit, now
        return elapsed

    def _charge(self, flight: _InFlight, wall: float) -> None:
        shares = [
            row_share(request.command, row, request.adapter_work, self._cost_model)
            for request, row in zip(flight.requests, flight.plan.rows, strict=True)
        ]
        charges = charge(wall, shares)
        for request, one in zip(flight.requests, charges, strict=True):
            request.seconds += one.seconds
        outbox = self._outbox
        outbox.charges.extend(charges)
        outbox.wall_seconds += wall
        outbox.num_rows += len(shares)
        outbox.num_prompt_tokens += sum(share.prompt_tokens for share in shares)

    def _report(self, outbox: _Outbox) -> StepReport:
        scheduler, pool, counts = self._scheduler, self._scheduler.pool, self._adapters.counts()
        return StepReport(
            step=self._steps,
            wall_seconds=outbox.wall_seconds + outbox.idle_seconds,
            idle_seconds=outbox.idle_seconds,
            num_rows=outbox.num_rows,
            num_prompt_tokens=outbox.num_prompt_tokens,
            num_sampled=outbox.num_sampled,
            num_running=len(scheduler.running),
            num_waiting=len(self._requests) - len(scheduler.running),
            blocks_used=pool.num_used,
            blocks_cached=pool.num_cached,
            blocks_total=pool.num_blocks,
            prefix_queries=outbox.prefix_queries,
            prefix_hits=outbox.prefix_hits,
            preemptions=outbox.preemptions,
            adapters_disk=counts.disk,
            adapters_host=counts.host,
            adapters_device=counts.device,
            adapter_host_bytes=counts.host_bytes,
            adapter_device_bytes=counts.device_bytes,
            pins_host=counts.pins_host,
            pins_device=counts.pins_device,
            charges=tuple(outbox.charges),
            moves=tuple(self._adapters.drain_moves()),
        )


def _sequence(command: Submit, adapter: Resolved | None, limits: EngineLimits) -> Sequence:
    """An adapter that does not act on this prompt is held, and told, but the base computes."""
    invocation = adapter.invocation_tokens if adapter else ()
    activation = activation_of(command.prompt_ids, invocation)
    acting = adapter if activation is not None else None
    return Sequence(
        request_id=command.request_id,
        sampling=command.sampling,
        tokens=list(command.prompt_ids),
        tenant=command.tenant,
        weights=acting.revision if acting else BASE_WEIGHTS,
        activation=activation or 0,
        revision=acting.revision if acting else "",
        adapter_id=command.adapter_id,
        adapter_bytes=acting.num_bytes if acting else 0,
        full_bytes=acting.full_bytes if acting else 0,
        has_own_head=acting.has_own_head if acting else False,
        short_tokens=limits.short_tokens,
    )


def _outside(command: Submit, vocab_size: int) -> Failure | None:
    """Tokens that the weights which are to compute them do not have."""
    if max(command.prompt_ids) >= vocab_size or min(command.prompt_ids) < 0:
        return _failure("bad_request", f"token ids must lie in [0, {vocab_size})")
    if any(not 0 <= token_id < vocab_size for token_id, _ in command.sampling.logit_bias):
        return _failure("bad_request", f"logit_bias ids must lie in [0, {vocab_size})")
    return None


def _failure(code: FailureCode, message: str, source: str = "") -> Failure:
    return Failure(code=code, message=message, source=source)


def _with_requests(answer: AdapterList | OrderDone, holders: Holders) -> AdapterList | OrderDone:
    """Adapters, with how many requests hold them."""
    if isinstance(answer, OrderDone):
        entry = answer.entry and _entry_with_requests(answer.entry, holders)
        return msgspec.structs.replace(answer, entry=entry)
    names = {name for name, _ in holders}
    entries = [
        _entry_with_requests(entry, holders) if entry.adapter_id in names else entry
        for entry in answer.adapters
    ]
    return msgspec.structs.replace(answer, adapters=tuple(entries))


def _entry_with_requests(entry: AdapterEntry, holders: Holders) -> AdapterEntry:
    revisions = tuple(
        msgspec.structs.replace(one, num_requests=holders[entry.adapter_id, one.revision])
        for one in entry.revisions
    )
    num_resolving = holders[entry.adapter_id, ""]
    num_requests = num_resolving + sum(one.num_requests for one in revisions)
    return msgspec.structs.replace(entry, revisions=revisions, num_requests=num_requests)


def _numerical_failure(committed: Committed) -> Failure | None:
    if committed.finish_reason != "error":
        return None
    return _failure("internal", "the logits were not finite: the adapter or its scale overflows")

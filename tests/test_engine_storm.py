"""The engine and its adapters, without a model, under thousands of random steps.

Requests come, are cancelled, preempted and refused while adapters are replaced, deleted, broken
and evicted under them. Every answer must be the one its revision gives alone; nothing may be left.
"""

import itertools
import math
import os
import random
import shutil
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adapter_files import BASE, SITES, make_folder, write_adapter
from lory_server.accounting import CostModel
from lory_server.adapters.blob import read_blob
from lory_server.adapters.cache import AdapterCache
from lory_server.adapters.format import read_manifest
from lory_server.adapters.pool import AdapterPool
from lory_server.adapters.store import AdapterStore
from lory_server.blocks import BlockPool
from lory_server.engine import Engine, EngineLimits
from lory_server.messages import (
    AdapterOrder,
    Cancel,
    Finished,
    ListAdapters,
    OrderDone,
    OrderKind,
    Sampling,
    StepEvents,
    Submit,
)
from lory_server.plan import INVALID_TOKEN, SampledToken, StepPlan, StepResult
from lory_server.scheduler import Scheduler, SchedulerLimits
from simulated import EOS, VOCAB, SimulatedRunner, alone

RANK_4_BYTES = 9_728
NAMES = [f"a{index}" for index in range(6)]
IDLE_S = 5.0
"""What passes when the engine has nothing to do; no request pays for it."""

POISON = 49
"""A prompt that begins with it has logits that are not finite."""


class Clock:
    """Every look takes a while, so that no interval is empty."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        self.now_s += 0.001
        return self.now_s


class StormRunner(SimulatedRunner):
    """Knows what each request must be computed with from the engine's own bookkeeping, and that a
    device reads its adapters until a step is collected."""

    engine: Engine
    cache: AdapterCache

    def __init__(self) -> None:
        super().__init__(block_size=4)
        self.plans: deque[StepPlan] = deque()

    def submit(self, plan: StepPlan) -> StepResult:
        for row in plan.rows:
            sequence = self.engine._requests[row.sequence_id].sequence
            assert sequence is not None
            self.weights_of[row.sequence_id] = sequence.weights
            self.activation_of[row.sequence_id] = sequence.activation
        self._look()
        self.plans.append(plan)
        result = super().submit(plan)
        sampled = tuple(
            SampledToken(INVALID_TOKEN, 0.0) if token and self._is_poisoned(row) else token
            for row, token in zip(plan.rows, result.sampled, strict=True)
        )
        return StepResult(sampled, result.scored)

    def collect(self, ticket: object) -> StepResult:
        self._look()
        self.check_still_there(self.plans.popleft())
        return super().collect(ticket)

    def _look(self) -> None:
        resident = self.cache.residency().resident
        self.slot_of = {revision: adapter.slot for revision, adapter in resident.items()}

    def _is_poisoned(self, row) -> bool:
        return self.engine._requests[row.sequence_id].command.prompt_ids[0] == POISON


class Storm:
    def __init__(self, root: Path, seed: int, depth: int) -> None:
        self.rng = random.Random(seed)
        self.root = root
        self.clock = Clock()
        pool = AdapterPool(
            4 * RANK_4_BYTES, torch.float32, torch.device("cpu"), SITES, 3, grain_bytes=256
        )
        self.cache = AdapterCache(AdapterStore(root), pool, BASE, 6 * RANK_4_BYTES, make_folder())
        runner = StormRunner()
        scheduler = Scheduler(BlockPool(17, 4), SchedulerLimits(5, 12, max_overtakes=8), [EOS])
        self.engine = runner.engine = Engine(
            scheduler,
            runner,
            self.cache,
            CostModel(1000, 50.0),
            EngineLimits(VOCAB, 64, max_queued=14, pipeline_depth=depth, serves_adapters=True),
            self.clock,
        )
        runner.cache = self.cache
        self.started_s = self.engine._last_commit
        self.commands: dict[int, Submit] = {}
        self.answers: dict[int, list[int]] = defaultdict(list)
        self.scores: dict[int, int] = defaultdict(int)
        self.finished: dict[int, Finished] = {}
        self.charged_s: dict[int, float] = defaultdict(float)
        self.passed_s = 0.0
        self.preemptions = 0
        self.evictions = 0
        self.calls = 0
        self.lists = 0
        self.order_rate = 0.0
        self.num_orders = 0
        self.orders: dict[int, AdapterOrder] = {}
        self.done: Counter[tuple[OrderKind, str]] = Counter()
        self.versions: dict[str, list[str]] = {}
        self.since: dict[int, int] = {}
        for name in NAMES:
            self.write(name, seed=0)

    # -- what happens -----------------------------------------------------------------------

    def step(self) -> None:
        rng = self.rng
        if rng.random() < 0.35:
            self.submit()
        if self.commands and rng.random() < 0.08:
            self.engine.cancel(Cancel(request_id=rng.choice(list(self.commands)[-20:])))
        if rng.random() < 0.02:
            self.write(rng.choice(NAMES), seed=rng.randrange(1000))
        if rng.random() < 0.005:
            shutil.rmtree(self.root / rng.choice(NAMES), ignore_errors=True)
        if rng.random() < 0.01:
            self.calls += 1
            self.engine.list_adapters(ListAdapters(call_id=self.calls))
        if rng.random() < 0.002:
            self.engine.cancel_all("timeout")
        if rng.random() < self.order_rate:
            kind = rng.choice(ORDERS)
            name = rng.choice([*NAMES, "broken", "absent"])
            self.order(kind, name, rng.choice([*self.versions.get(name, ()), "", "", ""])[:8])
        self.turn()

    def order(self, kind: OrderKind, adapter_id: str, revision: str = "") -> None:
        self.num_orders += 1
        order = AdapterOrder(
            call_id=FIRST_ORDER + self.num_orders,
            kind=kind,
            adapter_id=adapter_id,
            revision=revision,
        )
        self.orders[order.call_id] = order
        self.engine.obey(order)

    def turn(self) -> None:
        self.engine.step()
        if self.engine.has_events or self.rng.random() < 0.1:
            self.take(self.engine.events())
        for answer in self.engine.adapter_answers():
            if isinstance(answer, OrderDone):
                self.take_done(answer)
            else:
                self.lists += 1
        self.engine.check()
        if not self.engine.can_step:
            time.sleep(0.0003)
            self.clock.now_s += IDLE_S

    def submit(self) -> None:
        rng, request_id = self.rng, len(self.commands)
        start = rng.choice([1, 1, 1, 2, POISON if rng.random() < 0.2 else 3])
        prompt = [start, *range(4, 4 + rng.randrange(30))]
        if rng.random() < 0.03:
            prompt = rng.choice([[], [VOCAB], [-1], [5] * 60])
        sampling = Sampling(
            max_new_tokens=rng.choice([0, 1, 5, 20, 30]),
            seed=0,
            ignore_eos=rng.random() < 0.5,
            presence_penalty=rng.choice([0.0, 0.0, 0.5]),
            prompt_logprobs=rng.random() < 0.2,
        )
        name = rng.choice(["", *NAMES, *NAMES, "broken", "absent", "../a0", "a0\0"])
        command = Submit(
            request_id=request_id,
            prompt_ids=tuple(prompt),
            sampling=sampling,
            adapter_id=name,
            tenant=rng.choice(["one", "two"]),
        )
        self.commands[request_id] = command
        self.since[request_id] = len(self.versions.get(name, ()))
        self.engine.submit(command)

    def write(self, name: str, seed: int) -> None:
        """A new version, moved into place whole, as one of ours or of the broken ones."""
        fresh = self.root.parent / "fresh"
        write_adapter(fresh, rank=self.rng.choice([2, 4, 4, 8]), seed=seed)
        with AdapterStore(fresh.parent).locate("fresh") as files:
            manifest = read_manifest(files.config_fd, files.weights_fd, BASE)
            blob = read_blob(files.weights_fd, manifest, torch.float32)
        self.versions.setdefault(name, []).append(blob.revision)
        shutil.rmtree(self.root / name, ignore_errors=True)
        fresh.rename(self.root / name)

    # -- what must hold ---------------------------------------------------------------------

    def take(self, events: StepEvents) -> None:
        report = events.report
        charged_s = math.fsum(charge.seconds for charge in report.charges)
        assert charged_s + report.idle_seconds == pytest.approx(report.wall_seconds, abs=1e-9)
        assert charged_s < IDLE_S / 2
        self.passed_s += report.wall_seconds
        self.preemptions += report.preemptions
        self.evictions += sum(move.kind == "evict" for move in report.moves)
        for charge in report.charges:
            command = self.commands[charge.request_id]
            assert (charge.tenant, charge.adapter_id) == (command.tenant, command.adapter_id)
            self.charged_s[charge.request_id] += charge.seconds
        for scored in events.prompts:
            assert scored.request_id not in self.finished
            self.scores[scored.request_id] += len(scored.logprobs)
        for token in events.tokens:
            assert token.request_id not in self.finished, "a token after the terminal event"
            self.check_scored(token.request_id)
            self.answers[token.request_id].append(token.token_id)
        for finished in events.finished:
            assert finished.request_id not in self.finished, "two terminal events"
            self.finished[finished.request_id] = finished

    def take_done(self, done: OrderDone) -> None:
        """Each order is answered once; what it was refused for can be so."""
        order = self.orders.pop(done.call_id)
        self.done[order.kind, done.failure.code if done.failure else "done"] += 1
        if done.failure is None:
            assert done.entry is not None
            if order.kind in ("find", "load", "pin"):
                assert done.revision.startswith(order.revision)
                assert done.revision in self.versions[order.adapter_id]
        if order.kind in ("unpin", "drop"):
            assert done.failure is None

    def check_end(self) -> None:
        assert self.finished.keys() == self.commands.keys()
        assert self.lists == self.calls
        lasted_s = self.engine._last_commit - self.started_s
        assert self.passed_s == pytest.approx(lasted_s, abs=1e-6)
        for request_id, finished in self.finished.items():
            self.check_answer(self.commands[request_id], finished)

    def check_answer(self, command: Submit, finished: Finished) -> None:
        answer, failure = self.answers[command.request_id], finished.failure
        assert finished.usage.generated_tokens == len(answer)
        assert finished.usage.engine_seconds <= self.charged_s[command.request_id] + 1e-9
        if failure is not None:
            self.check_failure(command, failure.code)
            return
        revision = finished.adapter_revision
        if command.adapter_id and finished.reason in ("eos", "length"):
            assert (
                revision in self.versions[command.adapter_id][self.since[command.request_id] - 1 :]
            )
        expected = alone(list(command.prompt_ids), command.sampling, revision or "base")
        assert answer == expected[: len(answer)]
        if finished.reason in ("eos", "length"):
            assert answer == expected
            self.check_scored(command.request_id)

    def check_scored(self, request_id: int) -> None:
        command = self.commands[request_id]
        wanted = len(command.prompt_ids) - 1 if command.sampling.prompt_logprobs else 0
        assert self.scores[request_id] == wanted

    def check_failure(self, command: Submit, code: str) -> None:
        prompt, name = command.prompt_ids, command.adapter_id
        if code == "internal":
            assert prompt[0] == POISON
        elif code == "bad_request":
            assert not prompt or not 0 <= prompt[0] < VOCAB
        elif code == "context_too_long":
            assert len(prompt) + command.sampling.max_new_tokens > 64
        elif code == "adapter_not_found":
            assert name
        elif code == "adapter_invalid":
            assert name == "broken" or name in NAMES
        elif code == "adapter_capacity":
            assert self.order_rate, "nothing but a pin makes them too large"
        else:
            assert code == "overloaded"

    def finish(self) -> None:
        end_s = time.monotonic() + 20
        while self.engine.num_requests or self.calls > self.lists or self.orders:
            assert time.monotonic() < end_s, "the storm does not end"
            self.turn()
        while self.engine.can_step or self.cache.residency().loading or self.cache._loads:
            self.turn()
        self.take(self.engine.events())


ORDERS: tuple[OrderKind, ...] = ("find", "load", "load", "unload", "pin", "pin", "unpin", "drop")
FIRST_ORDER = 1_000_000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "adapters"
    write_adapter(root / "broken", change=lambda t: next(iter(t.values())).fill_(float("nan")))
    return root


@pytest.fixture(params=itertools.product([1, 2], [0, 1]), ids=lambda p: f"seed{p[0]}-depth{p[1]}")
def storm(root: Path, request: pytest.FixtureRequest) -> Iterator[Storm]:
    num_files = len(os.listdir("/proc/self/fd"))
    storm = Storm(root, *request.param)
    yield storm
    storm.engine.close()
    assert len(os.listdir("/proc/self/fd")) <= num_files


def test_a_storm_ends_every_request_once_and_leaves_nothing(storm: Storm) -> None:
    for _ in range(2500):
        storm.step()
    storm.finish()
    storm.check_end()
    reasons = {finished.reason for finished in storm.finished.values()}
    assert reasons == {"eos", "length", "cancelled", "timeout", "error"}
    assert storm.preemptions > 5
    assert storm.evictions > 5
    cache, scheduler = storm.cache, storm.engine._scheduler
    assert not any(entry.holds for entry in cache.host._entries.values())
    assert scheduler.pool.num_used == 0
    assert not scheduler._in_flight
    assert not scheduler._sequences
    assert not cache._tickets


def test_a_storm_of_orders_among_requests_is_answered_and_leaves_nothing(storm: Storm) -> None:
    storm.order_rate = 0.16
    for _ in range(1200):
        storm.step()
    storm.finish()
    storm.check_end()
    assert {kind for kind, code in storm.done if code == "done"} == {*ORDERS}
    told = {code for _, code in storm.done}
    assert {"adapter_capacity", "adapter_pinned", "revision_not_found"} <= told
    for name in NAMES:
        storm.order("drop", name)
    storm.finish()
    cache, orders = storm.cache, storm.engine._orders
    assert not any(entry.holds for entry in cache.host._entries.values())
    assert not cache.device.pinned
    assert (cache.pins.device_bytes, cache.budget.pinned_bytes) == (0, 0)
    for left in (orders._arriving, orders._resolving, orders._leaving, orders._pins):
        assert not left
    assert (len(cache.host), len(cache.device)) == (0, 0)
    assert cache.device.pool.used_bytes == cache.budget.used_bytes == 0

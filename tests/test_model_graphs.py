"""Replayed decode steps compute what steps run op by op do, whatever the mix; nothing waits."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lory_kernels
import lory_server.build
import tiny_models
from graph_tape import Recorder, Tape, TapeOps
from lory_kernels import BASE_SLOT, SiteTable, TorchOps
from lory_server.build import EngineError, capture_graphs, graph_bytes
from lory_server.messages import EngineOptions, Sampling
from lory_server.model.decoder import Decoder
from lory_server.model.graphs import BASE_ONLY, MOST_ROWS, RANK_BUCKETS, padded_rows, variants
from lory_server.model.kv import KVCache
from lory_server.model.load import load
from lory_server.model.lora import attach
from lory_server.model.packing import Packer
from lory_server.model.runner import Runner
from lory_server.model.staging import BUFFERS_IN_TURN, FIRST_BYTES, Stage, sender
from lory_server.plan import PENDING, PlanRow, SampleRow, StepPlan, StepResult
from parity_world import ParityWorld, Reference, Session, compare
from sync_trap import SyncTrap, WaitsError
from test_engine_parity import submit_all
from test_engine_parity_dora import make_adapters
from test_model_lora import NUM_SLOTS, make_tables, random_factors

BLOCK_SIZE = 4
NUM_BLOCKS = 80
MAX_BLOCKS = 8
MAX_ROWS = 12
NEAR = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("llama", tmp_path_factory.mktemp("llama"))


@dataclass
class Twins:
    """One decoder, two runners with KV of their own: one replays, the other never does."""

    decoder: Decoder
    tables: list[SiteTable]
    recorder: Recorder
    replaying: Runner
    plain: Runner

    @classmethod
    def make(cls, folder: Path, max_rows: int = MAX_ROWS, has_adapters: bool = True) -> "Twins":
        ops: Any = TapeOps(lory_kernels.select("torch"))
        decoder = load(EngineOptions(model=str(folder)), "cpu", torch.float32, ops)
        tables, pool = make_tables(decoder.sites, random_factors(decoder.sites))
        attach(decoder, tables, pool)
        replaying, plain = (cls._runner(decoder, max_rows) for _ in range(2))
        recorder = Recorder(ops)
        replaying.capture(recorder, has_adapters)
        return cls(decoder, tables, recorder, replaying, plain)

    @staticmethod
    def _runner(decoder: Decoder, max_rows: int) -> Runner:
        kv = KVCache.allocate(decoder.spec, NUM_BLOCKS, BLOCK_SIZE, torch.float32, "cpu")
        packer = Packer(max_rows, MAX_BLOCKS, BLOCK_SIZE)
        return Runner(decoder, kv, packer, max_rows, torch.device("cpu"))

    def step(self, *rows: PlanRow) -> StepResult:
        """The replaying runner's result; both must agree."""
        plan = StepPlan(0, rows)
        expected = self.plain.collect(self.plain.submit(plan))
        found = self.replaying.collect(self.replaying.submit(plan))
        for ours, theirs in zip(found.sampled, expected.sampled, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                assert ours.token_id == theirs.token_id
                assert ours.logprob == pytest.approx(theirs.logprob, abs=NEAR)
        return found

    def assert_same_kv(self) -> None:
        ours, theirs = self.replaying._kv, self.plain._kv
        for one, other in zip(ours.keys + ours.values, theirs.keys + theirs.values, strict=True):
            torch.testing.assert_close(one, other, atol=NEAR, rtol=0)

    def swap_slots(self) -> None:
        """Both adapters are evicted, and each is loaded where the other was."""
        for table in self.tables:
            for column in (table.a_offset_SK, table.b_offset_SK, table.rank_SK, table.scale_SK):
                column.copy_(column.flip(0))


@dataclass
class Stream:
    """A sequence as a scheduler would run it."""

    lane: int
    slot: int
    rank: int
    tokens: list[int]
    blocks: list[int]
    sampling: Sampling
    num_computed: int = 0

    def row(self, rng: random.Random) -> PlanRow:
        """All that is not computed yet; the newest token sometimes only the lane knows."""
        token_ids = self.tokens[self.num_computed :]
        if self.num_computed and rng.random() < 0.5:
            token_ids = [PENDING]
        row = PlanRow(
            sequence_id=self.lane,
            lane=self.lane,
            start=self.num_computed,
            token_ids=token_ids,
            blocks=self.blocks,
            slot=self.slot,
            rank=self.rank,
            sample=SampleRow(self.sampling, len(self.tokens)),
        )
        self.num_computed = len(self.tokens)
        return row


@dataclass
class World:
    """Sequences that come, are sometimes left out of a step, and go."""

    rng: random.Random
    max_rows: int = MAX_ROWS
    live: dict[int, Stream] = field(default_factory=dict)
    free: list[int] = field(default_factory=lambda: list(range(NUM_BLOCKS)))

    def admit(self) -> Stream:
        rng = self.rng
        lane = rng.choice([lane for lane in range(self.max_rows) if lane not in self.live])
        slot = rng.choice([BASE_SLOT, *range(NUM_SLOTS)])
        # An upper bound of the slot's true rank, as a plan may give: it chooses the variant.
        rank = 0 if slot == BASE_SLOT else rng.choice([8, 16, 17, 64, 200])
        prompt = [rng.randrange(3, tiny_models.VOCAB_SIZE) for _ in range(rng.randint(1, 9))]
        temperature = rng.choice([0.0, 0.0, 0.8])
        sampling = Sampling(max_new_tokens=99, seed=rng.randrange(1000), temperature=temperature)
        stream = Stream(lane, slot, rank, prompt, [], sampling)
        self.grow(stream)
        self.live[lane] = stream
        return stream

    def grow(self, stream: Stream) -> None:
        while len(stream.blocks) * BLOCK_SIZE < len(stream.tokens):
            stream.blocks.append(self.free.pop(self.rng.randrange(len(self.free))))

    def leave(self, lane: int) -> None:
        self.free.extend(self.live.pop(lane).blocks)

    def take(self, streams: list[Stream], result: StepResult) -> None:
        for stream, token in zip(streams, result.sampled, strict=True):
            assert token is not None
            stream.tokens.append(token.token_id)
            self.grow(stream)
            if len(stream.tokens) >= MAX_BLOCKS * BLOCK_SIZE:
                self.leave(stream.lane)


def live_some(twins: Twins, world: World, steps: int) -> Iterator[int]:
    """Decode steps of changing size and mix; rows of each."""
    rng = world.rng
    for _ in range(steps):
        if len(world.live) < world.max_rows and rng.random() < 0.4:
            stream = world.admit()
            world.take([stream], twins.step(stream.row(rng)))
        some = [stream for stream in world.live.values() if rng.random() < 0.8]
        rng.shuffle(some)
        if some:
            world.take(some, twins.step(*(stream.row(rng) for stream in some)))
            yield len(some)
        if len(world.live) > 3 and rng.random() < 0.2:
            world.leave(rng.choice(list(world.live)))


@pytest.mark.parametrize("seed", range(3))
def test_replays_equal_steps_op_by_op_over_changing_mixes(folder: Path, seed: int) -> None:
    twins, world = Twins.make(folder), World(random.Random(seed))
    sizes = []
    for number, size in enumerate(live_some(twins, world, 60)):
        sizes.append(size)
        if number % 7 == 0:
            twins.swap_slots()
    twins.assert_same_kv()
    assert twins.recorder.num_replays >= len(sizes)
    assert len(set(sizes)) > 6
    used = [tape for tape in twins.recorder.tapes if tape.num_replays]
    assert len(used) > 10, "most sizes and variants"


def test_an_adapter_that_is_swapped_between_replays_changes_the_answer(folder: Path) -> None:
    twins = Twins.make(folder)
    decode = plan_row(0, start=0, slot=0, rank=3)
    before = twins.step(decode)
    twins.swap_slots()
    assert twins.step(decode).sampled[0] != before.sampled[0]
    assert twins.recorder.num_replays == 2


def plan_row(lane: int, *, start: int, slot: int = BASE_SLOT, **more: Any) -> PlanRow:
    sampling = Sampling(max_new_tokens=9, seed=0)
    fields = {"token_ids": [7 + lane], "sample": SampleRow(sampling, start + 1), **more}
    return PlanRow(lane, lane, start, blocks=[9 + lane, 30 + lane], slot=slot, **fields)


def test_padding_writes_no_keys_and_changes_nobody(folder: Path) -> None:
    """Three rows in a graph of four: the fourth must not write where a slot of 0 or -1 would be."""
    twins = Twins.make(folder)
    kv = twins.replaying._kv
    assert not any(pages.any() for pages in kv.keys + kv.values), "capturing wrote"
    for pages in kv.keys + kv.values:
        pages.fill_(5.0)
    rows = [plan_row(lane, start=3, slot=lane - 1, rank=8) for lane in range(3)]
    twins.replaying.collect(twins.replaying.submit(StepPlan(0, tuple(rows))))
    assert twins.recorder.num_replays == 1
    for pages in kv.keys + kv.values:
        written = (pages != 5.0).flatten(2).any(-1).any(-1).nonzero().flatten().tolist()
        assert written == [9, 10, 11]
        assert (pages[9:12, :, :3] == 5.0).all(), "positions before the step's"


def test_padding_is_that_of_the_step_not_of_the_one_before(folder: Path) -> None:
    """Eight rows, then five in the same graph: three rows of the first must not write again."""
    twins = Twins.make(folder)
    for rows in (8, 5, 7, 8):
        twins.step(*(plan_row(lane, start=0, slot=lane % 2, rank=8) for lane in range(rows)))
        for pages in twins.replaying._kv.keys:
            pages[9 + rows :].zero_()
        for pages in twins.plain._kv.keys:
            pages[9 + rows :].zero_()
    fewer = [plan_row(lane, start=1, slot=lane % 2, rank=8) for lane in range(5)]
    twins.step(*fewer)
    twins.step(*fewer)
    twins.assert_same_kv()
    eights = [tape for tape in twins.recorder.tapes if tape.num_replays]
    assert len(eights) == 1


def test_segments_of_a_larger_step_do_not_outlive_it(folder: Path) -> None:
    """In both host buffers: what lies past the last segment is empty and nobody's."""
    twins = Twins.make(folder)
    many = [plan_row(lane, start=0, slot=lane % 2, rank=8) for lane in range(4)]
    fewer = [plan_row(0, start=0), plan_row(1, start=0, slot=1, rank=8), plan_row(2, start=0)]
    for rows in (many, many, fewer, fewer):
        twins.step(*rows)
        graphs: Any = twins.replaying._graphs
        there = graphs._inputs[4].tensors
        starts, slots = there["starts_G1"].tolist(), there["slots_G"].tolist()
        assert starts == ([0, 2, 3, 3, 3] if rows is fewer else [0, 2, 4, 4, 4])
        assert slots == ([BASE_SLOT, 1, BASE_SLOT, BASE_SLOT] if rows is fewer else [0, 1, -1, -1])


def test_what_is_no_decode_step_runs_op_by_op(folder: Path) -> None:
    twins = Twins.make(folder, max_rows=6)
    decode = plan_row(0, start=0)
    twins.step(plan_row(0, start=0, token_ids=[5, 6]))
    twins.step(decode, plan_row(1, start=0, token_ids=[5, 6]))
    twins.step(plan_row(0, start=0, sample=None), plan_row(1, start=0))
    twins.step(plan_row(0, start=0, targets=[8]))
    assert twins.recorder.num_replays == 0
    twins.step(decode)
    assert twins.recorder.num_replays == 1


def test_more_rows_than_were_captured_run_op_by_op(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lory_server.model.graphs.MOST_ROWS", 2)
    twins = Twins.make(folder)
    twins.step(*(plan_row(lane, start=0) for lane in range(3)))
    assert twins.recorder.num_replays == 0
    twins.step(*(plan_row(lane, start=0) for lane in range(2)))
    assert twins.recorder.num_replays == 1


def test_a_base_without_adapters_captures_one_variant(folder: Path) -> None:
    twins = Twins.make(folder, has_adapters=False)
    assert len(twins.recorder.tapes) == len(padded_rows(MAX_ROWS))
    twins.step(plan_row(0, start=0, slot=1, rank=8))
    assert twins.recorder.num_replays == 0, "nobody captured adapters"


def test_rows_of_the_base_alone_replay_no_sgmv(folder: Path) -> None:
    twins = Twins.make(folder)
    base = [plan_row(0, start=0)]
    adapted = [*base, plan_row(1, start=0, slot=0, rank=8)]
    for rows, calls_sgmv in ((base, False), (adapted, True)):
        before = [tape.num_replays for tape in twins.recorder.tapes]
        twins.step(*rows)
        now = zip(twins.recorder.tapes, before, strict=True)
        (tape,) = [tape for tape, count in now if tape.num_replays > count]
        assert any("sgmv" in getattr(call.op, "__name__", "") for call in tape.calls) == calls_sgmv


@pytest.mark.parametrize(
    ("rank", "bucket"), [(0, 16), (1, 16), (16, 16), (17, 64), (64, 64), (65, 256), (256, 256)]
)
def test_the_smallest_variant_that_holds_the_ranks_is_replayed(
    folder: Path, rank: int, bucket: int
) -> None:
    """Adapters of rank 0, which have gains or biases alone, are no rows of the base."""
    twins = Twins.make(folder, max_rows=2)
    graphs: Any = twins.replaying._graphs
    adapted = plan_row(1, start=0, slot=1, rank=rank, has_gain_or_bias=rank == 0)
    twins.step(plan_row(0, start=0), adapted)
    assert [key for key, tape in graphs._graphs.items() if tape.num_replays] == [(2, bucket)]


def test_padded_sizes() -> None:
    assert padded_rows(1) == (1,)
    assert padded_rows(12) == (1, 2, 4, 8, 12)
    assert padded_rows(64) == (1, 2, 4, 8, 16, 24, 32, 48, 64)
    assert padded_rows(100) == (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100)
    assert padded_rows(4000)[-1] == MOST_ROWS
    assert variants(False) == (BASE_ONLY,)
    assert variants(True) == (BASE_ONLY, *RANK_BUCKETS)


# -- through an engine ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ParityWorld:
    return ParityWorld.make("llama", tmp_path_factory.mktemp("llama"))


def replayed(
    world: ParityWorld, monkeypatch: pytest.MonkeyPatch, depth: int, changes: dict[str, Any]
) -> tuple[Session, Recorder]:
    """Every adapter and the base, after each adapter was on the host."""
    ops = TapeOps(TorchOps())
    monkeypatch.setattr(lory_server.build, "select", lambda *_, **__: ops)
    session = Session(world.options(**changes), depth)
    recorder = Recorder(ops)
    runner: Any = session.engine._runner
    runner.capture(recorder, has_adapters=True)
    for request_id, name in enumerate(world.adapters):
        session.submit(request_id, [5], name, max_new_tokens=1)
    session.run()
    submit_all(session, world)
    session.run()
    session.close()
    return session, recorder


@pytest.mark.parametrize(
    ("depth", "changes"),
    [
        (0, {}),
        (1, {}),
        (1, {"max_resident_adapters": 2}),
        (1, {"kv_bytes": 11 * 4096, "max_resident_adapters": 3, "max_step_tokens": 16}),
    ],
    ids=["plain", "pipelined", "evictions", "preemptions"],
)
def test_an_engine_that_replays_answers_as_peft_does(
    llama: ParityWorld, monkeypatch: pytest.MonkeyPatch, depth: int, changes: dict[str, Any]
) -> None:
    session, recorder = replayed(llama, monkeypatch, depth, changes)
    compare(session, Reference(llama.base), llama.adapters).check()
    sampling = [report for report in session.reports if report.num_sampled]
    assert recorder.num_replays > len(sampling) / 3
    assert "kv_bytes" not in changes or session.preemptions > 0
    assert changes.get("max_resident_adapters") != 2 or session.moves("evict", "device") > 0


def test_replayed_steps_find_the_gains_and_biases_of_each_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody had any when the steps were captured."""
    world = ParityWorld.make("qwen2", tmp_path, make_adapters)
    session, recorder = replayed(world, monkeypatch, 1, {"max_resident_adapters": 3})
    compare(session, Reference(world.base), world.adapters).check()
    sampling = [report for report in session.reports if report.num_sampled]
    assert recorder.num_replays > len(sampling) / 3
    assert session.moves("evict", "device") > 0


# -- nothing waits ----------------------------------------------------------------------------

EVERY_WISH = (
    {},
    {"temperature": 0.7},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 5},
    {"temperature": 0.7, "typical_p": 0.9, "num_top_logprobs": 3},
    {"logit_bias": ((3, 1.0), (5, -1.0))},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.1},
)


def wish_row(lane: int, wish: dict[str, Any], **more: Any) -> PlanRow:
    sampling = Sampling(max_new_tokens=9, seed=lane, **wish)
    history = [3, 4, 4, 5] if "repetition_penalty" in wish else None
    sample = SampleRow(sampling, 4, history, prompt_len=2)
    return plan_row(lane, start=3, slot=lane % 2, rank=8, sample=sample, **more)


@pytest.mark.parametrize("runner_name", ["replaying", "plain"])
def test_submitting_never_waits_for_the_device(folder: Path, runner_name: str) -> None:
    twins = Twins.make(folder)
    runner: Runner = getattr(twins, runner_name)
    known = [wish_row(lane, wish) for lane, wish in enumerate(EVERY_WISH)]
    pending = [replace(row, token_ids=[PENDING]) for row in known]
    scored = wish_row(6, {"num_top_logprobs": 2}, token_ids=[4, 5, 6], targets=[5, 6])
    plans = [StepPlan(0, tuple(rows)) for rows in (known, pending, [*pending, scored])]
    for plan in plans:
        with SyncTrap():
            ticket = runner.submit(plan)
        assert all(token is not None for token in runner.collect(ticket).sampled)
    assert twins.recorder.num_replays == (2 if runner_name == "replaying" else 0)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: x[x > 1],
        lambda x: x[[0, 1]],
        lambda x: x.__setitem__([0], 1.0),
        lambda x: x.nonzero(),
        lambda x: bool(x[0]),
        lambda x: x.unique(),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: x.masked_select(x > 1),
        lambda x: x.to("cpu"),
        lambda x: x.copy_(x),
    ],
)
def test_the_trap_catches_what_waits(wait: Any) -> None:
    x = torch.arange(4.0)
    with pytest.raises(WaitsError), SyncTrap():
        wait(x)


def test_the_trap_is_set_where_the_runner_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twins = Twins.make(folder)
    right = twins.plain._decoder.logits
    monkeypatch.setattr(
        Decoder, "logits", lambda _, hidden, own: (hidden.tolist(), right(hidden))[1]
    )
    with pytest.raises(WaitsError), SyncTrap():
        twins.plain.submit(StepPlan(0, (plan_row(0, start=0),)))


def test_a_buffer_is_sent_from_again_when_all_others_have_been() -> None:
    """The one in flight may still be read while the next is written; the CPU copies at once."""
    stage = Stage(torch.device("cpu"))
    buffers = []
    for number in range(BUFFERS_IN_TURN + 1):
        sent = stage.send({"number_N": np.array([number])})
        assert sent["number_N"].tolist() == [number]
        buffers.append(stage._buffers[stage._turn])
    assert len({id(buffer) for buffer in buffers}) == BUFFERS_IN_TURN == 16
    assert buffers[-1] is buffers[0]


def test_a_buffer_grows_with_what_is_sent() -> None:
    stage = Stage(torch.device("cpu"))
    large = np.arange(FIRST_BYTES, dtype=np.int64)
    for _ in range(BUFFERS_IN_TURN + 1):
        one = np.array([2.5], np.float32)
        sent = stage.send({"empty_N": large[:0], "large_N": large, "one_N": one})
        assert sent["empty_N"].numel() == 0
        assert np.array_equal(sent["large_N"].numpy(), large)
        assert sent["one_N"].tolist() == [2.5]
        assert all(tensor.data_ptr() % 16 == 0 for tensor in sent.values())


def test_on_the_cpu_nothing_is_copied() -> None:
    array = np.arange(3)
    sent = sender(torch.device("cpu"))({"array_N": array})
    assert sent["array_N"].data_ptr() == array.ctypes.data


# -- the stand-in, and building ---------------------------------------------------------------


def test_the_tape_runs_ops_again_and_no_python() -> None:
    """Else a step whose grid came from the rows of its capture would pass here."""
    x, calls = torch.ones(2), []

    def run() -> torch.Tensor:
        calls.append(1)
        return x * len(calls)

    tape = Recorder(TapeOps(TorchOps()))(run)
    x.fill_(3.0)
    assert tape.replay().tolist() == [6.0, 6.0]
    assert len(calls) == 2
    assert tape.replay() is tape.output


def test_memory_that_a_replay_has_not_written_is_dirty() -> None:
    tape: Tape = Recorder(TapeOps(TorchOps()))(lambda: torch.empty(2))
    assert tape.replay().isnan().all()


def test_what_cannot_be_captured_is_refused_with_the_fix(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lory_server.build, "free_device_bytes", lambda _: 0)

    def capture(run: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    runner = Twins.make(folder).plain
    options = EngineOptions(model=str(folder))
    with pytest.raises(EngineError, match=r"capturing; use --no-cuda-graphs$"):
        capture_graphs(runner, capture, options, torch.device("cpu"))


def test_the_memory_of_graphs_grows_with_rows_and_variants(folder: Path) -> None:
    decoder = Twins.make(folder).decoder
    options = EngineOptions(model=str(folder), max_batch_rows=64)
    base = graph_bytes(options, decoder)
    adapted = graph_bytes(EngineOptions(model="", adapters_dir="a", max_batch_rows=64), decoder)
    fewer = graph_bytes(EngineOptions(model="", max_batch_rows=8), decoder)
    assert fewer < base < adapted < 4 * base

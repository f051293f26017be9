"""Adapters move between disk, host and device while requests hold them; nothing is lost or torn."""

import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adapter_files import BASE, SITES, Tensors, make_folder, write_adapter
from lory_server.adapters import cache as cache_module
from lory_server.adapters import known as known_module
from lory_server.adapters import refusals as refusals_module
from lory_server.adapters import workers as workers_module
from lory_server.adapters.blob import AdapterBlob
from lory_server.adapters.cache import AdapterCache
from lory_server.adapters.errors import AdapterInvalidError
from lory_server.adapters.fold import BaseFolder
from lory_server.adapters.host import HostBudget, HostTier
from lory_server.adapters.jobs import LoadKey
from lory_server.adapters.journal import MAX_LINES, MAX_SKIPPED_LINES, Journal
from lory_server.adapters.loaders import Loaders
from lory_server.adapters.outcomes import Listed, Outcome, Resolved, ResolveFailed
from lory_server.adapters.pool import AdapterPool
from lory_server.adapters.reader import ThreadReader
from lory_server.adapters.refusals import Refusals
from lory_server.adapters.store import AdapterFiles, AdapterStore
from lory_server.plan import AdapterDemand, Residency
from lory_server.recipes import MergeSource, Recipe, merged_id

RANK_4_BYTES = 9_728
DEADLINE_S = 20.0

MakeCache = Callable[..., "World"]


class World:
    """A cache with the loop that the engine would run around it."""

    def __init__(self, root: Path, pool_bytes: int, max_slots: int, **options: Any) -> None:
        device = torch.device("cpu")
        self.pool = AdapterPool(
            pool_bytes, torch.float32, device, SITES, max_slots, grain_bytes=256
        )
        self.store = AdapterStore(root)
        host_bytes = options.pop("host_bytes", 10_000_000)
        self.cache = AdapterCache(self.store, self.pool, BASE, host_bytes, make_folder(), **options)
        self.answers: dict[int, Outcome] = {}
        self.num_tickets = 0

    def turn(self) -> Residency:
        for answer in self.cache.poll():
            assert not isinstance(answer, Listed)
            assert answer.ticket not in self.answers
            self.answers[answer.ticket] = answer
        return self.cache.residency()

    def until(self, condition: Callable[[], object]) -> None:
        end_s = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end_s, "waited too long"
            self.turn()
            time.sleep(0.0005)

    def ask(self, adapter_id: str) -> int:
        self.num_tickets += 1
        self.cache.resolve(self.num_tickets, adapter_id)
        return self.num_tickets

    def answer(self, adapter_id: str) -> Outcome:
        ticket = self.ask(adapter_id)
        self.until(lambda: ticket in self.answers)
        return self.answers[ticket]

    def hold(self, adapter_id: str) -> Resolved:
        answer = self.answer(adapter_id)
        assert isinstance(answer, Resolved), answer
        return answer

    def refusal(self, adapter_id: str) -> ResolveFailed:
        answer = self.answer(adapter_id)
        assert isinstance(answer, ResolveFailed), answer
        return answer

    def bring(self, *revisions: str, in_use: tuple[str, ...] = ()) -> Residency:
        """Demand revisions until all are resident."""

        def resident() -> bool:
            self.cache.demand(AdapterDemand(frozenset(in_use), revisions))
            return all(revision in self.turn().resident for revision in revisions)

        self.until(resident)
        self.cache.device.check()
        return self.cache.residency()

    def settle(self) -> None:
        self.until(lambda: not self.cache.residency().loading)

    def blob(self, revision: str) -> AdapterBlob:
        return self.cache.host.entry(revision).blob

    def factors_on_device(self, revision: str, like: AdapterBlob) -> torch.Tensor:
        """What SGMV would read through the slot's tables, laid out as in the blob."""
        slot = self.cache.residency().resident[revision].slot
        found = torch.zeros_like(like.data)
        for part, starts in like.manifest.placed(like.chunk_starts):
            table = self.pool.tables[part.site]
            assert int(table.rank_SK[slot, part.slice]) == part.rank
            for (kind, length), source in zip(part.chunks(), starts.values(), strict=True):
                offsets = getattr(table, f"{kind}_offset_SK")
                place = int(offsets[slot, part.slice])
                found[source : source + length] = self.pool.data[place : place + length]
        return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight adapters of two ranks, old enough that their signatures can be trusted."""
    for index in range(8):
        write_adapter(tmp_path / f"a{index}", rank=2 if index % 2 else 4, seed=index)
    time.sleep(0.15)
    return tmp_path


@pytest.fixture
def make(root: Path) -> Iterator[MakeCache]:
    worlds: list[World] = []

    def make_world(pool_bytes: int = 100_000, max_slots: int = 8, **options: Any) -> World:
        worlds.append(World(root, pool_bytes, max_slots, **options))
        return worlds[-1]

    yield make_world
    for world in worlds:
        world.cache.close()


class Gate:
    """Holds up reads of chosen adapters, and counts all of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.closed: set[str] = set()
        self.reads: list[str] = []
        self.opened = threading.Event()
        read = ThreadReader.blob

        def slow(reader: ThreadReader, files: AdapterFiles, manifest: Any) -> AdapterBlob:
            self.reads.append(files.adapter_id)
            if files.adapter_id in self.closed:
                assert self.opened.wait(DEADLINE_S)
            return read(reader, files, manifest)

        monkeypatch.setattr(ThreadReader, "blob", slow)

    def open(self) -> None:
        self.closed.clear()
        self.opened.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


class FoldGate:
    """Holds up the folding of the base into all adapters while it is closed, and counts it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.revisions: list[str] = []
        fold = BaseFolder.fold

        def slow(folder: BaseFolder, blob: AdapterBlob) -> AdapterBlob:
            self.revisions.append(blob.revision)
            assert self.opened.wait(DEADLINE_S)
            return fold(folder, blob)

        monkeypatch.setattr(BaseFolder, "fold", slow)


@pytest.fixture
def fold_gate(monkeypatch: pytest.MonkeyPatch) -> FoldGate:
    return FoldGate(monkeypatch)


class LookGate:
    """Holds up all looks at names while it is closed, each before it has seen anything."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.opened.set()
        locate = AdapterStore.locate

        def slow(store: AdapterStore, adapter_id: str) -> AdapterFiles:
            assert self.opened.wait(DEADLINE_S)
            return locate(store, adapter_id)

        monkeypatch.setattr(AdapterStore, "locate", slow)


@pytest.fixture
def look_gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[LookGate]:
    gate = LookGate(monkeypatch)
    yield gate
    gate.opened.set()


# -- resolving ------------------------------------------------------------------------------


def test_a_resolved_adapter_says_what_it_needs(make: MakeCache) -> None:
    world = make()
    resolved = world.hold("a0")
    assert resolved.adapter_id == "a0"
    assert resolved.num_bytes == RANK_4_BYTES
    assert resolved.revision == world.hold("a0").revision


def test_a_herd_shares_one_load(make: MakeCache, gate: Gate) -> None:
    world = make()
    gate.closed.add("a0")
    tickets = [world.ask("a0") for _ in range(200)]
    world.until(lambda: gate.reads)
    gate.open()
    world.until(lambda: all(ticket in world.answers for ticket in tickets))
    assert gate.reads == ["a0"]
    revisions = {
        answer.revision for answer in world.answers.values() if isinstance(answer, Resolved)
    }
    assert len(revisions) == 1
    assert world.cache.host.entry(revisions.pop()).holds == 200


def test_a_warm_adapter_is_not_read_again(make: MakeCache, gate: Gate) -> None:
    world = make()
    world.hold("a0")
    world.hold("a0")
    assert gate.reads == ["a0"]


def test_slow_loads_do_not_delay_warm_adapters_or_other_threads(
    make: MakeCache, gate: Gate
) -> None:
    world = make()
    world.hold("a0")
    gate.closed.add("a1")
    slow = world.ask("a1")
    world.until(lambda: "a1" in gate.reads)
    assert world.hold("a2").revision
    assert world.hold("a0").revision
    assert slow not in world.answers
    gate.open()
    world.until(lambda: slow in world.answers)


def test_files_that_stall_hold_up_no_other_adapter(
    make: MakeCache, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than there are loaders: spare threads load the others, and end again."""
    monkeypatch.setattr(workers_module, "STALL_S", 0.02)
    world = make(num_loaders=2)
    gate.closed = {"a1", "a2", "a3"}
    stuck = [world.ask(name) for name in ("a1", "a1", "a2", "a3", "a3")]
    world.until(lambda: gate.closed <= set(gate.reads))
    for name in ("a4", "a5", "a0"):
        assert world.hold(name).revision
    assert not any(ticket in world.answers for ticket in stuck)
    assert sorted(gate.reads) == ["a0", "a1", "a2", "a3", "a4", "a5"], "each is read once"
    gate.open()
    world.until(lambda: all(ticket in world.answers for ticket in stuck))
    world.until(lambda: not [t for t in threading.enumerate() if t.name.endswith("-spare")])
    lane = world.cache._loaders.plain
    assert len(lane.readers) == lane.free.qsize() == 2


def test_a_folder_that_hangs_holds_up_no_other_name(
    make: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request looks at its folder: one look at a time for a name, and spare threads."""
    monkeypatch.setattr(workers_module, "STALL_S", 0.02)
    opened, looks, locate = threading.Event(), list[str](), AdapterStore.locate

    def hang(store: AdapterStore, adapter_id: str) -> AdapterFiles:
        looks.append(adapter_id)
        if adapter_id in ("a1", "a2"):
            assert opened.wait(DEADLINE_S)
        return locate(store, adapter_id)

    world = make()
    world.hold("a0")
    monkeypatch.setattr(AdapterStore, "locate", hang)
    stuck = [world.ask(name) for name in ("a1", "a1", "a1", "a2")]
    world.until(lambda: {"a1", "a2"} <= set(looks))
    assert world.hold("a0").revision, "what is warm needs a look, too"
    assert world.hold("a3").revision
    assert looks.count("a1") == 1
    opened.set()
    world.until(lambda: all(ticket in world.answers for ticket in stuck))
    assert all(isinstance(world.answers[ticket], Resolved) for ticket in stuck)
    world.until(lambda: not len(world.cache._lookups))


def test_who_asks_during_a_look_waits_for_one_that_begins_after(
    make: MakeCache, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a request could be given bytes that were replaced before it came."""
    world = make()
    looked, may_go_on, locate = threading.Event(), threading.Event(), AdapterStore.locate

    def slow(store: AdapterStore, adapter_id: str) -> AdapterFiles:
        files = locate(store, adapter_id)
        looked.set()
        assert may_go_on.wait(DEADLINE_S)
        return files

    old = world.hold("a0").revision
    monkeypatch.setattr(AdapterStore, "locate", slow)
    first = world.ask("a0")
    assert looked.wait(DEADLINE_S)
    replace(root, "a0", seed=99)
    late = [world.ask("a0") for _ in range(3)]
    may_go_on.set()
    world.until(lambda: all(ticket in world.answers for ticket in (first, *late)))
    revisions = [getattr(world.answers[ticket], "revision", None) for ticket in (first, *late)]
    assert revisions[0] == old
    assert len(set(revisions[1:])) == 1
    assert None not in revisions
    assert old != revisions[1]


def test_a_cancelled_ticket_is_not_answered_and_holds_nothing(make: MakeCache, gate: Gate) -> None:
    world = make()
    gate.closed.add("a0")
    ticket, other = world.ask("a0"), world.ask("a0")
    world.until(lambda: gate.reads)
    world.cache.cancel(ticket)
    gate.open()
    world.until(lambda: other in world.answers)
    answer = world.answers[other]
    assert isinstance(answer, Resolved)
    assert ticket not in world.answers
    assert world.cache.host.entry(answer.revision).holds == 1
    world.cache.release(answer.revision)
    assert world.cache.host.entry(answer.revision).holds == 0


def test_a_load_that_nobody_waits_for_any_more_is_found_by_its_name(
    make: MakeCache, gate: Gate
) -> None:
    """Or no order to unload or drop the adapter would reach it."""
    world = make()
    gate.closed.add("a0")
    ticket = world.ask("a0")
    world.until(lambda: gate.reads)
    world.cache.cancel(ticket)
    gate.open()
    world.until(lambda: len(world.cache.host))
    (revision,) = world.cache.host.revisions("a0")
    assert world.cache.known.revisions("a0") == (revision,)


def test_failures_name_the_cause_and_leave_others_alone(make: MakeCache, root: Path) -> None:
    world = make()
    write_adapter(root / "bad", r=3)
    assert world.refusal("absent").code == "adapter_not_found"
    assert world.refusal("../a0").code == "adapter_not_found"
    bad = world.refusal("bad")
    assert bad.code == "adapter_invalid"
    assert "lora_A" in bad.message
    assert str(root) not in bad.message
    assert world.hold("a0").revision
    assert world.cache.budget.used_bytes == world.blob(world.hold("a0").revision).num_bytes


def test_a_failed_load_is_tried_again_when_the_file_changes(make: MakeCache, root: Path) -> None:
    world = make()
    write_adapter(root / "bad", r=3)
    assert world.refusal("bad").code == "adapter_invalid"
    shutil.rmtree(root / "bad")
    write_adapter(root / "bad")
    assert world.hold("bad").revision


def test_a_broken_file_is_not_read_for_each_of_a_storm(
    make: MakeCache, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make()
    write_adapter(root / "bad", change=lambda t: next(iter(t.values())).fill_(float("nan")))
    gate = Gate(monkeypatch)
    for _ in range(5):
        assert "not finite" in world.refusal("bad").message
    assert gate.reads == ["bad"]
    monkeypatch.setattr(refusals_module, "REFUSAL_MEMORY_S", -1.0)
    world.cache._refusals = Refusals()
    for _ in range(2):
        assert world.refusal("bad").code == "adapter_invalid"
    assert gate.reads == ["bad"] * 3


def test_a_message_names_its_adapter_once(
    make: MakeCache, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log's line and the reply begin with the name, and the message began with it, too."""
    write_adapter(root / "half")
    (root / "half" / "adapter_model.safetensors").unlink()
    world = make(pool_bytes=RANK_4_BYTES - 256)
    assert world.refusal("half").message == "adapter_model.safetensors is missing"
    large = world.refusal("a0").message
    assert large.startswith(f"adapter 'a0' takes {RANK_4_BYTES} bytes on the device")
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "adapter 'half' refused: adapter_model.safetensors is missing"
    assert lines[1].startswith("adapter 'a0' refused: takes 9728 bytes")


def test_refusals_are_remembered_up_to_a_number_and_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(refusals_module, "MAX_REFUSALS", 2)
    now_s = 0.0
    refusals = Refusals(lambda: now_s)
    keys = [LoadKey(f"bad{index}", (index,)) for index in range(4)]
    for key in keys:
        refusals.remember(key, AdapterInvalidError(key.adapter_id))
    assert [refusals.find(key) is not None for key in keys] == [True, True, False, False]
    now_s = refusals_module.REFUSAL_MEMORY_S
    assert refusals.find(keys[0]) is None
    refusals.remember(keys[2], AdapterInvalidError("bad2"))
    refusals.remember(keys[3], OSError("no more files"))
    assert str(refusals.find(keys[2])) == "bad2"
    assert refusals.find(keys[3]) is None
    assert len(refusals) == 1


def test_a_file_written_to_while_it_is_read_is_refused(
    make: MakeCache, root: Path, gate: Gate
) -> None:
    """No mixture of two versions is ever served."""
    world = make()
    gate.closed.add("a0")
    ticket = world.ask("a0")
    world.until(lambda: gate.reads)
    with open(root / "a0" / "adapter_model.safetensors", "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(bytes(8))
    gate.open()
    world.until(lambda: ticket in world.answers)
    answer = world.answers[ticket]
    assert isinstance(answer, ResolveFailed)
    assert answer.code == "adapter_invalid"
    assert "changed while it was read" in answer.message
    assert world.cache.budget.used_bytes == 0


def test_folding_delays_nobody_else_and_is_done_once_a_revision(
    make: MakeCache, root: Path, fold_gate: FoldGate
) -> None:
    for name in ("dora", "same", "other"):
        write_adapter(root / name, use_dora=True, seed=int(name == "other"))
    world = make()
    tickets = [world.ask(name) for name in ("dora", "dora", "other")]
    world.until(lambda: fold_gate.revisions)
    for index in range(4):
        assert world.hold(f"a{index}").revision, "two loaders, and neither is folding"
    assert not any(ticket in world.answers for ticket in tickets)
    fold_gate.opened.set()
    world.until(lambda: all(ticket in world.answers for ticket in tickets))
    assert len(fold_gate.revisions) == 2
    used_bytes = world.cache.budget.used_bytes
    assert world.hold("same").revision == world.hold("dora").revision
    assert len(fold_gate.revisions) == 2
    assert world.cache.budget.used_bytes == used_bytes


def test_a_gain_and_a_bias_are_where_the_tables_say(make: MakeCache, root: Path) -> None:
    write_adapter(root / "dora", use_dora=True)
    world = make(max_slots=2)
    revision = world.hold("dora").revision
    for others in (("a0", "a1"), ("a2",)):
        world.bring(*(world.hold(name).revision for name in others))
        resident = world.bring(revision).resident[revision]
        assert resident.has_gain_or_bias
        blob = world.blob(revision)
        assert torch.equal(world.factors_on_device(revision, blob), blob.data)
    plain = world.hold("a0").revision
    assert not world.bring(plain).resident[plain].has_gain_or_bias
    slot = world.cache.residency().resident[plain].slot
    for table in world.pool.tables:
        assert table.gain_offset_SK is not None
        assert (table.gain_offset_SK[slot] == -1).all(), "those of the slot's last adapter are gone"


def test_an_adapter_that_cannot_be_folded_fails_alone_and_leaves_no_bytes(
    make: MakeCache, root: Path
) -> None:
    def vanish(tensors: Tensors) -> None:
        """B A takes all of the first row of the base away."""
        q0 = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors[f"{q0}.lora_A.weight"][0] = next(folder._linears[0].row_blocks(range(1), 99))[0]
        tensors[f"{q0}.lora_B.weight"][0] = torch.tensor([-0.5, 0, 0, 0])

    folder = make_folder()
    write_adapter(root / "bad", use_dora=True, change=vanish)
    world = make()
    for _ in range(2):
        refusal = world.refusal("bad")
        assert refusal.code == "adapter_invalid"
        assert "q_proj.lora_magnitude_vector" in refusal.message
    assert world.cache.budget.used_bytes == 0
    assert world.hold("a0").revision


def test_readers_are_waited_for_once_before_the_first_load(make: MakeCache) -> None:
    waited: list[object] = []

    class SlowReader(ThreadReader):
        def wait_until_ready(self) -> None:
            waited.append(self)

    world = make(make_reader=SlowReader, num_loaders=3)
    world.cache.wait_until_ready()
    assert len(set(map(id, waited))) == len(waited) == 3
    assert world.hold("a0").revision


def test_an_unexpected_error_is_reported_and_the_thread_lives(
    make: MakeCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = make(num_loaders=1)

    def explode(*_: object) -> None:
        raise ZeroDivisionError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(ThreadReader, "blob", explode)
        failed = world.refusal("a0")
    assert failed.code == "internal"
    assert "secret" not in failed.message
    assert "secret" in caplog.text
    assert world.cache.budget.used_bytes == 0
    assert world.hold("a0").revision


def test_an_adapter_larger_than_a_tier_is_refused(make: MakeCache) -> None:
    assert make(pool_bytes=RANK_4_BYTES).hold("a0").num_bytes == RANK_4_BYTES
    small_pool = make(pool_bytes=RANK_4_BYTES - 256)
    refusal = small_pool.refusal("a0")
    assert refusal.code == "adapter_capacity"
    assert "--adapter-memory" in refusal.message
    assert small_pool.hold("a1").num_bytes < RANK_4_BYTES
    refusal = make(host_bytes=RANK_4_BYTES - 1000).refusal("a0")
    assert refusal.code == "adapter_capacity"
    assert "--adapter-host-memory" in refusal.message


# -- new bytes under an old name ------------------------------------------------------------


def replace(root: Path, name: str, seed: int) -> None:
    write_adapter(root / "staging" / name, rank=4, seed=seed)
    shutil.rmtree(root / name)
    (root / "staging" / name).rename(root / name)


def test_a_replaced_adapter_serves_new_bytes_to_new_requests_only(
    make: MakeCache, root: Path
) -> None:
    world = make()
    old = world.hold("a0").revision
    before = world.blob(old).data.clone()
    world.bring(old)
    replace(root, "a0", seed=99)
    new = world.hold("a0").revision
    assert new != old
    world.bring(new, in_use=(old,))
    for revision in (old, new):
        blob = world.blob(revision)
        assert torch.equal(world.factors_on_device(revision, blob), blob.data)
    assert torch.equal(world.blob(old).data, before)
    assert not torch.equal(world.blob(new).data, before)


def test_a_request_that_comes_after_a_replacement_does_not_join_the_old_load(
    make: MakeCache, root: Path, gate: Gate
) -> None:
    world = make()
    gate.closed.add("a0")
    early = world.ask("a0")
    world.until(lambda: gate.reads)
    replace(root, "a0", seed=99)
    late = world.ask("a0")
    world.until(lambda: len(gate.reads) == 2)
    gate.open()
    world.until(lambda: {early, late} <= world.answers.keys())
    first, second = world.answers[early], world.answers[late]
    assert isinstance(second, Resolved)
    assert not isinstance(first, Resolved) or first.revision != second.revision
    assert second.revision == world.hold("a0").revision


def test_a_file_rewritten_at_once_is_read_again(make: MakeCache, root: Path) -> None:
    """Within a clock tick a rewrite may leave the signature as it was, so it is not trusted."""
    world = make()
    revisions: set[str] = set()
    for seed in range(5):
        shutil.rmtree(root / "a0")
        write_adapter(root / "a0", seed=100 + seed)
        revisions.add(world.hold("a0").revision)
    assert len(revisions) == 5


def test_names_are_remembered_up_to_a_number(
    make: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_module, "MAX_NAMES", 2)
    world = make()
    for name in ("a0", "a1", "a0", "a2"):
        world.hold(name)
    assert list(world.cache.known.names()) == ["a0", "a2"]


def test_merges_of_requests_push_no_adapter_out_of_what_is_known(
    make: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request may bring another recipe, some kilobytes of name."""
    monkeypatch.setattr(known_module, "MAX_MERGES", 2)
    monkeypatch.setattr(known_module, "MAX_NAMES", 2)
    world = make()
    world.hold("a0")
    names = [
        merged_id(Recipe(sources=(MergeSource("a0", float(weight)),))) for weight in range(1, 5)
    ]
    for name in names:
        world.hold(name)
    assert list(world.cache.known.names()) == ["a0", *names[-2:]]


def test_a_deleted_adapter_is_gone_for_new_requests_and_stays_for_holders(
    make: MakeCache, root: Path
) -> None:
    world = make(max_slots=1)
    held, other = world.hold("a0").revision, world.hold("a2").revision
    blob = world.blob(held)
    world.bring(held)
    shutil.rmtree(root / "a0")
    assert world.refusal("a0").code == "adapter_not_found"
    world.bring(other)
    assert held not in world.cache.residency().resident
    world.bring(held)
    assert torch.equal(world.factors_on_device(held, blob), blob.data)


# -- the host tier --------------------------------------------------------------------------


def let_equal_loads_cost_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    put = HostTier.put

    def put_at_a_fixed_cost(tier: HostTier, adapter_id: str, blob: AdapterBlob, *rest: Any) -> None:
        put(tier, adapter_id, blob, blob.num_bytes / 1e9, rest[1])

    monkeypatch.setattr(HostTier, "put", put_at_a_fixed_cost)


def test_among_equals_the_least_recently_released_blob_makes_room(
    make: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_equal_loads_cost_the_same(monkeypatch)
    world = make(host_bytes=2 * RANK_4_BYTES)
    first, second = world.hold("a0").revision, world.hold("a2").revision
    world.cache.release(second)
    world.cache.release(first)
    world.hold("a4")
    assert first in world.cache.host
    assert second not in world.cache.host
    assert [(m.kind, m.adapter_id) for m in world.cache.drain_moves()][-2:] == [
        ("evict", "a2"),
        ("load", "a4"),
    ]


def test_what_is_asked_for_often_stays_on_the_host(
    make: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_equal_loads_cost_the_same(monkeypatch)
    world = make(host_bytes=2 * RANK_4_BYTES)
    favourite = world.hold("a0").revision
    assert world.hold("a0").revision == world.hold("a0").revision == favourite
    once = world.hold("a2").revision
    for revision in (favourite, favourite, favourite, once):
        world.cache.release(revision)
    world.cache.host.check()
    world.cache.release(world.hold("a4").revision)
    assert favourite in world.cache.host, "though the other was released later"
    assert once not in world.cache.host


def test_what_is_dear_to_load_stays_on_the_host(
    make: MakeCache, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folding a large base takes a hundred times as long as reading an adapter."""
    fold = BaseFolder.fold

    def slow(folder: BaseFolder, blob: AdapterBlob) -> AdapterBlob:
        time.sleep(0.3)
        return fold(folder, blob)

    monkeypatch.setattr(BaseFolder, "fold", slow)
    write_adapter(root / "dora", use_dora=True)
    world = make(host_bytes=3 * RANK_4_BYTES)
    dear = world.hold("dora").revision
    world.cache.release(dear)
    for name in ("a0", "a2", "a4", "a6", "a0", "a2"):
        world.cache.release(world.hold(name).revision)
    assert dear in world.cache.host


def test_a_replaced_revision_goes_first_and_leaves_its_past_to_the_new_one(
    make: MakeCache, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_equal_loads_cost_the_same(monkeypatch)
    world = make(host_bytes=3 * RANK_4_BYTES, max_slots=3)
    for _ in range(5):
        old = world.hold("a0").revision
        world.cache.release(old)
    other = world.hold("a2").revision
    world.bring(old, other)
    replace(root, "a0", seed=99)
    new = world.hold("a0").revision
    assert world.cache.host.uses(new) == 6
    assert world.cache.host.uses(old) == 0
    world.bring(new)
    for revision in (new, other):
        world.cache.release(revision)
    third = world.hold("a4").revision
    assert old not in world.cache.host
    assert {new, other, third} <= world.cache.host._entries.keys()
    assert world.bring(third).resident.keys() == {new, other, third}


def test_when_all_are_held_loads_wait_their_turn(make: MakeCache) -> None:
    world = make(host_bytes=2 * RANK_4_BYTES)
    first, second = world.hold("a0").revision, world.hold("a2").revision
    waiting = [world.ask("a4"), world.ask("a1"), world.ask("a6")]
    world.until(lambda: len(world.cache._waiting_for_room) == 3)
    for _ in range(20):
        world.turn()
        time.sleep(0.001)
    assert not any(ticket in world.answers for ticket in waiting)
    assert world.hold("a0").revision == first
    world.cache.release(second)
    world.until(lambda: waiting[0] in world.answers)
    assert waiting[2] not in world.answers
    for _ in range(2):
        world.cache.release(first)
    world.until(lambda: waiting[1] in world.answers)
    answer = world.answers[waiting[0]]
    assert isinstance(answer, Resolved)
    world.cache.release(answer.revision)
    world.until(lambda: waiting[2] in world.answers)


def test_a_cancelled_ticket_gives_up_its_place_in_the_queue(make: MakeCache, gate: Gate) -> None:
    world = make(host_bytes=RANK_4_BYTES)
    held = world.hold("a0").revision
    gone, patient = world.ask("a2"), world.ask("a4")
    world.until(lambda: len(world.cache._waiting_for_room) == 2)
    world.cache.cancel(gone)
    world.cache.release(held)
    world.until(lambda: patient in world.answers)
    assert gone not in world.answers
    assert not world.cache._loads
    assert gate.reads == ["a0", "a4"], "what nobody wants is not read"


def test_a_small_load_does_not_take_the_room_that_a_large_one_waits_for(make: MakeCache) -> None:
    world = make(host_bytes=2 * RANK_4_BYTES)
    first = world.hold("a0").revision
    world.hold("a1")
    large = world.ask("a2")
    world.until(lambda: world.cache._waiting_for_room)
    small = world.ask("a3")
    world.until(lambda: len(world.cache._waiting_for_room) == 2)
    world.cache.release(first)
    world.until(lambda: large in world.answers)
    world.until(lambda: small in world.answers)


def test_a_load_does_not_wait_for_room_that_a_pin_has_taken_meanwhile(make: MakeCache) -> None:
    """It was found to fit before the pin came, and would have waited for ever."""
    world = make(host_bytes=2 * RANK_4_BYTES)
    held = [world.hold(name).revision for name in ("a0", "a2")]
    ticket = world.ask("a4")
    world.until(lambda: world.cache._loads)
    end_s = time.monotonic() + DEADLINE_S
    while world.cache._outcomes.empty():
        assert time.monotonic() < end_s
    for revision in held:
        world.cache.pin(revision)
    world.until(lambda: ticket in world.answers)
    answer = world.answers[ticket]
    assert isinstance(answer, ResolveFailed)
    assert (answer.code, "pinned adapters leave 0" in answer.message) == ("adapter_capacity", True)
    assert not world.cache._loads


def test_newcomers_do_not_overtake_those_who_wait_for_room() -> None:
    budget = HostBudget(100)
    assert budget.try_reserve(60)
    budget.hold_back(True)
    assert not budget.try_reserve(10)
    assert budget.try_reserve(10, is_waiter=True)
    budget.hold_back(False)
    assert budget.try_reserve(10)
    assert not budget.try_reserve(30)


# -- the device tier ------------------------------------------------------------------------


def test_more_adapters_than_slots_take_turns_byte_for_byte(make: MakeCache) -> None:
    world = make(max_slots=2)
    held = [world.hold(f"a{index}").revision for index in range(8)]
    for revision in held * 2:
        world.bring(revision)
        blob = world.blob(revision)
        assert torch.equal(world.factors_on_device(revision, blob), blob.data)
    assert len(world.cache.residency().resident) == 2
    kinds = [(move.kind, move.tier) for move in world.cache.drain_moves()]
    assert kinds.count(("load", "device")) == 16
    assert kinds.count(("evict", "device")) == 14
    assert world.cache.drain_moves() == []


def test_adapters_in_use_or_pinned_are_never_evicted(make: MakeCache) -> None:
    world = make(max_slots=2)
    used, pinned, wanted = (world.hold(f"a{index}").revision for index in range(3))
    world.bring(used, pinned)
    world.cache.pin(pinned)
    for _ in range(50):
        world.cache.demand(AdapterDemand(frozenset({used}), (wanted,)))
        residency = world.turn()
        assert residency.resident.keys() == {used, pinned}
        assert not residency.loading
    world.cache.unpin(pinned)
    assert world.bring(wanted, in_use=(used,)).resident.keys() == {used, wanted}


def test_who_is_asked_for_often_is_evicted_after_those_who_are_not(make: MakeCache) -> None:
    world = make(max_slots=2)
    favourite, other, third = (world.hold(name).revision for name in ("a0", "a2", "a4"))
    for _ in range(3):
        world.cache.release(world.hold("a0").revision)
    world.bring(favourite, other)
    for revision in (favourite, other):
        world.cache.demand(AdapterDemand(frozenset({revision}), ()))
    assert world.bring(third).resident.keys() == {favourite, third}


def test_the_least_recently_used_is_evicted_first(make: MakeCache) -> None:
    world = make(max_slots=3)
    a, b, c, d = (world.hold(f"a{index}").revision for index in range(4))
    world.bring(a, b, c)
    for revision in (b, a, c):
        world.cache.demand(AdapterDemand(frozenset({revision}), ()))
    assert world.bring(d).resident.keys() == {a, c, d}


def test_whom_others_wait_for_is_evicted_last_however_long_unused(make: MakeCache) -> None:
    world = make(max_slots=3)
    soon, later, idle, wanted = (world.hold(f"a{index}").revision for index in range(4))
    world.bring(soon, later, idle)
    for revision in (soon, later, idle):
        world.cache.demand(AdapterDemand(frozenset({revision}), ()))
    world.cache.demand(AdapterDemand(frozenset(), (wanted, soon, later)))
    world.until(lambda: wanted in world.cache.residency().resident)
    assert world.cache.residency().resident.keys() == {soon, later, wanted}
    world.cache.demand(AdapterDemand(frozenset({wanted}), (idle, soon, later)))
    world.until(lambda: idle in world.cache.residency().resident)
    assert world.cache.residency().resident.keys() == {soon, idle, wanted}


def test_nobody_makes_room_for_who_is_behind_in_line(make: MakeCache) -> None:
    """What had been fetched ahead for one was evicted to fetch ahead for the next."""
    world = make(max_slots=2)
    waits, idle, first, last = (world.hold(f"a{index}").revision for index in range(4))
    world.bring(waits, idle)
    for _ in range(20):
        world.cache.demand(AdapterDemand(frozenset(), (first, waits, last)))
        world.settle()
    assert world.cache.residency().resident.keys() == {first, waits}
    world.cache.demand(AdapterDemand(frozenset({first}), (last, waits)))
    world.settle()
    assert world.cache.residency().resident.keys() == {first, last}


def test_a_large_adapter_is_not_starved_by_small_ones(make: MakeCache) -> None:
    """The first demand that does not fit ends the search: later ones leave its room alone."""
    world = make(pool_bytes=RANK_4_BYTES + 2048)
    used, large, small = (world.hold(name).revision for name in ("a1", "a0", "a3"))
    world.bring(used)
    for _ in range(20):
        world.cache.demand(AdapterDemand(frozenset({used}), (large, small)))
        residency = world.turn()
        assert residency.resident.keys() == {used}
        assert not residency.loading
    assert large in world.bring(large).resident


def test_a_more_urgent_demand_may_take_the_place_of_a_less_urgent_one(make: MakeCache) -> None:
    world = make(max_slots=1)
    first, second = world.hold("a0").revision, world.hold("a2").revision
    world.bring(second)
    assert world.bring(first, in_use=()).resident.keys() == {first}
    world.cache.demand(AdapterDemand(frozenset(), (first, second)))
    assert world.turn().resident.keys() == {first}


def test_a_slot_is_shown_only_when_its_copy_is_complete(
    make: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make()
    revision = world.hold("a0").revision
    copied, may_go_on = threading.Event(), threading.Event()
    copier = world.cache.device._copier
    copy = copier.copy

    def slow(*args: Any) -> Any:
        row = copy(*args)
        copied.set()
        assert may_go_on.wait(DEADLINE_S)
        return row

    monkeypatch.setattr(copier, "copy", slow)
    before = world.cache.residency()
    world.cache.demand(AdapterDemand(frozenset(), (revision,)))
    assert copied.wait(DEADLINE_S)
    residency = world.cache.residency()
    assert residency.loading == {revision}
    assert not residency.resident
    assert residency.free_slots == 7
    assert not any(table.rank_SK.any() for table in world.pool.tables)
    may_go_on.set()
    world.until(lambda: revision in world.cache.residency().resident)
    assert not before.resident
    assert not residency.resident


def test_a_blob_stays_on_the_host_while_it_is_copied(
    make: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make(host_bytes=RANK_4_BYTES)
    revision = world.hold("a0").revision
    may_go_on = threading.Event()
    copier = world.cache.device._copier
    copy = copier.copy

    def slow(*args: Any) -> Any:
        assert may_go_on.wait(DEADLINE_S)
        return copy(*args)

    monkeypatch.setattr(copier, "copy", slow)
    world.cache.demand(AdapterDemand(frozenset(), (revision,)))
    world.cache.release(revision)
    other = world.ask("a2")
    world.until(lambda: world.cache._waiting_for_room)
    assert revision in world.cache.host
    may_go_on.set()
    world.until(lambda: other in world.answers)
    assert revision not in world.cache.host
    assert revision in world.cache.residency().resident


def test_a_failed_copy_is_raised_on_the_engines_thread(
    make: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make()
    revision = world.hold("a0").revision

    def fail(*_: object) -> None:
        raise RuntimeError("device error")

    monkeypatch.setattr(world.cache.device._copier, "copy", fail)
    world.cache.demand(AdapterDemand(frozenset(), (revision,)))
    with pytest.raises(RuntimeError, match="copying an adapter"):
        world.until(lambda: False)


def test_the_residency_reports_room_that_can_be_had(make: MakeCache) -> None:
    world = make(pool_bytes=3 * RANK_4_BYTES, max_slots=5)
    resolved = world.hold("a0")
    residency = world.bring(resolved.revision)
    assert residency.resident[resolved.revision].num_bytes == resolved.num_bytes
    assert residency.free_bytes == 2 * RANK_4_BYTES
    assert residency.free_slots == 4
    assert world.cache.residency() is residency


# -- ahead of the look ----------------------------------------------------------------------

NOTHING_ELSE = AdapterDemand(frozenset(), ())


def known_on_the_host(world: World, *names: str) -> list[str]:
    """Their revisions; nobody holds them and none is on the device."""
    revisions = [world.hold(name).revision for name in names]
    for revision in revisions:
        world.cache.release(revision)
    return revisions


def test_an_adapter_comes_to_the_device_while_its_name_is_looked_up(
    make: MakeCache, look_gate: LookGate
) -> None:
    """A request used to wait a step for the look, and another one for the copy."""
    world = make()
    [revision] = known_on_the_host(world, "a0")
    look_gate.opened.clear()
    ticket = world.ask("a0")
    world.cache.demand(NOTHING_ELSE)
    world.until(lambda: revision in world.cache.residency().resident)
    assert ticket not in world.answers
    look_gate.opened.set()
    world.until(lambda: ticket in world.answers)
    answer = world.answers[ticket]
    assert isinstance(answer, Resolved)
    assert answer.revision == revision


def test_a_name_that_stands_for_other_bytes_by_now_gets_those(
    make: MakeCache, root: Path, look_gate: LookGate
) -> None:
    world = make()
    [old] = known_on_the_host(world, "a0")
    replace(root, "a0", seed=99)
    look_gate.opened.clear()
    ticket = world.ask("a0")
    world.cache.demand(NOTHING_ELSE)
    world.until(lambda: old in world.cache.residency().resident)
    look_gate.opened.set()
    world.until(lambda: ticket in world.answers)
    answer = world.answers[ticket]
    assert isinstance(answer, Resolved)
    assert answer.revision != old
    assert not world.cache._expected
    resident = world.bring(answer.revision).resident
    slot = resident[answer.revision].slot
    assert slot != resident[old].slot
    blob = world.blob(answer.revision)
    assert torch.equal(world.factors_on_device(answer.revision, blob), blob.data)


def test_nothing_is_guessed_of_what_is_only_to_be_found_or_was_given_up(
    make: MakeCache, look_gate: LookGate
) -> None:
    world = make()
    known_on_the_host(world, "a0", "a1")
    look_gate.opened.clear()
    world.cache.resolve(101, "a0", for_device=False)
    world.cache.resolve(102, "a1")
    world.cache.cancel(102)
    world.cache.demand(NOTHING_ELSE)
    assert not world.cache.residency().loading


def test_a_guess_that_is_not_on_the_host_any_more_loads_nothing(
    make: MakeCache, look_gate: LookGate
) -> None:
    world = make()
    [revision] = known_on_the_host(world, "a0")
    look_gate.opened.clear()
    ticket = world.ask("a0")
    assert world.cache.let_go(revision)
    world.cache.demand(NOTHING_ELSE)
    assert not world.cache.residency().loading
    look_gate.opened.set()
    world.until(lambda: ticket in world.answers)
    assert getattr(world.answers[ticket], "revision", None) == revision


def test_a_guess_takes_no_room_from_those_in_line(make: MakeCache, look_gate: LookGate) -> None:
    world = make(max_slots=1)
    [guessed] = known_on_the_host(world, "a0")
    first = world.hold("a1").revision
    look_gate.opened.clear()
    world.ask("a0")
    world.cache.demand(AdapterDemand(frozenset(), (first,)))
    assert world.cache.residency().loading == {first}
    world.until(lambda: first in world.cache.residency().resident)
    world.cache.demand(AdapterDemand(frozenset({first}), ()))
    assert not world.cache.residency().loading
    world.cache.demand(NOTHING_ELSE)
    assert world.cache.residency().loading == {guessed}


def test_so_many_are_guessed_at_once_and_no_more(
    make: MakeCache, look_gate: LookGate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each load is work between two steps."""
    monkeypatch.setattr(cache_module, "MAX_EXPECTED", 2)
    world = make()
    names = ("a0", "a1", "a2", "a3")
    revisions = known_on_the_host(world, *names)
    look_gate.opened.clear()
    for name in names:
        world.ask(name)
    world.cache.demand(NOTHING_ELSE)
    assert world.cache.residency().loading == set(revisions[:2])


# -- reports --------------------------------------------------------------------------------


def listed(world: World, call_id: int) -> Listed:
    world.cache.request_list(call_id)
    end_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < end_s:
        for answer in world.cache.poll():
            assert isinstance(answer, Listed)
            return answer
        time.sleep(0.001)
    raise AssertionError("no list came")


def test_the_list_shows_each_adapters_tier(make: MakeCache, root: Path) -> None:
    world = make()
    on_device, on_host = world.hold("a0").revision, world.hold("a1").revision
    world.bring(on_device)
    answer = listed(world, 7)
    assert answer.call_id == 7
    entries = {entry.adapter_id: (entry.tier, entry.revision) for entry in answer.adapters}
    assert len(entries) == 8
    assert entries["a0"] == ("device", on_device)
    assert entries["a1"] == ("host", on_host)
    assert entries["a2"] == ("disk", "")
    shutil.rmtree(root / "a0")
    assert "a0" not in {entry.adapter_id for entry in listed(world, 8).adapters}


def test_a_flood_of_lists_keeps_no_adapter_from_loading(
    make: MakeCache, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call walked the folder, and loads waited behind all of the walks."""
    world = make(num_loaders=2)
    may_walk = threading.Event()
    walks: list[int] = []
    list_ids = AdapterStore.list_ids

    def slow(store: AdapterStore) -> tuple[str, ...]:
        walks.append(1)
        assert may_walk.wait(DEADLINE_S)
        return list_ids(store)

    monkeypatch.setattr(AdapterStore, "list_ids", slow)
    for call_id in range(100):
        world.cache.request_list(call_id)
        world.cache.counts()
    assert world.hold("a0").revision
    write_adapter(root / "late")
    may_walk.set()
    lists: dict[int, Listed] = {}
    end_s = time.monotonic() + DEADLINE_S
    while len(lists) < 100:
        assert time.monotonic() < end_s
        lists |= {a.call_id: a for a in world.cache.poll() if isinstance(a, Listed)}
    assert len(walks) == 2
    assert "late" in {entry.adapter_id for entry in lists[99].adapters}


def test_a_walk_that_fails_is_an_empty_list_and_the_next_is_whole(
    make: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make()
    with monkeypatch.context() as patch:
        patch.setattr(AdapterStore, "list_ids", lambda _: 1 / 0)
        assert listed(world, 1).adapters == ()
    assert len(listed(world, 2).adapters) == 8


def test_counts_are_of_each_tier(make: MakeCache) -> None:
    world = make()
    resolved = world.hold("a0")
    world.hold("a1")
    world.bring(resolved.revision)
    world.until(lambda: world.cache.counts().disk == 8)
    counts = world.cache.counts()
    assert (counts.host, counts.device) == (2, 1)
    assert counts.device_bytes == resolved.num_bytes
    assert counts.host_bytes == world.cache.budget.used_bytes > RANK_4_BYTES


def test_moves_are_reported_with_their_time(make: MakeCache, root: Path) -> None:
    world = make()
    revision = world.hold("a0").revision
    world.bring(revision)
    write_adapter(root / "bad", r=3)
    world.refusal("bad")
    moves = world.cache.drain_moves()
    assert [(m.kind, m.tier, m.adapter_id) for m in moves] == [
        ("load", "host", "a0"),
        ("load", "device", "a0"),
        ("fail", "host", "bad"),
    ]
    assert all(move.seconds > 0 for move in moves if move.kind == "load")


def test_each_refusal_in_the_log_is_counted_and_no_other(
    make: MakeCache,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Those of folders that were not even read had their line, and no count."""
    world = make(num_loaders=1)
    write_adapter(root / "bad", r=3)
    write_adapter(root / "half")
    (root / "half" / "adapter_model.safetensors").unlink()
    for name in ("bad", "half", "half", "absent", "../a0"):
        world.refusal(name)
    for name in ("bad", "a0"):
        world.refusal(name) if name == "bad" else world.hold(name)
    refused = [r.getMessage().split("'")[1] for r in caplog.records if "refused" in r.getMessage()]
    failed = [move.adapter_id for move in world.cache.drain_moves() if move.kind == "fail"]
    assert refused == failed == ["bad", "half", "half"]
    monkeypatch.setattr(AdapterStore, "locate", lambda *_: 1 / 0)
    assert world.refusal("a0").code == "internal"
    assert [move.kind for move in world.cache.drain_moves()] == ["fail"]


def test_adapters_that_nobody_can_name_are_told_at_start(
    root: Path, make: MakeCache, caplog: pytest.LogCaptureFixture
) -> None:
    for index in range(MAX_SKIPPED_LINES + 5):
        write_adapter(root / f"no name {index:02}")
    world = make()
    world.until(lambda: any("more folders" in r.getMessage() for r in caplog.records))
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("folder 'no name 00' in the adapters folder is skipped: names are")
    assert len(lines) == MAX_SKIPPED_LINES + 1
    assert lines[-1] == "5 more folders in the adapters folder are skipped, too"


def test_a_storm_of_our_own_failures_leaves_few_traces(caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(lambda: 0.0)
    for _ in range(1000):
        journal.broke("work", OSError("no more files"))
    assert len(caplog.records) == MAX_LINES
    assert all(record.exc_info for record in caplog.records)


def test_the_log_tells_what_became_of_an_adapter(
    make: MakeCache, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lory_server.adapters.journal")
    world = make(max_slots=1, host_bytes=2 * RANK_4_BYTES)
    first = world.hold("a0").revision
    world.bring(first)
    replace(root, "a0", seed=99)
    second = world.hold("a0").revision
    world.cache.release(first)
    world.bring(second)
    world.hold("a2")
    write_adapter(root / "bad", r=3)
    for _ in range(3):
        world.refusal("bad")
    world.refusal("absent")
    lines = [(r.levelname, r.getMessage()) for r in caplog.records]
    told = [line.partition(":")[0] for _, line in lines]
    assert told == [
        "adapter 'a0' loaded to host",
        "adapter 'a0' loaded to device",
        "adapter 'a0' loaded to host",
        "adapter 'a0' replaced",
        "adapter 'a0' evicted from device",
        "adapter 'a0' loaded to device",
        "adapter 'a0' evicted from host",
        "adapter 'a2' loaded to host",
        "adapter 'bad' refused",
    ]
    assert re.fullmatch(rf".*: revision {first}, {RANK_4_BYTES} bytes, \d+\.\d ms", lines[0][1])
    assert lines[3][1].endswith(f": revision {second}, was {first}")
    assert [level for level, _ in lines] == ["INFO"] * 8 + ["WARNING"]
    assert "lora_A" in lines[-1][1]


def test_a_flood_of_swaps_leaves_few_lines_and_a_refusal_among_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "lory_server.adapters.journal")
    now_s = 0.0
    journal = Journal(lambda: now_s)
    for index in range(5000):
        now_s += 0.01
        journal.loaded("device", f"a{index}", "revision", 1, 0.001)
    journal.refused("bad", ValueError("reason"))
    assert [move.kind for move in journal.drain()] == ["load"] * 5000 + ["fail"]
    levels = [record.levelname for record in caplog.records]
    assert levels.count("INFO") <= 6 * (MAX_LINES + 1)
    assert levels[-1] == "WARNING"
    left_out = [r for r in caplog.records if "left out" in r.getMessage()]
    assert {record.getMessage().split()[0] for record in left_out} <= {"980", "981", "979"}
    assert len(left_out) >= 4


def test_news_wakes_the_engine(make: MakeCache) -> None:
    woken = threading.Event()
    world = make(on_ready=woken.set)
    world.ask("a0")
    assert woken.wait(DEADLINE_S)


def test_loaders_have_the_priority_of_the_step_and_end_with_the_cache(make: MakeCache) -> None:
    world = make()
    world.hold("a0")
    loaders: Loaders = world.cache._loaders
    for thread in loaders.threads:
        assert thread.native_id is not None
        ours = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        assert os.getpriority(os.PRIO_PROCESS, thread.native_id) == ours
    world.cache.close()
    assert not any(thread.is_alive() for thread in loaders.threads)


# -- everything at once ---------------------------------------------------------------------


class Soak:
    """Random requests, cancellations, replacements and demands over one small cache."""

    def __init__(self, world: World, root: Path, seed: int) -> None:
        self.world = world
        self.root = root
        self.rng = random.Random(seed)
        self.waiting: set[int] = set()
        self.holds: list[str] = []
        self.sums: dict[str, torch.Tensor] = {}
        self.in_use: frozenset[str] = frozenset()
        self.checked = 0

    def step(self) -> None:
        rng = self.rng
        if rng.random() < 0.5 and len(self.waiting) + len(self.holds) < 12:
            self.waiting.add(self.world.ask(f"a{rng.randrange(9)}"))
        if self.waiting and rng.random() < 0.1:
            ticket = self.waiting.pop()
            self.world.cache.cancel(ticket)
        if rng.random() < 0.05:
            replace(self.root, f"a{rng.randrange(8)}", seed=rng.randrange(1000))
        residency = self.world.turn()
        self.collect()
        if self.holds and rng.random() < 0.45:
            self.world.cache.release(self.holds.pop(rng.randrange(len(self.holds))))
        held = set(self.holds)
        runnable = sorted(held & residency.resident.keys())
        self.in_use = frozenset(rng.sample(runnable, min(len(runnable), 2)))
        wanted = sorted(held - residency.resident.keys())
        rng.shuffle(wanted)
        self.world.cache.demand(AdapterDemand(self.in_use, tuple(wanted)))
        self.check()

    def collect(self) -> None:
        for ticket in list(self.waiting & self.world.answers.keys()):
            self.waiting.remove(ticket)
            answer = self.world.answers[ticket]
            if isinstance(answer, Resolved):
                self.holds.append(answer.revision)
                data = self.world.blob(answer.revision).data
                self.sums.setdefault(answer.revision, data.clone())
            else:
                assert isinstance(answer, ResolveFailed)
                assert answer.code in ("adapter_not_found", "adapter_invalid"), answer

    def check(self) -> None:
        cache = self.world.cache
        cache.device.check()
        assert cache.budget.used_bytes <= cache.budget.total_bytes
        resident = cache.residency().resident
        assert self.in_use <= resident.keys()
        for revision in self.in_use:
            blob = self.world.blob(revision)
            assert torch.equal(blob.data, self.sums[revision])
            assert torch.equal(self.world.factors_on_device(revision, blob), blob.data)
            self.checked += 1

    def finish(self) -> None:
        world, cache = self.world, self.world.cache

        def all_answered() -> bool:
            self.collect()
            for revision in self.holds:
                cache.release(revision)
            self.holds.clear()
            return not self.waiting

        world.until(all_answered)
        world.settle()


@pytest.mark.parametrize("seed", [1, 2])
def test_a_soak_leaks_nothing_and_never_tears_what_is_held(
    make: MakeCache, root: Path, seed: int
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    world = make(pool_bytes=4 * RANK_4_BYTES, max_slots=3, host_bytes=6 * RANK_4_BYTES)
    soak = Soak(world, root, seed)
    end_s = time.monotonic() + DEADLINE_S
    for _ in range(600):
        soak.step()
    while soak.checked < 100:
        assert time.monotonic() < end_s
        soak.step()
    soak.finish()
    cache = world.cache
    world.until(lambda: not cache._loads and not cache._waiting_for_room)
    world.until(lambda: cache.host.make_room(6 * RANK_4_BYTES) or cache.budget.free_bytes)
    assert cache.budget.used_bytes == 0
    assert len(cache.host) == 0
    assert not cache._tickets
    assert not cache._expected
    cache.device.check()
    assert len(os.listdir("/proc/self/fd")) <= before

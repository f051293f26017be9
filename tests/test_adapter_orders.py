"""Operators load, pin, unload, replace and drop adapters while streams run; no stream notices."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from lory_server.messages import (
    AdapterEntry,
    AdapterList,
    AdapterOrder,
    ListAdapters,
    Matched,
    OrderDone,
    OrderKind,
)
from parity_world import Comparison, ParityWorld, Reference, Session

STREAMS = 10
TARGETS = ["q_proj", "v_proj", "down_proj"]


class Operator(Session):
    """A session whose engine is given orders, too."""

    def __init__(self, world: ParityWorld, pipeline_depth: int = 0, **changes: Any) -> None:
        super().__init__(world.options(**changes), pipeline_depth)
        self.world = world
        self.calls = 1_000_000

    def order(self, kind: OrderKind, adapter_id: str, revision: str = "") -> OrderDone:
        self.calls += 1
        call = self.calls
        self.engine.obey(
            AdapterOrder(call_id=call, kind=kind, adapter_id=adapter_id, revision=revision)
        )
        answer = self._wait(call)
        assert isinstance(answer, OrderDone)
        return answer

    def done(self, kind: OrderKind, adapter_id: str, revision: str = "") -> AdapterEntry:
        answer = self.order(kind, adapter_id, revision)
        assert answer.entry is not None, answer.failure
        return answer.entry

    def refused(self, kind: OrderKind, adapter_id: str, revision: str = "") -> str:
        failure = self.order(kind, adapter_id, revision).failure
        assert failure is not None
        return f"{failure.code}: {failure.message}"

    def entry(self, adapter_id: str) -> AdapterEntry:
        self.calls += 1
        self.engine.list_adapters(ListAdapters(call_id=self.calls))
        answer = self._wait(self.calls)
        assert isinstance(answer, AdapterList)
        return next(entry for entry in answer.adapters if entry.adapter_id == adapter_id)

    def _wait(self, call: int) -> AdapterList | OrderDone:
        answers: list[AdapterList | OrderDone] = []

        def answered() -> bool:
            answers.extend(self.engine.adapter_answers())
            return any(answer.call_id == call for answer in answers)

        self.run(until=answered)
        return next(answer for answer in answers if answer.call_id == call)

    def start_streams(self, adapter_id: str, first: int = 0) -> list[int]:
        """Ten streams of one adapter, each some tokens along."""
        ids = list(range(first, first + STREAMS))
        for i in ids:
            prompt = [3 + (7 * i + k) % 190 for k in range(5 + i % 10)]
            self.submit(i, prompt, adapter_id, max_new_tokens=30, ignore_eos=True)
        self.run(until=lambda: all(len(self.answers[i].tokens) > 3 for i in ids))
        return ids

    def check_streams(self, ids: list[int], adapter: Path) -> set[str]:
        """Every token is PEFT's; the revisions that gave them."""
        reference, comparison = Reference(self.world.base), Comparison()
        for i in ids:
            answer, prompt = self.answers[i], list(self.prompts[i].prompt_ids)
            assert answer.finished is not None
            assert (answer.finished.reason, len(answer.tokens)) == ("length", 30)
            logits = reference.logits(prompt + answer.tokens, adapter)
            comparison.add(f"stream {i}", prompt, answer.tokens, logits)
        comparison.check()
        return {self.answers[i].finished.adapter_revision for i in ids}  # type: ignore[union-attr]

    def failure(self, request_id: int) -> str:
        self.run(until=lambda: self.answers[request_id].finished is not None)
        finished = self.answers[request_id].finished
        assert finished is not None
        assert finished.failure is not None
        return f"{finished.failure.code}: {finished.failure.message}"

    def in_memory(self) -> int:
        return len(self.engine._adapters.host) + len(self.engine._adapters.device)


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> ParityWorld:
    """Four adapters of one shape, kept aside."""
    folder = tmp_path_factory.mktemp("orders")
    base = tiny_models.build("llama", folder / "base", tie_word_embeddings=False)
    adapters = {
        f"v{seed}": tiny_models.save_adapter(
            folder / "kept" / f"v{seed}", base, 4, 8, TARGETS, seed
        )
        for seed in range(4)
    }
    return ParityWorld("llama", base, folder / "kept", adapters)


@pytest.fixture
def world(versions: ParityWorld, tmp_path: Path) -> ParityWorld:
    """The first version as `a`, the others under their own names."""
    for name in ("v1", "v2", "v3"):
        shutil.copytree(versions.adapters[name], tmp_path / name)
    shutil.copytree(versions.adapters["v0"], tmp_path / "a")
    return ParityWorld("llama", versions.base, tmp_path, versions.adapters)


@pytest.fixture
def operator(world: ParityWorld) -> Iterator[Operator]:
    operator = Operator(world)
    yield operator
    operator.close()


def replace(world: ParityWorld, version: str) -> None:
    """Put another version in the place of `a`, as one should."""
    root = world.adapters_dir
    shutil.copytree(world.adapters[version], root / ".new")
    (root / "a").rename(root / ".old")
    (root / ".new").rename(root / "a")
    shutil.rmtree(root / ".old")


# -- while ten streams run ------------------------------------------------------------------


def test_unloading_waits_for_the_last_of_ten_streams(world, operator) -> None:
    ids = operator.start_streams("a")
    entry = operator.done("unload", "a")
    assert entry.num_requests == STREAMS
    assert [one.num_requests for one in entry.revisions] == [STREAMS]
    assert operator.in_memory() == 2
    operator.run()
    operator.step()
    assert operator.in_memory() == 0
    assert operator.entry("a").tier == "disk"
    operator.check_streams(ids, world.adapters["v0"])


def test_others_take_the_place_of_an_adapter_only_between_its_streams(world) -> None:
    """Two slots, one of them pinned: the rest take turns in the other."""
    operator = Operator(world, max_resident_adapters=2)
    operator.done("pin", "v3")
    ids = operator.start_streams("a")
    for i, name in enumerate(("v1", "v2", "v3", "v1"), start=100):
        operator.submit(i, [5, 6, 7], name, max_new_tokens=4, ignore_eos=True)
    operator.run()
    operator.check_streams(ids, world.adapters["v0"])
    assert operator.moves("evict", "device") >= 2
    assert operator.entry("v3").tier == "device"
    operator.done("unpin", "v3")
    operator.close()


def test_replacing_changes_new_streams_and_none_of_ten_that_run(world, operator) -> None:
    old = operator.start_streams("a")
    replace(world, "v1")
    new = operator.start_streams("a", first=STREAMS)
    operator.done("unload", "a")
    operator.run()
    first = operator.check_streams(old, world.adapters["v0"])
    second = operator.check_streams(new, world.adapters["v1"])
    assert len(first) == len(second) == 1
    assert first != second
    operator.step()
    assert operator.in_memory() == 0


def test_dropping_a_deleted_adapter_ends_none_of_ten_that_run(world, operator) -> None:
    operator.done("pin", "v1")
    ids = operator.start_streams("a")
    shutil.rmtree(world.adapters_dir / "a")
    assert operator.done("drop", "a").num_requests == STREAMS
    assert operator.in_memory() == 4
    operator.submit(100, [5], "a")
    assert operator.failure(100).startswith("adapter_not_found")
    operator.run()
    operator.step()
    assert operator.in_memory() == 2, "the pinned one alone is left"
    operator.check_streams(ids, world.adapters["v0"])
    operator.done("unpin", "v1")


def test_what_a_step_in_flight_reads_is_not_let_go_of(world, monkeypatch) -> None:
    """The cancelled stream's last row is still being computed when nobody holds its adapter."""
    operator = Operator(world, pipeline_depth=1)
    operator.submit(0, [5, 6], "a", max_new_tokens=60, ignore_eos=True)
    operator.run(until=lambda: len(operator.answers[0].tokens) > 3)
    device, runner = operator.engine._adapters.device, operator.engine._runner
    collect, there = runner.collect, []

    def collecting(ticket: Any) -> Any:
        there.append(len(device))
        return collect(ticket)

    monkeypatch.setattr(runner, "collect", collecting)
    assert operator.engine._in_flight, "a step is on its way"
    operator.cancel(0)
    operator.done("unload", "a")
    operator.run(until=lambda: operator.in_memory() == 0)
    assert there == [1]
    operator.close()


# -- revisions ------------------------------------------------------------------------------


def test_a_replaced_revision_is_served_by_its_digest_while_it_is_in_memory(world, operator) -> None:
    revision = operator.order("load", "a").revision
    replace(world, "v1")
    prompt = list(range(3, 30))
    for i, wanted in enumerate((revision, revision[:6], "")):
        operator.submit(i, prompt, "a", revision=wanted, max_new_tokens=12, ignore_eos=True)
        operator.run()
    old, again, new = (operator.answers[i] for i in range(3))
    assert old.tokens == again.tokens != new.tokens
    assert new.finished.adapter_revision not in ("", revision)
    entry = operator.entry("a")
    assert [one.revision for one in entry.revisions] == [revision, entry.revision]
    assert operator.refused("load", "a", "000000").endswith(f"; in memory are also {revision}")
    operator.done("unload", "a", revision)
    operator.submit(3, prompt, "a", revision=revision)
    assert operator.failure(3).startswith("revision_not_found: adapter 'a' is revision")
    assert operator.refused("load", "a", "000000").startswith("revision_not_found")


def test_a_revision_on_disk_is_found_without_having_been_read(operator) -> None:
    other = operator.order("find", "v1").revision
    operator.done("drop", "v1")
    assert operator.in_memory() == 0
    operator.submit(0, [5], "v1", revision=other[:8], max_new_tokens=2, ignore_eos=True)
    operator.run()
    assert operator.answers[0].finished.adapter_revision == other


def test_a_revision_belongs_to_the_adapter_that_had_it(operator) -> None:
    revision = operator.order("load", "v1").revision
    operator.submit(0, [5], "a", revision=revision)
    assert operator.failure(0).startswith("revision_not_found")


# -- pins -----------------------------------------------------------------------------------


def test_a_pinned_adapter_is_resident_at_once_and_stays(world, operator) -> None:
    num_bytes = operator.done("load", "a").revisions[0].host_bytes
    operator = Operator(world, max_resident_adapters=2, adapter_host_bytes=2 * num_bytes)
    entry = operator.done("pin", "a")
    assert (entry.tier, [one.is_pinned for one in entry.revisions]) == ("device", [True])
    for i in range(12):
        operator.submit(i, [5], f"v{1 + i % 3}", max_new_tokens=1)
        operator.run()
    assert operator.moves("evict", "host") > 0
    assert operator.entry("a").tier == "device"
    assert (operator.reports[-1].pins_host, operator.reports[-1].pins_device) == (1, 1)
    assert operator.refused("unload", "a").startswith("adapter_pinned: adapter 'a' is pinned")
    operator.done("unpin", "a")
    operator.done("unload", "a")
    assert operator.entry("a").tier == "disk"
    operator.close()


def test_a_pin_that_leaves_no_room_is_refused_by_name(world) -> None:
    operator = Operator(world, max_resident_adapters=2)
    operator.done("pin", "a")
    at_hand = operator.order("find", "v2").revision
    operator.submit(0, [5], "v1", max_new_tokens=60, ignore_eos=True)
    operator.run(until=lambda: bool(operator.answers[0].tokens))
    said = operator.refused("pin", "v2", at_hand)
    assert said.startswith("adapter_capacity: adapter 'v2' cannot be pinned")
    assert "--max-resident-adapters" in said
    operator.run()
    operator.done("pin", "v2")
    operator.submit(1, [5], "v1")
    assert "pinned" in operator.failure(1), "it would have waited for ever"
    operator.done("unpin", "a")
    operator.submit(2, [5], "v1", max_new_tokens=2, ignore_eos=True)
    operator.run()
    assert len(operator.answers[2].tokens) == 2
    operator.done("drop", "v2")
    operator.close()


def test_pins_are_bounded_in_bytes_of_either_tier(world) -> None:
    need = Operator(world)
    sizes = need.done("load", "a").revisions[0]
    need.close()
    for option, num_bytes, flag in (
        ("adapter_pool_bytes", sizes.device_bytes * 3 // 2, "--adapter-memory"),
        ("adapter_host_bytes", sizes.host_bytes * 3 // 2, "--adapter-host-memory"),
    ):
        operator = Operator(world, **{option: num_bytes})
        operator.done("pin", "a")
        assert flag in operator.refused("pin", "v1")
        operator.submit(0, [5], "v1")
        said = operator.failure(0)
        assert said.startswith("adapter_capacity: adapter 'v1'")
        assert flag in said
        operator.done("unpin", "a")
        operator.close()


def test_a_pin_follows_its_name_to_new_bytes_unless_it_names_a_revision(world, operator) -> None:
    first = operator.order("pin", "a").revision
    replace(world, "v1")
    second = operator.order("load", "a").revision
    pinned = {one.revision: one.is_pinned for one in operator.entry("a").revisions}
    assert pinned == {first: False, second: True}
    operator.done("pin", "a", first)
    replace(world, "v2")
    operator.submit(0, [5], "a", max_new_tokens=1)
    operator.run()
    third = operator.answers[0].finished.adapter_revision
    pinned = {one.revision: one.is_pinned for one in operator.entry("a").revisions}
    assert pinned == {first: True, second: False, third: True}
    operator.done("unpin", "a", first)
    assert operator.entry("a").revisions[0].is_pinned is False
    operator.done("unpin", "a")
    assert not any(one.is_pinned for one in operator.entry("a").revisions)


def test_pinning_twice_is_pinning_once(operator) -> None:
    operator.done("pin", "a")
    operator.done("pin", "a")
    assert not operator.done("unpin", "a").revisions[0].is_pinned
    operator.done("unpin", "a")


# -- what is told ---------------------------------------------------------------------------


def test_an_entry_tells_what_matched_and_where_its_bytes_are(operator) -> None:
    assert operator.entry("a").idle_seconds is None
    entry = operator.done("load", "a")
    one = entry.revisions[0]
    assert one.matched == (
        Matched("q_proj", 2, (4,)),
        Matched("v_proj", 2, (4,)),
        Matched("down_proj", 2, (4,)),
    )
    assert one.file_bytes > 0 < one.host_bytes <= one.device_bytes
    assert entry.idle_seconds is not None
    assert entry.idle_seconds < 60


def test_an_entry_tells_why_the_last_load_was_refused(world, operator) -> None:
    weights = world.adapters_dir / "v2" / "adapter_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-10])
    assert operator.refused("load", "v2").startswith("adapter_invalid")
    assert "truncated" in operator.entry("v2").refusal
    weights.write_bytes(good)
    operator.done("load", "v2")
    assert operator.entry("v2").refusal == ""


def test_orders_for_what_is_not_there_are_refused(world, operator) -> None:
    for kind in ("find", "load", "pin"):
        assert operator.refused(kind, "nothing").startswith("adapter_not_found")
    bare = Operator(world, adapters_dir="")
    assert "--adapters" in bare.refused("load", "a")
    bare.engine.close()

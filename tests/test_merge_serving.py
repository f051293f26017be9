"""Merges are loaded, shared, replaced and let go of like any adapter, and say what PEFT says."""

import shutil
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from typer.testing import CliRunner

import tiny_models
from adapter_files import BASE, write_adapter
from lory_router.cli import app
from lory_server.adapters import reader as reader_module
from lory_server.adapters.blob import AdapterBlob
from lory_server.adapters.errors import AdapterError
from lory_server.adapters.merge_plan import MergePlan
from lory_server.adapters.outcomes import Resolved
from lory_server.adapters.reader import ThreadReader
from lory_server.adapters.store import SETTLED_NS, AdapterStore
from lory_server.merge_folder import write_folder
from lory_server.messages import AdapterOrder, ListAdapters, Submit
from lory_server.recipes import MergeSource, Recipe, merged_id, read_recipe
from parity_world import Comparison, ParityWorld, Reference, Session, compare
from test_adapter_cache import World
from test_merge import deltas, weighted_sum


def merge_of(*sources: tuple[str, float], **fields: Any) -> str:
    return merged_id(Recipe(sources=tuple(MergeSource(*source) for source in sources), **fields))


AB = merge_of(("a", 0.5), ("b", -1.0))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, name in enumerate("abcd"):
        write_adapter(tmp_path / "adapters" / name, seed=seed)
    time.sleep(1.2 * SETTLED_NS / 1e9)
    return tmp_path / "adapters"


@pytest.fixture
def make(root: Path) -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def build(**options: Any) -> World:
        worlds.append(World(root, options.pop("pool_bytes", 200_000), 16, **options))
        return worlds[-1]

    yield build
    for world in worlds:
        world.cache.close()


class Merging:
    """Counts merges, and holds them back while told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.begun = threading.Event()
        self.may_go = threading.Event()
        self.may_go.set()
        merge = reader_module.merged_blob

        def merged_blob(fds: Sequence[int], plan: MergePlan, dtype: torch.dtype) -> AdapterBlob:
            self.count += 1
            self.begun.set()
            assert self.may_go.wait(20)
            return merge(fds, plan, dtype)

        monkeypatch.setattr(reader_module, "merged_blob", merged_blob)


@pytest.fixture
def merging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Merging]:
    merging = Merging(monkeypatch)
    yield merging
    merging.may_go.set()


def replace_adapter(root: Path, name: str, **changes: Any) -> None:
    """As by a deployment that keeps the old files."""
    write_adapter(root.parent / "new", **changes)
    (root / name).rename(root.parent / f"old-{name}")
    (root.parent / "new").rename(root / name)


# -- in the tiers ---------------------------------------------------------------------------


def test_a_merge_comes_to_the_device_as_its_sum(make: Callable[..., World], root: Path) -> None:
    world = make()
    held = world.hold(AB)
    world.bring(held.revision)
    blob = world.blob(held.revision)
    assert torch.equal(world.factors_on_device(held.revision, blob), blob.data)
    expected = weighted_sum(root, ("a", 0.5), ("b", -1.0))
    for module, delta in deltas(blob).items():
        torch.testing.assert_close(delta, expected[module], rtol=1e-5, atol=1e-5)
    assert world.cache.residency().resident[held.revision].max_rank == 8


def test_two_hundred_first_requests_are_one_merge(
    make: Callable[..., World], merging: Merging
) -> None:
    world = make()
    merging.may_go.clear()
    tickets = [world.ask(AB) for _ in range(200)]
    world.until(merging.begun.is_set)
    merging.may_go.set()
    world.until(lambda: all(ticket in world.answers for ticket in tickets))
    assert merging.count == 1
    assert all(isinstance(world.answers[ticket], Resolved) for ticket in tickets)
    assert world.hold(AB).revision == world.answers[tickets[0]].revision  # type: ignore[union-attr]
    assert merging.count == 1


def test_a_slow_merge_delays_no_adapter(make: Callable[..., World], merging: Merging) -> None:
    world = make(num_loaders=1)
    merging.may_go.clear()
    ticket = world.ask(AB)
    world.until(merging.begun.is_set)
    assert world.hold("c").adapter_id == "c"
    assert world.hold("d").adapter_id == "d"
    assert ticket not in world.answers
    merging.may_go.set()
    world.until(lambda: ticket in world.answers)


def test_a_reader_for_merges_starts_with_the_first_of_them(make: Callable[..., World]) -> None:
    made = Counter[str]()

    class CountedReader(ThreadReader):
        def __init__(self, base: Any, dtype: torch.dtype) -> None:
            super().__init__(base, dtype)
            made["made"] += 1

        def close(self) -> None:
            made["closed"] += 1

    world = make(num_loaders=2, make_reader=CountedReader)
    world.hold("a")
    assert made["made"] == 2
    for name in (AB, merge_of(("a", 1.0))):
        world.hold(name)
        assert made["made"] == 3
    world.cache.close()
    assert made["closed"] == 3


def test_the_start_of_their_reader_is_no_part_of_what_a_merge_costs(
    make: Callable[..., World],
) -> None:
    """The first would be kept through a thousand turnovers of the host for what it did not cost."""

    class LateStarter(ThreadReader):
        def wait_until_ready(self) -> None:
            time.sleep(0.5)

    world = make(make_reader=LateStarter)
    revision = world.hold(AB).revision
    assert world.cache.host.entry(revision).load_seconds < 0.5


def test_equal_merges_share_their_numbers_whatever_they_are_called(
    make: Callable[..., World], merging: Merging
) -> None:
    world = make()
    saved = merge_of(("a", 0.5), ("b", -1.0), name="blend")
    assert world.hold(AB).revision == world.hold(saved).revision
    assert len(world.cache.host) == 1
    assert merging.count == 1


def test_an_evicted_merge_is_made_again_as_it_was(
    make: Callable[..., World], merging: Merging
) -> None:
    world = make()
    revision = world.hold(AB).revision
    before = world.blob(revision).data.clone()
    world.cache.release(revision)
    assert world.cache.let_go(revision)
    again = world.hold(AB)
    assert again.revision == revision
    assert torch.equal(world.blob(revision).data, before)
    assert merging.count == 2


def test_merges_take_their_room_from_the_same_budget(make: Callable[..., World]) -> None:
    world = make()
    world.hold(AB)
    used = world.cache.budget.used_bytes
    assert used == world.blob(world.hold(AB).revision).num_bytes
    world = make(host_bytes=used - 1)
    refused = world.refusal(AB)
    assert refused.code == "adapter_capacity"
    assert refused.message.startswith("adapter 'linear of a, b' takes")
    assert world.cache.budget.used_bytes == 0


# -- sources change -------------------------------------------------------------------------


def test_who_holds_a_merge_keeps_it_and_who_comes_gets_the_new_one(
    make: Callable[..., World], root: Path
) -> None:
    world = make()
    old = world.hold(AB)
    data = world.blob(old.revision).data.clone()
    replace_adapter(root, "b", seed=50)
    new = world.hold(AB)
    assert new.revision != old.revision
    assert torch.equal(world.blob(old.revision).data, data)
    expected = weighted_sum(root, ("a", 0.5), ("b", -1.0))
    for module, delta in deltas(world.blob(new.revision)).items():
        torch.testing.assert_close(delta, expected[module], rtol=1e-5, atol=1e-5)


def test_a_source_replaced_while_it_is_merged_makes_no_mixture(
    make: Callable[..., World], root: Path, merging: Merging
) -> None:
    expected = weighted_sum(root, ("a", 0.5), ("b", -1.0))
    world = make()
    merging.may_go.clear()
    first = world.ask(AB)
    world.until(merging.begun.is_set)
    replace_adapter(root, "b", seed=50)
    merging.may_go.set()
    later = world.hold(AB)
    world.until(lambda: first in world.answers)
    old = world.answers[first]
    assert isinstance(old, Resolved)
    assert old.revision != later.revision
    for module, delta in deltas(world.blob(old.revision)).items():
        torch.testing.assert_close(delta, expected[module], rtol=1e-5, atol=1e-5)


def test_a_source_written_to_while_it_is_merged_is_refused(
    make: Callable[..., World], root: Path, merging: Merging
) -> None:
    world = make()
    merging.may_go.clear()
    ticket = world.ask(AB)
    world.until(merging.begun.is_set)
    with open(root / "b" / "adapter_model.safetensors", "r+b") as file:
        file.seek(-8, 2)
        file.write(bytes(8))
    merging.may_go.set()
    world.until(lambda: ticket in world.answers)
    refused = world.answers[ticket]
    assert not isinstance(refused, Resolved)
    assert "changed while it was read" in refused.message  # type: ignore[union-attr]
    assert world.cache.budget.used_bytes == 0


def test_a_source_that_is_missing_or_refused_is_told(
    make: Callable[..., World], root: Path
) -> None:
    write_adapter(root / "dora", use_dora=True)
    world = make()
    missing = world.refusal(merge_of(("a", 1.0), ("none", 1.0)))
    assert (missing.code, missing.source) == ("adapter_not_found", "none")
    refused = world.refusal(merge_of(("dora", 1.0), ("a", 1.0)))
    assert (refused.code, refused.source) == ("adapter_invalid", "dora")
    assert refused.message.startswith("source 1 ('dora'): ")
    assert world.cache.budget.used_bytes == 0
    shutil.rmtree(root / "b")
    assert world.refusal(AB).source == "b"


@pytest.mark.parametrize("name", ["+", "+x", "+{}", '+{"sources": 3}', "+[]"])
def test_a_name_that_only_begins_as_a_merges_is_not_there(
    make: Callable[..., World], name: str
) -> None:
    """The engine ended."""
    world = make()
    assert world.refusal(name).code == "adapter_not_found"
    assert world.hold("a").adapter_id == "a"


# -- in the engine --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parity(tmp_path_factory: pytest.TempPathFactory) -> ParityWorld:
    return ParityWorld.make("llama", tmp_path_factory.mktemp("llama"))


RECIPES: dict[str, tuple[tuple[tuple[str, float], ...], dict[str, Any], dict[str, Any]]] = {
    "linear": (
        (("all-16", 0.6), ("mlp-3", -0.8), ("attention-33", 0.5), ("qv-1", 2.0)),
        {},
        {"combination_type": "cat"},
    ),
    "ties": (
        (("all-16", 0.9), ("twin-16", 0.7)),
        {"method": "ties", "density": 0.4},
        {"combination_type": "ties", "density": 0.4},
    ),
    "svd": (
        (("all-16", 0.9), ("qv-1", 0.7)),
        {"method": "svd", "rank": 4},
        {"combination_type": "svd", "svd_rank": 4},
    ),
}


def peft_merges(world: ParityWorld) -> Any:
    """A PEFT model that has the merges under their names."""
    from peft import PeftModel

    names = dict.fromkeys(name for sources, _, _ in RECIPES.values() for name, _ in sources)
    model: Any = tiny_models.load_reference(world.base, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index, name in enumerate(names):
            folder, known_as = str(world.adapters_dir / name), name.replace("/", "-")
            if index:
                model.load_adapter(folder, adapter_name=known_as)
            else:
                model = PeftModel.from_pretrained(model, folder, adapter_name=known_as)
        for name, (sources, _, how) in RECIPES.items():
            known_as = [source.replace("/", "-") for source, _ in sources]
            model.add_weighted_adapter(known_as, [weight for _, weight in sources], name, **how)
    return model.eval()


def test_merges_and_their_sources_in_one_batch_say_what_peft_says(parity: ParityWorld) -> None:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    tiny_models.save_adapter(parity.adapters_dir / "twin-16", parity.base, 16, 8, targets, seed=77)
    session = Session(parity.options())
    merges = {merge_of(*sources, **fields): name for name, (sources, fields, _) in RECIPES.items()}
    wanted = [*merges, "", "all-16", "qv-1"] * 2
    for number, name in enumerate(wanted):
        session.submit(number, range(3 + number, 24), name)
    session.run()
    model, comparison = peft_merges(parity), Comparison()
    for number, answer in session.answers.items():
        command = session.prompts[number]
        prompt, name = list(command.prompt_ids), command.adapter_id
        with torch.inference_mode():
            if name:
                model.set_adapter(merges.get(name, name))
                logits = model(torch.tensor([prompt + answer.tokens])).logits[0]
            else:
                with model.disable_adapter():
                    logits = model(torch.tensor([prompt + answer.tokens])).logits[0]
        comparison.add(name, prompt, answer.tokens, logits)
    session.close()
    comparison.check()
    assert len({tuple(answer.tokens) for answer in session.answers.values()}) > 6


def test_a_request_tells_its_merge_and_is_charged_under_its_label(parity: ParityWorld) -> None:
    session = Session(parity.options())
    name = merge_of(("all-16", 0.5), ("qv-1", 0.5))
    session.submit(1, range(3, 20), name)
    command = session.prompts[1]
    session.run()
    finished = session.answers[1].finished
    assert finished is not None
    revision = finished.adapter_revision
    assert len(revision) == 32
    session.engine.submit(_charged_as(command, "blend"))
    session.answers[2] = type(session.answers[1])()
    session.run()
    charged = {charge.adapter_id for report in session.reports for charge in report.charges}
    assert charged == {name, "blend"}
    assert session.answers[2].tokens == session.answers[1].tokens
    session.close()


def _charged_as(command: Submit, label: str) -> Submit:
    return msgspec.structs.replace(command, request_id=2, charged_as=label)


def test_operators_pin_and_unload_a_merge(parity: ParityWorld) -> None:
    session = Session(parity.options())
    engine, name = session.engine, merge_of(("all-16", 0.5), ("qv-1", 0.5), name="blend")

    def order(kind: Any) -> Any:
        engine.obey(AdapterOrder(call_id=1, kind=kind, adapter_id=name))
        return answer()

    def answer() -> Any:
        found: list[Any] = []
        session.run(lambda: bool(found) or found.extend(engine.adapter_answers()) or bool(found))
        return found[0]

    pinned = order("pin").entry
    assert (pinned.tier, pinned.revisions[0].is_pinned) == ("device", True)
    assert order("unload").failure.message == "adapter 'blend' is pinned; unpin it first"
    engine.list_adapters(ListAdapters(call_id=2))
    listed = {entry.adapter_id for entry in answer().adapters}
    assert name in listed
    order("unpin")
    assert order("unload").entry.tier == "disk"
    engine.list_adapters(ListAdapters(call_id=3))
    assert name not in {entry.adapter_id for entry in answer().adapters}
    session.close()


# -- as a folder ----------------------------------------------------------------------------


def test_a_merge_written_to_a_folder_is_what_peft_and_the_server_read(
    parity: ParityWorld, tmp_path: Path
) -> None:
    out = tmp_path / "blend"
    sources = (("all-16", 0.5), ("team/pattern", -0.5), ("mlp-3", 1.0))
    of = [part for name, weight in sources for part in ("--of", f"{name}={weight}")]
    places = ["--model", str(parity.base), "--adapters", str(parity.adapters_dir)]
    made = CliRunner().invoke(app, ["merge", str(out), *of, *places])
    assert made.exit_code == 0
    assert "0.5 x all-16, -0.5 x team/pattern, 1 x mlp-3 by linear" in made.output
    shutil.copytree(out, parity.adapters_dir / "written")
    session = Session(parity.options())
    for number, name in enumerate((merge_of(*sources), "written")):
        session.submit(number, range(3, 24), name)
    session.run()
    answer, written = session.answers[0], session.answers[1]
    adapters = {session.prompts[0].adapter_id: out, "written": out}
    compare(session, Reference(parity.base), adapters).check()
    session.close()
    assert answer.tokens == written.tokens
    for wrong in (["--of", "all-16=x"], ["--of", "all-16=1", "--rank", "4"]):
        told = CliRunner().invoke(app, ["merge", str(tmp_path / "other"), *wrong, *places])
        assert told.exit_code != 0
    assert [path.name for path in tmp_path.iterdir()] == ["blend"]


def test_a_folder_is_written_whole_or_not_at_all(root: Path, tmp_path: Path) -> None:
    store, out = AdapterStore(root), tmp_path / "out" / "blend"
    recipe = read_recipe(AB)
    write_folder(recipe, BASE, store, out)
    with pytest.raises(FileExistsError, match="is there already"):
        write_folder(recipe, BASE, store, out)
    for bad in (merge_of(("a", 1.0), ("none", 1.0)), merge_of(*[("a", 1e38)] * 2)):
        with pytest.raises(AdapterError):
            write_folder(read_recipe(bad), BASE, store, out.with_name("other"))
    assert [path.name for path in out.parent.iterdir()] == ["blend"]
    written = World(out.parent, 200_000, 16)
    held = written.hold("blend")
    expected = weighted_sum(root, ("a", 0.5), ("b", -1.0))
    for module, delta in deltas(written.blob(held.revision)).items():
        torch.testing.assert_close(delta, expected[module], rtol=1e-5, atol=1e-5)
    written.cache.close()

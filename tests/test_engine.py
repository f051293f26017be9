"""The engine's promises around the step: refusals, terminal events, charges, idle time."""

import json
import math
from pathlib import Path

import pytest

import tiny_models
from lory_server.adapters.manner import read_manner
from lory_server.build import EngineError, build
from lory_server.messages import EngineOptions, ListAdapters
from parity_world import ParityWorld, Session


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> ParityWorld:
    folder = tmp_path_factory.mktemp("engine")
    base = tiny_models.build("llama", folder / "base")
    adapters = {
        name: tiny_models.save_adapter(folder / "adapters" / name, base, 4, 8, ["q_proj"], seed)
        for seed, name in enumerate(("first", "second"))
    }
    return ParityWorld("llama", base, folder / "adapters", adapters)


@pytest.fixture
def session(world: ParityWorld):
    session = Session(world.options())
    yield session
    session.close()


def failure(session: Session, request_id: int) -> str:
    session.run()
    finished = session.answers[request_id].finished
    assert finished is not None
    assert finished.reason == "error"
    assert finished.failure is not None
    return f"{finished.failure.code}: {finished.failure.message}"


@pytest.mark.parametrize(
    ("prompt", "fields", "says"),
    [
        ([], {}, "bad_request: the prompt has no tokens"),
        ([1, 200], {}, r"bad_request: token ids must lie in \[0, 200\)"),
        ([1, -1], {}, "bad_request: token ids"),
        ([1], {"logit_bias": ((200, 1.0),)}, "bad_request: logit_bias"),
        ([1] * 120, {"max_new_tokens": 20}, "context_too_long: 120 prompt tokens"),
    ],
)
def test_an_impossible_request_fails_alone_and_at_once(session, prompt, fields, says) -> None:
    session.submit(1, [4, 5], max_new_tokens=3, ignore_eos=True)
    session.submit(2, prompt, **fields)
    session.step()
    assert session.answers[2].finished is not None
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(failure(session, 2))
    assert len(session.answers[1].tokens) == 3


@pytest.mark.parametrize("name", ["missing", "../base", "/etc/passwd", "a/b/c", "first\x00"])
def test_an_unknown_or_hostile_name_is_not_found(session, name: str) -> None:
    session.submit(1, [4, 5], name)
    assert failure(session, 1).startswith("adapter_not_found")


def test_a_queue_has_an_end(world: ParityWorld) -> None:
    session = Session(world.options(max_queued=2))
    for request_id in range(3):
        session.submit(request_id, [4, 5])
    assert failure(session, 2).startswith("overloaded")
    session.close()


def test_a_server_without_adapters_says_so(world: ParityWorld) -> None:
    session = Session(world.options(adapters_dir=""))
    session.submit(1, [4, 5], "first")
    assert "--adapters" in failure(session, 1)
    session.submit(2, [4, 5])
    session.run()
    assert session.answers[2].tokens
    session.close()


def test_a_process_that_reads_adapters_changes_no_answer(world: ParityWorld) -> None:
    answers: list[list[object]] = []
    for reader_processes in (0, 1):
        session = Session(world.options(reader_processes=reader_processes))
        for request_id, name in enumerate(("first", "second", "")):
            session.submit(request_id, [4, 5, 6], name, max_new_tokens=8, ignore_eos=True)
        session.submit(3, [4, 5], "missing")
        assert failure(session, 3).startswith("adapter_not_found")
        session.run()
        answers.append([session.answers[request_id].tokens for request_id in range(3)])
        session.close()
    assert answers[0] == answers[1]
    assert answers[0][0] != answers[0][1] != answers[0][2]


def test_charges_and_idle_time_sum_to_the_time_that_passed(session) -> None:
    for request_id in range(6):
        session.submit(request_id, [3 + request_id] * 20, ["", "first", "second"][request_id % 3])
    session.run()
    for report in session.reports:
        charged = math.fsum(charge.seconds for charge in report.charges)
        assert charged + report.idle_seconds == pytest.approx(report.wall_seconds, abs=1e-9)
    total = math.fsum(report.wall_seconds for report in session.reports)
    charged = math.fsum(a.finished.usage.engine_seconds for a in session.answers.values())
    assert 0 < charged <= total
    assert {c.adapter_id for r in session.reports for c in r.charges} == {"", "first", "second"}


@pytest.mark.parametrize("depth", [0, 1])
def test_a_busy_engine_is_never_idle(world: ParityWorld, depth: int) -> None:
    """Planning and reporting between two steps were booked as idle: a third of the time."""
    session = Session(world.options(), depth)
    for request_id in range(30):
        session.submit(request_id, [3 + request_id] * 10, max_new_tokens=20, ignore_eos=True)
    session.step()
    session.run()
    busy = session.reports[1:-1]
    assert sum(report.idle_seconds for report in busy) == 0.0
    session.close()


def test_usage_counts_prompt_answer_and_reused_tokens(session) -> None:
    prompt = list(range(3, 40))
    for request_id in (1, 2):
        session.submit(request_id, prompt, "first", max_new_tokens=5, ignore_eos=True)
        session.run()
    usages = [session.answers[i].finished.usage for i in (1, 2)]
    assert [(u.prompt_tokens, u.generated_tokens) for u in usages] == [(37, 5), (37, 5)]
    assert [u.cached_tokens for u in usages] == [0, 32]
    assert usages[0].queue_seconds >= usages[0].load_seconds > 0
    assert sum(report.num_sampled for report in session.reports) == 10


def test_the_dearer_adapter_pays_more_for_the_same_step(world: ParityWorld, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    for rank in (1, 64):
        tiny_models.save_adapter(folder / f"r{rank}", world.base, rank, 8, "all-linear", 0)
    session = Session(world.options(adapters_dir=str(folder)))
    for request_id, name in enumerate(("r1", "r64", "r1", "r64")):
        session.submit(request_id, [3 + request_id], name, max_new_tokens=90, ignore_eos=True)
    session.run()
    shared = [report.charges for report in session.reports if len(report.charges) == 4]
    assert shared
    for charges in shared:
        cost = {charge.adapter_id: charge.seconds for charge in charges}
        assert cost["r64"] > 1.2 * cost["r1"]
    session.close()


def test_a_prompt_that_just_fits_the_context_runs_and_one_longer_does_not(session) -> None:
    session.submit(1, [4] * 118, max_new_tokens=10, ignore_eos=True)
    session.submit(2, [4] * 119, max_new_tokens=10, ignore_eos=True)
    session.run()
    assert len(session.answers[1].tokens) == 10
    assert session.answers[2].finished.failure.code == "context_too_long"


def test_tenants_never_share_kv(session) -> None:
    prompt = list(range(3, 40))
    for request_id, tenant in enumerate(("one", "one", "two")):
        session.submit(request_id, prompt, tenant=tenant)
        session.run()
    cached = [session.answers[i].finished.usage.cached_tokens for i in range(3)]
    assert cached == [0, 32, 0]


def test_cancelling_lets_go_of_an_adapter_at_every_stage(session) -> None:
    for request_id, num_steps in enumerate((0, 1, 2, 5, 50)):
        session.submit(request_id, [4, 5], "first", max_new_tokens=60, ignore_eos=True)
        for _ in range(num_steps):
            session.step()
        session.cancel(request_id)
    session.run()
    reasons = {answer.finished.reason for answer in session.answers.values()}
    assert "cancelled" in reasons


def test_cancelling_a_request_whose_adapter_is_loading_leaves_nothing(session) -> None:
    session.submit(1, [4, 5], "first")
    session.cancel(1)
    session.submit(2, [4, 5], "first")
    session.run()
    assert session.answers[1].finished.reason == "cancelled"
    assert session.answers[2].finished.reason in ("eos", "length")
    session.engine.check()


def test_a_stop_token_ends_the_answer_and_is_part_of_it(session) -> None:
    session.submit(1, [4, 5], max_new_tokens=8, ignore_eos=True)
    session.run()
    free = session.answers[1].tokens
    session.submit(2, [4, 5], max_new_tokens=8, ignore_eos=True, stop_token_ids=(free[2],))
    session.run()
    assert session.answers[2].tokens == free[: free.index(free[2]) + 1]
    assert session.answers[2].finished.reason == "stop_token"


def test_adapters_are_listed_with_their_tier(session) -> None:
    session.submit(1, [4, 5], "first")
    session.run()
    session.engine.list_adapters(ListAdapters(call_id=7))
    lists: list = []

    def listed() -> bool:
        lists.extend(session.engine.adapter_answers())
        return bool(lists)

    session.run(until=listed)
    assert lists[0].call_id == 7
    tiers = {entry.adapter_id: entry.tier for entry in lists[0].adapters}
    assert tiers == {"first": "device", "second": "disk"}


def test_a_damaged_adapter_fails_its_request_by_name(world: ParityWorld, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    tiny_models.save_adapter(folder / "good", world.base, 4, 8, ["q_proj"], 0)
    tiny_models.save_adapter(folder / "bad", world.base, 4, 8, ["q_proj"], 0)
    weights = folder / "bad" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    session = Session(world.options(adapters_dir=str(folder)))
    session.submit(1, [4, 5], "bad")
    session.submit(2, [4, 5], "good")
    assert failure(session, 1).startswith("adapter_invalid")
    assert session.answers[2].tokens
    session.close()


def test_replacing_an_adapter_changes_new_requests_and_no_running_one(
    world: ParityWorld, tmp_path: Path
) -> None:
    folder = tmp_path / "adapters"
    prompt = list(range(3, 30))
    tiny_models.save_adapter(folder / "a", world.base, 4, 8, ["q_proj", "v_proj"], 0)
    session = Session(world.options(adapters_dir=str(folder)))
    session.submit(1, prompt, "a", max_new_tokens=40, ignore_eos=True)
    session.run(until=lambda: len(session.answers[1].tokens) > 5)
    tiny_models.save_adapter(folder / "a", world.base, 4, 8, ["q_proj", "v_proj"], 1)
    session.submit(2, prompt, "a", max_new_tokens=40, ignore_eos=True)
    session.run()
    tiny_models.save_adapter(folder / "a", world.base, 4, 8, ["q_proj", "v_proj"], 0)
    session.submit(3, prompt, "a", max_new_tokens=40, ignore_eos=True)
    session.run()
    old, new, back = (session.answers[i] for i in (1, 2, 3))
    assert old.tokens == back.tokens != new.tokens
    assert old.finished.adapter_revision == back.finished.adapter_revision
    assert new.finished.usage.cached_tokens == 0, "KV of the old revision was reused"
    session.close()


def write_manifest(folder: Path, template: str) -> str:
    """The manner's digest."""
    raw = json.dumps({"manifest_version": 1, "template": template}).encode()
    (folder / "adapter_manifest.json").write_bytes(raw)
    return read_manner(raw).digest


def test_a_request_made_by_the_manner_of_another_revision_fails_and_holds_nothing(
    world: ParityWorld, tmp_path: Path
) -> None:
    """The very bytes under another template are another revision, too."""
    folder = tmp_path / "adapters"
    tiny_models.save_adapter(folder / "a", world.base, 4, 8, ["q_proj", "v_proj"], 0)
    session = Session(world.options(adapters_dir=str(folder)))
    session.submit(1, [3, 4, 5], "a")
    session.run()
    digest = write_manifest(folder / "a", "{text} ->")
    session.submit(2, [3, 4, 5], "a")
    session.submit(3, [3, 4, 5], "a", manner=digest)
    session.run()
    assert failure(session, 2).startswith("manner_changed")
    first, third = session.answers[1], session.answers[3]
    assert third.tokens == first.tokens
    assert third.finished.adapter_revision != first.finished.adapter_revision
    write_manifest(folder / "a", "{text}->")
    session.submit(4, [3, 4, 5], "a", manner=digest)
    session.run()
    assert failure(session, 4).startswith("manner_changed")
    assert not any(entry.holds for entry in session.engine._adapters.host._entries.values())
    session.close()


def test_an_adapter_with_a_hostile_manifest_fails_alone_by_name(
    world: ParityWorld, tmp_path: Path
) -> None:
    folder = tmp_path / "adapters"
    for name in ("good", "bad"):
        tiny_models.save_adapter(folder / name, world.base, 4, 8, ["q_proj"], 0)
    (folder / "bad" / "adapter_manifest.json").write_text(
        '{"manifest_version": 1, "template": "{text.__class__}"}'
    )
    session = Session(world.options(adapters_dir=str(folder)))
    session.submit(1, [4, 5], "bad")
    session.submit(2, [4, 5], "good")
    session.run()
    assert "adapter_manifest.json: template" in failure(session, 1)
    assert session.answers[2].tokens
    session.close()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "/nowhere"}, "no such folder"),
        ({"device": "cuda"}, "--device cpu"),
        ({"kv_bytes": 100}, "--kv-memory"),
        ({"max_model_len": 4096}, "--max-model-len 4096"),
        ({"max_model_len": 100, "kv_bytes": 12 * 4096}, "--max-model-len 100"),
        ({"max_batch_rows": 64, "max_step_tokens": 32}, "--max-step-tokens"),
        ({"block_size": 0}, "--block-size must be at least 1"),
    ],
)
def test_what_cannot_be_built_says_why(world: ParityWorld, changes, says: str) -> None:
    options = world.options(**changes)
    with pytest.raises(EngineError, match=says):
        build(options, lambda: None)


def test_defaults_fit_a_laptop(world: ParityWorld) -> None:
    engine, info = build(EngineOptions(model=str(world.base), device="cpu"), lambda: None)
    assert info.max_model_len == 128
    assert info.dtype == "float32"
    assert dict(info.memory_table)["adapter pool"] == 0
    engine.close()

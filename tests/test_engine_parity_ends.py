"""Embeddings, heads and norms of adapters' own, beside all other kinds in one running batch: every
answer equals PEFT's."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lory_server.adapters.base_copies import WholeEnds
from lory_server.adapters.ends import Ends
from lory_server.adapters.full_weights import FullWeights
from lory_server.model import runner as runner_module
from lory_server.model.ends import StepEnds, step_ends
from parity_world import SPLIT, ParityWorld, Reference, Session, compare, save_adapters
from test_engine_parity import nf4_reference, run, submit_all

Recipes = dict[str, dict[str, Any]]


def recipe(targets: Any, rank: int = 4, **fields: Any) -> dict[str, Any]:
    return {"rank": rank, "alpha": 8, "target_modules": targets, **fields}


def ends_of(is_tied: bool) -> Recipes:
    """LoRA, whole weights and token rows; at the embedding, the head, both."""
    q, dora = ["q_proj"], {"use_dora": True}
    some, others = list(range(199, 2, -4)), list(range(4, 200, 5))
    recipes: Recipes = {
        "plain-8": recipe(SPLIT["all"], 8),
        "dora-8": recipe(SPLIT["all"], 8, **dora),
        "head-lora": recipe([*q, "lm_head"]),
        "head-alone": recipe(["lm_head"], 9, use_rslora=True),
        "head-dora": recipe(["v_proj", "lm_head"], **dora),
        "embed-lora": recipe([*q, "embed_tokens"], rank_pattern={"embed_tokens": 9}),
        "embed-dora": recipe(["o_proj", "embed_tokens"], **dora),
        "both-lora": recipe(["embed_tokens", "lm_head"], dtype=torch.bfloat16),
        "head": recipe(q, modules_to_save=["lm_head"]),
        "embed": recipe(q, modules_to_save=["embed_tokens"]),
        "both": recipe(q, modules_to_save=["embed_tokens", "lm_head"]),
        "head-and-lora": recipe([*q, "embed_tokens"], modules_to_save=["lm_head"]),
        "all-norms": recipe(q, modules_to_save=["norm"]),
        "last-norm": recipe(q, modules_to_save=["model.norm"]),
        "norms-and-head": recipe(q, modules_to_save=["input_layernorm", "lm_head"]),
        "tokens": recipe(q, trainable_token_indices=some),
        "head-tokens": recipe(q, trainable_token_indices={"lm_head": some}),
        "both-tokens": recipe(q, trainable_token_indices={"embed_tokens": some, "lm_head": others}),
        "tokens-and-head-lora": recipe([*q, "lm_head"], trainable_token_indices=some),
        "same-tokens": recipe(q, trainable_token_indices={"embed_tokens": some, "lm_head": some}),
    }
    if is_tied:
        tie = {"ensure_weight_tying": True}
        recipes |= {
            "tied-lora": recipe([*q, "embed_tokens"], rank_pattern={"embed_tokens": 9}, **tie),
            "tied-head-lora": recipe([*q, "lm_head"], **tie),
            "tied-embed": recipe(q, modules_to_save=["embed_tokens"], **tie),
            "tied-head": recipe(q, modules_to_save=["lm_head"], **tie),
        }
    return recipes


def untied_ends(family: str, base: Path, folder: Path) -> dict[str, Path]:
    return save_adapters(ends_of(is_tied=False), base, folder)


def tied_ends(family: str, base: Path, folder: Path) -> dict[str, Path]:
    return save_adapters(ends_of(is_tied=True), base, folder)


@pytest.fixture(
    scope="module",
    params=[("llama", False), ("gemma2", True), ("qwen3", True)],
    ids=["llama-untied", "gemma2-tied", "qwen3-tied"],
)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ParityWorld:
    """Gemma scales embeddings and caps logits, its norms are less one and there are more of them;
    Qwen3 norms queries and keys."""
    family, is_tied = request.param
    make = tied_ends if is_tied else untied_ends
    folder = tmp_path_factory.mktemp(family)
    return ParityWorld.make(family, folder, make, tie_word_embeddings=is_tied)


def test_float32(world: ParityWorld) -> None:
    session = run(world)
    compare(session, Reference(world.base), world.adapters).check()
    assert sum(report.prefix_hits for report in session.reports) > 0


def test_the_comparison_catches_a_swapped_adapter(world: ParityWorld) -> None:
    """A small tied head mostly repeats its input, whatever the adapter: there scores tell more."""
    if world.family == "gemma2":
        pytest.skip("the test of scores swaps adapters too")
    session, names = run(world), list(world.adapters)
    swapped = dict(zip(names, [world.adapters[n] for n in names[1:] + names[:1]], strict=True))
    comparison = compare(session, Reference(world.base), swapped)
    assert {text.split(":")[0] for text in comparison.wrong} == set(names)


def test_every_score_of_a_prompt_equals_peft_s_and_no_other_adapter_s(world: ParityWorld) -> None:
    session = Session(world.options(max_step_tokens=64))
    names = score_all(session, world)
    expected = expected_scores(Reference(world.base), world, names)
    for request_id, name in enumerate(names):
        actual = torch.tensor(session.answers[request_id].prompt_logprobs)
        others = (expected[other] for other in names if other != name)
        nearest = min((actual - other).abs().mean() for other in others)
        error = (actual - expected[name]).abs().max()
        assert error < 2e-3 < 10 * 2e-3 < nearest, (name, error, nearest)


def test_nf4(world: ParityWorld) -> None:
    session = run(world, quantize="nf4")
    compare(session, Reference(world.base, nf4_reference), world.adapters).check()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ParityWorld:
    return ParityWorld.make("llama", tmp_path_factory.mktemp("llama"), untied_ends)


PROMPT = [3, 150, 7, 60, 90, 11, 5, 199, 20, 3, 150, 7, *range(30, 60)]


def score_all(session: Session, world: ParityWorld) -> list[str]:
    """The base's and every adapter's scores of one prompt."""
    names = ["", *world.adapters]
    for request_id, name in enumerate(names):
        session.submit(request_id, PROMPT, name, prompt_logprobs=True, max_new_tokens=0)
    session.run()
    session.close()
    return names


def expected_scores(
    reference: Reference, world: ParityWorld, names: list[str]
) -> dict[str, torch.Tensor]:
    def scores(name: str) -> torch.Tensor:
        logits = reference.logits(PROMPT, world.adapters.get(name))
        return torch.log_softmax(logits, -1)[range(len(PROMPT) - 1), PROMPT[1:]]

    return {name: scores(name) for name in names}


def test_bfloat16_is_within_its_rounding_of_peft(llama: ParityWorld) -> None:
    """And a wrong adapter, or the base alone, is far from it."""
    session = Session(llama.options(dtype="bfloat16"))
    names = score_all(session, llama)
    expected = expected_scores(Reference(llama.base), llama, names)
    for request_id, name in enumerate(names):
        actual = torch.tensor(session.answers[request_id].prompt_logprobs)
        error = (actual - expected[name]).abs().mean()
        nearest = min((actual - expected[other]).abs().mean() for other in names if other != name)
        assert error < 0.2 < 2 * 0.2 < nearest, (name, error, nearest)


def test_answers_stay_after_eviction_from_the_device_and_the_host(llama: ParityWorld) -> None:
    session = Session(llama.options(max_resident_adapters=3, adapter_host_bytes=600 << 10))
    for seed in range(2):
        submit_all(session, llama, seed, rounds=1)
        session.run()
    session.close()
    assert session.moves("evict", "device") > 0
    assert session.moves("evict", "host") > 0
    compare(session, Reference(llama.base), llama.adapters).check()


def test_a_budget_for_one_pair_of_ends_makes_adapters_take_turns(llama: ParityWorld) -> None:
    """Nobody waits for ever, though small adapters keep the pool and pairs do not fit together."""
    session = Session(llama.options(full_weight_bytes=2 * 56 << 10))
    submit_all(session, llama, rounds=2)
    session.run()
    session.close()
    assert session.moves("evict", "device") > 0
    compare(session, Reference(llama.base), llama.adapters).check()


def test_a_step_reads_a_few_heads_at_most(
    llama: ParityWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of further heads wait for their turn, and get what they would have got."""
    most: list[int] = []

    def seen(*args: Any) -> StepEnds | None:
        ends = step_ends(*args)
        heads = {id(run.ends.head_VH) for run in ends.head if run.ends} if ends else set()
        most.append(len(heads))
        return ends

    monkeypatch.setattr(runner_module, "step_ends", seen)
    session = Session(llama.options())
    session.engine._scheduler._heads._limit = 1
    owners = ["head", "both", "norms-and-head", "head-and-lora", "plain-8"]
    for request_id, name in enumerate(owners * 3):
        session.submit(request_id, [5, 6, 7 + request_id], name, ignore_eos=True)
    session.run()
    session.close()
    assert max(most) == 1
    compare(session, Reference(llama.base), llama.adapters).check()


def test_ends_that_are_larger_than_their_budget_are_refused_by_name(llama: ParityWorld) -> None:
    """But not those of which the file only repeats the base's."""
    session = Session(llama.options(full_weight_bytes=20 << 10))
    for request_id, name in enumerate(("head", "both-lora", "head-dora", "embed-lora", "tokens")):
        session.submit(request_id, [5, 6], name)
    session.run()
    session.close()
    finished = [answer.finished for answer in session.answers.values()]
    failures = [one.failure for one in finished if one and one.failure]
    assert [one.code for one in failures] == ["adapter_capacity"]
    assert "lm_head" in failures[0].message
    assert "--full-weights-memory" in failures[0].message
    compare(session, Reference(llama.base), llama.adapters, may_fail=True).check()


def test_what_repeats_the_base_s_weights_is_not_kept(
    llama: ParityWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[int] = []
    without = WholeEnds.without_copies

    def counted(*args: Any) -> Any:
        smaller = without(*args)
        dropped.append(len(args[1].manifest.full) - len(smaller.manifest.full))
        return smaller

    monkeypatch.setattr(WholeEnds, "without_copies", counted)
    session = Session(llama.options())
    session.submit(0, [5, 6], "both-lora")
    session.run()
    assert dropped == [2]
    adapters = session.engine._adapters
    assert adapters.device.pool.full.extents.used_bytes == 0
    [entry] = adapters.host._entries.values()
    assert adapters.budget.used_bytes == entry.blob.num_bytes == entry.blob.pool_numel * 4
    session.close()


@pytest.mark.parametrize("left_out", ["embedding", "head", "norms"])
def test_the_comparison_catches_what_is_left_out(
    left_out: str, llama: ParityWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = FullWeights.publish
    fields: dict[str, dict[str, Any]] = {
        "embedding": {"embedding_VH": None, "embedding_rows": None, "lookup": None},
        "head": {"head_VH": None, "head_rows": None, "adapts_head": False},
        "norms": {"norms": {}},
    }

    def without(full: FullWeights, slot: int, ends: Ends | None) -> None:
        publish(full, slot, ends and Ends(**(_fields(ends) | fields[left_out])))

    monkeypatch.setattr(FullWeights, "publish", without)
    wrong = compare(run(llama), Reference(llama.base), llama.adapters).wrong
    expected = {
        "embedding": {name for name in llama.adapters if has_embedding(name)},
        "head": {name for name in llama.adapters if "head" in name or "both" in name}
        | {"same-tokens"},
        "norms": {name for name in llama.adapters if "norm" in name},
    }[left_out]
    assert {text.split(":")[0] for text in wrong} == expected


def has_embedding(name: str) -> bool:
    return any(part in name for part in ("embed", "both", "and-lora")) or name in (
        "tokens",
        "same-tokens",
        "tokens-and-head-lora",
    )


def _fields(ends: Ends) -> dict[str, Any]:
    return {name: getattr(ends, name) for name in Ends.__dataclass_fields__}


def test_steps_without_such_rows_are_the_same_steps(
    llama: ParityWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters with ends lie on the device meanwhile."""
    carried: list[bool] = []

    def seen(*args: Any) -> StepEnds | None:
        ends = step_ends(*args)
        carried.append(ends is not None)
        return ends

    monkeypatch.setattr(runner_module, "step_ends", seen)
    session = Session(llama.options())
    for request_id, (name, carries) in enumerate((("both", True), ("plain-8", False), ("", False))):
        carried.clear()
        session.submit(request_id, [5, 6], name)
        session.run()
        assert set(carried) == {carries}
    session.close()


@pytest.mark.parametrize("depth", [0, 1])
def test_after_a_storm_every_byte_is_back(llama: ParityWorld, depth: int) -> None:
    """Cancellations, few blocks, a budget for two heads: what is told is right, nothing is lost."""
    options = llama.options(kv_bytes=40 * 4096, full_weight_bytes=2 * 56 << 10)
    session = Session(options, depth)
    rng = random.Random(depth)
    submit_all(session, llama, depth, rounds=3)
    while not session.is_done:
        for request_id in session.answers:
            if rng.random() < 0.02:
                session.cancel(request_id)
        for _ in range(3):
            session.step()
    compare(session, Reference(llama.base), llama.adapters).check()
    adapters = session.engine._adapters
    session.run(until=lambda: not adapters._loads)  # nobody waits for those any more
    session.close()
    for revision in list(adapters.host._entries):
        assert adapters.let_go(revision)
    for revision in list(adapters.device._resident):
        assert adapters.let_go(revision)
    full = adapters.device.pool.full
    assert (adapters.budget.used_bytes, adapters.device.used_bytes) == (0, 0)
    assert full.extents.free_bytes == full.total_bytes > 0
    assert not full.by_slot


def test_factors_on_the_embedding_are_charged_as_a_gather(llama: ParityWorld) -> None:
    """A token takes one column of A [9, 200], and its product with B [64, 9]. Beside an adapter
    that has the same but for them."""
    session = Session(llama.options())
    params = session.engine._cost_model.base_params
    for shares in charges_of_two(session, "embed-lora", "embed"):
        extra = shares["embed-lora"] / shares["embed"] - 1
        assert 0.5 < extra / (9 * (1 + 64) / params) < 1.001


def find_at_once(session: Session, num_adapters: int) -> None:
    """The engine hears of so many adapters in one step, however long each was looked for."""
    adapters: Any = session.engine._adapters
    poll, found = adapters.poll, []

    def poll_all() -> list[Any]:
        found.extend(poll())
        if len(found) < num_adapters:
            return []
        told = found.copy()
        found.clear()
        return told

    adapters.poll = poll_all


def charges_of_two(session: Session, *names: str) -> list[dict[str, float]]:
    """In the steps in which both made a token, and read no prompt; they are in step, for both have
    been loaded before, and are found at once."""
    find_at_once(session, len(names))
    for first_id, num_tokens in ((0, 1), (2, 8)):
        session.reports.clear()
        for request_id, name in enumerate(names, first_id):
            fields = {"max_new_tokens": num_tokens, "ignore_eos": True}
            session.submit(request_id, PROMPT, name, **fields)
        session.run()
    session.close()
    together = [
        {charge.adapter_id: charge.seconds for charge in report.charges}
        for report in session.reports
        if sum(charge.generated_tokens for charge in report.charges) == 2
        and not any(charge.prompt_tokens for charge in report.charges)
    ]
    assert together
    return together


def test_a_head_of_its_own_is_charged_to_who_uses_it(llama: ParityWorld) -> None:
    """Beside an adapter of the same factors that has the base's head."""
    together = charges_of_two(Session(llama.options()), "head", "embed")
    assert all(seconds["head"] > 1.05 * seconds["embed"] for seconds in together)

"""Adapters that act from their invocation tokens on, in a batch with others: as PEFT generates.

The reference is told where PEFT found the invocation in the prompt, as its `generate` does for all
the steps of an answer; one test has it generate.
"""

import random
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from lory_server import engine as engine_module
from parity_world import (
    FUSED,
    SPLIT,
    Comparison,
    ParityWorld,
    Reference,
    Session,
    save_adapters,
)
from test_engine_parity import BASE, nf4_reference

BLOCK = 8
INVOCATIONS: dict[str, list[int]] = {
    "alora-8": [7, 8, 9],
    "alora-16": [11],
    "alora-pattern": [7, 8],
    "alora-bias": [12, 12],
}


def make_adapters(family: str, base: Path, folder: Path) -> dict[str, Path]:
    targets = FUSED if family == "phi3" else SPLIT
    recipes: dict[str, dict[str, Any]] = {
        "alora-8": {"rank": 8, "alpha": 16, "target_modules": targets["all"]},
        "alora-16": {
            "rank": 16,
            "alpha": 8,
            "target_modules": targets["attention"],
            "use_rslora": True,
            "dtype": torch.bfloat16,
        },
        "alora-pattern": {
            "rank": 4,
            "alpha": 8,
            "target_modules": "all-linear",
            "rank_pattern": {"o_proj": 33, "down_proj": 2},
        },
        "alora-bias": {
            "rank": 3,
            "alpha": 6,
            "target_modules": targets["qv"],
            "lora_bias": True,
        },
        "plain-8": {"rank": 8, "alpha": 16, "target_modules": targets["all"]},
        "dora-8": {"rank": 8, "alpha": 16, "target_modules": targets["mlp"], "use_dora": True},
    }
    for name, tokens in INVOCATIONS.items():
        recipes[name]["alora_invocation_tokens"] = tokens
    return save_adapters(recipes, base, folder)


@pytest.fixture(scope="module", params=["mistral", "phi3"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ParityWorld:
    """Windows of eight tokens; packed projections."""
    return ParityWorld.make(request.param, tmp_path_factory.mktemp(request.param), make_adapters)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ParityWorld:
    return ParityWorld.make("llama", tmp_path_factory.mktemp("llama"), make_adapters)


class InvokedReference(Reference):
    @torch.inference_mode()
    def answer_logits(
        self, prompt: list[int], answer: list[int], adapter: Path | None
    ) -> torch.Tensor:
        """Of prompt and answer; the invocation is looked for in the prompt alone."""
        from peft.tuners.lora.variants import calculate_alora_offsets

        tokens, model = prompt + answer, self._model(adapter)
        config = getattr(model, "peft_config", {}).get("default")
        if config is None or not config.alora_invocation_tokens:
            return self.logits(tokens, adapter)
        (offset,) = calculate_alora_offsets(model.peft_config, "default", torch.tensor([prompt]))
        offsets = [None if offset is None else offset + len(answer)]
        return model(torch.tensor([tokens]), alora_offsets=offsets).logits[0].float()


def compare(session: Session, world: ParityWorld, reference: InvokedReference) -> Comparison:
    comparison = Comparison()
    for request_id, answer in session.answers.items():
        command = session.prompts[request_id]
        prompt, adapter = list(command.prompt_ids), world.adapters.get(command.adapter_id)
        logits = reference.answer_logits(prompt, answer.tokens, adapter)
        comparison.add(command.adapter_id or "base", prompt, answer.tokens, logits)
    return comparison


def filler(rng: random.Random, length: int) -> list[int]:
    """Tokens of which no invocation is made."""
    return [rng.randrange(20, tiny_models.VOCAB_SIZE) for _ in range(length)]


def prompts_for(invocation: list[int], rng: random.Random) -> dict[str, list[int]]:
    """By where the invocation stands."""
    shared = filler(random.Random(1), 60)
    return {
        "nowhere": shared[:30],
        "alone": list(invocation),
        "at the beginning": invocation + filler(rng, 10),
        "at the end": shared[:21] + invocation,
        "at a block's border": shared[: 2 * BLOCK] + invocation + filler(rng, 5),
        "over a block's border": shared[: 2 * BLOCK - 1] + invocation + filler(rng, 9),
        "over a chunk's border": shared[:39] + invocation + filler(rng, 20),
        "twice": shared[:9] + invocation + filler(rng, 6) + invocation + filler(rng, 3),
        "twice in a block": shared[:17] + invocation + invocation + filler(rng, 2),
        "begun at the end": shared[:12] + invocation + filler(rng, 2) + invocation[:-1],
    }


def submit_all(session: Session, world: ParityWorld, **fields: Any) -> None:
    """Every place of every invocation, among plain adapters and the base, while others run."""
    rng = random.Random(5)
    asked: list[tuple[str, list[int]]] = []
    for name, invocation in INVOCATIONS.items():
        for prompt in prompts_for(invocation, rng).values():
            asked.append((name, prompt))
            asked.append((rng.choice([BASE, "plain-8", "dora-8"]), prompt))
    rng.shuffle(asked)
    for request_id, (name, prompt) in enumerate(asked, len(session.answers)):
        session.submit(request_id, prompt, name, max_new_tokens=rng.randint(1, 14), **fields)
        session.step()


def run(world: ParityWorld, pipeline_depth: int = 0, **changes: Any) -> Session:
    session = Session(world.options(**changes), pipeline_depth)
    for request_id, name in enumerate(world.adapters):
        session.submit(request_id, [5], name, max_new_tokens=1)
    session.run()
    submit_all(session, world, ignore_eos=True)
    session.run()
    session.close()
    return session


def test_float32(world: ParityWorld) -> None:
    session = run(world)
    compare(session, world, InvokedReference(world.base)).check()
    assert sum(report.prefix_hits for report in session.reports) > 0


def test_nf4(llama: ParityWorld) -> None:
    session = run(llama, quantize="nf4")
    compare(session, llama, InvokedReference(llama.base, nf4_reference)).check()


PREEMPTIONS = {"kv_bytes": 16 * 4096, "max_step_tokens": 13}
ONE_ROW = {"max_batch_rows": 1, "max_step_tokens": 7}


@pytest.mark.parametrize(
    ("changes", "depth"),
    [
        (PREEMPTIONS, 1),
        ({"max_resident_adapters": 1}, 0),
        ({"prefix_caching": False}, 1),
        pytest.param(PREEMPTIONS, 0, marks=pytest.mark.full),
        pytest.param({"max_resident_adapters": 1}, 1, marks=pytest.mark.full),
        pytest.param(ONE_ROW, 0, marks=pytest.mark.full),
        pytest.param(ONE_ROW, 1, marks=pytest.mark.full),
    ],
)
def test_preemption_eviction_and_chunks_change_no_token(
    llama: ParityWorld, changes: Any, depth: int
) -> None:
    session = run(llama, depth, **changes)
    if "kv_bytes" in changes:
        assert session.preemptions > 0
    if "max_resident_adapters" in changes:
        assert session.moves("evict", "device") > 0
    compare(session, llama, InvokedReference(llama.base)).check()


def test_generate_of_peft_gives_the_same_answers(llama: ParityWorld) -> None:
    session, rng = Session(llama.options()), random.Random(7)
    for name in ("alora-8", "alora-bias"):
        for prompt in prompts_for(INVOCATIONS[name], rng).values():
            session.submit(len(session.answers), prompt, name, max_new_tokens=6, ignore_eos=True)
    session.run()
    session.close()
    reference = Reference(llama.base)
    for request_id, answer in session.answers.items():
        name, prompt = (
            session.prompts[request_id].adapter_id,
            session.prompts[request_id].prompt_ids,
        )
        generated = generate(reference._model(llama.adapters[name]), prompt, 6)
        assert answer.tokens == generated.sequences[0, len(prompt) :].tolist(), name


def test_an_invocation_in_the_answer_does_not_count(llama: ParityWorld) -> None:
    """A bias has the answer be nothing but invocations; how likely they were is told without it."""
    session, reference = Session(llama.options()), InvokedReference(llama.base)
    prompt, adapter = [30, 31, 32], llama.adapters["alora-16"]
    session.submit(0, prompt, "alora-16", max_new_tokens=6, logit_bias=((11, 50.0),))
    session.run()
    session.close()
    answer = session.answers[0]
    assert answer.tokens == [11] * 6
    generated = generate(reference._model(adapter), prompt, 6, sequence_bias={(11,): 50.0})
    expected = [logits[0].log_softmax(-1)[11].item() for logits in generated.logits]
    assert answer.logprobs == pytest.approx(expected, abs=1e-4)
    with torch.inference_mode():
        tokens = torch.tensor([prompt + answer.tokens])
        invoked = reference._model(adapter)(tokens, alora_offsets=[6]).logits[0]
    counted = invoked.log_softmax(-1)[len(prompt) - 1 : -1, 11].tolist()
    assert answer.logprobs[0] == pytest.approx(counted[0], abs=1e-4)
    assert answer.logprobs[1:] != pytest.approx(counted[1:], abs=0.1)


def generate(model: Any, prompt: Iterable[int], num_tokens: int, **fields: Any) -> Any:
    ids = torch.tensor([list(prompt)])
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=[],
        return_dict_in_generate=True,
        output_logits=True,
        **fields,
    )


def ask(session: Session, prompt: list[int], name: str, tenant: str = "default") -> int:
    """How much of the prompt had been computed before."""
    request_id = len(session.answers)
    session.submit(request_id, prompt, name, tenant=tenant, max_new_tokens=9, ignore_eos=True)
    session.run()
    finished = session.answers[request_id].finished
    assert finished is not None
    assert finished.reason == "length", finished
    return finished.usage.cached_tokens


def test_the_prefix_is_shared_between_the_base_and_all_of_them(llama: ParityWorld) -> None:
    session, rng = Session(llama.options()), random.Random(2)
    document = filler(rng, 43)
    first, second = [*document, 7, 8, 9], [*document, 11, 30]
    assert ask(session, document, BASE) == 0
    assert ask(session, first, "alora-8") == 40
    assert ask(session, second, "alora-16") == 40
    assert ask(session, first, "plain-8") == 0
    assert ask(session, first, "alora-8", tenant="other") == 0
    assert ask(session, first, BASE, tenant="other") == 40
    other = filler(rng, 30)
    assert ask(session, [*other, 7, 8, 9, 40, 41], "alora-8") == 0
    assert ask(session, [*other, 50, 51, 52], BASE) == 24
    assert ask(session, [*other, 11, 60, 61], "alora-16") == 24
    session.close()
    compare(session, llama, InvokedReference(llama.base)).check()


def test_what_the_base_computed_after_an_invocation_is_not_taken_for_the_adapters(
    llama: ParityWorld,
) -> None:
    session, rng = Session(llama.options()), random.Random(3)
    prompt = [*filler(rng, 20), 7, 8, 9, *filler(rng, 30)]
    assert ask(session, prompt, BASE) == 0
    assert ask(session, prompt, "alora-8") == 16
    assert ask(session, prompt, "alora-8") == 48
    assert ask(session, prompt, BASE) == 48
    assert ask(session, prompt, "alora-pattern") == 16  # [7, 8] stands in it, too
    session.close()
    compare(session, llama, InvokedReference(llama.base)).check()


def test_two_turns_of_a_chat(llama: ParityWorld) -> None:
    """In the second turn the first answer is before the invocation, and computed by the base."""
    session, rng = Session(llama.options()), random.Random(4)
    turn = [*filler(rng, 21), 7, 8, 9]
    assert ask(session, turn, "alora-8") == 0
    turn += session.answers[0].tokens + filler(rng, 14) + [7, 8, 9]
    assert ask(session, turn, "alora-8") == 16
    turn += session.answers[1].tokens + filler(rng, 5) + [7, 8, 9]
    assert ask(session, turn, "alora-8") == 40
    assert ask(session, [*turn, 99], BASE) == 64
    session.close()
    compare(session, llama, InvokedReference(llama.base)).check()


def test_the_comparison_catches_another_activation(
    llama: ParityWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    find, reference = engine_module.activation_of, InvokedReference(llama.base)

    def first(prompt: tuple[int, ...], invocation: tuple[int, ...]) -> int | None:
        if not invocation or find(prompt, invocation) is None:
            return find(prompt, invocation)
        size = len(invocation)
        return next(i for i in range(len(prompt)) if prompt[i : i + size] == invocation)

    def after(prompt: tuple[int, ...], invocation: tuple[int, ...]) -> int | None:
        found = find(prompt, invocation)
        return found + len(invocation) - 1 if found and len(invocation) > 1 else found

    for wrong in (lambda prompt, invocation: 0, first, after):
        monkeypatch.setattr(engine_module, "activation_of", wrong)
        names = {text.split(":")[0] for text in compare(run(llama), llama, reference).wrong}
        assert {"alora-8", "alora-pattern"} <= names <= INVOCATIONS.keys()


def test_an_adapter_that_is_not_invoked_is_held_but_never_brought_to_the_device(
    llama: ParityWorld,
) -> None:
    session = Session(llama.options())
    prompt = list(range(30, 50))
    assert ask(session, prompt, "alora-8") == 0
    assert ask(session, prompt, BASE) == 16
    assert session.answers[0].tokens == session.answers[1].tokens
    finished = session.answers[0].finished
    assert finished is not None
    assert len(finished.adapter_revision) == 32
    assert session.moves("load", "host") == 1
    assert session.moves("load", "device") == 0
    session.close()


def test_scores_of_prompt_and_answer_are_pefts(llama: ParityWorld) -> None:
    session, reference = Session(llama.options(max_step_tokens=12)), InvokedReference(llama.base)
    prompt = [*range(30, 50), 7, 8, 9, *range(50, 60)]
    for request_id, num_tokens in enumerate((12, 0)):
        session.submit(
            request_id, prompt, "alora-8", prompt_logprobs=True, max_new_tokens=num_tokens
        )
    session.run()
    session.close()
    for answer in session.answers.values():
        logits = reference.answer_logits(prompt, answer.tokens, llama.adapters["alora-8"])
        logprobs = torch.log_softmax(logits, -1)
        tokens = prompt + answer.tokens
        expected = [logprobs[i, token].item() for i, token in enumerate(tokens[1:])]
        assert [*answer.prompt_logprobs, *answer.logprobs] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("depth", [0, 1])
def test_penalties_see_the_prompt_before_the_invocation(llama: ParityWorld, depth: int) -> None:
    session = Session(llama.options(), depth)
    prompt = [*range(30, 50), 7, 8, 9, 60]
    fields = {"repetition_penalty": 1e6, "max_new_tokens": 20, "ignore_eos": True}
    session.submit(0, prompt, "alora-8", **fields)
    session.run()
    session.close()
    answer = session.answers[0].tokens
    assert len(set(answer)) == 20
    assert not set(answer) & set(prompt)


def test_rows_before_the_invocation_are_charged_as_the_bases(llama: ParityWorld) -> None:
    session = Session(llama.options())
    prompt = [*range(30, 50), 7, 8, 9]
    session.submit(0, prompt, "alora-8", max_new_tokens=1)
    session.run()
    before, after = (charge for report in session.reports for charge in report.charges)
    engine = session.engine
    (adapter,) = engine._adapters.residency().resident.values()
    session.close()
    work = engine._cost_model.work
    num_params = adapter.num_bytes // torch.float32.itemsize
    assert after.seconds / before.seconds == pytest.approx(work(20, 3, num_params) / work(0, 20, 0))
    assert (before.prompt_tokens, after.prompt_tokens, after.generated_tokens) == (20, 3, 1)


def test_a_list_tells_the_invocation_tokens(llama: ParityWorld) -> None:
    session = Session(llama.options())
    for name in ("alora-8", "plain-8"):
        ask(session, [5], name)
    known = session.engine._adapters.known
    assert known.entry("alora-8").revisions[0].invocation_tokens == (7, 8, 9)
    assert known.entry("plain-8").revisions[0].invocation_tokens == ()
    session.close()


@pytest.fixture(autouse=True)
def quiet_peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "`lora_bias=True` was passed")
        yield

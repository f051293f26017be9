"""Adapters with tokenizers and vocabularies of their own, beside all other rows of a batch: every
token equals PEFT's over a base that was resized likewise."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from own_tokenizers_world import ADDED, BASE_TOKENS, OWN_TOKENS, OwnReference, World, make_world
from parity_world import Session, compare


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("own"), is_tied=request.param)


def submit(
    session: Session, world: World, request_id: int, prompt: list[int], name: str, **fields: Any
) -> None:
    manner = world.manner(name).digest
    session.submit(request_id, prompt, name, manner=manner, ignore_eos=True, **fields)


def submit_all(session: Session, world: World, rounds: int = 3, **fields: Any) -> None:
    """Of each adapter and the base some, in any order; prompts have every token of theirs."""
    names = ["", *world.adapters] * rounds
    random.Random(0).shuffle(names)
    for request_id, name in enumerate(names):
        draw = random.Random(request_id)
        prompt = [draw.randrange(world.num_tokens(name)) for _ in range(draw.randint(3, 30))]
        submit(session, world, request_id, [*prompt, world.num_tokens(name) - 1], name, **fields)


def run(world: World, **options: Any) -> Session:
    session = Session(world.options(**options))
    submit_all(session, world)
    session.run()
    session.close()
    return session


@pytest.mark.parametrize("reader_processes", [0, 1])
def test_float32(world: World, reader_processes: int) -> None:
    session = run(world, reader_processes=reader_processes)
    compare(session, OwnReference(world), world.folders()).check()
    added = {token for answer in session.answers.values() for token in answer.tokens if token >= 32}
    assert added, "no answer has a token that the base does not have"


def test_every_score_of_a_prompt_equals_peft_s(world: World) -> None:
    session, names = Session(world.options(max_step_tokens=64)), ["", *world.adapters]
    prompts = [
        [0, 5, 7, 9, 30, *range(world.num_tokens(n) - 4, world.num_tokens(n))] for n in names
    ]
    for request_id, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        fields = {"prompt_logprobs": True, "max_new_tokens": 1, "num_top_logprobs": 3}
        submit(session, world, request_id, prompt, name, **fields)
    session.run()
    session.close()
    reference = OwnReference(world)
    for request_id, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        logits = reference.logits(prompt, world.folders().get(name))
        expected = torch.log_softmax(logits, -1)
        answer = session.answers[request_id]
        wanted = expected[range(len(prompt) - 1), prompt[1:]]
        assert (torch.tensor(answer.prompt_logprobs) - wanted).abs().max() < 1e-3
        best = expected[:-1].topk(3)
        assert [[i for i, _ in top] for top in answer.prompt_top] == best.indices.tolist()


DRAWN: dict[str, Any] = {
    "temperature": 0.9,
    "top_p": 0.95,
    "typical_p": 0.97,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.2,
    "num_top_logprobs": 4,
    "logit_bias": ((7, 1.5), (30, -2.0)),
}


def test_draws_are_the_same_whatever_the_width_of_the_neighbours(world: World) -> None:
    together = Session(world.options())
    submit_all(together, world, rounds=1, **DRAWN)
    together.run()
    together.close()
    for request_id, command in together.prompts.items():
        alone = Session(world.options())
        prompt = list(command.prompt_ids)
        submit(alone, world, request_id, prompt, command.adapter_id, **DRAWN)
        alone.run()
        alone.close()
        assert alone.answers[request_id].tokens == together.answers[request_id].tokens
        assert alone.answers[request_id].logprobs == pytest.approx(
            together.answers[request_id].logprobs, abs=1e-5
        )


def test_a_bias_reaches_a_token_that_only_the_adapter_has(world: World) -> None:
    session = Session(world.options())
    for request_id, token in enumerate(range(31, OWN_TOKENS)):
        submit(session, world, request_id, [0, 3], "grown", logit_bias=((token, 100.0),))
    session.run()
    session.close()
    for request_id, token in enumerate(range(31, OWN_TOKENS)):
        assert set(session.answers[request_id].tokens) == {token}
    assert len(ADDED) == 3


@pytest.mark.parametrize(
    ("name", "num_tokens"),
    [("", BASE_TOKENS), ("plain", BASE_TOKENS), ("grown", OWN_TOKENS), ("shrunk", 31)],
)
def test_tokens_that_its_weights_do_not_have_fail_a_request(
    world: World, name: str, num_tokens: int
) -> None:
    session = Session(world.options())
    submit(session, world, 0, [0, num_tokens], name)
    submit(session, world, 1, [0, 3], name, logit_bias=((num_tokens, 1.0),))
    submit(session, world, 2, [0, num_tokens - 1], name)
    session.run()
    session.close()
    for request_id in (0, 1):
        finished = session.answers[request_id].finished
        assert finished is not None
        assert finished.failure is not None
        assert f"must lie in [0, {num_tokens})" in finished.failure.message
    assert len(session.answers[2].tokens) == 12


def test_a_tokenizer_that_is_replaced_makes_another_revision(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    session = Session(world.options())
    stale = world.manner("grown").digest
    submit(session, world, 0, [0, 3], "grown")
    session.run()
    path = world.adapters["grown"].folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<note>", "<memo>"))
    assert world.manner("grown").digest != stale
    session.submit(1, [0, 3], "grown", manner=stale)
    submit(session, world, 2, [0, 3], "grown")
    session.run()
    session.close()
    first, second, third = (session.answers[i].finished for i in range(3))
    assert first is not None
    assert second is not None
    assert third is not None
    assert second.failure is not None
    assert second.failure.code == "manner_changed"
    assert third.failure is None
    assert first.adapter_revision != third.adapter_revision

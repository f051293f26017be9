"""Eight adapters and the base in one running batch: every answer equals PEFT's, token for token."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from parity_world import Comparison, ParityWorld, Reference, Session, compare

BASE = ""


def nf4_reference(folder: Path) -> Any:
    """transformers with bitsandbytes' NF4 weights, decoded exactly and computed in float32."""
    from bitsandbytes.nn.modules import Linear4bit
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = tiny_models.load_reference(folder, torch.float32, quantization_config=config)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.fixture(scope="module", params=tiny_models.FAMILIES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ParityWorld:
    return ParityWorld.make(request.param, tmp_path_factory.mktemp(request.param))


def submit_all(session: Session, world: ParityWorld, seed: int = 0, rounds: int = 2) -> None:
    """Every adapter and the base, `rounds` times, arriving while others run."""
    rng = random.Random(seed)
    request_id = len(session.answers)
    shared = [rng.randrange(3, tiny_models.VOCAB_SIZE) for _ in range(20)]
    for _ in range(rounds):
        names = [BASE, *world.adapters]
        rng.shuffle(names)
        for name in names:
            own = [rng.randrange(3, tiny_models.VOCAB_SIZE) for _ in range(rng.randint(1, 30))]
            prompt = shared + own if rng.random() < 0.5 else own
            session.submit(request_id, prompt, name, ignore_eos=rng.random() < 0.7)
            request_id += 1
            session.step()


def run(
    world: ParityWorld, pipeline_depth: int = 0, *, warm: bool = False, **changes: Any
) -> Session:
    """`warm`: every adapter is on the host first, so that no loader's pace decides who meets."""
    session = Session(world.options(**changes), pipeline_depth)
    for request_id, name in enumerate(world.adapters if warm else ()):
        session.submit(request_id, [5], name, max_new_tokens=1)
    session.run()
    submit_all(session, world)
    session.run()
    session.close()
    return session


def test_float32(world: ParityWorld) -> None:
    session = run(world)
    compare(session, Reference(world.base), world.adapters).check()
    assert sum(report.prefix_hits for report in session.reports) > 0


def test_nf4(world: ParityWorld) -> None:
    session = run(world, quantize="nf4")
    compare(session, Reference(world.base, nf4_reference), world.adapters).check()


def test_the_comparison_catches_a_swapped_adapter(world: ParityWorld) -> None:
    session = run(world)
    names = list(world.adapters)
    swapped = dict(zip(names, [world.adapters[n] for n in names[1:] + names[:1]], strict=True))
    comparison = compare(session, Reference(world.base), swapped)
    assert len({text.split(":")[0] for text in comparison.wrong}) == len(names)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ParityWorld:
    return ParityWorld.make("llama", tmp_path_factory.mktemp("llama"))


def test_two_slots_force_evictions_and_reloads(llama: ParityWorld) -> None:
    session = Session(llama.options(max_resident_adapters=2))
    for seed in range(2):
        submit_all(session, llama, seed)
        session.run()
    session.close()
    assert session.moves("evict", "device") >= len(llama.adapters)
    assert session.moves("load", "device") > len(llama.adapters)
    compare(session, Reference(llama.base), llama.adapters).check()


def test_a_small_pool_and_host_force_reloads_from_disk(llama: ParityWorld) -> None:
    session = run(llama, adapter_pool_bytes=640 << 10, adapter_host_bytes=640 << 10)
    assert session.moves("evict", "device") > 0
    assert session.moves("evict", "host") > 0
    compare(session, Reference(llama.base), llama.adapters).check()


def test_few_blocks_force_preemption(llama: ParityWorld) -> None:
    session = run(llama, warm=True, kv_bytes=11 * 4096)
    assert session.preemptions > 0
    compare(session, Reference(llama.base), llama.adapters).check()


def test_preemption_and_eviction_together(llama: ParityWorld) -> None:
    session = run(llama, warm=True, kv_bytes=11 * 4096, max_resident_adapters=3, max_step_tokens=16)
    assert session.preemptions > 0
    compare(session, Reference(llama.base), llama.adapters).check()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_resident_adapters": 2},
        {"kv_bytes": 11 * 4096, "max_resident_adapters": 3, "max_step_tokens": 16},
        {"max_batch_rows": 1},
    ],
    ids=["plain", "evictions", "preemptions", "one-row"],
)
def test_pipelined_steps_give_the_same_answers(llama: ParityWorld, changes: Any) -> None:
    """Depth 1: tokens are taken from their lanes before the host has seen them."""
    session = run(llama, pipeline_depth=1, warm="kv_bytes" in changes, **changes)
    if "kv_bytes" in changes:
        assert session.preemptions > 0
    compare(session, Reference(llama.base), llama.adapters).check()


@pytest.mark.parametrize("depth", [0, 1])
def test_a_penalised_row_sees_its_whole_history_at_any_depth(
    llama: ParityWorld, depth: int
) -> None:
    """A history that lags by the token in flight lets the penalised token through again."""
    session = Session(llama.options(), depth)
    prompt = list(range(3, 20))
    strong = {"ignore_eos": True, "max_new_tokens": 20}
    session.submit(0, prompt, "all-16", presence_penalty=2.0, logit_bias=((7, 9.0),), **strong)
    session.submit(1, prompt, "all-16", repetition_penalty=1e6, **strong)
    session.submit(2, prompt, "all-16", **strong)
    session.run()
    session.close()
    repetition = session.answers[1].tokens
    assert len(set(repetition)) == 20, "a token came twice"
    assert not set(repetition) & set(prompt)
    compare_only = Comparison()
    logits = Reference(llama.base).logits(
        prompt + session.answers[2].tokens, llama.adapters["all-16"]
    )
    compare_only.add("plain", prompt, session.answers[2].tokens, logits)
    compare_only.check()


@pytest.mark.parametrize(("seed", "depth"), [(0, 0), (1, 0), (2, 1), (3, 1)])
def test_random_cancellations_leave_the_rest_exact_and_nothing_behind(
    llama: ParityWorld, seed: int, depth: int
) -> None:
    session = Session(llama.options(kv_bytes=40 * 4096, max_resident_adapters=3), depth)
    rng = random.Random(seed)
    submit_all(session, llama, seed, rounds=3)
    while not session.is_done:
        for request_id in session.answers:
            if rng.random() < 0.02:
                session.cancel(request_id)
        for _ in range(3):
            session.step()
    reasons = {a.finished.reason for a in session.answers.values() if a.finished}
    assert "cancelled" in reasons
    compare(session, Reference(llama.base), llama.adapters).check()
    session.close()


def test_without_prefix_reuse_the_answers_are_the_same(llama: ParityWorld) -> None:
    session = run(llama, prefix_caching=False)
    assert sum(report.prefix_hits for report in session.reports) == 0
    compare(session, Reference(llama.base), llama.adapters).check()


def test_prompt_logprobs_and_token_logprobs_equal_the_reference(llama: ParityWorld) -> None:
    session = Session(llama.options(max_step_tokens=12))
    prompt = list(range(3, 40))
    session.submit(1, prompt, "all-16", prompt_logprobs=True, num_top_logprobs=3)
    session.submit(2, prompt, BASE, prompt_logprobs=True, max_new_tokens=0)
    session.run()
    session.close()
    reference = Reference(llama.base)
    for request_id, adapter in ((1, llama.adapters["all-16"]), (2, None)):
        answer = session.answers[request_id]
        tokens = prompt + answer.tokens
        logprobs = torch.log_softmax(reference.logits(tokens, adapter), -1)
        expected = [logprobs[i, token].item() for i, token in enumerate(tokens[1:])]
        assert [*answer.prompt_logprobs, *answer.logprobs] == pytest.approx(expected, abs=1e-4)
        for i, top in enumerate(answer.prompt_top):
            best = logprobs[i].topk(3)
            assert [token_id for token_id, _ in top] == best.indices.tolist()
            assert [logprob for _, logprob in top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert len(session.answers[1].prompt_top) == len(prompt) - 1
    assert session.answers[2].prompt_top == ()


def test_a_seed_gives_the_same_answer_in_any_batch(llama: ParityWorld) -> None:
    prompt = [5, 6, 7, 8]
    settings = {"temperature": 0.9, "top_p": 0.95, "seed": 77, "ignore_eos": True}
    alone = Session(llama.options())
    alone.submit(0, prompt, "all-16", **settings)
    alone.run()
    alone.close()
    crowd = Session(llama.options(max_step_tokens=16, kv_bytes=30 * 4096))
    submit_all(crowd, llama)
    crowd.submit(99, prompt, "all-16", **settings)
    crowd.run()
    crowd.close()
    assert crowd.answers[99].tokens == alone.answers[0].tokens
    assert len(set(alone.answers[0].tokens)) > 3

"""Phi-3's two sets of rotary factors: every token is the one that transformers + PEFT choose for a
sequence of the length that it then has, whatever runs, is shared or is preempted beside it."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from parity_world import FUSED, Comparison, ParityWorld, Reference, Session, save_adapters

SHORT = 32
"""Tokens up to which the short factors hold."""
FIELDS: dict[str, Any] = {
    "original_max_position_embeddings": SHORT,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [1.5 + 2.0 * i for i in range(8)],
    },
}


def make_adapters(family: str, base: Path, folder: Path) -> dict[str, Path]:
    recipes: dict[str, dict[str, Any]] = {
        "all-8": {"rank": 8, "alpha": 16, "target_modules": FUSED["all"]},
        "alora-3": {
            "rank": 3,
            "alpha": 6,
            "target_modules": FUSED["all"],
            "alora_invocation_tokens": [190, 191],
        },
    }
    return save_adapters(recipes, base, folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> ParityWorld:
    return ParityWorld.make("phi3", tmp_path_factory.mktemp("phi3"), make_adapters, **FIELDS)


def compare(session: Session, world: ParityWorld) -> Comparison:
    """Each token beside the logits of what stood before it, as long as it was then."""
    comparison, reference = Comparison(), Reference(world.base)
    for request_id, answer in session.answers.items():
        command = session.prompts[request_id]
        prompt, name = list(command.prompt_ids), command.adapter_id
        for i in range(len(answer.tokens)):
            seen = prompt + answer.tokens[:i]
            logits = reference.logits(seen, world.adapters.get(name))
            comparison.add(name or "base", seen, answer.tokens[i : i + 1], logits)
    return comparison


def submit_all(session: Session) -> None:
    """Sequences that stay short, grow long, and are long from the first; half share a prefix."""
    rng = random.Random(3)
    shared = [rng.randrange(3, 190) for _ in range(SHORT + 20)]
    lengths = [(5, 6), (20, 30), (24, 8), (24, 9), (31, 4), (32, 1), (32, 6), (33, 5), (52, 9)]
    for length, new in lengths:
        for name in ("", "all-8", "alora-3"):
            prompt = shared[:length]
            if rng.random() < 0.5:
                prompt = [*prompt[:-1], rng.randrange(3, 190)]
            # Invoked at the beginning, so that PEFT alone knows the place whatever follows.
            if name == "alora-3":
                prompt = [190, 191, *prompt[2:]]
            session.submit(len(session.answers), prompt, name, max_new_tokens=new, ignore_eos=True)
            session.step()


@pytest.mark.parametrize(
    ("changes", "depth"),
    [({}, 0), ({}, 1), ({"kv_bytes": 11 * 4096, "max_step_tokens": 13}, 1)],
    ids=["plain", "pipelined", "preemptions"],
)
def test_float32(world: ParityWorld, changes: Any, depth: int) -> None:
    session = Session(world.options(**changes), depth)
    submit_all(session)
    session.run()
    session.close()
    compare(session, world).check()
    assert sum(report.prefix_hits for report in session.reports) > 0
    assert (session.preemptions > 0) == bool(changes)


def test_generate_of_transformers_gives_the_same_answer(world: ParityWorld) -> None:
    """It drops its cache where a sequence grows long."""
    prompt = list(range(40, 40 + SHORT - 4))
    session = Session(world.options())
    session.submit(0, prompt, max_new_tokens=12, ignore_eos=True)
    session.run()
    session.close()
    model = tiny_models.load_reference(world.base, torch.float32)
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=-1
        )
    assert session.answers[0].tokens == out[0, len(prompt) :].tolist()

"""Where an adapter with invocation tokens begins to act, and whose KV a block is."""

import random
from typing import Any

import pytest

from lory_server.messages import Sampling
from lory_server.sequence import BASE_WEIGHTS, Sequence, activation_of

BLOCK = 4


@pytest.mark.parametrize(
    ("prompt", "invocation", "expected"),
    [
        ((1, 2, 3), (), 0),
        ((1, 2, 3), (1, 2), 0),
        ((1, 2, 3), (2, 3), 1),
        ((1, 2, 3), (3,), 2),
        ((1, 2, 3), (2, 1), None),
        ((1, 2), (1, 2, 3), None),
        ((7, 8, 1, 7, 8, 2), (7, 8), 3),
        ((7, 7, 7, 7), (7, 7), 2),  # they overlap, and the last one counts
        ((7, 8, 7, 9, 7, 8), (7, 8, 7), 0),
        ((0xD800, 0xDC00, 1), (0xD800, 0xDC00), 0),  # numbers that are no characters
    ],
)
def test_the_last_invocation_of_the_prompt_counts(
    prompt: tuple[int, ...], invocation: tuple[int, ...], expected: int | None
) -> None:
    assert activation_of(prompt, invocation) == expected


def test_the_activation_is_pefts_for_any_prompt() -> None:
    """Few different tokens, so that invocations repeat, overlap and are missing."""
    import torch
    from peft import LoraConfig
    from peft.tuners.lora.variants import calculate_alora_offsets

    rng = random.Random(0)
    found = 0
    for _ in range(150):
        prompt = tuple(rng.randrange(2) for _ in range(rng.randint(1, 12)))
        invocation = tuple(rng.randrange(2) for _ in range(rng.randint(1, 4)))
        configs: Any = {
            "a": LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=list(invocation))
        }
        (offset,) = calculate_alora_offsets(configs, "a", torch.tensor([prompt]))
        expected = None if offset is None else len(prompt) - offset
        assert activation_of(prompt, invocation) == expected
        found += expected is not None
    assert 50 < found < 150


def hashes(weights: str, activation: int = 0, tenant: str = "t", num_tokens: int = 16) -> list:
    sequence = Sequence(
        request_id=0,
        sampling=Sampling(max_new_tokens=1, seed=0),
        tokens=list(range(num_tokens)),
        tenant=tenant,
        weights=weights,
        activation=activation,
    )
    return sequence.full_block_hashes(BLOCK, num_tokens)


def common(one: list, other: list) -> int:
    """How many blocks at the beginning are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


@pytest.mark.parametrize(
    ("activation", "shared"), [(1, 0), (3, 0), (4, 1), (5, 1), (8, 2), (15, 3)]
)
def test_only_blocks_wholly_before_the_activation_are_the_bases(
    activation: int, shared: int
) -> None:
    base, invoked = hashes(BASE_WEIGHTS), hashes("a", activation)
    assert common(base, invoked) == shared
    assert not set(base[shared:]) & set(invoked[shared:])
    assert common(invoked, hashes("b", activation)) == shared
    assert common(invoked, hashes("a", activation)) == 4
    assert common(base, hashes("a", activation, tenant="u")) == 0


def test_an_adapter_that_acts_at_once_shares_nothing() -> None:
    assert common(hashes(BASE_WEIGHTS), hashes("a")) == 0


def test_equal_tokens_differ_by_where_in_their_block_the_adapter_began() -> None:
    """An answer may hold the invocation again; in the next prompt it is that one that counts."""
    assert common(hashes("a", 5), hashes("a", 6)) == 1
    assert not set(hashes("a", 5)[1:]) & set(hashes("a", 6)[1:])

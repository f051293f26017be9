"""The sampler against the distributions it claims, and against transformers' own filters."""

import math
from collections import Counter

import pytest
import torch

from lory_server.messages import Sampling
from lory_server.model.sampler import Samples, uniform
from lory_server.model.sampler import sample as sample_with
from lory_server.model.staging import Stage
from lory_server.plan import SampleRow

VOCAB = 12


def sample(scores: torch.Tensor, rows: list[SampleRow]) -> Samples:
    return sample_with(scores, rows, Stage(torch.device("cpu")).send)


def logits(rows: int = 1, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def row(position: int = 0, history=None, prompt_len: int = 0, **fields) -> SampleRow:
    fields = {"max_new_tokens": 1, "seed": 1, **fields}
    return SampleRow(Sampling(**fields), position, history, prompt_len)


def draws(one: torch.Tensor, count: int, **fields) -> Counter[int]:
    rows = [row(position=i, **fields) for i in range(count)]
    return Counter(sample(one.expand(count, -1), rows).token_ids_S.tolist())


def test_greedy_takes_the_best_token_and_reports_its_logprob() -> None:
    scores = logits(5)
    samples = sample(scores, [row() for _ in range(5)])
    expected = torch.log_softmax(scores, -1)
    assert samples.token_ids_S.tolist() == scores.argmax(-1).tolist()
    torch.testing.assert_close(samples.logprobs_S, expected.max(-1).values)


def test_draws_are_uniform_and_independent_of_neighbouring_seeds_and_positions() -> None:
    values = [uniform(seed, position) for seed in range(100) for position in range(100)]
    assert len(set(values)) == len(values)
    assert abs(sum(values) / len(values) - 0.5) < 0.01
    buckets = Counter(int(v * 10) for v in values)
    assert all(abs(count - 1000) < 150 for count in buckets.values())
    shifted = [uniform(1, p) - uniform(2, p - 1) for p in range(1, 200)]
    assert min(abs(d) for d in shifted) > 0


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_sampled_frequencies_follow_the_softmax(temperature: float) -> None:
    one = logits()
    counts = draws(one, 20_000, temperature=temperature)
    expected = torch.softmax(one[0] / temperature, -1)
    for token, p in enumerate(expected.tolist()):
        assert abs(counts[token] / 20_000 - p) < 4 * math.sqrt(p * (1 - p) / 20_000) + 1e-4


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 3},
        {"top_p": 0.7},
        {"typical_p": 0.5},
        {"top_k": 6, "top_p": 0.8, "typical_p": 0.9},
    ],
)
def test_filters_keep_what_transformers_keeps(fields: dict[str, float]) -> None:
    from transformers import TopKLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper

    one = logits(seed=3)
    kept = one / 0.9
    ids = torch.zeros(1, 1, dtype=torch.long)
    for name, warper in (
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
        ("typical_p", TypicalLogitsWarper),
    ):
        if name in fields:
            kept = warper(fields[name])(ids, kept)
    expected = torch.softmax(kept[0], -1)
    counts = draws(one, 5_000, temperature=0.9, **fields)
    assert {t for t, p in enumerate(expected.tolist()) if p > 0} == set(counts)
    for token, count in counts.items():
        assert abs(count / 5_000 - expected[token]) < 0.03


@pytest.mark.parametrize("fields", [{}, {"top_p": 0.9}, {"typical_p": 0.9}, {"top_k": 4}])
def test_a_draw_does_not_depend_on_the_batch(fields: dict[str, float]) -> None:
    scores = logits(8, 200, seed=5)
    rows = [row(position=i, seed=i, temperature=1.0, **fields) for i in range(8)]
    others = [row(temperature=0.5, top_p=0.3), row(), row(temperature=2.0)]
    mixed = sample(torch.cat([logits(3, 200, seed=9), scores]), [*others, *rows]).token_ids_S[3:]
    for i in range(8):
        alone = sample(scores[i : i + 1], [rows[i]]).token_ids_S
        assert alone.item() == mixed[i].item()


def test_repetition_penalty_equals_transformers_over_prompt_and_answer() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    scores, history = logits(seed=7), [1, 2, 2, 5]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([history]), scores.clone())
    got = sample(scores, [row(history=history, prompt_len=2, repetition_penalty=1.7)])
    assert got.token_ids_S.item() == expected.argmax().item()


def test_frequency_and_presence_count_the_answer_alone() -> None:
    scores = torch.zeros(1, VOCAB)
    scores[0, 3], scores[0, 4], scores[0, 5] = 3.0, 2.5, 2.0
    history = [4, 4, 4, 3, 3]  # the prompt holds 4, the answer 3 twice
    assert sample(scores, [row(history=history, prompt_len=3)]).token_ids_S.item() == 3
    penalised = row(history=history, prompt_len=3, frequency_penalty=0.3)
    assert sample(scores, [penalised]).token_ids_S.item() == 4
    once = row(history=history, prompt_len=3, presence_penalty=0.4)
    assert sample(scores, [once]).token_ids_S.item() == 3


def test_logit_bias_changes_the_choice_but_not_the_reported_logprob() -> None:
    scores = logits()
    biased = sample(scores, [row(logit_bias=((7, 100.0),))])
    assert biased.token_ids_S.item() == 7
    torch.testing.assert_close(biased.logprobs_S[0], torch.log_softmax(scores, -1)[0, 7])


def test_alternatives_are_the_best_tokens_in_order() -> None:
    scores = logits(2)
    samples = sample(scores, [row(num_top_logprobs=3), row()])
    assert samples.top_ids_SK is not None
    assert samples.top_ids_SK[0].tolist() == scores[0].topk(3).indices.tolist()


def test_a_row_without_finite_logits_is_marked_and_spoils_no_other() -> None:
    scores = logits(3)
    clean = sample(scores, [row(temperature=1.0, top_p=0.9, seed=i) for i in range(3)])
    scores[1, 4] = math.nan
    spoilt = sample(scores, [row(temperature=1.0, top_p=0.9, seed=i) for i in range(3)])
    assert math.isnan(spoilt.logprobs_S[1])
    for i in (0, 2):
        assert spoilt.token_ids_S[i] == clean.token_ids_S[i]


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-6, 1e-3])
@pytest.mark.parametrize("fields", [{}, {"top_p": 0.9}])
def test_a_temperature_near_zero_is_greedy_and_not_noise(temperature: float, fields) -> None:
    """Logits over 1e-38 were infinite, and an arbitrary token won."""
    scores = logits(seed=11)
    rows = [row(position=i, temperature=temperature, **fields) for i in range(20)]
    tokens = sample(scores.expand(20, -1), rows).token_ids_S.tolist()
    assert set(tokens) == {scores.argmax().item()}

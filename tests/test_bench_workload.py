"""What a load test asks for: popularity, base rows, arrivals and prompts."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from lory_router.bench.workload import Popularity, Workload, WorkloadError, adapter_names

NAMES = tuple(f"a{number:02d}" for number in range(8))


def workload(**changes: object) -> Workload:
    plain = Workload(
        num_requests=64,
        adapters=NAMES,
        popularity=Popularity("distinct"),
        base_share=0.0,
        prompt_tokens=6,
        output_tokens=4,
        vocab_size=50,
        seed=1,
    )
    return replace(plain, **changes)  # pyright: ignore[reportArgumentType]


def shares(popularity: Popularity, num_requests: int = 20_000) -> list[float]:
    asks = workload(popularity=popularity, num_requests=num_requests, prompt_tokens=1).requests(0)
    counts = Counter(ask.adapter for ask in asks)
    return [counts[name] / num_requests for name in NAMES]


def test_zipf_is_true_zipf() -> None:
    """p_i is proportional to i^-alpha: not a power of a uniform draw, not a geometric series."""
    weights = [(i + 1) ** -1.1 for i in range(8)]
    expected = [weight / sum(weights) for weight in weights]
    assert shares(Popularity.parse("zipf:1.1")) == pytest.approx(expected, abs=0.01)
    geometric = [1.5**-i / sum(1.5**-j for j in range(8)) for i in range(8)]
    assert geometric != pytest.approx(expected, abs=0.01)


def test_uniform_identical_and_distinct() -> None:
    assert shares(Popularity.parse("uniform")) == pytest.approx([1 / 8] * 8, abs=0.01)
    assert shares(Popularity.parse("identical"), 64) == [1.0] + [0.0] * 7
    asks = workload().requests(0)
    assert [ask.adapter for ask in asks[:9]] == [*NAMES, NAMES[0]]


def test_the_record_states_the_formula() -> None:
    described = workload(popularity=Popularity.parse("zipf:1.5")).described()
    assert described["popularity_formula"] == (
        "drawn: p_i = i^-1.5 / sum_j j^-1.5, i and j from 1 to 8"
    )


def test_base_rows_are_an_exact_share_and_mixed_in() -> None:
    asks = workload(base_share=0.25).requests(0)
    places = [place for place, ask in enumerate(asks) if not ask.adapter]
    assert len(places) == 16
    assert places != list(range(16))
    assert [ask.adapter for ask in asks if ask.adapter][:8] == list(NAMES)


def test_without_adapters_every_row_is_a_base_row() -> None:
    assert {ask.adapter for ask in workload(adapters=()).requests(0)} == {""}


def test_the_same_repetition_is_the_same_and_no_two_share_a_prompt() -> None:
    """A prompt sent twice would be found in the prefix cache and flatter the second run."""
    one = workload()
    assert one.requests(3) == one.requests(3)
    seen = {tuple(ask.prompt) for number in range(4) for ask in one.requests(number)}
    assert len(seen) == 4 * 64
    assert min(min(prompt) for prompt in seen) >= 3  # type: ignore[type-var]


def test_poisson_arrivals_have_the_rate_and_the_spread_asked_for() -> None:
    asks = workload(num_requests=5000, rate_per_s=20.0, prompt_tokens=1).requests(0)
    gaps = [b.at_s - a.at_s for a, b in pairwise(asks)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(1 / 20, rel=0.05)
    assert deviation == pytest.approx(mean, rel=0.05), "exponential gaps: deviation = mean"


def test_given_texts_are_sent_in_turn() -> None:
    asks = workload(texts=("one", "two", "three"), num_requests=4).requests(1)
    assert [ask.prompt for ask in asks] == ["two", "three", "one", "two"]


@pytest.mark.parametrize(
    "text", ["zipf", "zipf:", "zipf:-1", "zipf:nan", "skewed", "uniform:2", ""]
)
def test_a_popularity_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(WorkloadError, match="popularity"):
        Popularity.parse(text)


def test_adapter_names_come_in_three_forms() -> None:
    assert adapter_names("all", "", ("x", "y")) == ("x", "y")
    assert adapter_names("2", "lora-{i:03d}", ()) == ("lora-000", "lora-001")
    assert adapter_names("a, b", "", ()) == ("a", "b")
    assert adapter_names("", "", ("x",)) == ()
    with pytest.raises(WorkloadError, match="adapter-pattern"):
        adapter_names("2", "{n}", ())


@pytest.mark.parametrize("changes", [{"base_share": 1.5}, {"vocab_size": 3}])
def test_numbers_out_of_range_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(WorkloadError, match=r"base-share|vocab-size"):
        workload(**changes)

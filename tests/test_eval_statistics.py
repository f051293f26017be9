"""Intervals that hold what they promise, and metrics against other ways to count the same."""

import math
from collections.abc import Sequence
from functools import cache
from random import Random

import pytest

from lory_trainer.evaluation.catalogue import make_metrics
from lory_trainer.evaluation.labels import macro_f1
from lory_trainer.evaluation.metrics import Metric
from lory_trainer.evaluation.overlap import bleu, bleu_counts, rouge_l
from lory_trainer.evaluation.run import _estimate
from lory_trainer.evaluation.statistics import Estimate, sign_test, wilson

# -- intervals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "num", "low", "high"),
    [(0.8, 10, 0.4902, 0.9433), (0, 10, 0, 0.2775), (1, 10, 0.7225, 1), (1, 1, 0.2065, 1)],
)
def test_wilsons_interval_is_that_of_the_tables(share: float, num: int, low: float, high: float):
    assert wilson(share, num) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("num", [3, 10, 30, 100])
def test_the_interval_of_a_share_holds_it_as_often_as_it_says(num: int):
    """Over every outcome there is, weighed by how likely it is."""
    intervals = [wilson(right / num, num) for right in range(num + 1)]
    shares = [0.005 + 0.01 * step for step in range(100)]
    held = [
        sum(
            math.comb(num, right) * share**right * (1 - share) ** (num - right)
            for right, (low, high) in enumerate(intervals)
            if low <= share <= high
        )
        for share in shares
    ]
    assert 0.945 <= sum(held) / len(held) <= 0.97
    assert min(held) > 0.82


def estimated(spec: str, answers: Sequence[str], wanted: Sequence[str]) -> dict[str, Estimate]:
    def one(metric: Metric) -> Estimate:
        rows = [metric.measure(a, w) for a, w in zip(answers, wanted, strict=True)]
        return _estimate(metric, rows, seed=0)

    return {metric.name: one(metric) for metric in make_metrics([spec], wanted)}


@pytest.mark.parametrize(
    "spec", ["exact_match", "normalized_match", "contains", "regex=a", "json_valid", "label"]
)
def test_rows_that_are_right_or_wrong_have_the_interval_of_a_share(spec: str):
    wanted = ['"a"'] * 20
    found = estimated(spec, ['"a"'] * 15 + ["["] * 5, wanted)
    main = found.pop("label.accuracy" if spec == "label" else spec.partition("=")[0])
    assert (main.low, main.high) == wilson(0.75, 20)


@pytest.mark.parametrize("spec", ["exact_match", "label", "json_fields", "rouge_l", "bleu"])
@pytest.mark.parametrize("num", [1, 4])
def test_a_few_rows_alike_are_not_called_certain(spec: str, num: int):
    right = estimated(spec, ['{"a": 1}'] * num, ['{"a": 1}'] * num)
    for found in right.values():
        assert (found.value, found.high) == (1, 1)
        assert found.low == wilson(1, num)[0] < 0.52


def test_what_is_no_share_is_resampled():
    (metric,) = make_metrics(["perplexity"], ["x"])
    rows = [metric.measure([-1.0, -float(n % 3)], "x") for n in range(50)]
    found = _estimate(metric, rows, seed=0)
    assert 1 < found.low < found.value < found.high


def test_the_interval_of_a_resampled_mean_holds_it_about_as_often():
    """Of half-right JSON, whose true mean is known; few rows make it a little narrow."""
    (metric,) = make_metrics(["json_fields"], ["{}"])
    rng, held = Random(1), 0
    for trial in range(100):
        rows = [rng.choice((0.0, 0.25, 0.5, 1.0)) for _ in range(40)]
        found = _estimate(metric, rows, seed=trial)
        held += found.low <= 0.4375 <= found.high
    assert 89 <= held <= 99


def test_the_sign_test_is_the_binomials():
    for wins in range(13):
        for losses in range(13):
            num, few = wins + losses, min(wins, losses)
            tail = sum(math.comb(num, k) for k in range(few + 1)) / 2**num
            assert sign_test(wins, losses) == pytest.approx(min(1, 2 * tail))


# -- the same, counted otherwise ------------------------------------------------------------


def test_macro_f1_is_that_of_precision_and_recall():
    rng = Random(2)
    for _ in range(50):
        rows = [(rng.choice("abcx"), rng.choice("abc")) for _ in range(rng.randint(1, 12))]
        scores = []
        for label in {wanted for _, wanted in rows}:
            right = sum(row == (label, label) for row in rows)
            given = sum(g == label for g, _ in rows)
            precision = right / given if given else 0
            recall = right / sum(w == label for _, w in rows)
            both = precision + recall
            scores.append(2 * precision * recall / both if both else 0)
        assert macro_f1(rows) == pytest.approx(sum(scores) / len(scores))


def words(rng: Random) -> list[str]:
    return [rng.choice("abcdé") for _ in range(rng.randint(0, 9))]


def test_rouge_l_is_of_the_longest_common_subsequence():
    rng = Random(3)
    for _ in range(200):
        got, want = words(rng), words(rng)

        @cache
        def common(i: int, j: int, got: tuple[str, ...], want: tuple[str, ...]) -> int:
            if i == len(got) or j == len(want):
                return 0
            if got[i] == want[j]:
                return 1 + common(i + 1, j + 1, got, want)
            return max(common(i + 1, j, got, want), common(i, j + 1, got, want))

        num = common(0, 0, tuple(got), tuple(want))
        expected = 2 * num / (len(got) + len(want)) if got or want else 1
        assert rouge_l(" ".join(got), " ".join(want)) == pytest.approx(expected)


def test_bleu_is_counted_gram_by_gram():
    rng = Random(4)
    for _ in range(100):
        pairs = [(words(rng), words(rng)) for _ in range(3)]
        logs: list[float] = []
        is_none = False
        for n in range(1, 5):
            matching = there = 0
            for got, want in pairs:
                left = [tuple(want[i : i + n]) for i in range(len(want) - n + 1)]
                for i in range(len(got) - n + 1):
                    there += 1
                    if tuple(got[i : i + n]) in left:
                        left.remove(tuple(got[i : i + n]))
                        matching += 1
            is_none = is_none or bool(there and not matching)
            logs += [math.log(matching / there)] if matching else []
        num_got, num_want = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
        found = bleu([bleu_counts(" ".join(got), " ".join(want)) for got, want in pairs])
        if is_none or not logs:
            assert found == 0
        else:
            short = min(1, math.exp(1 - num_want / num_got))
            assert found == pytest.approx(short * math.exp(sum(logs) / len(logs)))

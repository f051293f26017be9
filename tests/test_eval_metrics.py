"""Metrics, intervals and gates: figures worked out by hand, and answers meant to fool them."""

import json
import math
from typing import Any

import pytest

from lory_trainer.evaluation.catalogue import make_metrics
from lory_trainer.evaluation.errors import EvaluationError
from lory_trainer.evaluation.gate import parse_gate
from lory_trainer.evaluation.labels import OTHER, confusion
from lory_trainer.evaluation.overlap import bleu, bleu_counts
from lory_trainer.evaluation.statistics import estimate, pair, percentile, sign_test
from test_eval_report import make_evaluation


def total(spec: str, answers: list[str], wanted: list[str]) -> float:
    (metric, *_) = make_metrics([spec], wanted)
    return metric.total([metric.measure(a, w) for a, w in zip(answers, wanted, strict=True)])


@pytest.mark.parametrize(
    ("spec", "answer", "wanted", "score"),
    [
        ("exact_match", "yes", "yes", 1),
        ("exact_match", "yes ", "yes", 0),
        ("normalized_match", " The  CAT, sat! ", "the cat sat", 1),
        ("normalized_match", "the cat", "the cats", 0),
        ("normalized_match", "", "...", 0),
        ("normalized_match", "?!", "...", 0),
        ("normalized_match", " ... ", "...", 1),
        ("exact_match", "", "", 1),
        ("exact_match", "e\u0301", "é", 0),
        ("normalized_match", "e\u0301", "é", 1),
        ("contains", "anything", "", 1),
        ("label", "", "", 1),
        ("label", "(other)", "x", 0),
        ("normalized_match", "\uff21\u00df", "ass", 1),
        ("contains", "it is Paris.", "Paris", 1),
        ("contains", "it is paris.", "Paris", 0),
        (r"regex=^\d{4}-\d\d$", "2021-03", "anything", 1),
        (r"regex=^\d{4}-\d\d$", "on 2021-03", "anything", 0),
        ("json_valid", ' {"a": [1, null]} ', "", 1),
        ("json_valid", '{"a": 1} and more', "", 0),
        ("json_valid", '{"a": NaN}', "", 0),
        ("json_valid", "[" * 5000 + "]" * 5000, "", 0),
        ("json_valid", "[" * 80 + "]" * 80, "", 0),
        ("json_fields", '{"a": 1, "b": {"c": "x"}}', '{"b": {"c": "x"}, "a": 1}', 1),
        ("json_fields", '{"a": 1, "b": 2}', '{"a": 1, "b": 3}', 0.5),
        ("json_fields", '{"a": 1, "b": 2}', '{"a": 1}', 0.5),
        ("json_fields", '{"a": true}', '{"a": 1}', 0),
        ("json_fields", '{"a": 1.0, "b": 1e2}', '{"a": 1, "b": 100}', 1),
        ("json_fields", '{"a": 1e999}', '{"a": 1}', 0),
        ("json_fields", "1", "1", 1),
        ("json_fields", "[]", "{}", 0),
        ("json_fields", '{"a": 1, "a": 2}', '{"a": 2}', 1),
        ("json_fields", '{"\\u00e9": 1}', '{"é": 1}', 1),
        ("json_fields", '{"a": "1"}', '{"a": 1}', 0),
        ("json_fields", '{"a.b": 1}', '{"a": {"b": 1}}', 0),
        ("json_fields", "[1, 2]", "[2, 1]", 0),
        ("json_fields", "{}", "{}", 1),
        ("json_fields", "no", '{"a": 1}', 0),
        ("rouge_l", "the cat sat", "The cat sat.", 1),
        ("rouge_l", "a b c d", "a x c y", 0.5),
        ("rouge_l", "", "", 1),
        ("rouge_l", "a", "", 0),
        ("bleu", "positive", "positive", 1),
        ("bleu", "negative", "positive", 0),
        ("bleu", "", "positive", 0),
    ],
)
def test_a_score(spec, answer, wanted, score):
    assert total(spec, [answer], [wanted]) == pytest.approx(score)


def test_a_wanted_answer_that_is_no_json_is_the_files_fault():
    with pytest.raises(EvaluationError, match="not JSON"):
        total("json_fields", ["{}"], ["no"])


def test_bleu_is_that_of_the_paper():
    """Counted by hand: all 5 words, 3 of 4 pairs, 2 of 3, 1 of 2, and a penalty for being short."""
    got, want = "the cat sat on mats", "the cat sat on the mats"
    counts = bleu_counts(got, want)
    assert counts == (5, 3, 2, 1, 5, 4, 3, 2, 5, 6)
    expected = (5 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25 * math.exp(1 - 6 / 5)
    assert bleu([counts]) == pytest.approx(expected)
    assert bleu([counts, bleu_counts("a b c d", "a b c d")]) != pytest.approx((1 + expected) / 2)


def test_repeating_a_right_word_does_not_pay():
    assert bleu_counts("the the the", "the cat")[0] == 1


def test_a_schema_is_followed_in_full(tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text(
        json.dumps(
            {
                "type": "object",
                "required": ["name", "order"],
                "properties": {"order": {"type": "string", "pattern": "^[0-9]+$"}},
                "additionalProperties": {"type": "string"},
            }
        )
    )
    answers = ['{"name": "A", "order": "1"}', '{"name": "A", "order": "x"}', '{"name": "A"}', "A"]
    assert total(f"json_schema={schema}", answers, [""] * 4) == 0.25
    (metric,) = make_metrics([f"json_schema={schema}"], [""])
    assert metric.name == "json_schema.valid"


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "string", "pattern": r"\p{L}+"}, "is not a 'regex'"),
        ({"allOf": [{"$ref": "#"}]}, "refers to itself"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_one_message(tmp_path, schema, says):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(schema))
    with pytest.raises(EvaluationError, match=says):
        total(f"json_schema={path}", ['"a"'], [""])


@pytest.mark.parametrize("content", ["{", '{"type": "no such type"}'])
def test_a_file_that_is_no_schema_says_so(tmp_path, content):
    schema = tmp_path / "schema.json"
    schema.write_text(content)
    with pytest.raises(EvaluationError, match=r"schema\.json"):
        make_metrics([f"json_schema={schema}"], [""])


def test_a_schema_that_refers_elsewhere_fetches_nothing(tmp_path, monkeypatch):
    import urllib.request

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_: pytest.fail("it was fetched"))
    schema = tmp_path / "schema.json"
    schema.write_text('{"$ref": "http://127.0.0.1:9/schema.json"}')
    with pytest.raises(EvaluationError, match="refers"):
        total(f"json_schema={schema}", ["{}"], [""])


def test_labels_count_by_class():
    wanted = ["a", "a", "a", "b", "b", "c"]
    answers = ["a", "a ", "b", "b", "nonsense", "a"]
    assert total("label", answers, wanted) == pytest.approx(3 / 6)
    metrics = {metric.name: metric for metric in make_metrics(["label"], wanted)}
    measure = metrics["label.accuracy"].measure
    rows = [measure(a, w) for a, w in zip(answers, wanted, strict=True)]
    # a: 2 of 3 given, 2 of 3 wanted; b: 1 of 2, 1 of 2; c: none of 0, none of 1.
    assert metrics["label.macro_f1"].total(rows) == pytest.approx((4 / 6 + 2 / 4 + 0) / 3)
    assert confusion(rows) == {"a": {"a": 2, "b": 1}, "b": {OTHER: 1, "b": 1}, "c": {"a": 1}}


def test_a_label_that_is_called_other_is_given_only_by_name():
    wanted = [OTHER, OTHER, "a"]
    assert total("label", ["nonsense", OTHER, "a"], wanted) == pytest.approx(2 / 3)
    metric = make_metrics(["label"], wanted)[0]
    rows = [metric.measure(given, OTHER) for given in ("nonsense", OTHER)]
    assert confusion(rows) == {OTHER: {f"({OTHER})": 1, OTHER: 1}}


def test_perplexity_is_of_tokens_not_of_rows():
    (metric,) = make_metrics(["perplexity"], ["x"])
    rows = [metric.measure([math.log(0.5)] * 3, "x"), metric.measure([math.log(0.125)], "x")]
    assert metric.total(rows) == pytest.approx(2 ** (6 / 4))
    assert metric.total([metric.measure([], "")]) == 1
    assert math.isfinite(metric.total([metric.measure([-1e6], "x")]))
    assert not metric.is_better_high
    assert metric.row_score(rows[0]) > metric.row_score(rows[1])


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("exact_mach", "exact_match"),
        ("regex=(", "regular expression"),
        ("regex=", "regex"),
        ("json_schema=/nowhere", "cannot be read"),
        ("zzz", "there are exact_match"),
    ],
)
def test_a_metric_that_there_is_not_says_which_there_are(spec, says):
    with pytest.raises(EvaluationError, match=says):
        make_metrics([spec], [""])


def test_a_metric_asked_for_twice_is_refused():
    with pytest.raises(EvaluationError, match="twice"):
        make_metrics(["exact_match", "exact_match"], [""])


# -- statistics -----------------------------------------------------------------------------


def mean(values: Any) -> float:
    return sum(values) / len(values)


def test_an_interval_is_that_of_a_binomial_and_the_same_for_the_same_seed():
    measured = [1.0] * 80 + [0.0] * 20
    found = estimate(measured, mean, seed=3)
    assert found == estimate(measured, mean, seed=3)
    assert found != estimate(measured, mean, seed=4)
    assert found.value == 0.8
    spread = 1.96 * math.sqrt(0.8 * 0.2 / 100)
    assert found.low == pytest.approx(0.8 - spread, abs=0.02)
    assert found.high == pytest.approx(0.8 + spread, abs=0.02)


def test_percentiles_are_between_the_nearest():
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert percentile([1.0], 0.95) == 1.0
    assert percentile([0.0, 10.0], 0.95) == pytest.approx(9.5)


def test_the_sign_test_is_exact():
    assert sign_test(0, 0) == 1
    assert sign_test(5, 5) == 1
    assert sign_test(10, 0) == pytest.approx(2 / 2**10)
    assert sign_test(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert sign_test(3000, 2000) < 1e-40


def test_pairs_are_counted_row_by_row():
    found = pair("m", "a", "b", [(1, 0), (1, 1), (0, 1), (0.5, 0.25)])
    assert (found.wins, found.ties, found.losses) == (2, 1, 1)


# -- gates ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("exact_match >= 0.75", True),
        ("exact_match > 0.75", False),
        ("exact_match > base", True),
        ("exact_match >= base + 0.5", True),
        ("exact_match >= base + 0.51", False),
        ("exact_match > base - 0.1", True),
        ("perplexity < base", True),
        ("perplexity<2", True),
        ("latency_p95_s <= 0.2", True),
        ("generated_tokens == 40", True),
        ("cost_per_million_tokens < base", False),
        ("cost_per_correct < 1", False),
        ("exact_match > base (p < 0.07)", True),
        ("exact_match > base + 0.1 ( p<0.07 )", True),
        ("exact_match > base (p < 0.05)", False),
        ("exact_match > base + 0.9 (p < 0.07)", False),
    ],
)
def test_a_gate(text, holds):
    assert parse_gate(text).check(make_evaluation()).holds is holds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "exact_match",
        "exact_match 0.9",
        "exact_match => 1",
        "> 1",
        "exact_match > 0.9 (p < 0.05)",
        "exact_match > base (p > 0.05)",
    ],
)
def test_what_is_no_gate_is_refused_before_anything_is_asked(text):
    with pytest.raises(EvaluationError, match="FIGURE SIGN NUMBER"):
        parse_gate(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bleu > 0.5", "no figure 'bleu'"),
        ("exact_match > prompt_only", "no variant 'prompt_only'"),
        ("scores > 1", "scores"),
        ("perplexity < base (p < 0.05)", "rows are not compared by 'perplexity'"),
    ],
)
def test_a_gate_about_what_there_is_not_never_holds(text, says):
    with pytest.raises(EvaluationError, match=says):
        parse_gate(text).check(make_evaluation())

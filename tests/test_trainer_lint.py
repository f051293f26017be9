"""The linter: each kind of fault is found where it is, and good rows are left alone."""

import pytest

from lory_trainer.data_lint import Finding, lint
from lory_trainer.data_rows import Sample


def sample(number: int, prompt: str, answer: str, rejected: str | None = None) -> Sample:
    return Sample(f"line {number}", prompt, answer, rejected)


def good(count: int) -> list[Sample]:
    return [sample(n, f"question {n}", f"answer {n}") for n in range(1, count + 1)]


def found(train, held_out=()):
    return {(f.code, f.level): f for f in lint(train, list(held_out))}


def test_a_thousand_good_rows_need_no_word():
    assert lint(good(1000), [sample(1001, "another question", "x")]) == []


@pytest.mark.parametrize(
    ("count", "level", "advice"),
    [(10, "warning", "write 100"), (60, "info", "worth a try"), (500, "info", "narrow task")],
)
def test_few_rows_get_advice_by_their_number(count, level, advice):
    finding = found(good(count))["few", level]
    assert advice in finding.text


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("key AKIAIOSFODNN7EXAMPLE", "an AWS key"),
        ("sk-proj-abcdefghijklmnopqrstuvwx", "an API key"),
        ("hf_abcdefghijklmnopqrstuvwxyzABCDEFGH", "a Hugging Face token"),
        ("ghp_abcdefghijklmnopqrstuvwxyz0123456789", "a GitHub token"),
        ("-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY.SflKxwRJSMeKKF2Q", "a JSON web token"),
    ],
)
def test_secrets_are_found_and_never_shown(text, what):
    finding = found([*good(1000), sample(1001, "q", text)])["secret", "warning"]
    assert what in finding.text
    assert finding.places == ("line 1001",)
    assert text not in str(finding)


def test_addresses_are_found():
    finding = found([*good(1000), sample(7, "mail ana.lopez@example.com", "ok")])[
        "email", "warning"
    ]
    assert finding.places == ("line 7",)
    assert ("email", "warning") not in found([*good(1000), sample(7, "a @ b, x@y", "ok")])


def test_leaks_are_found_whole_and_in_part():
    words = " ".join(f"word{n}" for n in range(20))
    train = [*good(1000), sample(1001, f"before {words}", "x")]
    held_out = [sample(1, " QUESTION  5 ", "else"), sample(2, f"{words} after", "y")]
    findings = [f for f in lint(train, held_out) if f.code == "leak"]
    assert [f.places for f in findings] == [("line 1",), ("line 2",)]


def test_what_the_template_says_in_every_row_is_no_leak():
    frame = " ".join(f"word{n}" for n in range(20))
    train = [sample(n, f"{frame} {n}", "x") for n in range(1000)]
    assert not [f for f in lint(train, [sample(1, f"{frame} other", "y")]) if f.code == "leak"]


def test_duplicates_conflicts_and_empty_answers_are_found():
    train = [
        *good(1000),
        sample(1001, "question 1", "answer 1"),
        sample(1002, "question 2", "another answer"),
        sample(1003, "question 1003", "  "),
    ]
    findings = found(train)
    assert findings["duplicate", "warning"].places == ("line 1001",)
    assert findings["conflict", "warning"].places == ("line 1002",)
    assert findings["empty", "warning"].places == ("line 1003",)


def test_pairs_without_a_difference_are_found():
    pairs = [sample(n, f"q {n}", "a", "b") for n in range(1000)]
    finding = found([*pairs, sample(5, "q", "a", "a")])["same", "warning"]
    assert finding.places == ("line 5",)


def test_rare_labels_are_found_and_even_ones_told():
    even = [sample(n, f"q {n}", "yes" if n % 2 else "no") for n in range(1000)]
    assert "2 different answers" in found(even)["balance", "info"].text
    rare = [sample(n, f"q {n}", "yes" if n else "no") for n in range(1000)]
    assert "999 times" in found(rare)["balance", "warning"].text


def test_only_a_few_places_are_written_out():
    finding = found([sample(n, f"q {n}", "") for n in range(1000)])["empty", "warning"]
    assert str(finding).endswith("and 995 more)")


def test_lines_of_one_file_are_written_after_its_name():
    places = ("a.jsonl line 1", "a.jsonl line 2", "b.csv line 2", "a.jsonl line 3")
    finding = Finding("empty", "info", "empty", places)
    assert str(finding) == "empty (a.jsonl line 1, 2, b.csv line 2, a.jsonl line 3)"


def test_one_row_is_told_as_one():
    told = [str(finding) for finding in lint([sample(1, "q", " ")], [])]
    assert told[0] == "1 row has an empty answer: saying nothing is what is learned there (line 1)"
    assert told[1].startswith("1 row: under 50")

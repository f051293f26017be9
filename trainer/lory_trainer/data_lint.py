"""What is wrong with rows before a model sees them, and how many more would help.

Each finding names a few places, never the text found: it may be a secret. This module must not
know tokenizers or models.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lory_trainer.data_rows import Sample

MOST_PLACES = 5
GRAM_WORDS = 13
FEW, SOME, ENOUGH = 50, 100, 1000
MOST_CLASSES = 20

SECRETS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("a private key", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")),
    ("an AWS key", re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b")),
    ("an API key", re.compile(r"\b(?:sk|pk|rk)[-_](?:[A-Za-z]+[-_])*[A-Za-z0-9]{20,}\b")),
    ("a Hugging Face token", re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")),
    ("a GitHub token", re.compile(r"\b(?:ghp|gho|ghu|ghs|ghr)_[A-Za-z0-9]{36,}\b")),
    ("a Slack token", re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{10,}")),
    ("a JSON web token", re.compile(r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}")),
)
EMAIL = re.compile(r"\b[\w.+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})*\.[A-Za-z]{2,24}\b")


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of thing, and where it is."""

    code: Literal[
        "duplicate", "conflict", "empty", "leak", "secret", "email", "balance", "few", "same"
    ]
    level: Literal["warning", "info"]
    text: str
    places: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = _listed(self.places[:MOST_PLACES])
        more = len(self.places) - MOST_PLACES
        tail = f" and {more} more" if more > 0 else ""
        return f"{self.text} ({shown}{tail})" if shown else self.text


_OF_ONE = {"hold": "holds", "have": "has", "ask": "asks", "are": "is"}


def _rows(places: Sequence[str], verb: str) -> str:
    return f"{len(places)} rows {verb}" if len(places) > 1 else f"1 row {_OF_ONE[verb]}"


def _listed(places: Sequence[str]) -> str:
    """Lines of one file after its name: rows.jsonl line 1, 2, 5."""
    before = ""
    found: list[str] = []
    for place in places:
        where, _, number = place.rpartition(" ")
        found.append(number if where == before else place)
        before = where
    return ", ".join(found)


def lint(train: Sequence[Sample], held_out: Sequence[Sample]) -> list[Finding]:
    """Everything there is to say, what matters most first."""
    checks: tuple[Callable[[], Iterable[Finding]], ...] = (
        lambda: _secrets([*train, *held_out]),
        lambda: _leaks(train, held_out),
        lambda: _empty([*train, *held_out]),
        lambda: _conflicts(train),
        lambda: _same_answers(train),
        lambda: _duplicates(train),
        lambda: _emails([*train, *held_out]),
        lambda: _balance(train),
        lambda: _count(train),
    )
    return [finding for check in checks for finding in check()]


def _secrets(samples: Sequence[Sample]) -> Iterator[Finding]:
    for what, pattern in SECRETS:
        places = tuple(s.place for s in samples if pattern.search(s.text))
        if places:
            yield Finding(
                "secret",
                "warning",
                f"{_rows(places, 'hold')} what looks like {what}: a model can learn it by heart; "
                "take it out, and revoke it",
                places,
            )


def _emails(samples: Sequence[Sample]) -> Iterator[Finding]:
    places = tuple(s.place for s in samples if EMAIL.search(s.text))
    if places:
        yield Finding(
            "email",
            "warning",
            f"{_rows(places, 'hold')} e-mail addresses, which a model can learn by heart",
            places,
        )


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()


LEAST_SHARED = 3
"""Words in a row that more rows than these and than half of all have are their prompt's frame."""


def _leaks(train: Sequence[Sample], held_out: Sequence[Sample]) -> Iterator[Finding]:
    """Held-out rows that were trained on, whole or in a run of words."""
    if not held_out:
        return
    prompts = {_normal(s.prompt_text or s.text) for s in train}
    same = tuple(s.place for s in held_out if _normal(s.prompt_text or s.text) in prompts)
    if same:
        yield Finding(
            "leak",
            "warning",
            f"{len(same)} of {len(held_out)} held-out rows ask what a training row asks: their "
            "scores say nothing",
            same,
        )
    wanted = {gram for s in held_out for gram in _grams(s.text)}
    counts = Counter(gram for s in train for gram in wanted.intersection(_grams(s.text)))
    of_the_template = max(LEAST_SHARED, len(train) // 2)
    grams = {gram for gram, count in counts.items() if count <= of_the_template}
    whole = set(same)
    near = tuple(
        s.place
        for s in held_out
        if s.place not in whole and any(gram in grams for gram in _grams(s.text))
    )
    if near:
        yield Finding(
            "leak",
            "warning" if len(near) * 10 >= len(held_out) else "info",
            f"{len(near)} of {len(held_out)} held-out rows share {GRAM_WORDS} words in a row with "
            "a training row",
            near,
        )


def _grams(text: str) -> Iterator[int]:
    words = _normal(text).split()
    for start in range(len(words) - GRAM_WORDS + 1):
        yield hash(tuple(words[start : start + GRAM_WORDS]))


def _empty(samples: Sequence[Sample]) -> Iterator[Finding]:
    places = tuple(
        s.place
        for s in samples
        if not s.answer_text.strip() or (s.rejected is not None and not s.rejected.strip())
    )
    if places:
        text = f"{_rows(places, 'have')} an empty answer: saying nothing is what is learned there"
        yield Finding("empty", "warning", text, places)
    places = tuple(
        s.place for s in samples if isinstance(s.prompt, tuple) and not s.prompt_text.strip()
    )
    if places:
        yield Finding("empty", "warning", f"{_rows(places, 'ask')} nothing", places)


def _duplicates(samples: Sequence[Sample]) -> Iterator[Finding]:
    seen: set[str] = set()
    places: list[str] = []
    for sample in samples:
        text = _normal(sample.text)
        if text in seen:
            places.append(sample.place)
        seen.add(text)
    if places:
        text = f"{_rows(places, 'are')} there already: each counts again in every pass"
        yield Finding("duplicate", "warning", text, tuple(places))


def _conflicts(samples: Sequence[Sample]) -> Iterator[Finding]:
    """One question, several answers."""
    answers: dict[str, str] = {}
    places: list[str] = []
    for sample in samples:
        if not sample.prompt_text or sample.rejected is not None:
            continue
        prompt, answer = _normal(sample.prompt_text), sample.answer_text.strip()
        if answers.setdefault(prompt, answer) != answer:
            places.append(sample.place)
    if places:
        text = f"{_rows(places, 'ask')} what another row asks, with another answer"
        yield Finding("conflict", "warning", text, tuple(places))


def _same_answers(samples: Sequence[Sample]) -> Iterator[Finding]:
    places = tuple(
        s.place
        for s in samples
        if s.rejected is not None and s.rejected.strip() == s.answer.strip()
    )
    if places:
        text = f"{len(places)} pairs have the same answer twice: nothing is preferred"
        yield Finding("same", "warning", text, places)


def _balance(samples: Sequence[Sample]) -> Iterator[Finding]:
    """Where answers are a few labels, how they are spread."""
    answers = Counter(s.answer_text.strip() for s in samples if s.rejected is None)
    if not 2 <= len(answers) <= MOST_CLASSES or len(samples) < 5 * len(answers):
        return
    ordered = answers.most_common()
    spread = ", ".join(f"{label!r} {count}" for label, count in ordered[:MOST_PLACES])
    (_, most), (_, least) = ordered[0], ordered[-1]
    if most > 10 * least:
        yield Finding(
            "balance",
            "warning",
            f"{len(answers)} different answers, the commonest {most / least:.0f} times as often "
            f"as the rarest ({spread}): add rows of the rare ones",
        )
    else:
        yield Finding("balance", "info", f"{len(answers)} different answers: {spread}")


def _count(samples: Sequence[Sample]) -> Iterator[Finding]:
    count = len(samples)
    if count < FEW:
        advice = f"under {FEW} rarely teach a task; write {SOME} for a first try"
    elif count < SOME:
        advice = f"worth a try for a style or a few labels; {SOME} is a usual start"
    elif count < ENOUGH:
        advice = f"enough for a narrow task; nested output and rare cases want {ENOUGH} and more"
    else:
        return
    rows = "1 row" if count == 1 else f"{count} rows"
    yield Finding("few", "warning" if count < FEW else "info", f"{rows}: {advice}")

"""What an evaluation shows: a table, and a page that is whole in itself and trusts no text."""

import re
from dataclasses import replace
from html.parser import HTMLParser

from rich.console import Console

from lory_trainer.evaluation.page import page
from lory_trainer.evaluation.results import (
    Evaluation,
    GateResult,
    JudgedPair,
    RowResult,
    Spent,
    VariantResult,
)
from lory_trainer.evaluation.statistics import Estimate, Pairing
from lory_trainer.evaluation.table import show

HOSTILE = "</td><script>alert(1)</script><img src='http://evil/x' onerror=\"x\"> [red]&amp;"


def make_variant(name: str, exact: float, perplexity: float) -> VariantResult:
    return VariantResult(
        name=name,
        kind="base" if name == "base" else "adapter",
        revision="" if name == "base" else "1f3a9c",
        scores={
            "exact_match": Estimate(exact, exact - 0.1, exact + 0.1),
            "perplexity": Estimate(perplexity, perplexity, perplexity),
        },
        spent=Spent(0.1, 0.2, 100, 40, 2.0, cost_per_million_tokens=5.0, cost_per_correct=None),
        num_cut=0,
        confusion={"a": {"a": 3, HOSTILE: 1}},
    )


def make_evaluation() -> Evaluation:
    rows = tuple(
        RowResult(f"f line {i}", {"text": HOSTILE}, "w", {"good": got, "base": "x"}, scores)
        for i, (got, scores) in enumerate(
            [
                ("w", {"good": 1.0, "base": 0.0}),
                (HOSTILE, {"good": 0.0, "base": 1.0}),
                ("v", {"good": 0.0, "base": 0.0}),
            ]
        )
    )
    return Evaluation(
        data="rows.jsonl",
        data_sha256="0" * 64,
        server="http://127.0.0.1:1",
        base="tiny",
        base_matches=None,
        seed=0,
        is_greedy=True,
        max_new_tokens=16,
        concurrency=2,
        price_per_hour=1.0,
        candidate="good",
        main_metric="exact_match",
        lower_is_better=("perplexity",),
        variants=(make_variant("good", 0.75, 1.5), make_variant("base", 0.25, 9.0)),
        pairings=(Pairing("exact_match", "good", "base", 5, 1, 0, 0.0625),),
        judged=(JudgedPair(HOSTILE, "good", "base", 1, 2, 3, 4, 0.5),),
        judge_error=HOSTILE,
        rows=rows,
    )


GATES = [GateResult("exact_match > 0.9", False, "exact_match is 0.75, against 0.9")]


class Page(HTMLParser):
    """Which tags and texts there are; raises where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_a_page_loads_nothing_and_shows_every_text_as_it_is():
    text = page(make_evaluation(), GATES)
    found = Page(text)
    assert not {"script", "img", "link", "iframe", "object"} & set(found.tags)
    assert not found.links
    assert "default-src 'none'" in text
    assert not re.search(r"url\(|@import", text)
    assert any(HOSTILE in part for part in found.texts)
    assert "gate fails" in text


def test_the_worst_come_first_and_right_answers_not_at_all():
    worst = make_evaluation().worst(10)
    assert [row.place for row in worst] == ["f line 1", "f line 2"]
    assert len(make_evaluation().worst(1)) == 1


def test_a_table_tells_figures_pairs_gates_and_a_wrong_base():
    console = Console(record=True, width=160, file=open("/dev/null", "w"))  # noqa: SIM115
    show(console, replace(make_evaluation(), base_matches=False), GATES)
    console.file.close()
    text = console.export_text()
    for part in ("75.0% (65-85)", "1.500", "0.062", "gate FAILS", "another base", "[red]"):
        assert part in text, part
    assert "cost, 1M tokens" in text

"""The evaluation as one HTML file: nothing in it is loaded from anywhere, every text is escaped.

It must not know how figures are made.
"""

from collections.abc import Iterable, Sequence
from html import escape

from lory_trainer.evaluation.results import Confusion, Evaluation, GateResult, RowResult
from lory_trainer.evaluation.shown import base_warning, chance, duel, how, score_lines, spent_lines

MOST_ROWS = 100
"""Of the worst, that a page shows."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #8884; text-align: right }
th:first-child, td:first-child, .text th, .text td { text-align: left; vertical-align: top }
.text td { white-space: pre-wrap; font-family: ui-monospace, monospace; font-size: 13px }
.good { color: #1a7f37 } .bad { color: #cf222e } .quiet { color: #777 }
""".strip()
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(result: Evaluation, gates: Sequence[GateResult]) -> str:
    title = f"{result.candidate} on {result.data}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        *_warnings(result),
        _figures(result),
        _pairings(result),
        *(_confusion(one.name, one.confusion) for one in result.variants if one.confusion),
        *(_gate(gate) for gate in gates),
        _worst(result),
        f'<p class="quiet">{escape(how(result))}</p>',
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _warnings(result: Evaluation) -> list[str]:
    judge = f"the judge: {result.judge_error}" if result.judge_error else ""
    warnings = filter(None, (base_warning(result), judge))
    return [f'<p class="bad">{escape(warning)}</p>' for warning in warnings]


def _figures(result: Evaluation) -> str:
    rows = [*score_lines(result), *spent_lines(result)]
    return _table(
        ["", *(variant.name for variant in result.variants)],
        [[line.name, *line.cells] for line in rows],
    )


def _pairings(result: Evaluation) -> str:
    rows = [list(duel(pairing)) for pairing in result.pairings]
    rows += [
        [
            f"judge {one.judge}",
            one.second,
            *map(str, (one.wins, one.ties, one.losses)),
            chance(one.p),
        ]
        for one in result.judged
    ]
    if not rows:
        return ""
    head = ["metric", "against", "won", "tied", "lost", "p of the sign test"]
    return f"<h2>Row by row</h2>{_table(head, rows)}"


def _confusion(name: str, found: Confusion) -> str:
    given = sorted({label for counts in found.values() for label in counts})
    rows = [
        [wanted, *(str(counts.get(label, 0)) for label in given)]
        for wanted, counts in found.items()
    ]
    return f"<h2>Labels of {escape(name)}</h2>{_table(['wanted / given', *given], rows)}"


def _gate(gate: GateResult) -> str:
    verdict, style = ("holds", "good") if gate.holds else ("fails", "bad")
    text = escape(f"gate {verdict}: {gate.condition}: {gate.explanation}")
    return f'<p class="{style}">{text}</p>'


def _worst(result: Evaluation) -> str:
    worst = result.worst(MOST_ROWS)
    if not worst:
        return "<p>Every answer is the wanted one.</p>"
    names = [variant.name for variant in result.variants]
    head = ["row", "asked", "wanted", *names]
    rows = [_asked(row, names) for row in worst]
    return f"<h2>Worst rows</h2>{_table(head, rows, 'text')}"


def _asked(row: RowResult, names: Sequence[str]) -> list[str]:
    asked = "\n".join(f"{name}: {value}" for name, value in row.values.items())
    return [row.place, asked, row.wanted, *(row.answers[name] for name in names)]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], style: str = "") -> str:
    body = "\n".join(f"<tr>{_cells(row, 'td')}</tr>" for row in rows)
    mark = f' class="{style}"' if style else ""
    return f"<table{mark}>\n<tr>{_cells(head, 'th')}</tr>\n{body}\n</table>"


def _cells(texts: Iterable[str], kind: str) -> str:
    return "".join(f"<{kind}>{escape(text)}</{kind}>" for text in texts)

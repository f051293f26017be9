"""The evaluation in a terminal. It must not know how figures are made."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lory_trainer.evaluation.results import Evaluation, GateResult
from lory_trainer.evaluation.shown import base_warning, chance, duel, how, score_lines, spent_lines


def show(console: Console, result: Evaluation, gates: list[GateResult], num_worst: int = 5) -> None:
    console.print(_figures(result))
    if result.pairings:
        console.print(_pairings(result))
    for one in result.judged:
        console.print(
            Text(
                f"judge {one.judge}: {one.first} against {one.second}: {one.wins} won,"
                f" {one.ties} tied, {one.losses} lost, {one.unreadable} unreadable"
                f" (p {chance(one.p)})"
            )
        )
    _show_worst(console, result, num_worst)
    console.print(Text(how(result), style="dim"))
    if warning := base_warning(result):
        console.print(Text(f"warning: {warning}", style="yellow"))
    for gate in gates:
        verdict = "holds" if gate.holds else "FAILS"
        style = "green" if gate.holds else "red"
        console.print(Text(f"gate {verdict}: {gate.condition}: {gate.explanation}", style=style))


def _figures(result: Evaluation) -> Table:
    table = Table("", box=None)
    for variant in result.variants:
        table.add_column(Text(variant.name), justify="right")
    for line in score_lines(result):
        table.add_row(line.name, *line.cells, style="bold")
    for line in spent_lines(result):
        table.add_row(line.name, *line.cells)
    return table


def _pairings(result: Evaluation) -> Table:
    table = Table(box=None)
    table.add_column(Text(f"{result.candidate} against"))
    table.add_column("metric")
    for name in ("won", "tied", "lost", "p"):
        table.add_column(name, justify="right")
    main = [one for one in result.pairings if one.metric == result.main_metric]
    for pairing in main:
        metric, other, *counts = duel(pairing)
        table.add_row(Text(other), metric, *counts)
    return table


def _show_worst(console: Console, result: Evaluation, most: int) -> None:
    worst = result.worst(most)
    if not worst:
        return
    console.print(Text(f"Worst of {result.candidate}:", style="bold"))
    for row in worst:
        console.print(Text(f"  {row.place}: {_short(' | '.join(row.values.values()))}"))
        console.print(Text(f"    wanted {_short(row.wanted)}", style="green"))
        console.print(Text(f"    got    {_short(row.answers[result.candidate])}", style="red"))


def _short(text: str, most: int = 160) -> str:
    """One line of printable characters."""
    plain = ascii(text)
    return plain if len(plain) <= most else plain[:most] + "..."

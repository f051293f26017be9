"""Writes each task's rows: data/<task>/train.jsonl, and eval.jsonl with texts not trained on.

The rows depend on the task's name and the counts alone. This script must not know models.
"""

import json
from collections.abc import Collection
from pathlib import Path
from random import Random
from typing import Annotated

import typer
from tasks import TASKS, Row, TaskMaker

DATA_DIR = Path(__file__).parent / "data"
NUM_TRAIN_ROWS = 6000
NUM_EVAL_ROWS = 100


def train_rows(task: str, count: int = NUM_TRAIN_ROWS) -> list[Row]:
    return _distinct_rows(TASKS[task], Random(f"{task} train"), count, frozenset())


def eval_rows(task: str, count: int = NUM_EVAL_ROWS) -> list[Row]:
    """Rows whose text is in none of the training rows."""
    trained = {text for text, _ in train_rows(task)}
    return _distinct_rows(TASKS[task], Random(f"{task} eval"), count, trained)


def _distinct_rows(make: TaskMaker, rng: Random, count: int, seen: Collection[str]) -> list[Row]:
    """`count` rows with different texts, or as many as 20 times that many draws give."""
    rows: dict[str, str] = {}
    for _ in range(20 * count):
        if len(rows) == count:
            break
        text, answer = make(rng)
        if text not in seen:
            rows[text] = answer
    return list(rows.items())


def write_jsonl(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": text, "completion": answer}) for text, answer in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(
    output: Annotated[Path, typer.Option(help="Folder of the tasks' data.")] = DATA_DIR,
) -> None:
    """Write the training and evaluation rows of every demo task."""
    for task in TASKS:
        write_jsonl(output / task / "train.jsonl", train_rows(task))
        write_jsonl(output / task / "eval.jsonl", eval_rows(task))


if __name__ == "__main__":
    typer.run(main)

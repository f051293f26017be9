"""Rows for `make demo-train`: train/pig-latin.jsonl, a task that no shipped adapter knows.

A row is a phrase and the same in pig latin. The rows depend on the count alone. This script must
not know models.
"""

import json
from pathlib import Path
from random import Random
from typing import Annotated

import typer
import words

NUM_ROWS = 3000
ROWS_FILE = Path(__file__).parent / "train" / "pig-latin.jsonl"
VOWELS = "aeiou"


def pig_latin(word: str) -> str:
    """apple: appleway; string: ingstray."""
    start = next((i for i, letter in enumerate(word) if letter in VOWELS), 0)
    return f"{word[start:]}{word[:start]}ay" if start else f"{word}way"


def rows(count: int = NUM_ROWS) -> list[dict[str, str]]:
    """Different phrases of one to four words."""
    rng, found = Random("pig latin"), {}
    while len(found) < count:
        text = words.phrase(rng, 1, 4).lower()
        found[text] = " ".join(pig_latin(word) for word in text.split())
    return [{"phrase": text, "translation": answer} for text, answer in found.items()]


def main(output: Annotated[Path, typer.Option(help="JSONL file.")] = ROWS_FILE) -> None:
    """Write the rows."""
    lines = (json.dumps(row) for row in rows())
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

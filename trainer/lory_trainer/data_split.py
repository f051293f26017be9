"""Which rows are trained on, and which are held out.

This module must not know what a row means.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from random import Random

from lory_trainer.config import SplitOptions
from lory_trainer.data_files import PARTS, Part, RawRow, RowParts
from lory_trainer.errors import DataError

NUMBERED: dict[str, Part] = {"0": "train", "1": "validation", "2": "test"}


def split_rows(rows: Sequence[RawRow], options: SplitOptions, seed: int) -> RowParts:
    """Each row in one of the three; their order is kept."""
    choose = {"random": _at_random, "hash": _by_hash, "fixed": _by_column}[options.type]
    parts: dict[Part, list[RawRow]] = {"train": [], "validation": [], "test": []}
    for row, part in zip(rows, choose(rows, options, seed), strict=True):
        parts[part].append(row)
    if not parts["train"]:
        raise DataError("split: leaves no rows to train on")
    return RowParts(tuple(parts["train"]), tuple(parts["validation"]), tuple(parts["test"]))


def _at_random(rows: Sequence[RawRow], options: SplitOptions, seed: int) -> list[Part]:
    """Exact shares, rounded; which rows, the seed says."""
    places = list(range(len(rows)))
    Random(seed).shuffle(places)
    _, validation, test = options.probabilities
    num_validation = round(len(rows) * validation)
    num_test = min(round(len(rows) * test), len(rows) - num_validation)
    parts: list[Part] = ["train"] * len(rows)
    for place in places[:num_validation]:
        parts[place] = "validation"
    for place in places[num_validation : num_validation + num_test]:
        parts[place] = "test"
    return parts


def _by_hash(rows: Sequence[RawRow], options: SplitOptions, seed: int) -> list[Part]:
    return [_part_at(_hash_share(row), options) for row in rows]


def _hash_share(row: RawRow) -> float:
    text = json.dumps(row.values, sort_keys=True, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def _part_at(share: float, options: SplitOptions) -> Part:
    train, validation, _ = options.probabilities
    if share < train:
        return "train"
    return "validation" if share < train + validation else "test"


def _by_column(rows: Sequence[RawRow], options: SplitOptions, seed: int) -> list[Part]:
    read: Callable[[RawRow], Part] = lambda row: _named_part(row, options.column)  # noqa: E731
    return [read(row) for row in rows]


def _named_part(row: RawRow, column: str) -> Part:
    value = row.values.get(column)
    if isinstance(value, float) and value == int(value):
        value = int(value)
    part = NUMBERED.get(str(value)) or PARTS.get(str(value).lower())
    if part is None:
        raise DataError(
            f"data: {row.place}: column `{column}` must hold 0, 1 or 2 (train, validation, test); "
            f"found: {value!r}"
        )
    return part

"""Rows of text to rows of token ids, with a mark where the answer begins.

The prompt is tokenised exactly as a server would tokenise it, the answer after it on its own,
then the end-of-sequence id. The loss mask goes by position, never by id: padding may share the
id of the end. This module must not know models, peft or the configuration's file.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from lory_trainer.errors import DataError
from lory_trainer.template import render, template_fields

IGNORED = -100
"""The label cross_entropy skips."""

Row = dict[str, str]


@dataclass(frozen=True, slots=True)
class Example:
    """One row as ids; the first num_prompt_tokens are read, the others are learned."""

    ids: tuple[int, ...]
    num_prompt_tokens: int

    @property
    def num_answer_tokens(self) -> int:
        return len(self.ids) - self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded rows, [rows, length]."""

    ids: torch.Tensor
    labels: torch.Tensor

    @property
    def num_answer_tokens(self) -> int:
        return int((self.labels != IGNORED).sum())


def read_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    """The named columns of every line; raises DataError naming the line that lacks one."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise DataError(
            f"data: there is no file {path}; a relative path starts at the configuration's folder"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data: {path.name} cannot be read: {error}") from error
    rows = [
        _parse_row(line, f"{path.name} line {number}", columns)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not rows:
        raise DataError(f"data: {path.name} holds no rows")
    return rows


def _parse_row(line: str, place: str, columns: Sequence[str]) -> Row:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"data: {place}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f'data: {place}: expected an object such as {{"text": "..."}}')
    for column in columns:
        if not isinstance(value.get(column), str):
            found = ", ".join(value) or "nothing"
            raise DataError(f"data: {place}: column `{column}` must hold text; found: {found}")
    return {column: value[column] for column in columns}


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def encode(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, template: str, completion: str
) -> list[Example]:
    """Every row as an Example; the template's fields and the completion column must be there."""
    template_fields(template)
    eos_id = tokenizer.eos_token_id
    if not isinstance(eos_id, int):
        raise DataError(
            "base: its tokenizer names no eos_token; an adapter could not learn to stop"
        )
    return [_encode_row(tokenizer, render(template, row), row[completion], eos_id) for row in rows]


def _encode_row(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, eos_id: int
) -> Example:
    prompt_ids = tokenizer.encode(prompt)
    answer_ids = tokenizer.encode(answer, add_special_tokens=False)
    return Example((*prompt_ids, *answer_ids, eos_id), len(prompt_ids))


def fit_length(
    examples: Sequence[Example], max_length: int, overlong: Literal["error", "drop"]
) -> list[Example]:
    """The rows of at most max_length tokens; longer ones are an error or dropped, never cut."""
    kept = [example for example in examples if len(example.ids) <= max_length]
    num_overlong = len(examples) - len(kept)
    longest = max(len(example.ids) for example in examples)
    if num_overlong and overlong == "error":
        raise DataError(
            f"data: {num_overlong} of {len(examples)} rows are longer than max_length {max_length} "
            f"(longest: {longest} tokens); raise max_length or set `overlong: drop`"
        )
    if not kept:
        raise DataError(f"data: every row is longer than max_length {max_length}")
    return kept


def epoch_batches(examples: Sequence[Example], batch_size: int, rng: Random) -> list[list[Example]]:
    """Every row once, in random order; rows of like length are neighbours, so padding is little."""
    order = list(examples)
    rng.shuffle(order)
    pool = batch_size * 16
    batches: list[list[Example]] = []
    for start in range(0, len(order), pool):
        alike = sorted(order[start : start + pool], key=lambda example: len(example.ids))
        batches += [alike[i : i + batch_size] for i in range(0, len(alike), batch_size)]
    rng.shuffle(batches)
    return batches


def collate(examples: Sequence[Example]) -> Batch:
    """Pads on the right with id 0: a causal model never looks there, and no label is there."""
    length = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    labels = torch.full((len(examples), length), IGNORED, dtype=torch.long)
    for row, example in enumerate(examples):
        tokens = torch.tensor(example.ids)
        ids[row, : len(tokens)] = tokens
        labels[row, example.num_prompt_tokens : len(tokens)] = tokens[example.num_prompt_tokens :]
    return Batch(ids, labels)

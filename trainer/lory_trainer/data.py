"""Rows of token ids and the batches made of them.

The loss mask goes by position, never by id: padding may share the id of the end. This module must
not know models, tokenizers, files or the configuration.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, TypeVar

import torch

from lory_trainer.errors import DataError

IGNORED = -100
"""The label cross_entropy skips."""

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Example:
    """One row as ids; the first num_prompt_tokens are read, the others are learned."""

    ids: tuple[int, ...]
    num_prompt_tokens: int
    learned_before: tuple[Span, ...] = ()
    """Parts of the prompt that are learned too: the assistant's earlier turns."""

    @property
    def num_answer_tokens(self) -> int:
        """The first token of all cannot be learned: nothing comes before it."""
        return sum(end - max(start, 1) for start, end in self.learned)

    @property
    def learned(self) -> tuple[Span, ...]:
        return (*self.learned_before, (self.num_prompt_tokens, len(self.ids)))


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, the better one first."""

    chosen: Example
    rejected: Example
    reference: tuple[float, float] | None = None
    """Log-probabilities of both before the run."""

    @property
    def ids(self) -> tuple[int, ...]:
        """Of both, as many as are read."""
        return (*self.chosen.ids, *self.rejected.ids)

    @property
    def num_answer_tokens(self) -> int:
        return self.chosen.num_answer_tokens + self.rejected.num_answer_tokens


@dataclass(frozen=True, slots=True)
class Pack:
    """Several examples in one sequence; none sees another."""

    examples: tuple[Example, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(token for example in self.examples for token in example.ids)

    @property
    def num_answer_tokens(self) -> int:
        return sum(example.num_answer_tokens for example in self.examples)


Item = Example | Pair | Pack
Row = Example | Pair
ItemT = TypeVar("ItemT", bound=Item)


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded rows, [rows, length]."""

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor | None = None
    """For packs: each token's place in its own example."""
    reference: torch.Tensor | None = None
    """For pairs: each row's log-probability before the run."""

    @property
    def num_answer_tokens(self) -> int:
        return int((self.labels != IGNORED).sum())

    def to(self, device: torch.device) -> "Batch":
        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device)

        return Batch(
            self.ids.to(device),
            self.labels.to(device),
            move(self.positions),
            move(self.reference),
        )

    def chosen_half(self) -> "Batch":
        """Of pairs, the better answers."""
        half = len(self.ids) // 2
        return Batch(self.ids[:half], self.labels[:half])


def longest(item: Item) -> int:
    """Tokens of the longest sequence that the item needs."""
    if isinstance(item, Pair):
        return max(len(item.chosen.ids), len(item.rejected.ids))
    return len(item.ids)


def rows_of(item: Item) -> tuple[Example, ...]:
    """That are read apart."""
    if isinstance(item, Pack):
        return item.examples
    return (item.chosen, item.rejected) if isinstance(item, Pair) else (item,)


def fit_length(
    examples: Sequence[Row],
    max_length: int,
    overlong: Literal["error", "drop", "cut_prompt"],
    places: Sequence[str] = (),
) -> list[Row]:
    """The rows of at most max_length tokens; of longer ones no answer is ever cut. `places` names
    them for the complaint."""
    if overlong == "cut_prompt":
        examples = [_cut(example, max_length) for example in examples]
    kept = [example for example in examples if longest(example) <= max_length]
    num_overlong = len(examples) - len(kept)
    if num_overlong and overlong == "error":
        worst = max(range(len(examples)), key=lambda index: longest(examples[index]))
        where = f", {places[worst]}" if places else ""
        raise DataError(
            f"data: {num_overlong} of {len(examples)} rows are longer than max_length {max_length} "
            f"(longest: {longest(examples[worst])} tokens{where}); raise max_length or set "
            "`overlong: drop`"
        )
    if not kept:
        raise DataError(f"data: every row is longer than max_length {max_length}")
    return kept


def _cut(example: Row, max_length: int) -> Row:
    """Without as many of the prompt's first tokens as are too many; one of the prompt stays."""
    if isinstance(example, Pair):
        surplus = longest(example) - max_length
        chosen, rejected = (_cut_start(e, surplus) for e in (example.chosen, example.rejected))
        return Pair(chosen, rejected)
    return _cut_start(example, len(example.ids) - max_length)


def _cut_start(example: Example, surplus: int) -> Example:
    surplus = min(surplus, example.num_prompt_tokens - 1)
    if surplus <= 0:
        return example
    spans = ((start - surplus, end - surplus) for start, end in example.learned_before)
    kept = tuple((max(1, start), end) for start, end in spans if end > 1)
    return Example(example.ids[surplus:], example.num_prompt_tokens - surplus, kept)


def pack(examples: Sequence[Example], max_length: int) -> list[Pack]:
    """Longest first, each into the first pack that has room for it."""
    packs: list[list[Example]] = []
    rooms: list[int] = []
    for example in sorted(examples, key=lambda example: -len(example.ids)):
        size = len(example.ids)
        place = next((i for i, room in enumerate(rooms) if room >= size), None)
        if place is None:
            packs.append([])
            rooms.append(max_length)
            place = len(packs) - 1
        packs[place].append(example)
        rooms[place] -= size
    return [Pack(tuple(examples)) for examples in packs]


def epoch_batches(examples: Sequence[ItemT], batch_size: int, rng: Random) -> list[list[ItemT]]:
    """Every row once, in random order; rows of like length are neighbours, so padding is little."""
    order = list(examples)
    rng.shuffle(order)
    pool = batch_size * 16
    batches: list[list[ItemT]] = []
    for start in range(0, len(order), pool):
        alike = sorted(order[start : start + pool], key=lambda example: len(example.ids))
        batches += [alike[i : i + batch_size] for i in range(0, len(alike), batch_size)]
    rng.shuffle(batches)
    return batches


def collate(items: Sequence[Item]) -> Batch:
    """Pads on the right with id 0: a causal model never looks there, and no label is there.

    Pairs become two rows each: every chosen one, then every rejected one.
    """
    rows = list(_rows(items))
    length = max(sum(len(example.ids) for example in row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORED, dtype=torch.long)
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        begin = 0
        for example in row:
            _place(example, begin, ids[index], labels[index], positions[index])
            begin += len(example.ids)
    is_packed = any(isinstance(item, Pack) for item in items)
    return Batch(ids, labels, positions if is_packed else None, _references(items))


def _references(items: Sequence[Item]) -> torch.Tensor | None:
    known = [item.reference for item in items if isinstance(item, Pair) and item.reference]
    if len(known) < len(items):
        return None
    return torch.tensor([*(chosen for chosen, _ in known), *(rejected for _, rejected in known)])


def _rows(items: Sequence[Item]) -> Iterator[tuple[Example, ...]]:
    for item in items:
        if isinstance(item, Pack):
            yield item.examples
        else:
            yield (item.chosen if isinstance(item, Pair) else item,)
    yield from ((item.rejected,) for item in items if isinstance(item, Pair))


def _place(
    example: Example, begin: int, ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor
) -> None:
    """The first token of an example is never a label: nothing of it comes before."""
    tokens = torch.tensor(example.ids)
    ids[begin : begin + len(tokens)] = tokens
    positions[begin : begin + len(tokens)] = torch.arange(len(tokens))
    for start, end in example.learned:
        start = max(start, 1)
        labels[begin + start : begin + end] = tokens[start:end]

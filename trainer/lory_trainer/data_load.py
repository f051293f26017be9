"""From a data set on disk to what a run trains and evaluates on.

Read, split, look through, tokenise, fit to the length, pack. This module must not know models.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lory_trainer.config import TrainOptions
from lory_trainer.data import Example, Item, Row, fit_length, longest, pack
from lory_trainer.data_encode import Encoder, make_encoder
from lory_trainer.data_files import RawRow, RowParts, data_digest, read_data
from lory_trainer.data_lint import Finding, lint
from lory_trainer.data_rows import Plan, Sample, make_sample, plan_rows
from lory_trainer.data_split import split_rows
from lory_trainer.errors import DataError


@dataclass(frozen=True, slots=True)
class LoadedData:
    """All that a run needs of its rows."""

    plan: Plan
    encoder: Encoder
    examples: tuple[Row, ...]
    """To train on, before they are packed."""
    items: tuple[Item, ...]
    """As they are trained on."""
    validation: tuple[Row, ...]
    test: tuple[RawRow, ...]
    findings: tuple[Finding, ...]
    num_rows: int
    """Read to train on; a conversation may give several examples."""
    num_dropped: int
    num_cut: int
    num_held_out_dropped: int
    file_name: str
    digest: str


def load_data(
    options: TrainOptions,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int] = (),
) -> LoadedData:
    path = folder / options.data
    parts = _parts(options, folder)
    plan = plan_rows(options, parts.train)
    encoder = make_encoder(tokenizer, plan, stop_ids=stop_ids, learn_prompt=options.train_on_prompt)
    train = [make_sample(row, plan) for row in parts.train]
    validation = [make_sample(row, plan) for row in parts.validation]
    test = [make_sample(row, plan) for row in parts.test]
    findings = tuple(lint(train, [*validation, *test]))
    _refuse(findings, options)

    encoded, places = _encode(train, encoder, options)
    examples = fit_length(encoded, options.max_length, options.overlong, places)
    encoded_validation, _ = _encode(validation, encoder, options)
    fitting = _fitting(encoded_validation, options)
    is_cutting = options.overlong == "cut_prompt"
    num_cut = sum(longest(e) > options.max_length for e in encoded) if is_cutting else 0
    num_dropped = len(encoded) - len(examples)
    return LoadedData(
        plan=plan,
        encoder=encoder,
        examples=tuple(examples),
        items=_items(examples, options),
        validation=tuple(fitting),
        num_held_out_dropped=len(encoded_validation) - len(fitting),
        test=parts.test,
        findings=findings,
        num_rows=len(train),
        num_dropped=num_dropped,
        num_cut=max(0, num_cut - num_dropped),
        file_name=path.name,
        digest=data_digest(path),
    )


def _parts(options: TrainOptions, folder: Path) -> RowParts:
    parts = read_data(folder / options.data)
    if options.max_rows is not None:
        parts = replace(parts, train=parts.train[: options.max_rows])
    if options.split is not None:
        split = split_rows(parts.train, options.split, options.seed)
        parts = RowParts(
            split.train, (*parts.validation, *split.validation), (*parts.test, *split.test)
        )
    if options.eval_data is not None:
        rows = read_data(folder / options.eval_data).train
        parts = replace(parts, validation=(*parts.validation, *rows))
    return parts


def _refuse(findings: Sequence[Finding], options: TrainOptions) -> None:
    wrong = [str(finding) for finding in findings if finding.level == "warning"]
    if wrong and options.lint == "error":
        lines = "\n".join(f"  {line}" for line in wrong)
        raise DataError(f"data: lint: error was asked for, and it finds\n{lines}")


def _encode(
    samples: Sequence[Sample], encoder: Encoder, options: TrainOptions
) -> tuple[list[Row], list[str]]:
    """And the place of each."""
    rows: list[Row] = []
    places: list[str] = []
    for sample in samples:
        found = encoder.encode(sample)
        if options.method == "pretrain":
            found = [piece for row in found for piece in _pieces(row.ids, options.max_length)]
        rows += found
        places += [sample.place] * len(found)
    return rows, places


def _pieces(ids: Sequence[int], length: int) -> list[Row]:
    """A long text goes on where it was cut; the token it goes on from is read again."""
    starts = range(0, max(1, len(ids) - 1), length - 1)
    return [Example(tuple(ids[start : start + length]), 0) for start in starts]


def _fitting(examples: list[Row], options: TrainOptions) -> list[Row]:
    """Held-out rows that are too long are left out, unless they can be cut."""
    if not examples:
        return []
    how = "cut_prompt" if options.overlong == "cut_prompt" else "drop"
    try:
        return fit_length(examples, options.max_length, how)
    except DataError:
        return []


def _items(examples: Sequence[Row], options: TrainOptions) -> tuple[Item, ...]:
    if not options.packing:
        return tuple(examples)
    return tuple(pack([e for e in examples if isinstance(e, Example)], options.max_length))

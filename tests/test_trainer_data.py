"""Rows to ids: what is read, what is learned, and what is refused."""

from random import Random
from typing import Any

import pytest

from lory_trainer.data import IGNORED, Example, Pair, collate, epoch_batches, fit_length, pack
from lory_trainer.data_encode import make_encoder
from lory_trainer.data_files import RawRow
from lory_trainer.data_rows import Plan, make_sample
from lory_trainer.errors import DataError
from trainer_world import char_tokenizer


def encoded(*rows: dict[str, Any], tokenizer: Any = None, template: str = "{text}>") -> list[Any]:
    plan = Plan("columns", template, "completion")
    encoder = make_encoder(tokenizer or char_tokenizer(), plan)
    raw = [RawRow(row, f"row {number}") for number, row in enumerate(rows, start=1)]
    return [example for row in raw for example in encoder.encode(make_sample(row, plan))]


def test_row_is_prompt_with_bos_then_answer_then_end():
    [example] = encoded({"text": "ab", "completion": "cd"})
    assert example.ids == (0, 3, 4, 30, 5, 6, 1)
    assert example.num_prompt_tokens == 4
    assert example.num_answer_tokens == 3


def test_only_the_answer_and_its_end_are_learned():
    batch = collate([Example((0, 3, 4, 5, 1), 3), Example((0, 3, 1), 2)])
    assert batch.labels.tolist() == [
        [IGNORED, IGNORED, IGNORED, 5, 1],
        [IGNORED, IGNORED, 1, IGNORED, IGNORED],
    ]
    assert batch.num_answer_tokens == 3


def test_end_is_learned_even_where_padding_shares_its_id():
    """Masking by id made models that never stop, wherever pad is eos."""
    rows = [{"text": "a", "completion": "b"}, {"text": "a", "completion": "bcd"}]
    batch = collate(encoded(*rows, tokenizer=char_tokenizer(pad_is_eos=True)))
    assert [(row == 1).sum().item() for row in batch.labels] == [1, 1]


def test_tokenizer_without_an_end_is_refused():
    tokenizer = char_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="eos_token"):
        encoded({"text": "a", "completion": "b"}, tokenizer=tokenizer)


def test_numbers_and_objects_are_answered_as_json_writes_them():
    plan = Plan("columns", "{text}", "completion")
    row = RawRow({"text": None, "completion": {"b": 1}}, "row 1")
    sample = make_sample(row, plan)
    assert (sample.prompt, sample.answer) == ("", '{"b": 1}')


def test_long_rows_are_refused_or_dropped_never_cut():
    short, long = Example((0, 3, 1), 2), Example((0, 3, 4, 5, 1), 2)
    with pytest.raises(DataError, match=r"1 of 2 rows .* \(longest: 5 tokens\)"):
        fit_length([short, long], 4, "error")
    with pytest.raises(DataError, match=r"longest: 5 tokens, line 2\)"):
        fit_length([short, long], 4, "error", ["line 1", "line 2"])
    assert fit_length([short, long], 4, "drop") == [short]
    assert fit_length([short, long], 5, "error") == [short, long]
    with pytest.raises(DataError, match="every row"):
        fit_length([long], 4, "drop")


def test_an_epoch_holds_every_row_once():
    examples = [Example((0, 3, number), 2) for number in range(133)]
    batches = epoch_batches(examples, 4, Random(0))
    flat = [example for batch in batches for example in batch]
    assert flat != examples
    assert sorted(flat, key=lambda example: example.ids) == examples
    assert {len(batch) for batch in batches} <= {1, 4}
    assert batches == epoch_batches(examples, 4, Random(0))
    assert batches != epoch_batches(examples, 4, Random(1))


def test_a_prompt_is_cut_at_its_beginning_and_an_answer_never():
    long, answer = Example((0, 3, 4, 5, 6, 1), 4), Example((0, 3, 4, 5, 6, 1), 1)
    assert fit_length([long, answer], 4, "cut_prompt") == [Example((4, 5, 6, 1), 2)]
    pair = Pair(Example((0, 3, 4, 5, 1), 3), Example((0, 3, 4, 5, 6, 1), 3))
    [cut] = fit_length([pair], 5, "cut_prompt")
    assert cut.chosen.ids[:2] == cut.rejected.ids[:2] == (3, 4)


def test_earlier_turns_are_learned_where_they_were_and_after_a_cut_too():
    example = Example((0, 3, 4, 1, 5, 6, 1), 5, ((2, 4),))
    assert example.num_answer_tokens == 4
    assert collate([example]).labels.tolist() == [[IGNORED, IGNORED, 4, 1, IGNORED, 6, 1]]
    [cut] = fit_length([example], 5, "cut_prompt")
    assert collate([cut]).labels.tolist() == [[IGNORED, 1, IGNORED, 6, 1]]


def test_packs_hold_every_example_once_and_are_full():
    examples = [Example((0, *range(3, 3 + size), 1), 2) for size in (1, 2, 3, 4, 5, 6)]
    packs = pack(examples, 10)
    assert sorted(e.ids for p in packs for e in p.examples) == sorted(e.ids for e in examples)
    assert all(len(p.ids) <= 10 for p in packs)
    assert len(packs) == 4


def test_a_pack_says_where_each_of_its_rows_begins():
    [one] = pack([Example((0, 3, 1), 2), Example((0, 4, 5, 1), 1)], 8)
    batch = collate([one])
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.labels.tolist() == [[IGNORED, 4, 5, 1, IGNORED, IGNORED, 1]]
    assert collate([Example((0, 1), 1)]).positions is None

"""Rows to ids: what is read, what is learned, and what is refused."""

import json
from pathlib import Path
from random import Random

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lory_trainer.data import (
    IGNORED,
    Example,
    collate,
    encode,
    epoch_batches,
    fit_length,
    read_rows,
)
from lory_trainer.errors import DataError


def char_tokenizer(*, pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    """One token a character, a BOS before every text."""
    vocab = {"<bos>": 0, "<eos>": 1, "<pad>": 2} | {chr(97 + i): 3 + i for i in range(26)}
    inner = Tokenizer(models.WordLevel(vocab | {" ": 29, ">": 30}, unk_token=">"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    pad = "<eos>" if pad_is_eos else "<pad>"
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token=pad
    )


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_row_is_prompt_with_bos_then_answer_then_end():
    [example] = encode(
        [{"text": "ab", "completion": "cd"}], char_tokenizer(), "{text}>", "completion"
    )
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
    batch = collate(encode(rows, char_tokenizer(pad_is_eos=True), "{text}>", "completion"))
    assert [(row == 1).sum().item() for row in batch.labels] == [1, 1]


def test_tokenizer_without_an_end_is_refused():
    tokenizer = char_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="eos_token"):
        encode([{"text": "a", "completion": "b"}], tokenizer, "{text}", "completion")


def test_rows_keep_only_the_named_columns(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", {"text": "a", "completion": "b", "id": 7})
    assert read_rows(path, ("text", "completion")) == [{"text": "a", "completion": "b"}]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"text": "a"}', "line 2: column `completion` must hold text; found: text"),
        ('{"text": "a", "completion": 7}', "line 2: column `completion` must hold text"),
        ("[1]", "line 2: expected an object"),
        ("{", "line 2: not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "completion": "b"}\n' + bad + "\n")
    with pytest.raises(DataError) as caught:
        read_rows(path, ("text", "completion"))
    assert message in str(caught.value)


def test_no_rows_and_no_file_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no rows"):
        read_rows(tmp_path / "empty.jsonl", ("text",))
    with pytest.raises(DataError, match=r"no file .*none\.jsonl; a relative path starts at"):
        read_rows(tmp_path / "none.jsonl", ("text",))
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path, ("text",))


def test_long_rows_are_refused_or_dropped_never_cut():
    short, long = Example((0, 3, 1), 2), Example((0, 3, 4, 5, 1), 2)
    with pytest.raises(DataError, match=r"1 of 2 rows .* \(longest: 5 tokens\)"):
        fit_length([short, long], 4, "error")
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

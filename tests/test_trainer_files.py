"""Rows from files and folders of every kind, read by their columns, and held out."""

import json
from datetime import date
from decimal import Decimal

import pytest

from lory_trainer.config import SplitOptions, parse_options
from lory_trainer.data_files import RawRow, data_digest, read_data
from lory_trainer.data_rows import make_sample, plan_rows
from lory_trainer.data_split import split_rows
from lory_trainer.errors import DataError
from trainer_world import write_rows

ROWS = [{"text": f"a{number}", "completion": 'b, "c"\nd'} for number in range(4)]


def values(rows):
    return [row.values for row in rows]


def write(folder, suffix):
    path = folder / f"rows{suffix}"
    if suffix in (".jsonl", ".ndjson"):
        write_rows(path, *ROWS)
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif suffix in (".csv", ".tsv"):
        separator = "," if suffix == ".csv" else "\t"
        lines = [separator.join(("text", "completion"))]
        lines += [separator.join((row["text"], '"b, ""c""\nd"')) for row in ROWS]
        path.write_text("\ufeff" + "\n".join(lines) + "\n")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        table = pyarrow.Table.from_pylist(ROWS)
        if suffix == ".parquet":
            from pyarrow.parquet import write_table

            write_table(table, path, row_group_size=3)
        else:
            with pyarrow.ipc.new_stream(path, table.schema) as stream:
                stream.write_table(table)
    return path


@pytest.mark.parametrize(
    "suffix", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow"]
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    assert values(read_data(write(tmp_path, suffix)).train) == ROWS


def test_json_may_be_lines_or_hold_its_list_in_an_object(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    assert values(read_data(path).train) == ROWS
    path.write_text(json.dumps({"version": 1, "data": ROWS}))
    assert values(read_data(path).train) == ROWS


@pytest.mark.parametrize("row", [{"a": 1, "b": "x"}, {"messages": [{"role": "user"}]}])
@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_of_json_is_one_row(tmp_path, row, indent):
    (tmp_path / "rows.json").write_text(json.dumps(row, indent=indent))
    assert values(read_data(tmp_path / "rows.json").train) == [row]


def test_a_folder_of_the_hub_keeps_its_parts_apart(tmp_path):
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train-00000-of-00002.jsonl", ROWS[0])
    write_rows(tmp_path / "data" / "train-00001-of-00002.jsonl", ROWS[1])
    write_rows(tmp_path / "data" / "validation-00000-of-00001.jsonl", ROWS[2])
    write_rows(tmp_path / "data" / "test-00000-of-00001.jsonl", ROWS[3])
    (tmp_path / "README.md").write_text("a card")
    parts = read_data(tmp_path)
    assert values(parts.train) == ROWS[:2]
    assert (values(parts.validation), values(parts.test)) == ([ROWS[2]], [ROWS[3]])


def test_a_folder_as_the_datasets_package_saves_it_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {
        "train": datasets.Dataset.from_list(ROWS[:3]),
        "test": datasets.Dataset.from_list(ROWS[3:]),
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    read = read_data(tmp_path / "saved")
    assert (values(read.train), values(read.test)) == (ROWS[:3], ROWS[3:])
    parts["train"].save_to_disk(tmp_path / "one")
    assert values(read_data(tmp_path / "one").train) == ROWS[:3]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.jsonl", "{}\n[1]\n", "rows.jsonl line 2: expected an object"),
        ("rows.jsonl", '{"a": 1}\n{\n', "rows.jsonl line 2: not JSON"),
        ("rows.jsonl", "\n", "rows.jsonl holds no rows"),
        ("rows.json", '{"a": [],\n "b": [2]}', "expected a list of rows"),
        ("rows.json", "[1]", "rows.json row 1: expected an object"),
        ("rows.json", "", "rows.json: not JSON"),
        ("rows.json", "[]", "rows.json holds no rows"),
        ("rows.jsonl", '{"a": 1}\n{"a": 1, "b": 2, "a": 3}\n', "line 2: `a` is there twice"),
        ("rows.jsonl", '{"a": {"b": NaN}}\n', "rows.jsonl line 1: NaN is no JSON"),
        ("rows.json", '[{"a": 1}, {"a": -Infinity}]', "rows.json: -Infinity is no JSON"),
        ("rows.jsonl", '{"a": 1}\n\n{"a": "\udcff"}\n', "rows.jsonl line 3: is not UTF-8"),
        ("rows.csv", "a,b\n1,\udcff\n", "rows.csv line 2: is not UTF-8"),
        ("rows.csv", "a,b\n", "rows.csv holds no rows"),
        ("rows.csv", "", "rows.csv holds no rows"),
        ("rows.csv", 'a,b\n1,"2" 3\n', "rows.csv line 2: "),
        ("rows.csv", f"a,b\n1,{'x' * 200_000}\n", "line 2: field larger"),
        ("rows.csv", "a,a,b\n1,2,3\n", "names `a` twice"),
        ("rows.csv", "a,b\n1\n", "line 2: not as many fields"),
        ("rows.csv", "a,b\n1,2,3\n", "line 2: not as many fields"),
        ("rows.xlsx", "x", "files of this kind are not read; these are: .jsonl"),
        ("rows.parquet", "x", "cannot be read"),
        ("rows.arrow", "x", "cannot be read"),
    ],
)
def test_a_bad_file_is_named_with_its_place(tmp_path, name, text, message):
    if name.endswith(("parquet", "arrow")):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(text, errors="surrogateescape")
    with pytest.raises(DataError) as caught:
        read_data(tmp_path / name)
    assert message in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".JSONL"])
def test_marks_carriage_returns_and_empty_lines_are_passed_over(tmp_path, suffix):
    line = '{"a": "1", "b": "2"}' if suffix.lower() == ".jsonl" else "\t".join("12")
    lines = ["", line, "", line, ""] if suffix.lower() == ".jsonl" else ["a\tb", line, "", line]
    text = "\ufeff" + "\r\n".join(lines) + "\r\n"
    path = tmp_path / f"rows{suffix}"
    path.write_bytes((text.replace("\t", ",") if suffix == ".csv" else text).encode())
    assert values(read_data(path).train) == [{"a": "1", "b": "2"}] * 2


def test_what_lies_beside_the_rows_of_a_folder_is_passed_over(tmp_path):
    write_rows(tmp_path / "train.JSONL", *ROWS)
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "notes.json").write_text("{}")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert values(read_data(tmp_path).train) == ROWS
    before = data_digest(tmp_path)
    (tmp_path / ".cache" / "huggingface" / "notes.json").write_text("[]")
    assert data_digest(tmp_path) == before


def test_parquet_does_not_give_a_tool_the_keys_of_another(tmp_path):
    """Arrow makes one shape of all objects of a column, and fills it with nulls."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    tools = [{"function": {"name": "f", "x": 1}}, {"function": {"name": "g", "y": None, "z": [2]}}]
    rows = [{"tools": tools, "text": None}, {"tools": [], "text": "a"}]
    write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    first, second = values(read_data(tmp_path / "rows.parquet").train)
    expected = [{"function": {"name": "f", "x": 1}}, {"function": {"name": "g", "z": [2]}}]
    assert (first, second["text"]) == ({"tools": expected, "text": None}, "a")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no file .*none\.jsonl; a relative path starts at"):
        read_data(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no data files"):
        read_data(tmp_path)


def test_a_folders_digest_goes_by_its_files(tmp_path):
    write_rows(tmp_path / "train.jsonl", *ROWS)
    before = data_digest(tmp_path)
    assert data_digest(tmp_path) == before
    write_rows(tmp_path / "train.jsonl", *ROWS[1:])
    assert data_digest(tmp_path) != before


# -- what the columns say ------------------------------------------------------------------------


def sample(row, config=""):
    options = parse_options(f"base: x\ndata: y\n{config}\n")
    raw = RawRow(row, "row 1")
    return make_sample(raw, plan_rows(options, [raw]))


@pytest.mark.parametrize(
    ("row", "config", "prompt", "answer"),
    [
        ({"text": "a", "completion": "b"}, "", "a", "b"),
        ({"prompt": "a", "completion": "b"}, "", "a", "b"),
        ({"question": "a", "answer": "b"}, "", "a", "b"),
        ({"x": "a", "y": "b"}, "template: '<{x}>'\ncompletion: y", "<a>", "b"),
        ({"text": "a", "completion": "b"}, "completion_prefix: ' '", "a", " b"),
        ({"text": "a", "completion": 7}, "", "a", "7"),
        ({"text": "a", "completion": date(2026, 3, 1)}, "", "a", "2026-03-01"),
        ({"text": "a", "completion": Decimal("1.50")}, "", "a", "1.50"),
        ({"text": "a", "completion": [{"x": True}]}, "", "a", '[{"x": true}]'),
    ],
)
def test_rows_are_known_by_their_columns(row, config, prompt, answer):
    found = sample(row, config)
    assert (found.prompt, found.answer) == (prompt, answer)


def test_instructions_get_the_usual_words_around_them():
    found = sample({"instruction": "Add.", "input": "1 2", "output": "3"})
    assert isinstance(found.prompt, str)
    assert "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n" in found.prompt
    plain = sample({"instruction": "Add.", "output": "3"})
    assert "### Input" not in str(plain.prompt)


def test_conversations_are_read_in_both_dialects():
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    shared = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert sample({"messages": said}).prompt == sample({"conversations": shared}).prompt
    asked = {"prompt": said[:1], "completion": said[1:]}
    assert sample(asked).prompt == tuple(said)


def test_pairs_are_read_in_every_dialect():
    asked = user("a")
    openai = {
        "input": {"messages": [asked], "tools": []},
        "preferred_output": [said("good")],
        "non_preferred_output": [said("bad")],
    }
    whole = {"chosen": [asked, said("good")], "rejected": [asked, said("bad")]}
    apart = {"prompt": [asked], "chosen": [said("good")], "rejected": [said("bad")]}
    for row in (openai, whole, apart):
        found = sample(row, "method: dpo")
        assert (found.prompt, found.answer, found.rejected) == ((asked,), "good", "bad")
    plain = sample({"prompt": "a", "chosen": "good", "rejected": "bad"}, "method: dpo")
    assert (plain.prompt, plain.answer, plain.rejected) == ("a", "good", "bad")


@pytest.mark.parametrize(
    ("row", "config", "message"),
    [
        ({"a": "x"}, "", "the columns say neither"),
        (
            {"text": "a", "completion": None},
            "template: '{text}'\ncompletion: completion",
            "must hold text",
        ),
        ({"text": "a"}, "method: dpo", "no column chosen, rejected; found: text"),
        ({"a": "x"}, "method: pretrain", "no column `text`"),
        ({"messages": [{"role": "user", "content": "a"}]}, "", "no message of the assistant's"),
        ({"messages": [{"content": "a"}]}, "", "a message needs a role"),
        ({"messages": "a"}, "", "expected messages"),
        ({"messages": []}, "", "expected messages"),
        ({"messages": ["a"]}, "", "a message must be an object"),
        ({"messages": [{"role": "user", "content": 5}]}, "", "content must be text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "",
            "content must be text",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "", "lone surrogate"),
        (
            {"messages": [{"role": "assistant", "content": "a", "weight": 2}]},
            "",
            "weight is 0 or 1",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": 3}]}, "", "tool_calls must be a list"),
        ({"messages": [{"role": "assistant", "tool_calls": [3]}]}, "", "needs a function"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]},
            "",
            "arguments must be an object",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a"}], "tools": "[1]"},
            "",
            "tools must be a list of objects",
        ),
        ({"text": "a", "completion": float("nan")}, "", "`completion` must hold text; it holds a"),
        ({"text": "a", "completion": {"x": float("inf")}}, "", "(NaN, infinity)"),
        ({"text": b"a", "completion": "b"}, "", "`text` must hold text; it holds bytes"),
        ({"text": "\udc00", "completion": "b"}, "", "(a lone surrogate)"),
        ({"text": "a", "completion": "b"}, "template: '{x}'\ncompletion: text", "no column `x`"),
        (
            {"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"},
            "method: dpo",
            "must end in a text of the assistant's",
        ),
    ],
)
def test_a_row_that_cannot_be_learned_from_is_named(row, config, message):
    with pytest.raises(DataError) as caught:
        sample(row, config)
    assert message in str(caught.value)
    assert "row 1" in str(caught.value)


def test_columns_are_those_that_any_row_fills():
    """A first row without `input` does not make the others lose theirs."""
    rows = [
        {"instruction": "a", "input": None, "output": "b"},
        {"instruction": "c", "input": "d", "output": "e"},
    ]
    raw = [RawRow(row, f"row {number}") for number, row in enumerate(rows, start=1)]
    plan = plan_rows(parse_options("base: x\ndata: y\n"), raw)
    assert plan.fields == ("instruction", "input")
    assert "### Input:\nd\n" in str(make_sample(raw[1], plan).prompt)
    mixed = [RawRow(ROWS[0], "row 1"), RawRow({"messages": [user("a"), said("b")]}, "row 2")]
    plan = plan_rows(parse_options("base: x\ndata: y\n"), mixed)
    with pytest.raises(DataError, match="row 1: no messages, which other rows have; found: text"):
        make_sample(mixed[0], plan)


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def test_parts_of_text_are_joined_as_the_server_joins_them():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    found = sample({"messages": [{"role": "developer", "content": parts}, said("c")]})
    assert found.prompt == ({"role": "system", "content": "a\nb"}, said("c"))


def test_a_prompt_of_text_may_stand_beside_answers_of_messages():
    """As in UltraFeedback, where the conversation is in the answers as well."""
    whole = {"prompt": "a", "chosen": [user("a"), said("b")], "rejected": [user("a"), said("c")]}
    apart = {"prompt": "a", "chosen": [said("b")], "rejected": [said("c")]}
    for row in (whole, apart):
        found = sample(row, "method: dpo")
        assert (found.prompt, found.answer, found.rejected) == ((user("a"),), "b", "c")
    other = whole | {"prompt": [user("x")]}
    with pytest.raises(DataError, match="begin with another conversation"):
        sample(other, "method: dpo")


# -- rows held out -------------------------------------------------------------------------------


def rows_of(count):
    return [
        RawRow({"text": str(number), "split": number % 3}, f"row {number}")
        for number in range(count)
    ]


def test_random_shares_are_exact_and_go_by_the_seed():
    options = SplitOptions(probabilities=[0.8, 0.1, 0.1])
    parts = split_rows(rows_of(50), options, 1)
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [40, 5, 5]
    assert split_rows(rows_of(50), options, 1) == parts
    assert split_rows(rows_of(50), options, 2) != parts


def test_more_rows_move_no_row_that_was_split_by_its_hash():
    options = SplitOptions(type="hash", probabilities=[0.5, 0.25, 0.25])
    few, many = split_rows(rows_of(60), options, 0), split_rows(rows_of(90), options, 0)
    assert set(values_of(few.validation)) <= set(values_of(many.validation))
    assert 5 < len(few.validation) < 25


def values_of(rows):
    return [row.values["text"] for row in rows]


def test_a_column_says_where_a_row_belongs():
    parts = split_rows(rows_of(6), SplitOptions(type="fixed"), 0)
    assert [values_of(part) for part in (parts.train, parts.validation, parts.test)] == [
        ["0", "3"],
        ["1", "4"],
        ["2", "5"],
    ]
    with pytest.raises(DataError, match="column `part` must hold 0, 1 or 2"):
        split_rows(rows_of(2), SplitOptions(type="fixed", column="part"), 0)


def test_a_split_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(DataError, match="leaves no rows"):
        split_rows(rows_of(1), SplitOptions(probabilities=[0.1, 0.9, 0.0]), 0)

"""Files of rows to rows: JSONL, JSON, CSV, TSV, Parquet, Arrow, and folders of them.

A folder is a Hugging Face data set as `save_to_disk` writes it or as the hub keeps it; its parts
are told apart by their names. This module must not know what a row means.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from lory_trainer.errors import DataError

Part = Literal["train", "validation", "test"]
PARTS: dict[str, Part] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
}

CONVERSATIONS = {"messages", "conversations"}
"""Columns of which one row holds a list."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it lies in its file."""

    values: dict[str, Any]
    place: str
    """File and line, for complaints."""


@dataclass(frozen=True, slots=True)
class RowParts:
    """The rows of a data set, as far as it keeps them apart."""

    train: tuple[RawRow, ...]
    validation: tuple[RawRow, ...] = ()
    test: tuple[RawRow, ...] = ()


def read_data(path: Path) -> RowParts:
    """Every row of a file or folder; raises DataError naming the place that is wrong."""
    if path.is_dir():
        return _read_folder(path)
    rows = tuple(_read_file(path))
    if not rows:
        raise DataError(f"data: {path.name} holds no rows")
    return RowParts(rows)


def data_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, or of a folder's names and files."""
    digest = hashlib.sha256()
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    for file_path in _data_files(path):
        digest.update(f"{file_path.relative_to(path)}\n{data_digest(file_path)}\n".encode())
    return digest.hexdigest()


def _data_files(folder: Path) -> list[Path]:
    """Without what is kept beside the rows: notes about them, and hidden folders."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path.suffix.lower() in _READERS
        and not path.name.endswith(("_info.json", "_infos.json"))
        and path.name not in ("state.json", "dataset_dict.json")
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _read_folder(folder: Path) -> RowParts:
    rows: dict[Part, list[RawRow]] = {"train": [], "validation": [], "test": []}
    files = _data_files(folder)
    if not files:
        raise DataError(
            f"data: {folder.name} holds no data files; these are read: {', '.join(_READERS)}"
        )
    for path in files:
        rows[_part_of(path.relative_to(folder))] += _read_file(path)
    if not rows["train"]:
        raise DataError(f"data: {folder.name} holds no training rows")
    return RowParts(tuple(rows["train"]), tuple(rows["validation"]), tuple(rows["test"]))


def _part_of(path: Path) -> Part:
    """By the folder's or file's name: validation/data-0.arrow, test-00000-of-00001.parquet."""
    for name in (*path.parts[:-1], path.stem):
        word = name.lower().replace("_", "-").replace(".", "-").split("-")[0]
        if word in PARTS:
            return PARTS[word]
    return "train"


def _read_file(path: Path) -> Iterator[RawRow]:
    read = _READERS.get(path.suffix.lower())
    if path.exists() and read is None:
        raise DataError(
            f"data: {path.name}: files of this kind are not read; these are: {', '.join(_READERS)}"
        )
    try:
        yield from (read or _read_jsonl)(path)
    except FileNotFoundError as error:
        raise DataError(
            f"data: there is no file {path}; a relative path starts at the configuration's folder, "
            "and a data set of the hub has to be downloaded first"
        ) from error
    except OSError as error:
        raise DataError(f"data: {path.name} cannot be read: {error}") from error


def _text(path: Path) -> str:
    """Without a byte order mark."""
    encoded = path.read_bytes()
    try:
        return encoded.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = encoded.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"data: {path.name} line {line}: is not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    lines = _text(path).split("\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{path.name} line {number}"
            yield _row(_parse(line, place), place)


def _read_json(path: Path) -> Iterator[RawRow]:
    """A list of objects, or one object that holds such a list; else lines, or one row."""
    text = _text(path)
    if text.lstrip()[:1] == "{" and _is_lines(text):
        yield from _read_jsonl(path)
        return
    value = _parse(text, path.name)
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        if not lists or value.keys() & CONVERSATIONS:
            yield RawRow(value, f"{path.name} line 1")
            return
        if len(lists) != 1:
            raise DataError(f"data: {path.name}: expected a list of rows")
        value = lists[0]
    if not isinstance(value, list):
        raise DataError(f"data: {path.name}: expected a list of rows")
    for number, item in enumerate(value, start=1):
        yield _row(item, f"{path.name} row {number}")


def _is_lines(text: str) -> bool:
    """The first line is an object by itself."""
    try:
        return isinstance(json.loads(text.lstrip().split("\n", 1)[0]), dict) and (
            "\n" in text.strip()
        )
    except ValueError:
        return False


class _OddError(ValueError):
    """What Python's reader takes, and would pass in silence."""


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except _OddError as error:
        raise DataError(f"data: {place}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"data: {place}: not JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _OddError(f"`{twice}` is there twice; keep one of them")
    return found


def _no_constant(text: str) -> Any:
    raise _OddError(f"{text} is no JSON; write null, or leave the row out")


def _row(value: Any, place: str) -> RawRow:
    if not isinstance(value, dict):
        raise DataError(f'data: {place}: expected an object such as {{"text": "..."}}')
    return RawRow(value, place)


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[RawRow]:
    lines = StringIO(_text(path), newline="")
    reader = csv.DictReader(lines, delimiter=delimiter, restkey="", strict=True)
    try:
        names = reader.fieldnames or ()
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"data: {path.name}: the first line names `{twice[0]}` twice")
        for values in reader:
            place = f"{path.name} line {reader.line_num}"
            if "" in values or None in values.values():
                raise DataError(f"data: {place}: not as many fields as the first line names")
            yield RawRow(dict(values), place)
    except csv.Error as error:
        raise DataError(
            f"data: {path.name} line {reader.line_num + 1}: {error}; JSONL has no such limits"
        ) from error


def _read_tsv(path: Path) -> Iterator[RawRow]:
    return _read_csv(path, "\t")


def _read_parquet(path: Path) -> Iterator[RawRow]:
    def batches() -> Iterable[Any]:
        from pyarrow.parquet import ParquetFile

        with ParquetFile(path) as file:
            yield from file.iter_batches()

    return _from_arrow(path, batches)


def _read_arrow(path: Path) -> Iterator[RawRow]:
    """The streams that the `datasets` package writes, or Arrow files."""

    def batches() -> Iterable[Any]:
        from pyarrow import ArrowInvalid, ipc

        with path.open("rb") as file:
            try:
                yield from ipc.open_stream(file)
                return
            except ArrowInvalid:
                file.seek(0)
            reader = ipc.open_file(file)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))

    return _from_arrow(path, batches)


def _from_arrow(path: Path, batches: Callable[[], Iterable[Any]]) -> Iterator[RawRow]:
    try:
        from pyarrow import ArrowException
    except ModuleNotFoundError as error:
        raise DataError(
            f"data: {path.name} needs pyarrow; install it with: pip install 'lory-server[train]'"
        ) from error
    number = 0
    try:
        for batch in batches():
            for values in batch.to_pylist():
                number += 1
                whole = {name: _without_nulls(value) for name, value in values.items()}
                yield RawRow(whole, f"{path.name} row {number}")
    except ArrowException as error:
        raise DataError(f"data: {path.name} cannot be read: {error}") from error


def _without_nulls(value: Any) -> Any:
    """Arrow gives every object of a column the keys of all of them: a null is a key that was not
    there."""
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


_READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


def write_rows(rows: Sequence[RawRow], path: Path) -> None:
    """As JSONL, for whoever evaluates on them."""
    lines = (json.dumps(row.values, ensure_ascii=False, default=str) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

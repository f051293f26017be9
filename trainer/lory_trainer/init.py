"""`lory train --init`: a few questions, and a configuration of one page.

A wrong answer is told and asked again, so that none of the others is lost. It must not know models;
of a base only its folder is looked for, of a data set its columns.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import typer
import yaml

from lory_trainer.config import TrainOptions, parse_options
from lory_trainer.data_files import RawRow, read_data
from lory_trainer.data_rows import filled_columns, plan_rows
from lory_trainer.errors import ConfigError, DataError, OutputError, TrainerError
from lory_trainer.template import template_fields

PAGE = """\
# {title}
base: {base}
data: {data}
method: {method}
{prompt}{pairs}lora:
  r: {rank}
  target_modules: all-linear
{quantization}split:
  type: random
  probabilities: [0.9, 0.05, 0.05]
epochs: {epochs}
batch_size: auto
learning_rate: auto
max_length: {max_length}
overlong: drop
"""
ANSWERS: dict[str, dict[str, str]] = {
    "sft": {"completion": "answer"},
    "dpo": {"chosen": "better answer", "rejected": "worse answer"},
    "pretrain": {},
}
"""The columns that are not asked by, and what to call them."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PLAIN = re.compile(r"[A-Za-z./][\w./-]*")
MOST_RANK = 256

T = TypeVar("T")


def ask(path: Path) -> Path:
    """Writes the answers to `path`; a file that is there is never replaced."""
    if path.exists():
        raise OutputError(f"{path} exists; give another name")
    base = _ask("Base (a folder, or an id on the hub)", lambda text: _base(text, path.parent))
    data, rows = _ask(
        "Rows (JSONL, JSON, CSV, Parquet, or a folder)", lambda text: _rows(text, path.parent)
    )
    method = _ask(f"Method: {', '.join(ANSWERS)}", _method, default="sft")
    prompt = _prompt(method, rows)
    is_quantized = typer.confirm("Hold the base in 4 bits (QLoRA)?", default=False)
    page = PAGE.format(
        title=path.stem,
        base=_scalar(base),
        data=_scalar(data),
        method=method,
        prompt=prompt,
        pairs="dpo:\n  sft_weight: 1.0\n" if method == "dpo" else "",
        rank=_ask("Rank of the adapter", _whole(1, MOST_RANK), default="16"),
        quantization="quantization:\n  bits: 4\n" if is_quantized else "",
        epochs=_ask("Passes over the rows", _whole(1), default="3"),
        max_length=_ask("Longest row in tokens", _whole(2), default="1024"),
    )
    parse_options(page, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _ask(question: str, read: Callable[[str], T], default: str | None = None) -> T:
    def checked(text: str) -> T:
        try:
            return read(text.strip())
        except TrainerError as error:
            raise typer.BadParameter(str(error)) from error

    return typer.prompt(question, default=default, value_proc=checked)


def _base(text: str, folder: Path) -> str:
    place = _place(text, folder)
    if place is not None and place.is_dir():
        if not (place / "config.json").is_file():
            raise ConfigError(f"{text} holds no config.json")
        return _from(folder, text, place)
    if not HUB_ID.fullmatch(text):
        raise ConfigError(f"there is no folder {text}, and it is no id such as owner/name")
    return text


def _rows(text: str, folder: Path) -> tuple[str, Sequence[RawRow]]:
    place = _place(text, folder)
    if place is None:
        raise DataError(f"there is no file or folder {text}")
    return _from(folder, text, place), read_data(place).train


def _place(text: str, folder: Path) -> Path | None:
    """Where it is, seen from the file that is written, or else from here."""
    typed = Path(text).expanduser()
    return next((place for place in (folder / typed, typed) if place.exists()), None)


def _from(folder: Path, text: str, place: Path) -> str:
    """As the file will say it."""
    return text if place == folder / text else os.path.relpath(place, folder)


def _method(text: str) -> str:
    if text not in ANSWERS:
        raise ConfigError(f"{text!r} is none of: {', '.join(ANSWERS)}")
    return text


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    def read(text: str) -> int:
        number = int(text) if text.isdecimal() else least - 1
        if number < least or (most is not None and number > most):
            upper = "" if most is None else f" up to {most}"
            raise ConfigError(f"{text!r} is no whole number from {least}{upper}")
        return number

    return read


# -- what the columns do not say ---------------------------------------------------------------


def _prompt(method: str, rows: Sequence[RawRow]) -> str:
    """The lines that say how rows are read; none where they say it themselves."""
    columns = sorted(filled_columns(rows))
    answers = ANSWERS[method]
    try:
        plan = plan_rows(_options(method), rows)
    except DataError as error:
        typer.echo(f"note: {error}", err=True)
    else:
        if plan.template is None:
            return ""
        completion = {"completion": plan.completion} if plan.completion else {}
        return _lines({"template": plan.template} | completion)
    found = {key: _ask_column(what, columns) for key, what in answers.items()}
    return _lines({"template": _ask_template(columns, tuple(found.values()))} | found)


def _options(method: str) -> TrainOptions:
    return parse_options(f"base: x\ndata: x\nmethod: {method}\n")


def _ask_column(what: str, columns: Sequence[str]) -> str:
    def read(text: str) -> str:
        if text not in columns:
            raise DataError(f"there is no column {text!r}; there are: {', '.join(columns)}")
        return text

    return _ask(f"Column of the {what} ({', '.join(columns)})", read)


def _ask_template(columns: Sequence[str], answers: Sequence[str]) -> str:
    shown = [name for name in columns if name not in answers]

    def read(text: str) -> str:
        template = text.replace("\\n", "\n")
        for name in template_fields(template):
            if name not in shown:
                raise DataError(f"there is no column {name!r} to ask by; there are: {shown}")
        return template

    names = ", ".join(f"{{{name}}}" for name in shown)
    return _ask(f"Prompt, with columns in braces ({names}) and \\n for a new line", read)


def _lines(values: dict[str, Any]) -> str:
    return "".join(f"{key}: {_text(value)}\n" for key, value in values.items())


def _text(text: str) -> str:
    """Several lines as they are, where YAML lets them be; else in quotes."""
    body = text.removesuffix("\n")
    lines = body.split("\n")
    if len(lines) == 1 or body != body.strip() or any(line != line.strip() for line in lines):
        return json.dumps(text, ensure_ascii=False)
    block = "\n".join(f"  {line}" if line else "" for line in lines)
    return f"|\n{block}" if text.endswith("\n") else f"|-\n{block}"


def _scalar(text: str) -> str:
    """In quotes only where YAML might read something else."""
    is_plain = PLAIN.fullmatch(text) and yaml.safe_load(text) == text
    return text if is_plain else json.dumps(text, ensure_ascii=False)

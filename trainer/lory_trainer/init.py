"""`lory train --init`: a few questions, and a configuration of one page.

It must not know models; a data set is looked at for its columns alone.
"""

from pathlib import Path

import typer

from lory_trainer.config import parse_options
from lory_trainer.data_files import read_data
from lory_trainer.data_rows import Plan, plan_rows
from lory_trainer.errors import DataError, OutputError

PAGE = """\
# {title}
base: {base}
data: {data}
method: {method}
{prompt}lora:
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


def ask(path: Path) -> Path:
    """Writes the answers to `path`; a file that is there is never replaced."""
    if path.exists():
        raise OutputError(f"{path} exists; give another name")
    base = typer.prompt("Base (a folder, or an id on the hub)")
    data = typer.prompt("Rows (JSONL, JSON, CSV, Parquet, or a folder)")
    method = typer.prompt("Method: sft, dpo or pretrain", default="sft", value_proc=_method)
    plan = _look(path.parent / data, method)
    prompt = "" if plan is None else _prompt_lines(plan)
    bits = typer.confirm("Hold the base in 4 bits (QLoRA)?", default=False)
    page = PAGE.format(
        title=path.stem,
        base=base,
        data=data,
        method=method,
        prompt=prompt,
        rank=typer.prompt("Rank of the adapter", default=16),
        quantization="quantization:\n  bits: 4\n" if bits else "",
        epochs=typer.prompt("Passes over the rows", default=3),
        max_length=typer.prompt("Longest row in tokens", default=1024),
    )
    parse_options(page, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _method(text: str) -> str:
    """Asked again, unless it is one."""
    if text not in ("sft", "dpo", "pretrain"):
        raise typer.BadParameter("sft, dpo or pretrain")
    return text


def _look(data: Path, method: str) -> Plan | None:
    """How the rows would be read, or None if they say it themselves or cannot be read yet."""
    options = parse_options(f"base: x\ndata: x\nmethod: {method}\n")
    try:
        first = read_data(data).train[0]
    except DataError as error:
        typer.echo(f"note: {error}", err=True)
        return None
    try:
        return plan_rows(options, first)
    except DataError:
        columns = ", ".join(first.values)
        template = typer.prompt(f"Prompt with columns in braces ({columns})")
        completion = typer.prompt("Column of the answer")
        return Plan("columns", template, completion)


def _prompt_lines(plan: Plan) -> str:
    if plan.template is None:
        return ""
    lines = "\n".join(f"  {line}" if line else "" for line in plan.template.split("\n"))
    tail = "" if plan.template.endswith("\n") else "-"
    answer = f"completion: {plan.completion}\n" if plan.completion else ""
    return f"template: |{tail}\n{lines.rstrip()}\n{answer}"

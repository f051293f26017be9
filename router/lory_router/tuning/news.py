"""What a run tells in its events file, and what becomes of it: events of a job, a table.

The file is written by `lory train`, whose contract is the docstring of lory_trainer/events.py: a
JSON object a line; a line that is not whole yet is left for the next look, types and fields that
are not known are skipped. It must not know processes or the database.
"""

import csv
import io
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from lory_router.tuning.records import EventRecord, JobRecord, new_id

EVENTS_NAME = "events.jsonl"
MAX_READ_BYTES = 4 * 2**20
COLUMNS: tuple[str, ...] = (
    "step",
    "train_loss",
    "valid_loss",
    "learning_rate",
    "grad_norm",
    "tokens",
)
STOPPED = "stopped"
LEVELS: Mapping[str, str] = {"info": "info", "warning": "warn"}


class News(msgspec.Struct, frozen=True, kw_only=True):
    """One line, as far as it is used here."""

    type: str
    time: float = 0.0
    step: int = 0
    num_steps: int = 0
    num_rows: int = 0
    loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    reward_accuracy: float | None = None
    reward_margin: float | None = None
    learned_tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float | None = None
    path: str = ""
    eval_loss: float | None = None
    level: str = "info"
    text: str = ""
    code: str = ""
    error: str = ""


def read_news(run: Path, start: int) -> tuple[list[News], int]:
    """Whole lines from byte `start` on, and where the next look begins."""
    try:
        with (run / EVENTS_NAME).open("rb") as file:
            file.seek(start)
            data = file.read(MAX_READ_BYTES)
    except FileNotFoundError:
        return [], start
    whole = data[: data.rfind(b"\n") + 1]
    return [one for line in whole.splitlines() if (one := _parse(line))], start + len(whole)


def _parse(line: bytes) -> News | None:
    """None: what a killed run left half written."""
    try:
        return msgspec.json.decode(line, type=News)
    except msgspec.DecodeError:
        return None


def all_news(run: Path) -> list[News]:
    found: list[News] = []
    start, end = -1, 0
    while end != start:
        start = end
        news, end = read_news(run, start)
        found += news
    return found


def last_failure(run: Path) -> News | None:
    """What the run says it failed of, if that is the last it said."""
    news = all_news(run)
    return news[-1] if news and news[-1].type == "failed" else None


def without_paths(text: str, folders: Iterable[Path]) -> str:
    """A text that callers may read: of paths in these folders, what lies below them."""
    for folder in folders:
        if folder.is_absolute() and folder != Path(folder.root):
            text = text.replace(f"{folder}/", "")
    return text


def message_event(
    job_id: str, text: str, level: Literal["info", "warn", "error"] = "info"
) -> EventRecord:
    """What the server itself has to say of a job."""
    return EventRecord(new_id("ftevent"), job_id, int(time.time()), level, "message", text, "{}")


def told(job: JobRecord, one: News, hidden: Iterable[Path]) -> EventRecord | None:
    """The event of a job that comes of a line; None: callers need not see it."""
    place = f"Step {one.step}/{one.num_steps}"
    if one.type == "step":
        return _metrics(job, one, f"{place}: training loss={_shown(one.loss)}")
    if one.type == "eval":
        return _metrics(job, one, f"{place}: validation loss={_shown(one.loss)}")
    if one.type == "message":
        level: Any = LEVELS.get(one.level, "info")
        text = without_paths(one.text, hidden)
        return EventRecord(new_id("ftevent"), job.id, int(one.time), level, "message", text, "{}")
    return None


def _shown(loss: float | None) -> str:
    return "none" if loss is None else f"{loss:.4f}"


def _metrics(job: JobRecord, one: News, text: str) -> EventRecord:
    return EventRecord(
        new_id("ftevent"), job.id, int(one.time), "info", "metrics", text, json.dumps(figures(one))
    )


def figures(one: News) -> dict[str, float | int]:
    """Of a step, an evaluation or a checkpoint, as OpenAI names them."""
    loss = "valid_loss" if one.type == "eval" else "train_loss"
    values = {
        "step": one.step,
        "total_steps": one.num_steps,
        loss: one.loss,
        "learning_rate": one.learning_rate,
        "grad_norm": one.grad_norm,
        "reward_accuracy": one.reward_accuracy,
        "reward_margin": one.reward_margin,
        "tokens": one.learned_tokens or None,
        "tokens_per_second": one.tokens_per_second,
    }
    if one.type == "checkpoint":
        values["valid_loss"] = one.eval_loss
    return {name: value for name, value in values.items() if value is not None}


def results_csv(run: Path) -> bytes:
    """A row for every step and evaluation; of a step that was done twice, the later one."""
    rows: dict[tuple[int, str], dict[str, float | int]] = {}
    for one in all_news(run):
        if one.type in ("step", "eval"):
            rows[one.step, one.type] = figures(one)
    out = io.StringIO()
    table = csv.DictWriter(out, COLUMNS, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(row for _, row in sorted(rows.items()))
    return out.getvalue().encode()

"""What a run says while it goes: RUN/events.jsonl, and the contract of `lory train` as a process.

A program that starts runs (the fine-tuning API does) needs these two and nothing else.

The process
  `lory train CONFIG --output ADAPTER --run RUN [--dataset FILE] [--resume] [--replace]`
  exit 0    finished: ADAPTER is there, whole (and published, if that was asked for)
  exit 1    failed: the last event is `failed` and says why; ADAPTER is as it was before (but with
            the code `publish` it is written, and only the handing over failed). A command that
            fails before the run begins (a config that cannot be read) says so on stderr alone
  exit 130  stopped: SIGTERM or SIGINT ends the step under way, writes a checkpoint and exits; the
            last event is `failed` with code `stopped`. A second signal exits without a checkpoint
  --resume  goes on from the newest whole checkpoint in RUN, or from the start if there is none
  After a kill -9 the same command with --resume goes on. There is no half adapter and no half
  checkpoint at any moment: both are built beside their place and renamed.

The file
  One JSON object a line, appended and flushed line by line; numbers are finite or null. A line
  without its newline is not whole yet. A resumed run appends: it begins with another `started`,
  whose `resumed_from` is a step; steps after that one were lost and come again, and the later line
  holds. Readers must skip types and fields that they do not know.

  every line   type, time (Unix seconds), step (optimizer steps done; 0 before the first), num_steps
  started      name, base, method (sft, pretrain, dpo), num_rows, num_eval_rows, num_trainable,
               num_parameters, batch_size, gradient_accumulation_steps, learning_rate,
               max_length, seed, device, resumed_from (step or null)
  step         epoch (passes done, a fraction), loss, grad_norm, learning_rate, tokens (read by the
               whole run so far, padding not counted), learned_tokens (those the loss counted),
               seconds (of training so far), tokens_per_second, memory_bytes (peak); DPO adds
               reward_accuracy, reward_margin
  eval         loss, rows, seconds; DPO adds reward_accuracy, reward_margin
  checkpoint   path (relative to RUN: an adapter folder with the optimizer's state in it),
               loss (of that step), eval_loss (newest, or null)
  message      level (info, warning), text
  finished     output (the adapter's folder), loss (mean of the last steps), eval_loss (or null),
               tokens, learned_tokens, seconds, num_rows, published (a URL, a folder, or null),
               adapter_id
  failed       code (config, data, training, out_of_memory, output, publish, stopped, internal),
               error (what is wrong and the fix), checkpoint (newest whole one, relative to RUN, or
               null)
  The last line of a process is `finished` or `failed`, unless it was killed.

This module must not know models, data or the terminal.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from lory_trainer.errors import OutputError

EVENTS_FILE = "events.jsonl"

EventType = Literal["started", "step", "eval", "checkpoint", "message", "finished", "failed"]
Event = dict[str, Any]
Level = Literal["info", "warning"]
Listener = Callable[[Event], None]


class EventLog:
    """Appends events to RUN/events.jsonl, and tells each to the listeners; raises OutputError if
    the file takes no more."""

    def __init__(self, run: Path, *listeners: Listener) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self._listeners = listeners
        self._path = run / EVENTS_FILE
        self._file = _open_whole(self._path)
        self._step = 0
        self._num_steps = 0

    def say(self, kind: EventType, **fields: Any) -> None:
        """`step` and `num_steps` are those of the last event that gave them."""
        self._step = fields.pop("step", self._step)
        self._num_steps = fields.pop("num_steps", self._num_steps)
        place = {"step": self._step, "num_steps": self._num_steps}
        event: Event = {"type": kind, "time": round(time.time(), 3), **place, **_finite(fields)}
        self._write(f"{json.dumps(event)}\n".encode())
        for listener in self._listeners:
            listener(event)

    def _write(self, line: bytes) -> None:
        """Unbuffered: what a full disk does not take is not tried again when the file is closed."""
        try:
            is_whole = self._file.write(line) == len(line)
        except OSError as error:
            raise OutputError(f"{self._path} cannot be written: {error.strerror}") from error
        if not is_whole:
            raise OutputError(f"{self._path} cannot be written: the disk is full")

    def message(self, text: str, level: Level = "info") -> None:
        self.say("message", level=level, text=text)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _open_whole(path: Path) -> FileIO:
    """For appending; the half line that a killed run may have left is ended first."""
    file = FileIO(path, "a+")
    size = file.seek(0, 2)
    if size:
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


def read_events(run: Path) -> list[Event]:
    """Every whole event so far; what a killed run left half written is left out."""
    lines = (run / EVENTS_FILE).read_text(encoding="utf-8").split("\n")[:-1]
    return [event for line in lines if (event := _parse(line)) is not None]


def _parse(line: str) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


def _finite(fields: Mapping[str, Any]) -> Event:
    """JSON has no NaN."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in fields.items()
    }

"""A run in the terminal: one bar with loss, speed, memory and time left, and what it has to say.

Where there is no terminal, a line now and then. It hears events and must not know how they come
about.
"""

import math
from functools import partial
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from lory_trainer.events import Event

GIB = 1 << 30
NUM_LINES = 10
"""Of a run, where no bar can be drawn."""
LONGEST_NAME = 14


class ProgressBar:
    """A listener of a run's events."""

    def __init__(self, console: Console, name: str) -> None:
        self._console = console
        whole = partial(Column, no_wrap=True)
        # Only the bar gives way on a narrow terminal.
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=whole()),
            BarColumn(),
            MofNCompleteColumn(table_column=whole()),
            TextColumn("{task.fields[note]}", markup=False, table_column=whole()),
            TimeRemainingColumn(table_column=whole()),
            console=console,
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task(
            _short(name), total=None, note="loading the base and the rows"
        )

    def __call__(self, event: Event) -> None:
        match event["type"]:
            case "started":
                self._progress.update(
                    self._bar, completed=event["step"], total=event["num_steps"], note="first step"
                )
            case "step":
                self._progress.update(self._bar, completed=event["step"], note=_note(event))
                if not self._console.is_terminal and _is_told(event):
                    place = f"step {event['step']} of {event['num_steps']}"
                    self._say(f"{place}: {_note(event)}")
            case "eval":
                self._say(f"step {event['step']}: {_held_out(event)}")
            case "message":
                is_warning = event["level"] == "warning"
                text = f"warning: {event['text']}" if is_warning else event["text"]
                self._say(text, "yellow" if is_warning else "")

    def _say(self, text: str, style: str = "") -> None:
        self._console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."


def _is_told(event: Event) -> bool:
    every = math.ceil(event["num_steps"] / NUM_LINES)
    return event["step"] % every == 0 or event["step"] == event["num_steps"]


def _note(event: Event) -> str:
    speed, memory = event["tokens_per_second"], event["memory_bytes"] / GIB
    return f"loss {event['loss']:.4f}  {speed:,.0f} tokens/s  {memory:.1f} GiB"


def _held_out(event: Event) -> str:
    text = f"loss {event['loss']:.4f} on {event['rows']} held-out rows"
    if "reward_accuracy" in event:
        text += f", the better answer preferred in {event['reward_accuracy']:.0%}"
    return text

"""A run in the terminal: one bar with loss, speed, memory and time left, and what it has to say.

It hears events and must not know how they come about.
"""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lory_trainer.events import Event

GIB = 1 << 30


class ProgressBar:
    """A listener of a run's events."""

    def __init__(self, console: Console, name: str) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._bar = self._progress.add_task(name, total=None, note="loading the base and the rows")

    def __call__(self, event: Event) -> None:
        match event["type"]:
            case "started":
                self._progress.update(
                    self._bar, completed=event["step"], total=event["num_steps"], note="first step"
                )
            case "step":
                self._progress.update(self._bar, completed=event["step"], note=_note(event))
            case "eval":
                self._say(f"step {event['step']}: {_held_out(event)}")
            case "message":
                style = "yellow" if event["level"] == "warning" else ""
                self._say(event["text"], style)

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


def _note(event: Event) -> str:
    speed, memory = event["tokens_per_second"], event["memory_bytes"] / GIB
    return f"loss {event['loss']:.4f}  {speed:,.0f} tokens/s  {memory:.1f} GiB"


def _held_out(event: Event) -> str:
    text = f"loss {event['loss']:.4f} on {event['rows']} held-out rows"
    if "reward_accuracy" in event:
        text += f", the better answer preferred in {event['reward_accuracy']:.0%}"
    return text

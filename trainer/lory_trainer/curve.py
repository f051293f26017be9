"""RUN/curve.png: the loss and the gradient's norm over the steps, drawn from the event file.

The figure is drawn without pyplot: no display is looked for, and no figure stays open. This module
must not know models or data.
"""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lory_trainer.events import EVENTS_FILE, Event, read_events

CURVE_FILE = "curve.png"
INCHES = (7.6, 5.0)
SMOOTHING = 0.9
TRAINED, SMOOTHED, HELD_OUT, NORM = "#b8cbe8", "#1f5fbf", "#d9822b", "#5a8f4e"

Points = list[tuple[int, float]]


def write_curve(run: Path) -> Path | None:
    """Nothing is drawn of a run that took no step."""
    if not (run / EVENTS_FILE).exists():
        return None
    events = read_events(run)
    losses = series(events, "step", "loss")
    if not losses:
        return None
    figure = draw(losses, series(events, "step", "grad_norm"), series(events, "eval", "loss"))
    image = BytesIO()
    figure.savefig(image, format="png", dpi=100)
    path = run / CURVE_FILE
    path.write_bytes(image.getvalue())
    return path


def series(events: Sequence[Event], kind: str, field: str) -> Points:
    """By step; what a resumed run did again counts, and what was no number is left out."""
    found = {
        event["step"]: float(event[field])
        for event in events
        if event["type"] == kind and isinstance(event.get(field), int | float)
    }
    return sorted(found.items())


def draw(losses: Points, norms: Points, held_out: Points) -> Figure:
    figure = Figure(figsize=INCHES, layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    _line(above, losses, TRAINED, "training")
    _line(above, _smooth(losses), SMOOTHED, "training, smoothed")
    if held_out:
        _line(above, held_out, HELD_OUT, "held-out rows")
    above.set_ylabel("loss")
    above.legend(frameon=False)
    if norms:
        _line(below, norms, NORM, "gradient norm")
    below.set_ylabel("gradient norm")
    below.set_xlabel("step")
    return figure


def _line(axes: Any, points: Points, colour: str, label: str) -> None:
    """A single point shows as a dot."""
    steps, values = zip(*points, strict=True)
    marker = "o" if len(points) == 1 else None
    axes.plot(steps, values, color=colour, label=label, marker=marker, linewidth=1.2)


def _smooth(points: Points) -> Points:
    smoothed: Points = []
    mean = points[0][1]
    for step, value in points:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        smoothed.append((step, mean))
    return smoothed

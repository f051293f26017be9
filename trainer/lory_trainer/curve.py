"""RUN/curve.svg: the loss and the gradient's norm over the steps, drawn from the event file.

An SVG is text, so nothing needs to be installed for it, and every browser shows it. This module
must not know models or data.
"""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from lory_trainer.events import EVENTS_FILE, Event, read_events

CURVE_FILE = "curve.svg"
WIDTH, HEIGHT, LEFT, TOP, PANEL = 760, 460, 70, 30, 170
SMOOTHING = 0.9
MOST_POINTS = 2000

Points = list[tuple[int, float]]


def write_curve(run: Path) -> Path | None:
    """Nothing is drawn of a run that took no step."""
    if not (run / EVENTS_FILE).exists():
        return None
    events = read_events(run)
    losses, norms = _series(events, "step", "loss"), _series(events, "step", "grad_norm")
    if not losses:
        return None
    held_out = _series(events, "eval", "loss")
    path = run / CURVE_FILE
    path.write_text(draw(losses, norms, held_out), encoding="utf-8")
    return path


def _series(events: Sequence[Event], kind: str, field: str) -> Points:
    """By step; what a resumed run did again counts."""
    found = {
        event["step"]: float(event[field])
        for event in events
        if event["type"] == kind and isinstance(event.get(field), int | float)
    }
    return sorted(found.items())


def draw(losses: Points, norms: Points, held_out: Points) -> str:
    last = losses[-1][0]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        *_panel(
            "loss",
            TOP,
            last,
            [(losses, "#b8cbe8", 1), (_smooth(losses), "#1f5fbf", 2), (held_out, "#d9822b", 2)],
        ),
        *_panel("gradient norm", TOP + PANEL + 45, last, [(norms, "#5a8f4e", 1)]),
        f'<text x="{LEFT}" y="{HEIGHT - 8}">step 1 to {last}; blue: training, smoothed; '
        "orange: held-out rows</text>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _panel(title: str, top: int, last: int, lines: Sequence[tuple[Points, str, int]]) -> list[str]:
    values = [value for points, _, _ in lines for _, value in points if math.isfinite(value)]
    if not values:
        return []
    low, high = min(0.0, *values), max(values)
    high = high if high > low else low + 1.0
    right = WIDTH - 20
    parts = [
        f'<text x="{LEFT}" y="{top - 8}" font-weight="bold">{escape(title)}</text>',
        f'<path d="M{LEFT} {top}V{top + PANEL}H{right}" fill="none" stroke="#888"/>',
        f'<text x="{LEFT - 6}" y="{top + 10}" text-anchor="end">{high:.3g}</text>',
        f'<text x="{LEFT - 6}" y="{top + PANEL}" text-anchor="end">{low:.3g}</text>',
    ]

    def place(step: int, value: float) -> str:
        x = LEFT + (right - LEFT) * (step - 1) / max(1, last - 1)
        y = top + PANEL * (high - value) / (high - low)
        return f"{x:.1f},{y:.1f}"

    for points, colour, width in lines:
        shown = " ".join(place(s, v) for s, v in _thinned(points) if math.isfinite(v))
        if shown:
            style = f'fill="none" stroke="{colour}" stroke-width="{width}"'
            parts.append(f'<polyline points="{shown}" {style}/>')
    return parts


def _smooth(points: Points) -> Points:
    smoothed: Points = []
    mean = points[0][1]
    for step, value in points:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        smoothed.append((step, mean))
    return smoothed


def _thinned(points: Points) -> Points:
    stride = max(1, math.ceil(len(points) / MOST_POINTS))
    return points[::stride]

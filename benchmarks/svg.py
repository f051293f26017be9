"""A line chart as an SVG, for pages that are made from measured figures.

Plain text out of plain numbers, the same bytes for the same figures. It must not know what is
drawn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import log10

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 72, 150, 48, 56
COLORS = ("#2563eb", "#ea580c", "#059669", "#7c3aed")
INK, FAINT = "#1f2937", "#e5e7eb"
FONT = "font-family='system-ui, sans-serif'"
STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Line:
    title: str
    points: Sequence[tuple[float, float]]
    is_dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """The x axis is logarithmic, the y axis starts at 0."""

    title: str
    x_title: str
    y_title: str
    lines: Sequence[Line]


def draw(chart: Chart) -> str:
    xs = sorted({x for line in chart.lines for x, _ in line.points})
    step = _tick_step(max(y for line in chart.lines for _, y in line.points))
    top = step * 5

    def place(x: float, y: float) -> tuple[float, float]:
        share = (log10(x) - log10(xs[0])) / ((log10(xs[-1]) - log10(xs[0])) or 1.0)
        return LEFT + share * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y / top * (
            HEIGHT - TOP - BOTTOM
        )

    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' {FONT}>",
        f"<rect width='{WIDTH}' height='{HEIGHT}' fill='white'/>",
        _text(LEFT, 26, chart.title, "start", 15, "600"),
        *_axes(chart, xs, [step * tick for tick in range(6)], place),
        *(part for index, line in enumerate(chart.lines) for part in _line(index, line, place)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


Place = Callable[[float, float], tuple[float, float]]


def _axes(chart: Chart, xs: Sequence[float], ys: Sequence[float], place: Place) -> list[str]:
    parts: list[str] = []
    for y in ys:
        _, at = place(xs[0], y)
        parts.append(
            f"<line x1='{LEFT}' y1='{at:.1f}' x2='{WIDTH - RIGHT}' y2='{at:.1f}' stroke='{FAINT}'/>"
        )
        parts.append(_text(LEFT - 8, at + 4, f"{y:,.10g}", "end"))
    for x in xs:
        at, _ = place(x, 0)
        parts.append(_text(at, HEIGHT - BOTTOM + 20, f"{x:,.10g}", "middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(_text(middle, HEIGHT - 14, chart.x_title, "middle"))
    parts.append(_text(LEFT, TOP - 6, chart.y_title, "start"))
    return parts


def _line(index: int, line: Line, place: Place) -> list[str]:
    color, places = COLORS[index % len(COLORS)], [place(*point) for point in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dash = " stroke-dasharray='6 4'" if line.is_dashed else ""
    dots = [f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3.5' fill='{color}'/>" for x, y in places]
    legend = TOP + 18 * (index + 1)
    edge = WIDTH - RIGHT + 14
    return [
        f"<polyline points='{path}' fill='none' stroke='{color}' stroke-width='2'{dash}/>",
        *dots,
        f"<line x1='{edge}' y1='{legend - 4}' x2='{edge + 22}' y2='{legend - 4}'"
        f" stroke='{color}' stroke-width='2'{dash}/>",
        _text(edge + 28, legend, line.title, "start"),
    ]


def _text(x: float, y: float, text: str, anchor: str, size: int = 12, weight: str = "400") -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' font-size='{size}'"
        f" font-weight='{weight}' fill='{INK}'>{escape(text)}</text>"
    )


def _tick_step(most: float) -> float:
    """A round fifth of the axis, above `most` in all."""
    power = 10 ** int(log10(most / 5) // 1)
    return next(step * power for step in STEPS if step * power * 5 >= most)

"""Small drawings for the report, as SVG text: line charts and the dot-and-interval strips of the figures.

Colours are CSS classes, which the page defines for light, dark and print. What comes from outside is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 40
MAX_POINTS = 400  # a line's points on the page; longer series are thinned, under a line of means
NUM_MEANS = 60


@dataclass(frozen=True)
class Series:
    """One line: (pictures seen, value) pairs in the order seen. Values that are not finite leave a gap."""

    label: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Chart:
    """Lines over one pair of axes. `log` needs values above 0; others are left out."""

    title: str
    series: tuple[Series, ...]
    y_label: str = ""
    x_label: str = "pictures seen"
    log: bool = False
    caption: str = ""


def line_chart(chart: Chart) -> Markup:
    """The chart as an SVG element; without a point to draw, as a sentence that says so."""
    lines = [_drawable(series, chart.log) for series in chart.series]
    finite = np.concatenate([np.empty((0, 2)), *(line[np.isfinite(line[:, 1])] for line in lines)])
    if not len(finite):
        return Markup("<p class='empty'>No values were recorded.</p>")
    x_ticks = linear_ticks(min(0.0, finite[:, 0].min()), finite[:, 0].max(), 5)
    y_ticks = (log_ticks if chart.log else linear_ticks)(finite[:, 1].min(), finite[:, 1].max(), 5)
    x_of = _scale(min(x_ticks[0], finite[:, 0].min()), finite[:, 0].max(), LEFT, WIDTH - RIGHT, log=False)
    low, high = min(y_ticks[0], finite[:, 1].min()), max(y_ticks[-1], finite[:, 1].max())
    y_of = _scale(low, high, HEIGHT - BOTTOM, TOP, log=chart.log)
    body = [*_axes(x_ticks, y_ticks, x_of, y_of, finite[:, 0].max()), *_labels(chart)]
    for number, line in enumerate(lines):
        body += _line(line, number % 6, x_of, y_of)
    head = Markup("<svg class='chart' viewBox='0 0 {} {}' role='img' aria-label='{}'>")
    name = f"{chart.title}: {', '.join(series.label for series in chart.series)} over {chart.x_label}"
    return head.format(WIDTH, HEIGHT, name) + Markup("").join(body) + Markup("</svg>")


def _drawable(series: Series, log: bool) -> np.ndarray:
    points = np.array(series.points, dtype=np.float64).reshape(-1, 2)
    points[~np.isfinite(points[:, 1]) | ((points[:, 1] <= 0) & log), 1] = np.nan
    return points[np.isfinite(points[:, 0])]


def _axes(x_ticks, y_ticks, x_of, y_of, x_max: float) -> list[Markup]:
    parts = []
    for tick in y_ticks:
        y = f"{y_of(tick):.1f}"
        parts.append(Markup("<line class='rule' x1='{}' x2='{}' y1='{}' y2='{}'/>").format(LEFT, WIDTH - RIGHT, y, y))
        label = Markup("<text class='tick' x='{}' y='{}' dy='.32em' text-anchor='end'>{}</text>")
        parts.append(label.format(LEFT - 8, y, short(tick)))
    base = HEIGHT - BOTTOM
    parts.append(Markup("<line class='axis' x1='{}' x2='{}' y1='{}' y2='{}'/>").format(LEFT, WIDTH - RIGHT, base, base))
    for tick in x_ticks:
        if tick <= x_max * (1 + 1e-9):
            x = f"{x_of(tick):.1f}"
            parts.append(Markup("<line class='axis' x1='{}' x2='{}' y1='{}' y2='{}'/>").format(x, x, base, base + 4))
            label = Markup("<text class='tick' x='{}' y='{}' text-anchor='middle'>{}</text>")
            parts.append(label.format(x, base + 17, short(tick)))
    return parts


def _labels(chart: Chart) -> list[Markup]:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    across = Markup("<text class='name' x='{}' y='{}' text-anchor='middle'>{}</text>")
    upright = Markup("<text class='name' transform='translate(12 {}) rotate(-90)' text-anchor='middle'>{}</text>")
    return [across.format((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, chart.x_label), upright.format(middle, chart.y_label)]


def _line(points: np.ndarray, number: int, x_of, y_of) -> list[Markup]:
    """The line itself where it is short; where long, its thinned self in a pale tone under a line of means."""
    path = Markup("<path class='{} s{}' d='{}'/>")
    if len(points) <= 2 * NUM_MEANS:
        return [path.format("line", number, _path(points, x_of, y_of))]
    thin = points[:: math.ceil(len(points) / MAX_POINTS)]
    blocks = [block for block in np.array_split(points, NUM_MEANS) if np.isfinite(block[:, 1]).any()]
    means = np.array([[block[:, 0].mean(), np.nanmean(block[:, 1])] for block in blocks])
    return [path.format("raw", number, _path(thin, x_of, y_of)), path.format("line", number, _path(means, x_of, y_of))]


def _path(points: np.ndarray, x_of, y_of) -> str:
    steps, is_down = [], False
    for x, y in points:
        if not np.isfinite(y):
            is_down = False
            continue
        steps.append(f"{'L' if is_down else 'M'}{x_of(x):.1f} {y_of(y):.1f}")
        is_down = True
    if len(steps) == 1:  # a lone point: a round cap of no length shows as a dot
        steps.append("h0")
    return "".join(steps)


def interval_strip(
    value: float,
    low: float | None,
    high: float | None,
    *,
    ends: tuple[float, float],
    log: bool,
    limits: Sequence[float] = (),
    role: str = "reference",
) -> Markup:
    """A dot with its interval on a line from `ends[0]` to `ends[1]`, and an upright mark at each limit."""
    x_of = _scale(*ends, 8, 312, log=log)
    mark = "".join(f"<line class='limit' x1='{x:.1f}' x2='{x:.1f}' y1='2' y2='22'/>" for x in map(x_of, limits))
    bar = ""
    if low is not None and high is not None:
        bar = f"<line class='bar' x1='{x_of(low):.1f}' x2='{x_of(high):.1f}' y1='12' y2='12'/>"
    dot = f"<circle cx='{x_of(value):.1f}' cy='12' r='4.5'/>" if math.isfinite(value) else ""
    frame = "<svg class='strip {}' viewBox='0 0 320 24' aria-hidden='true'>"
    rail = "<line class='rail' x1='8' x2='312' y1='12' y2='12'/>"
    return Markup(frame).format(role) + Markup(rail + mark + bar + dot) + Markup("</svg>")


def _scale(low: float, high: float, start: float, end: float, *, log: bool) -> Callable[[float], float]:
    """Values in [low, high] to places from `start` to `end`, clipped there."""
    value_of = (lambda v: math.log(max(v, low))) if log else float
    first, last = value_of(low), value_of(high)
    span = (last - first) or 1.0

    def place(value: float) -> float:
        return start + (end - start) * min(1.0, max(0.0, (value_of(value) - first) / span))

    return place


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that cover [low, high]."""
    if high <= low:
        low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if low else (-1.0, 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [round(i * step, 12) for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Powers of ten that cover [low, high], with 2 and 5 between them where there are few; low > 0."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    if last - first > 2:
        stride = math.ceil((last - first) / count)
        return [10.0**power for power in range(first, last + stride, stride)]
    ticks = [factor * 10.0**power for power in range(first, last) for factor in (1, 2, 5)] + [10.0**last]
    below = [tick for tick in ticks if tick <= low]
    above = [tick for tick in ticks if tick >= high]
    return [tick for tick in ticks if below[-1] <= tick <= above[0]]


def short(value: float) -> str:
    """A tick's number: 20,000 becomes 20k, with a true minus sign."""
    size = abs(value)
    scaled, suffix = next((size / f, s) for f, s in ((1e6, "M"), (1e3, "k"), (1.0, "")) if size >= f or f == 1.0)
    return ("\N{MINUS SIGN}" if value < 0 else "") + f"{scaled:.6g}{suffix}"

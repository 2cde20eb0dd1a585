"""The report of a run: one HTML file that explains itself, and its numbers as JSON beside it.

A `Report` says everything in data; this file and its page template (`report.html`) only set it. Whatever is empty is
left out, so that a quick demo and a full evaluation share one page.
"""

from __future__ import annotations

import errno
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import ClassVar, Literal

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from pydantic import ConfigDict, TypeAdapter, ValidationError

from onestroke.errors import DataError, ResourceError
from onestroke.evaluate.grids import Grid, data_uri
from onestroke.evaluate.latency import LatencyRow
from onestroke.evaluate.metrics import AttributeScore
from onestroke.evaluate.plots import Chart, interval_strip, line_chart

Role = Literal["teacher", "student", "reference"]
Form = Literal["number", "percent", "times", "points"]
DIGITS = 3  # significant, in figures


@dataclass(frozen=True)
class Target:
    """A limit in the figure's own unit, e.g. Target("at most", 2.0, name="required")."""

    bound: Literal["at most", "at least"]
    limit: float
    name: str = "target"

    def met(self, value: float) -> bool:
        """Whether `value` lies on the right side; a value that is not a number does not."""
        return value <= self.limit if self.bound == "at most" else value >= self.limit


@dataclass(frozen=True)
class Reading:
    """One model's value of a figure, with its 95% interval."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    role: Role = "reference"
    targets: tuple[Target, ...] = ()

    def certain(self, target: Target) -> bool:
        """Whether the whole interval lies on the same side of the target as the value (False without interval)."""
        if self.low is None or self.high is None:
            return False
        return target.met(self.low) == target.met(self.high) == target.met(self.value)


@dataclass(frozen=True)
class Figure:
    """One measure and what each model reads on it; the teacher at 1 step belongs beside the student.

    `form`: how values are written. A "percent" is stored as a share in [0, 1], "points" as a difference of shares.
    """

    name: str
    meaning: str  # for a reader who has never met the measure
    readings: tuple[Reading, ...]
    better: Literal["lower", "higher", "neither"] = "lower"
    form: Form = "number"
    features: str = ""  # the network whose features were compared
    count: int | None = None  # pictures of each set
    log: bool | None = None  # scale of the drawing; None: logarithmic where values differ more than twentyfold

    @property
    def is_log(self) -> bool:
        values = [x for r in self.readings for x in (r.value, r.low, r.high) if x is not None and math.isfinite(x)]
        above_zero = bool(values) and min(values) > 0
        return above_zero and (self.log if self.log is not None else max(values) > 20 * min(values))

    @property
    def ends(self) -> tuple[float, float]:
        """Where the drawing begins and ends: room for every value, interval and limit."""
        values = [x for r in self.readings for x in (r.value, r.low, r.high, *(t.limit for t in r.targets))]
        values = [x for x in values if x is not None and math.isfinite(x)] or [0.0]
        if self.is_log:
            positive = [x for x in values if x > 0]
            return min(positive) / 1.15, max(positive) * 1.15
        low, high = min(0.0, *values), max(0.0, *values)
        room = 0.04 * (high - low) or 1.0
        return low - room * (low < 0), high + room


@dataclass(frozen=True)
class Highlight:
    """One large number of the page's head, already written out ("38×"), and what it says."""

    value: str
    label: str


@dataclass(frozen=True)
class Note:
    """A paragraph on what the numbers mean, or what to be careful about."""

    heading: str
    text: str


@dataclass(frozen=True)
class Report:
    """Everything the page shows. `grids`: the first is the hero; pictures are not kept in the JSON."""

    __pydantic_config__: ClassVar = ConfigDict(arbitrary_types_allowed=True, ser_json_inf_nan="strings", extra="forbid")

    title: str
    summary: str
    facts: Mapping[str, str] = field(default_factory=dict)  # what was done: dates, machine, seed, versions ...
    recipe: str = ""  # the resolved recipe, as YAML
    highlights: tuple[Highlight, ...] = ()
    grids: tuple[Grid, ...] = ()
    figures: tuple[Figure, ...] = ()
    latency: tuple[LatencyRow, ...] = ()
    adherence: Mapping[str, Mapping[str, AttributeScore]] = field(default_factory=dict)  # model -> attribute -> score
    charts: tuple[Chart, ...] = ()
    notes: tuple[Note, ...] = ()


def write_report(report: Report, path: Path) -> None:
    """Write the page to `path` and its numbers beside it, as `.json`; either is replaced whole or not at all.

    The page loads nothing from outside and needs no script. Raises ResourceError where the disk does not take it.
    """
    _replace(path.with_suffix(".json"), report_json(report))
    _replace(path, report_html(report))


def report_json(report: Report) -> str:
    """All but the pictures, as strict JSON: NaN and infinities are strings."""
    return _adapter().dump_json(report, indent=2, exclude={"grids"}).decode() + "\n"


def read_report(path: Path) -> Report:
    """The report whose numbers are in a `report.json`, without its pictures. Raises DataError where it is not one."""
    try:
        return _adapter().validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError("there is no such report", where=str(path)) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(
            f"not a report of this version ({place}: {first['msg']})", where=str(path), fix="Write it again."
        ) from error


def report_html(report: Report) -> str:
    """The page. Every text of the report is escaped."""
    return _template().render(
        report=report,
        statuses=_targets(report.figures),
        strip=_strip,
        latency=_by_batch_size(report.latency),
        parts=list(dict.fromkeys(name for row in report.latency for name in row.parts)),
        attributes=sorted({name for scores in report.adherence.values() for name in scores}),
        mean_corrected=_mean_corrected,
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "picture": data_uri,
        "chart": line_chart,
        "figure": figure_value,
        "interval": _interval,
        "limit": _limit,
        "seconds": seconds,
    }
    return environment.from_string(files("onestroke.evaluate").joinpath("report.html").read_text("utf-8"))


UNITS: dict[Form, str] = {"number": "", "percent": "%", "times": "×", "points": " points"}


def figure_value(value: float, form: Form = "number") -> str:
    """A value as a reader wants it: three significant digits, a true minus sign, its unit."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    shown = 100 * value if form in ("percent", "points") else value
    text = f"{abs(shown):.1f}" if form in ("percent", "points") else _significant(abs(shown))
    is_zero = not float(text.replace(",", ""))
    sign = "" if is_zero else "\N{MINUS SIGN}" if shown < 0 else "+" if form == "points" else ""
    return sign + text + UNITS[form]


def _interval(reading: Reading, form: Form) -> str:
    """Both ends, or nothing where there is no interval; without a unit that is a word."""
    ends = [figure_value(end, form).removesuffix(" points") for end in (reading.low, reading.high) if end is not None]
    return " to ".join(ends) if len(ends) == 2 else ""


def _limit(target: Target, form: Form) -> str:
    """A target as it was set, without digits that nobody wrote: at most 2×."""
    shown = 100 * target.limit if form in ("percent", "points") else target.limit
    return f"{target.bound} " + f"{shown:.6g}".replace("-", "\N{MINUS SIGN}") + UNITS[form]


def seconds(value: float) -> str:
    """A duration in the unit that suits it: 12.3 s, 45.6 ms, 0.12 ms."""
    return f"{_significant(value)} s" if value >= 0.9995 else f"{_significant(1000 * value)} ms"


def _significant(value: float) -> str:
    """`DIGITS` significant digits, all of those before the point; `value` at least 0."""
    rounded = float(f"{value:.{DIGITS - 1}e}")
    if rounded == 0 or rounded >= 10 ** (DIGITS - 1):
        return f"{value:,.0f}"
    if rounded < 1e-4:
        return f"{value:.{DIGITS - 2}e}"
    return f"{value:.{DIGITS - 1 - math.floor(math.log10(rounded))}f}"


def _targets(figures: Sequence[Figure]) -> list[tuple[Figure, Reading, Target]]:
    return [(f, reading, target) for f in figures for reading in f.readings for target in reading.targets]


def _strip(figure: Figure, reading: Reading) -> Markup:
    limits = [target.limit for target in reading.targets]
    return interval_strip(
        reading.value, reading.low, reading.high, ends=figure.ends, log=figure.is_log, limits=limits, role=reading.role
    )


def _by_batch_size(rows: Sequence[LatencyRow]) -> dict[int, list[LatencyRow]]:
    sizes = dict.fromkeys(row.batch_size for row in rows)
    return {size: [row for row in rows if row.batch_size == size] for size in sizes}


def _mean_corrected(scores: Mapping[str, AttributeScore]) -> float | None:
    known = [score.corrected for score in scores.values() if score.corrected is not None]
    return sum(known) / len(known) if known else None


@cache
def _adapter() -> TypeAdapter[Report]:
    return TypeAdapter(Report)


def _replace(path: Path, text: str) -> None:
    """Write beside `path`, then rename over it."""
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = file.name
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        fix = "Free some space." if error.errno == errno.ENOSPC else "Check the folder and its permissions."
        raise ResourceError(f"the report cannot be written ({error.strerror})", where=str(path), fix=fix) from error

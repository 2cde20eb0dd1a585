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
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import ClassVar

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from pydantic import ConfigDict, TypeAdapter, ValidationError

from onestroke.errors import DataError, ResourceError
from onestroke.evaluate.adherence import AttributeScore
from onestroke.evaluate.findings import (
    Figure,
    Flag,
    Form,
    GroupTable,
    Highlight,
    Measured,
    Missing,
    Note,
    Outcome,
    Reading,
    Target,
)
from onestroke.evaluate.grids import Gallery, Grid, data_uri
from onestroke.evaluate.latency import LatencyRow
from onestroke.evaluate.plots import Chart, interval_strip, line_chart

THUMBNAIL = 192  # pixels, of the worst pictures: there are hundreds
DIGITS = 3  # significant, in figures


@dataclass(frozen=True)
class Report:
    """Everything the page shows. `grids`: the first is the hero; pictures are not kept in the JSON.

    `measures`: every number with its name, for programs; `figures` are the same for readers.
    """

    __pydantic_config__: ClassVar = ConfigDict(arbitrary_types_allowed=True, ser_json_inf_nan="strings", extra="forbid")

    title: str
    summary: str
    facts: Mapping[str, str] = field(default_factory=dict)  # what was done: dates, machine, seed, versions ...
    recipe: str = ""  # the resolved recipe, as YAML
    highlights: tuple[Highlight, ...] = ()
    grids: tuple[Grid, ...] = ()
    gate: tuple[Outcome, ...] = ()
    flags: tuple[Flag, ...] | None = None  # None: nothing was looked for
    figures: tuple[Figure, ...] = ()
    groups: tuple[GroupTable, ...] = ()
    galleries: tuple[Gallery, ...] = ()
    failures: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # model -> prompts and reasons
    missing: tuple[Missing, ...] = ()
    measures: tuple[Measured, ...] = ()
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
    return _adapter().dump_json(report, indent=2, exclude={"grids", "galleries"}).decode() + "\n"


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
        questions=list(dict.fromkeys(figure.question for figure in report.figures)),
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
        "thumbnail": partial(data_uri, longest=THUMBNAIL),
        "chart": line_chart,
        "figure": figure_value,
        "interval": shown_interval,
        "limit": _limit,
        "seconds": seconds,
    }
    return environment.from_string(files("onestroke.evaluate").joinpath("report.html").read_text("utf-8"))


UNITS: dict[Form, str] = {"number": "", "percent": "%", "times": "×", "points": " points", "count": ""}


def figure_value(value: float, form: Form = "number") -> str:
    """A value as a reader wants it: three significant digits, a true minus sign, its unit."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if form == "count":
        return f"{value:,.0f}"
    shown = 100 * value if form in ("percent", "points") else value
    text = f"{abs(shown):.1f}" if form in ("percent", "points") else _significant(abs(shown))
    is_zero = not float(text.replace(",", ""))
    sign = "" if is_zero else "\N{MINUS SIGN}" if shown < 0 else "+" if form == "points" else ""
    return sign + text + UNITS[form]


def shown_interval(reading: Reading, form: Form) -> str:
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

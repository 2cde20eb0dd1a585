"""An ablation as JSON, as a Markdown table, and as one HTML page that needs nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from itertools import groupby
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from onestroke.ablation.scores import STEPS
from onestroke.ablation.table import MEASURES, Claim, Measure, Reading, Row
from onestroke.errors import ResourceError
from onestroke.evaluate.grids import data_uri
from onestroke.evaluate.plots import interval_strip

TITLES: Mapping[Measure, str] = {"distance": "Fréchet distance", "adherence": "Prompt adherence"}
BETTER: Mapping[Measure, str] = {"distance": "lower is better", "adherence": "higher is better"}
ORDER: Mapping[Measure, tuple[str, str]] = {  # of one setting, of several
    "distance": ("is nearer to real pictures than", "are nearer to real pictures than"),
    "adherence": ("follows its prompts better than", "follow their prompts better than"),
}


@dataclass(frozen=True)
class AblationReport:
    """Everything that is written. `shown`: pictures of a row (group, label) by number of steps; not in the JSON."""

    title: str
    summary: str
    command: str
    num_images: int  # pictures in every run
    count: int  # pictures that each run is measured on
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    yardsticks: tuple[Row, ...]  # what stands beside the table: real pictures, the teacher
    freedom: int  # of the spread between seeds; 0 where no setting has two
    facts: Mapping[str, str]
    study: str  # as YAML
    shown: Mapping[tuple[str, str], Mapping[int, np.ndarray]]
    prompts: tuple[str, ...] = ()  # of the pictures that are shown
    num_missing: int = 0  # runs that are not finished yet

    @property
    def groups(self) -> list[tuple[str, list[Row]]]:
        return [(group, list(rows)) for group, rows in groupby(self.rows, key=lambda row: row.group)]


def write_ablation(report: AblationReport, out: Path) -> None:
    """Write ablation.json, ablation.md and ablation.html in `out`, each whole or not at all. Raises ResourceError."""
    _replace(out / "ablation.json", ablation_json(report))
    _replace(out / "ablation.md", ablation_markdown(report))
    _replace(out / "ablation.html", ablation_html(report))


def ablation_json(report: AblationReport) -> str:
    """All the numbers; no pictures."""
    tree = {name: value for name, value in vars(report).items() if name != "shown"}
    tree |= {name: [asdict(item) for item in tree[name]] for name in ("rows", "claims", "yardsticks")}
    return json.dumps(tree, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def ablation_markdown(report: AblationReport) -> str:
    """A table a group, what may be claimed, and what the numbers are."""
    lines = [
        f"# {report.title}",
        "",
        *_paragraph(report.summary),
        *_paragraph(budget(report)),
        *_paragraph(unfinished(report)),
    ]
    lines += [f"    {report.command}", ""]
    if report.yardsticks:
        lines += [*_table(report.yardsticks, "For comparison"), ""]
    for group, rows in report.groups:
        lines += [f"## {group}", "", *_table(rows, "Setting"), "", *(f"- {line}" for line in words(report, group)), ""]
    return "\n".join([*lines, *(f"{note}\n" for note in notes(report))])


def _paragraph(text: str) -> list[str]:
    return [text, ""] if text else []


def _table(rows: Sequence[Row], head: str) -> Iterator[str]:
    has_paper = any(row.paper for row in rows)
    columns = [f"{TITLES[measure]}, {_steps(steps)}" for measure in MEASURES for steps in STEPS]
    cells = [head, "seeds", *columns, *(["paper"] if has_paper else [])]
    yield "| " + " | ".join(cells) + " |"
    yield "|---" * len(cells) + "|"
    for row in rows:
        readings = [row.failed] + [""] * (len(columns) - 1) if row.failed else map(shown_reading, row.readings)
        cells = [row.label, str(len(row.seeds) or ""), *readings, *([row.paper] if has_paper else [])]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def shown_reading(reading: Reading) -> str:
    """Value and interval: 210 [190, 232], or 61.2% [59.0%, 63.4%]."""
    value, low, high = (shown_value(reading.measure, x) for x in (reading.value, reading.low, reading.high))
    return f"{value} [{low}, {high}]"


def shown_value(measure: Measure, value: float) -> str:
    """Three significant digits of a distance; an adherence in percent."""
    if measure == "adherence":
        return f"{100 * value:.1f}%".replace("-", "\N{MINUS SIGN}")
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def words(report: AblationReport, group: str) -> list[str]:
    """What may be claimed of a group, a sentence for each measure and number of steps; one where nothing may be."""
    labels = [row.label for row in report.rows if row.group == group and not row.failed]
    claims = [claim for claim in report.claims if claim.group == group]
    if len(labels) < 2:
        return []
    if not claims:
        return ["No order is claimed: at every measure and number of steps, all intervals touch."]
    return [
        f"{TITLES[measure]}, {_steps(steps)}: "
        + _claimed([claim for claim in claims if (claim.measure, claim.steps) == (measure, steps)], labels, measure)
        for measure in MEASURES
        for steps in STEPS
    ]


def _claimed(claims: Sequence[Claim], labels: Sequence[str], measure: Measure) -> str:
    worse: dict[str, list[str]] = {}
    for claim in claims:
        worse.setdefault(claim.better, []).append(claim.worse)
    if not worse:
        return "no order is claimed."
    better: dict[tuple[str, ...], list[str]] = {}
    for name, others in worse.items():
        better.setdefault(tuple(others), []).append(name)
    said = [f"{_listed(names)} {ORDER[measure][len(names) > 1]} {_listed(others)}" for others, names in better.items()]
    pairs = len(labels) * (len(labels) - 1) // 2
    rest = pairs - len(claims)
    left = f" Of {pairs} pairs, {rest} {'is' if rest == 1 else 'are'} not told apart." if rest else ""
    return f"{'; '.join(said)}.{left}"


def _listed(names: Sequence[str]) -> str:
    quoted = [f"\N{LEFT DOUBLE QUOTATION MARK}{name}\N{RIGHT DOUBLE QUOTATION MARK}" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def budget(report: AblationReport) -> str:
    """What every run was given and is measured on."""
    return (
        f"Every run saw {report.num_images:,} pictures; every student is measured on the same {report.count:,} "
        "held-out prompts and seeds, with 95% intervals."
    )


def unfinished(report: AblationReport) -> str:
    """A warning where runs are missing, else nothing."""
    count = report.num_missing
    return (
        f"Not finished: {count} run{' is' if count == 1 else 's are'} missing; the same command goes on."
        if count
        else ""
    )


def notes(report: AblationReport) -> list[str]:
    """How to read the figures."""
    seeds = (
        f"The spread between training seeds is pooled over the settings that have several ({report.freedom} degrees of "
        "freedom) and is part of every interval, also where a setting was trained once."
        if report.freedom
        else "No setting was trained twice: the intervals hold the chance of the pictures alone, and an order holds "
        "for these runs. Other seeds may reverse it."
    )
    return [
        "An order is claimed only where two 95% intervals do not touch. Intervals are not corrected for their number.",
        "Fréchet distance, in the features of the comic judge, to as many real held-out pictures: mean over seeds "
        "(geometric), interval by a block jackknife. It depends on the number of pictures and compares at the same "
        "number only.",
        "Prompt adherence: the share of what prompts name that the judge finds, beyond guessing; interval by a "
        "bootstrap over prompts. The judge is a small network that no discriminator sees.",
        seeds,
    ]


def ablation_html(report: AblationReport) -> str:
    """The page; every text of the report is escaped."""
    return _template().render(
        report=report,
        budget=budget(report),
        unfinished=unfinished(report),
        notes=notes(report),
        words={group: words(report, group) for group, _ in report.groups},
        measures=MEASURES,
        steps=STEPS,
        titles=TITLES,
        better=BETTER,
        strip=_strip_of(report),
        value=shown_value,
        picture=data_uri,
        steps_words=_steps,
    )


def _strip_of(report: AblationReport):
    """A drawing of a reading, on one scale for all of its measure at its number of steps."""
    ends = {}
    for measure in MEASURES:
        for steps in STEPS:
            readings = [row.reading(measure, steps) for row in (*report.rows, *report.yardsticks) if row.readings]
            lows, highs = [r.low for r in readings], [r.high for r in readings]
            if measure == "distance":
                ends[measure, steps] = (min(lows, default=1) / 1.1, max(highs, default=1) * 1.1)
            else:
                ends[measure, steps] = (min([0.0, *lows]), max([*highs, 0.01]) * 1.03)

    def strip(reading: Reading, role: str = "student") -> Markup:
        return interval_strip(
            reading.value,
            reading.low,
            reading.high,
            ends=ends[reading.measure, reading.steps],
            log=reading.measure == "distance",
            role=role,
        )

    return strip


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(files("onestroke.ablation").joinpath("page.html").read_text("utf-8"))


def _steps(count: int) -> str:
    return f"{count} step{'s' if count > 1 else ''}"


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, "utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ResourceError(
            f"the table cannot be written ({error.strerror})", where=str(path), fix="Free some space."
        ) from error

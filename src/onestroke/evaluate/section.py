"""The evaluation section of a model card: the figures that matter, with n, network and interval, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from onestroke.evaluate.catalog import MEASURES
from onestroke.evaluate.findings import Measured, Reading
from onestroke.evaluate.report import Report, figure_value, shown_interval

KEYS = (
    "fd", "fd_ratio", "kd", "cmmd", "precision", "recall", "coverage", "adherence", "adherence_drop", "clip_score",
    "clip_score_drop", "pickscore_drop", "hpsv2_drop", "spread_ratio", "saturation_ratio", "contrast_ratio",
    "sharpness_ratio", "style_spread_ratio", "failed",
)  # fmt: skip


def card_section(report: Report, *, trained_against: frozenset[str] = frozenset(), command: str = "") -> str:
    """A table of measures by set: the student at each number of steps, the teacher, and real pictures."""
    whole = [m for m in report.measures if not m.column and m.network not in trained_against and m.key in KEYS]
    labels = _labels(whole)
    lines = ["| measure | " + " | ".join(labels) + " |", "|---|" + "---|" * len(labels)]
    for key in KEYS:
        for network in dict.fromkeys(m.network for m in whole if m.key == key):
            of = {m.label: m for m in whole if (m.key, m.network) == (key, network)}
            cells = [_cell(of[label]) if label in of else "" for label in labels]
            count = max(m.count for m in of.values())
            where = f"{network}, " if network else ""
            lines.append(f"| {MEASURES[key].title} ({where}n = {count:,}) | " + " | ".join(cells) + " |")
    lines += ["", "95% intervals in brackets.", *_verdict(report)]
    if trained_against:
        lines.append(f"Left out, for the discriminator saw them: {', '.join(sorted(trained_against))}.")
    if report.missing:
        lines.append(f"Not measured: {', '.join(one.name for one in report.missing if ':' not in one.name)}.")
    return "\n".join([*lines, *([f"\nMeasured by `{command}`."] if command else [])]) + "\n"


def _labels(measured: Sequence[Measured]) -> list[str]:
    order = {"student": 0, "teacher": 1, "reference": 2}
    return sorted(dict.fromkeys(m.label for m in measured), key=lambda label: min(
        (order[m.role], m.steps or 0) for m in measured if m.label == label
    ))  # fmt: skip


def _cell(one: Measured) -> str:
    form = MEASURES[one.key].form
    ends = shown_interval(Reading(one.label, one.value, one.low, one.high), form)
    return figure_value(one.value, form) + (f" [{ends}]" if ends else "")


def _verdict(report: Report) -> list[str]:
    if report.flags is None:
        return []
    if not report.flags:
        return ["No model was flagged as broken."]
    return [f"{flag.label}: {flag.says} ({flag.key} {flag.value:.3g})." for flag in report.flags]

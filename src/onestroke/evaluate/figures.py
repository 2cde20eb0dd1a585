"""Measures as the report shows them: figures with their targets, flags on broken students, tables by group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from onestroke.evaluate.catalog import MEASURES, QUESTIONS, goals
from onestroke.evaluate.findings import Figure, Flag, GroupTable, Measured, Reading, Target
from onestroke.evaluate.gate import Condition
from onestroke.evaluate.measures import Networks

GROUP_KEYS = (
    "adherence_drop", "clip_score_drop", "pickscore_drop", "hpsv2_drop", "saturation_ratio", "contrast_ratio",
    "sharpness_ratio", "style_spread_ratio", "kd_teacher", "cmmd_teacher",
)  # fmt: skip


@dataclass(frozen=True)
class Labels:
    """The sets that targets of the teacher are taken from; "" where there is no such set."""

    base: str = ""
    real: str = ""
    reconstructed: str = ""


def figures_of(
    measured: Sequence[Measured],
    networks: Networks,
    titles: Mapping[str, str],
    *,
    gate: Sequence[Condition] = (),
    labels: Labels = Labels(),
    with_goals: bool = True,
) -> tuple[Figure, ...]:
    """A figure for each measure and network, in the catalog's order; `titles`: what networks are called on the page."""
    whole = [m for m in measured if not m.column]
    aims = goals if with_goals else lambda key, steps: ()
    places = {(m.key, m.network) for m in whole}
    order = [key for question in QUESTIONS for key, of in MEASURES.items() if of.question == question]
    networks_in_order = list(dict.fromkeys(m.network for m in whole))
    figures = []
    for key in order:
        for network in networks_in_order:
            if (key, network) in places:
                some = [m for m in whole if (m.key, m.network) == (key, network)]
                figures.append(
                    _figure(key, network, some, networks, titles, gate, aims, _teacher_limits(key, some, labels))
                )
    return tuple(figures)


def _figure(
    key: str,
    network: str,
    measured: Sequence[Measured],
    networks: Networks,
    titles: Mapping[str, str],
    gate: Sequence[Condition],
    aims: Callable[[str, int | None], tuple[Target, ...]],
    teacher_limits: Mapping[str, Target],
) -> Figure:
    measure, is_seen = MEASURES[key], network in networks.trained_against
    readings = []
    for one in measured:
        targets: tuple[Target, ...] = ()
        if one.role == "student" and not is_seen:
            targets = (*aims(key, one.steps), *_of_gate(gate, one, networks))
        elif one.label in teacher_limits and not is_seen:
            targets = (teacher_limits[one.label],)
        readings.append(Reading(one.label, one.value, one.low, one.high, one.role, targets))  # pyright: ignore
    return Figure(
        measure.title,
        measure.meaning,
        tuple(readings),
        measure.better,  # pyright: ignore
        measure.form,
        titles.get(network, network),
        max(m.count for m in measured),
        question=measure.question,
        is_trained_against=is_seen,
    )


def _of_gate(gate: Sequence[Condition], one: Measured, networks: Networks) -> list[Target]:
    """The gate's own limits beside the readings that they test."""
    limits = []
    for condition in gate:
        network = condition.network or (networks.primary if one.network in networks.distances else one.network)
        if (condition.key, network) == (one.key, one.network) and condition.steps in (None, one.steps):
            limits.append(Target("at most" if condition.is_upper else "at least", condition.limit, "gate"))
    return limits


def _teacher_limits(key: str, measured: Sequence[Measured], labels: Labels) -> dict[str, Target]:
    """What the project asks of an embedded teacher: near the best that its VAE allows, and near real pictures."""
    values = {m.label: m.value for m in measured}
    if key == "fd" and labels.reconstructed in values:
        return {labels.base: Target("at most", 3 * values[labels.reconstructed], "3 x VAE reconstructions")}
    if key == "adherence" and labels.real in values:
        return {labels.base: Target("at least", 0.85 * values[labels.real], "85% of real pictures")}
    return {}


def flags_of(measured: Sequence[Measured], *, base_steps: int | None) -> tuple[Flag, ...]:
    """The students, and the teacher with other seeds (a teacher of fewer steps than `base_steps` is left out), whose
    whole interval lies beyond a measure's alarm: broken, whatever their averages say.
    """
    flags: dict[tuple[str, str], Flag] = {}  # the first of several networks
    for one in measured:
        measure = MEASURES[one.key]
        low, high = measure.alarm
        is_looked_at = one.role == "student" or one.steps == base_steps
        if one.low is None or one.high is None or one.column or not is_looked_at:
            continue
        if (low is not None and one.high < low) or (high is not None and one.low > high):
            flag = Flag(one.label, one.key, one.network, measure.alarm_says, one.value, one.low, one.high)
            flags.setdefault((one.label, one.key), flag)
    return tuple(flags.values())


def group_tables(measured: Sequence[Measured], students: Sequence[str]) -> tuple[GroupTable, ...]:
    """For each column of the prompts and each student: a row a group, the measures against the teacher across."""
    tables = []
    for column in dict.fromkeys(m.column for m in measured if m.column):
        for label in students:
            some = [m for m in measured if m.column == column and m.label == label and m.key in GROUP_KEYS]
            keys = sorted({(m.key, m.network) for m in some}, key=lambda k: (GROUP_KEYS.index(k[0]), k[1]))
            rows = []
            for group in dict.fromkeys(m.group for m in some):
                of = {(m.key, m.network): m for m in some if m.group == group}
                cells = tuple(Reading(group, of[k].value, of[k].low, of[k].high) if k in of else None for k in keys)
                rows.append((group, max(m.count for m in of.values()), cells))
            heads = tuple((MEASURES[key].title, network, MEASURES[key].form) for key, network in keys)
            if rows:
                tables.append(GroupTable(column, label, heads, tuple(rows)))
    return tuple(tables)

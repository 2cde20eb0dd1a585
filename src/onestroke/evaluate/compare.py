"""A student beside its teacher, from two pipelines to a report: which pictures, which measures, in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline

from onestroke.errors import DataError
from onestroke.evaluate.collect import Collected, OnProgress, Plan, collect
from onestroke.evaluate.drawn import MeasureCache, PictureCache
from onestroke.evaluate.figures import Labels, figures_of, flags_of, group_tables
from onestroke.evaluate.findings import Measured, Missing
from onestroke.evaluate.gate import Condition, judge_gate
from onestroke.evaluate.grids import Column, Grid, GridRow
from onestroke.evaluate.measures import measure_all, measure_groups
from onestroke.evaluate.observer import Observer
from onestroke.evaluate.pictures import (
    DrawnSet,
    Failed,
    RealSet,
    ReconstructedSet,
    Role,
    Way,
    orders_of,
    ways_of,
)
from onestroke.evaluate.prompts import PromptSet
from onestroke.evaluate.report import Report
from onestroke.evaluate.scored import Networks, Scored, score
from onestroke.evaluate.worst import worst_pictures

SPREAD_PROMPTS, SPREAD_SEEDS = 100, 5
OTHER_SEEDS, SPREAD_FIRST_SEED = 10_000_000, 1_000_000
MANY_STEPS = 10  # of a teacher, from which on it is what a student is measured by
GRID_SEED = 7
NUM_SHOWN_FAILURES = 5


@dataclass(frozen=True)
class Ways:
    """How student and teacher are drawn, by number of steps; the teacher's most steps are what is compared with."""

    student: Mapping[int, Way]
    teacher: Mapping[int, Way]

    @property
    def base(self) -> Way:
        return self.teacher[max(self.teacher)]


@dataclass(frozen=True)
class Looking:
    """What looks at the pictures; `spread` are those of the observers that see several seeds of a prompt."""

    observers: tuple[Observer, ...]
    spread: tuple[Observer, ...]
    networks: Networks
    titles: Mapping[str, str]
    missing: tuple[Missing, ...] = ()


@dataclass(frozen=True)
class Task:
    """What is compared on what.

    `prompts`: each once, in the order they are drawn. `real` and `reference`: halves of the held-out pictures.
    `with_floor`: the teacher is drawn once more with other seeds, which tells how far it is from itself.
    `spread_prompts`: how many prompts are drawn with `SPREAD_SEEDS` seeds each; None takes `SPREAD_PROMPTS`.
    """

    ways: Ways
    prompts: PromptSet
    reference: RealSet
    real: RealSet
    num_images: int
    cache: Path
    vae_of: DiffusionPipeline | None = None  # whose VAE reconstructs the real pictures
    with_floor: bool = True
    spread_prompts: int | None = None
    group_by: tuple[str, ...] | None = None  # columns of the prompts; None: all with few values


@dataclass(frozen=True)
class Findings:
    """All that an evaluation found, before it is set into a report."""

    collected: Collected
    scored: Scored
    measured: tuple[Measured, ...]
    missing: tuple[Missing, ...]
    label: str  # the student at the fewest steps


def pipelines_to_ways(
    student: DiffusionPipeline,
    teacher: DiffusionPipeline,
    *,
    guidance: float,
    student_steps: Sequence[int],
    teacher_steps: Sequence[int],
    size: tuple[int, int] | None = None,
) -> Ways:
    """The student without guidance, the teacher with it."""
    return Ways(
        ways_of(student, student_steps, size=size), ways_of(teacher, teacher_steps, guidance=guidance, size=size)
    )


def label_of(who: str, steps: int) -> str:
    """ "student, 4 steps" """
    return f"{who}, {steps} step{'s' if steps > 1 else ''}"


def plan_of(task: Task) -> Plan:
    """Which pictures are drawn: `num_images` of each set, fewer where there are fewer real ones.

    Prompts that are fewer are drawn with several seeds each. Raises DataError where nothing is left to compare.
    """
    most = min(task.num_images, len(task.reference), len(task.real))
    prompts = task.prompts[range(min(len(task.prompts), most))]
    if len(prompts) < 2:
        raise DataError(f"{len(prompts)} prompts are too few", fix="Give 2 prompts at least, better 1,000.")
    repeats = max(1, most // len(prompts))
    count, cache = repeats * len(prompts), PictureCache(task.cache)
    orders = orders_of(prompts.texts, repeats=repeats)

    def drawn(who: Role, way: Way, label: str = "", first_seed: int = 0) -> DrawnSet:
        of = orders_of(prompts.texts, repeats=repeats, first_seed=first_seed) if first_seed else orders
        return DrawnSet(label or label_of(who, way.steps), who, way, of, cache)

    base = label_of("teacher", task.ways.base.steps)
    teachers = [drawn("teacher", way) for way in task.ways.teacher.values()]
    floor = [drawn("teacher", task.ways.base, f"{base}, other seeds", OTHER_SEEDS)] if task.with_floor else []
    students = [drawn("student", way) for way in task.ways.student.values()]
    reference, real = (_first(pictures, count) for pictures in (task.reference, task.real))
    rebuilt = [ReconstructedSet(real, task.vae_of)] if task.vae_of else []
    num_varied = SPREAD_PROMPTS if task.spread_prompts is None else task.spread_prompts
    some = orders_of(prompts.texts[:num_varied], repeats=SPREAD_SEEDS, first_seed=SPREAD_FIRST_SEED)
    varied = {
        s.label: DrawnSet(f"{s.label}, {SPREAD_SEEDS} seeds of a prompt", s.role, s.way, some, cache)
        for s in (*teachers, *students)
    }
    return Plan(
        prompts, np.repeat(np.arange(len(prompts)), repeats), reference, (real, *rebuilt, *teachers, *floor, *students),
        base, {way.steps: s.label for way, s in zip(task.ways.student.values(), students, strict=True)}, varied,
        SPREAD_SEEDS,
    )  # fmt: skip


def _first(pictures: RealSet, count: int) -> RealSet:
    indices = [pictures.indices[i] for i in range(count)]
    return RealSet(pictures.label, pictures.source, indices, pictures.size, pictures.key_of)


def find(task: Task, looking: Looking, *, on_progress: OnProgress = lambda what, done, total, left: None) -> Findings:
    """Draw, look and measure; what is in the cache costs nothing."""
    plan = plan_of(task)
    collected = collect(
        plan, looking.observers, MeasureCache(task.cache), spread_observers=looking.spread, on_progress=on_progress
    )
    scored = score(collected, looking.networks)
    measured, lacking = measure_all(collected, scored, looking.networks)
    by_group, lacking_groups = measure_groups(
        collected, scored, looking.networks, plan.prompts.groupings(task.group_by)
    )
    return Findings(
        collected, scored, (*measured, *by_group), (*looking.missing, *lacking, *lacking_groups),
        plan.students[min(plan.students)],
    )  # fmt: skip


def report_of(
    findings: Findings, looking: Looking, *, title: str, summary: str, gate: Sequence[Condition] = ()
) -> Report:
    """Everything found, as the page shows it; grids, speed and facts are the caller's to add."""
    plan, measured = findings.collected.plan, findings.measured
    base = findings.collected.sets[plan.base]
    is_judged = (base.steps or 0) >= MANY_STEPS  # a teacher of few steps is no measure of a student
    labels = Labels(plan.base, "real pictures", "VAE reconstructions") if is_judged else Labels()
    networks = looking.networks
    return Report(
        title,
        summary,
        gate=judge_gate(gate, measured, networks, findings.missing) if gate else (),
        flags=flags_of(measured, base_steps=base.steps) if is_judged else None,
        figures=figures_of(measured, networks, looking.titles, gate=gate, labels=labels, with_goals=is_judged),
        groups=group_tables(measured, list(plan.students.values())),
        galleries=worst_pictures(findings.collected, findings.scored, networks, findings.label),
        failures=_shown_failures(findings),
        missing=findings.missing,
        measures=measured,
        adherence={label: one.attributes for label, one in findings.scored.adherence.items()},
    )


def _shown_failures(findings: Findings) -> dict[str, tuple[str, ...]]:
    """The first prompts that failed in each set, with their reasons, and how many there were."""
    plan, shown = findings.collected.plan, {}
    sets = {pictures.label: pictures for pictures in (plan.reference, *plan.sets, *plan.varied.values())}
    for label, reasons in findings.collected.failures.items():
        lines = [f"{sets[label].prompt(row)}: {reason}" for row, reason in list(reasons.items())[:NUM_SHOWN_FAILURES]]
        more = len(reasons) - len(lines)
        shown[label] = (f"{len(reasons)} of {len(sets[label])}", *lines, *([f"and {more} more"] if more else []))
    return shown


def compare_grid(ways: Ways, prompts: Sequence[str], cache: Path) -> Grid:
    """Same prompts, same seeds: a row a prompt, the teacher's steps and then the student's; failed ones are grey."""
    orders, columns, pictures = orders_of(prompts, first_seed=GRID_SEED), [], []
    for who, of in (("teacher", ways.teacher), ("student", ways.student)):
        for way in of.values():
            columns.append(Column(f"{way.steps} step{'s' if way.steps > 1 else ''}", who))
            drawn = dict(DrawnSet("grid", "reference", way, orders, PictureCache(cache)).read(range(len(orders))))
            pictures.append([drawn[i] for i in range(len(orders))])
    shapes = [picture.shape for column in pictures for picture in column if not isinstance(picture, Failed)]
    grey = np.full(shapes[0] if shapes else (64, 64, 3), 128, np.uint8)
    rows = tuple(
        GridRow(text, tuple(grey if isinstance(column[i], Failed) else column[i] for column in pictures))
        for i, text in enumerate(prompts)
    )
    guidance = ways.base.guidance
    return Grid(
        "Same prompts, same seeds", tuple(columns), rows, f"Teacher under guidance {guidance:g}; student without."
    )

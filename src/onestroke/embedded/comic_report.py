"""The report on a student of the embedded kind: what is measured, in which words, against which targets."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

from onestroke.data.comicset.captions import Caption
from onestroke.embedded import assess
from onestroke.embedded.judge import Judge
from onestroke.evaluate.grids import Column, Grid, GridRow
from onestroke.evaluate.metrics import (
    AdherenceScore,
    adherence,
    block_jackknife,
    frechet_distance,
    mean_pairwise_distance,
    paired_bootstrap,
    seed_spread,
)
from onestroke.evaluate.report import Figure, Reading, Target
from onestroke.sample import draw

JUDGE = "comic judge"
STUDENT_STEPS = (1, 2, 4)
TEACHER_STEPS = (1, 4, 25, 50)
SPREAD_PROMPTS, SPREAD_SEEDS = 100, 5


@dataclass(frozen=True)
class Plan:
    """What to measure: pictures of each set, the teacher's steps and guidance, and the student's steps."""

    num_images: int
    guidance: float
    teacher_steps: tuple[int, ...] = (1, 50)
    student_steps: tuple[int, ...] = STUDENT_STEPS
    cache: Path | None = None


@dataclass(frozen=True)
class Measured:
    """Figures of every way to draw, by label; the first teacher label is the one compared with."""

    captions: tuple[Caption, ...]
    reference: assess.Judged
    real: assess.Judged
    reconstructed: assess.Judged
    drawn: Mapping[str, assess.Judged]  # "teacher, 50 steps" ...
    spread: Mapping[str, np.ndarray]


def measure(
    student: DiffusionPipeline,
    teacher: DiffusionPipeline,
    judge: Judge,
    plan: Plan,
    *,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Measured:
    """Draw and judge everything the report needs; resumable through `plan.cache`."""
    captions = assess.prompts(plan.num_images)
    texts = [caption.text for caption in captions]
    on_progress("real pictures", 0, 1)
    reference = assess.judge_real(judge, plan.num_images, odd=True)
    real = assess.judge_real(judge, plan.num_images, odd=False)
    reconstructed = assess.judge_reconstructed(judge, teacher, plan.num_images)
    repeated = [text for text in texts[:SPREAD_PROMPTS] for _ in range(SPREAD_SEEDS)]
    drawn, spread = {}, {}
    for label, way in ways(student, teacher, plan).items():

        def tell(done: int, total: int, label: str = label) -> None:
            on_progress(label, done, total)

        drawn[label] = assess.judge_drawn(judge, way, texts, cache=plan.cache, on_progress=tell)
        varied = assess.judge_drawn(judge, way, repeated, first_seed=1_000_000, cache=plan.cache)
        spread[label] = seed_spread(varied.features.reshape(-1, SPREAD_SEEDS, varied.features.shape[1]))
    return Measured(tuple(captions), reference, real, reconstructed, drawn, spread)


def ways(student: DiffusionPipeline, teacher: DiffusionPipeline, plan: Plan) -> dict[str, assess.Way]:
    """The ways to draw that a plan compares, by the label that the report gives them."""
    guided = {
        _label("teacher", steps): assess.way_of(teacher, steps=steps, guidance=plan.guidance)
        for steps in plan.teacher_steps
    }
    few = {
        _label("student", steps): assess.way_of(student, steps=steps, guidance=0.0) for steps in plan.student_steps
    }
    return guided | few


def _label(who: str, steps: int) -> str:
    return f"{who}, {steps} step{'s' if steps > 1 else ''}"


def figures(measured: Measured) -> tuple[Figure, ...]:
    """The figures of the report, with intervals and targets."""
    return (_distance(measured), _adherence(measured), _spread(measured))


def distances(measured: Measured) -> dict[str, float]:
    """Fréchet distance of every set from the reference pictures."""
    sets = {"real pictures": measured.real, "VAE reconstructions": measured.reconstructed, **measured.drawn}
    return {label: frechet_distance(judged.features, measured.reference.features) for label, judged in sets.items()}


def adherence_of(measured: Measured) -> dict[str, AdherenceScore]:
    """Prompt adherence of every set that answers the same prompts."""
    named = [caption.named for caption in measured.captions]
    sets = {"real pictures": measured.real, "VAE reconstructions": measured.reconstructed, **measured.drawn}
    return {label: adherence(named, judged.values, reference=named) for label, judged in sets.items()}


def _distance(measured: Measured) -> Figure:
    values = distances(measured)
    best_teacher = _best_teacher(measured)
    readings = []
    for label, value in values.items():
        judged = {"real pictures": measured.real, "VAE reconstructions": measured.reconstructed}.get(label)
        judged = judged or measured.drawn[label]
        interval = block_jackknife(frechet_distance, judged.features, measured.reference.features, num_blocks=10)
        targets: tuple[Target, ...] = ()
        if label.startswith("student") and best_teacher:
            limits = {1: (2.0, 1.10), 4: (1.25, 1.00)}.get(int(label.split()[1]))
            if limits:
                base = values[best_teacher]
                targets = (Target("at most", limits[0] * base, f"required: {limits[0]:g} x the teacher's"),
                           Target("at most", limits[1] * base, f"aim: {limits[1]:g} x the teacher's"))
        elif label == best_teacher:
            targets = (Target("at most", 3 * values["VAE reconstructions"], "3 x the VAE reconstructions'"),)
        readings.append(Reading(label, value, interval.low, interval.high, _role(label), targets))
    return Figure(
        "Distance from real pictures",
        "Fréchet distance between the judge's features of each set and of held-out real pictures: 0 is a perfect copy "
        "of their distribution, and real pictures themselves mark the floor that so many pictures allow.",
        tuple(readings), "lower", "number", JUDGE, len(measured.reference.features), True,
    )


def _adherence(measured: Measured) -> Figure:
    scores = adherence_of(measured)
    best_teacher = _best_teacher(measured)
    readings = []
    for label, score in scores.items():
        interval = paired_bootstrap(np.array(score.per_prompt), num_resamples=2000)
        targets: tuple[Target, ...] = ()
        if label.startswith("student") and best_teacher:
            targets = (Target("at least", scores[best_teacher].value - 0.02, "within 2 points of the teacher"),)
        elif label == best_teacher:
            targets = (Target("at least", 0.85 * scores["real pictures"].value, "85% of real pictures"),)
        readings.append(Reading(label, score.value, interval.low, interval.high, _role(label), targets))
    return Figure(
        "Follows the prompt",
        "Share of the attributes named in the prompt that the judge finds in the picture, averaged over attributes and "
        "corrected for guessing. The prompts name combinations that no training picture shows.",
        tuple(readings), "higher", "percent", JUDGE, len(measured.captions), False,
    )


def _spread(measured: Measured) -> Figure:
    best_teacher = _best_teacher(measured)
    real = mean_pairwise_distance(measured.real.features[:1000])
    readings = [Reading("real pictures of any prompt", real)]
    for label, spread in measured.spread.items():
        interval = paired_bootstrap(spread, num_resamples=2000)
        targets: tuple[Target, ...] = ()
        if label.startswith("student") and best_teacher:
            limit = 0.85 * float(measured.spread[best_teacher].mean())
            targets = (Target("at least", limit, "0.85 of the teacher's"),)
        readings.append(Reading(label, interval.value, interval.low, interval.high, _role(label), targets))
    return Figure(
        "Still diverse",
        f"Mean distance between pictures of one prompt over {SPREAD_SEEDS} seeds, in the judge's features. A model that "
        "draws one picture for each prompt has 0.",
        tuple(readings), "higher", "number", JUDGE, SPREAD_PROMPTS * SPREAD_SEEDS, False,
    )


def _best_teacher(measured: Measured) -> str | None:
    """The teacher at the most steps, if it was drawn at more than a few."""
    labels = [label for label in measured.drawn if label.startswith("teacher")]
    label = max(labels, key=lambda label: int(label.split()[1]))
    return label if int(label.split()[1]) >= 10 else None


def _role(label: str):
    return label.split(",")[0] if label.startswith(("teacher", "student")) else "reference"


def compare_grid(
    student: DiffusionPipeline,
    teacher: DiffusionPipeline,
    texts: Sequence[str],
    *,
    guidance: float,
    seed: int = 7,
    teacher_steps: Sequence[int] = TEACHER_STEPS,
    student_steps: Sequence[int] = STUDENT_STEPS,
) -> Grid:
    """Same prompts, same seeds: a row a prompt, the teacher's steps and then the student's."""
    seeds = range(seed, seed + len(texts))
    columns, pictures = [], []
    for pipeline, group, steps_list, scale in (
        (teacher, "teacher", teacher_steps, guidance), (student, "student", student_steps, 0.0),
    ):
        for steps in steps_list:
            columns.append(Column(f"{steps} step{'s' if steps > 1 else ''}", group))
            pictures.append(draw(pipeline, texts, seeds=seeds, steps=steps, guidance=scale))
    rows = tuple(GridRow(text, tuple(column[i] for column in pictures)) for i, text in enumerate(texts))
    return Grid("Same prompts, same seeds", tuple(columns), rows, f"Teacher under guidance {guidance:g}; student without.")


def machine_facts() -> dict[str, str]:
    """Where and when a report was made."""
    return {
        "date": date.today().isoformat(),
        "machine": f"{torch.get_num_threads()} CPU threads, {platform.machine()}",
        "software": f"Python {platform.python_version()}, PyTorch {torch.__version__}",
    }

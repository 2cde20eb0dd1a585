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
NUM_BLOCKS = 10  # of the jackknife


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
    few = {_label("student", steps): assess.way_of(student, steps=steps, guidance=0.0) for steps in plan.student_steps}
    return guided | few


def _label(who: str, steps: int) -> str:
    return f"{who}, {steps} step{'s' if steps > 1 else ''}"


def figures(measured: Measured) -> tuple[Figure, ...]:
    """The figures of the report: each set by itself, and the student against the many-step teacher where it is."""
    absolute = (_distance(measured), _adherence(measured), _spread(measured))
    teacher = _many_step_teacher(measured)
    if teacher is None:
        return (*absolute, _distance_beside(measured, next(iter(measured.drawn)), {}))
    compared = (
        _distance_beside(measured, teacher, {1: (2.0, 1.10), 4: (1.25, 1.00)}),
        _adherence_beside(measured, teacher),
        _spread_beside(measured, teacher),
    )
    return tuple(figure for pair in zip(absolute, compared, strict=True) for figure in pair)


def _sets(measured: Measured) -> dict[str, assess.Judged]:
    return {"real pictures": measured.real, "VAE reconstructions": measured.reconstructed, **measured.drawn}


def distances(measured: Measured) -> dict[str, float]:
    """Fréchet distance of every set from the reference pictures."""
    reference = measured.reference.features
    return {label: frechet_distance(judged.features, reference) for label, judged in _sets(measured).items()}


def adherence_of(measured: Measured) -> dict[str, AdherenceScore]:
    """Prompt adherence of every set; all answer the same prompts."""
    named = [caption.named for caption in measured.captions]
    return {label: adherence(named, judged.values, reference=named) for label, judged in _sets(measured).items()}


def _distance(measured: Measured) -> Figure:
    reference, readings = measured.reference.features, []
    teacher, values = _many_step_teacher(measured), distances(measured)
    for label, judged in _sets(measured).items():
        interval = block_jackknife(frechet_distance, judged.features, reference, num_blocks=NUM_BLOCKS)
        limit = Target("at most", 3 * values["VAE reconstructions"], "3 x VAE reconstructions")
        targets = (limit,) if label == teacher else ()
        readings.append(Reading(label, values[label], interval.low, interval.high, _role(label), targets))
    return Figure(
        "Fréchet distance",
        "How far the pictures of a model, as a crowd, are from real held-out ones: their average look and their "
        "variety in one number. Two sets of real pictures are not at 0 either; they are the floor.",
        tuple(readings),
        "lower",
        "number",
        JUDGE,
        len(reference),
    )


def _distance_beside(measured: Measured, base: str, limits: Mapping[int, tuple[float, float]]) -> Figure:
    """Distances as multiples of that of `base`, jackknifed together; `limits`: required and aimed at, by steps."""

    def ratio(a: np.ndarray, b: np.ndarray, reference: np.ndarray) -> float:
        return frechet_distance(a, reference) / frechet_distance(b, reference)

    readings, reference = [], measured.reference.features
    for label, judged in measured.drawn.items():
        if label == base:
            continue
        sets = (judged.features, measured.drawn[base].features, reference)
        interval = block_jackknife(ratio, *sets, num_blocks=NUM_BLOCKS)
        pair = limits.get(_steps(label), ()) if label.startswith("student") else ()
        targets = tuple(Target("at most", limit, name) for name, limit in zip(("required", "aim"), pair, strict=False))
        readings.append(Reading(label, interval.value, interval.low, interval.high, _role(label), targets))
    return Figure(
        f"Fréchet distance, times that of the {base}",
        f"The same, as a multiple of what the {base} reaches.",
        tuple(readings),
        "lower",
        "times",
        JUDGE,
        len(reference),
    )


def _adherence(measured: Measured) -> Figure:
    scores, readings = adherence_of(measured), []
    teacher = _many_step_teacher(measured)
    for label, score in scores.items():
        interval = paired_bootstrap(np.array(score.per_prompt), num_resamples=2000)
        limit = Target("at least", 0.85 * scores["real pictures"].value, "85% of real pictures")
        targets = (limit,) if label == teacher else ()
        readings.append(Reading(label, score.value, interval.low, interval.high, _role(label), targets))
    return Figure(
        "Prompt adherence",
        "The share of what prompts name that the judge finds in the picture, averaged over attributes, beyond what "
        "guessing would find. Every prompt names a combination that no training picture shows.",
        tuple(readings),
        "higher",
        "percent",
        JUDGE,
        len(measured.captions),
    )


def _adherence_beside(measured: Measured, base: str) -> Figure:
    scores, readings = adherence_of(measured), []
    for label in measured.drawn:
        if label.startswith("student"):
            difference = np.array(scores[label].per_prompt) - np.array(scores[base].per_prompt)
            interval = paired_bootstrap(difference)
            target = Target("at least", -0.02, "required")
            readings.append(Reading(label, interval.value, interval.low, interval.high, "student", (target,)))
    return Figure(
        "Prompt adherence, difference to the teacher",
        f"Student minus {base}, prompt by prompt.",
        tuple(readings),
        "higher",
        "points",
        JUDGE,
        len(measured.captions),
    )


def _spread(measured: Measured) -> Figure:
    readings = []
    for label, spread in measured.spread.items():
        interval = paired_bootstrap(spread, num_resamples=2000)
        readings.append(Reading(label, interval.value, interval.low, interval.high, _role(label)))
    everything = mean_pairwise_distance(measured.real.features[:1000])
    return Figure(
        "Spread over seeds",
        f"How different the {SPREAD_SEEDS} pictures of one prompt are in the judge's features, averaged over "
        f"{SPREAD_PROMPTS} prompts. A model that draws one picture for a prompt, whatever the seed, has 0; two real "
        f"pictures of any prompts are {everything:.2f} apart.",
        tuple(readings),
        "higher",
        "number",
        JUDGE,
        SPREAD_PROMPTS * SPREAD_SEEDS,
    )


def _spread_beside(measured: Measured, base: str) -> Figure:
    readings = []
    for label, spread in measured.spread.items():
        if label.startswith("student"):
            interval = block_jackknife(lambda a, b: a.mean() / b.mean(), spread, measured.spread[base])
            target = Target("at least", 0.85, "required")
            readings.append(Reading(label, interval.value, interval.low, interval.high, "student", (target,)))
    return Figure(
        "Spread over seeds, times the teacher's",
        f"The same, as a multiple of the {base}'s.",
        tuple(readings),
        "higher",
        "times",
        JUDGE,
        SPREAD_PROMPTS * SPREAD_SEEDS,
    )


def _steps(label: str) -> int:
    return int(label.split()[1])


def _many_step_teacher(measured: Measured) -> str | None:
    """The teacher at the most steps, if it was drawn at more than a few."""
    label = max((label for label in measured.drawn if label.startswith("teacher")), key=_steps)
    return label if _steps(label) >= 10 else None


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
        (teacher, "teacher", teacher_steps, guidance),
        (student, "student", student_steps, 0.0),
    ):
        for steps in steps_list:
            columns.append(Column(f"{steps} step{'s' if steps > 1 else ''}", group))
            pictures.append(draw(pipeline, texts, seeds=seeds, steps=steps, guidance=scale))
    rows = tuple(GridRow(text, tuple(column[i] for column in pictures)) for i, text in enumerate(texts))
    return Grid(
        "Same prompts, same seeds", tuple(columns), rows, f"Teacher under guidance {guidance:g}; student without."
    )


def machine_facts() -> dict[str, str]:
    """Where and when a report was made."""
    return {
        "date": date.today().isoformat(),
        "machine": f"{torch.get_num_threads()} CPU threads, {platform.machine()}",
        "software": f"Python {platform.python_version()}, PyTorch {torch.__version__}",
    }

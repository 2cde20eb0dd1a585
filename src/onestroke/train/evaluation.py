"""Short evaluations of a run: how far the averaged student draws from real pictures and from its teacher, and the best.

The same prompts and seeds each time, measured by a network that the discriminator does not see. The teacher draws once:
its pictures are kept in the run's folder. Nothing that training uses is changed, its random numbers included.

    evaluation/          the teacher's pictures, and what was seen in them and in the real ones
    evaluations.jsonl    the figures of each evaluation
    best/                the student with the best figures so far, whole, with its own in evaluation.json
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from jaxtyping import Bool, Float
from torch import nn

from onestroke.config import Recipe
from onestroke.distill.add import STUDENT
from onestroke.distill.lora import drawing_unet
from onestroke.evaluate.collect import observe
from onestroke.evaluate.distances import Gaussian, frechet_distance, gaussian_of
from onestroke.evaluate.drawn import MeasureCache, PictureCache
from onestroke.evaluate.observer import Observer
from onestroke.evaluate.pictures import DrawnSet, PictureSet, batch_of, orders_of, ways_of
from onestroke.export import student_pipeline
from onestroke.families.model import DiffusionModel
from onestroke.precision import autocast_dtype
from onestroke.sample import draw
from onestroke.train.ranks import wait_through
from onestroke.train.tracking import Tracker
from onestroke.train.trainer import Trainer

TEACHER_STEPS = 25
TOLD_SECONDS = 10.0  # between two lines about the teacher's pictures
BEST, NOTES = "best", "evaluation.json"
Tell = Callable[[str], None]
Keep = Callable[[nn.Module, Path, Mapping[str, str]], object]  # the averaged weights, a folder, text files for it


@dataclass(frozen=True)
class Yardstick:
    """What a student is measured by: each prompt is drawn once, its place the seed; as many real pictures."""

    observer: Observer
    prompts: Sequence[str]
    real: PictureSet
    size: tuple[int, int]  # height, width in pixels
    guidance: float  # of the teacher


@dataclass(frozen=True)
class Baseline:
    """What students are compared with: real pictures and the teacher's, on the rows where both are there."""

    key: str  # names everything that a figure depends on but the student
    rows: Bool[np.ndarray, " n"]
    real: Gaussian
    teacher: Gaussian
    teacher_to_real: float


@dataclass(frozen=True)
class Figures:
    """Fréchet distances of a student's pictures, by number of steps; lower is better."""

    images: int  # that the student has trained on
    to_real: Mapping[int, float]
    to_teacher: Mapping[int, float]
    teacher_to_real: float
    key: str

    @property
    def score(self) -> float:
        """What the best student is chosen by: the distance to real pictures, averaged over the numbers of steps."""
        return float(np.mean(list(self.to_real.values())))

    def line(self) -> str:
        steps = (
            f"{_steps(n)} {self.to_real[n]:.2f} to real pictures and {self.to_teacher[n]:.2f} to the teacher's"
            for n in self.to_real
        )
        return f"{'; '.join(steps)} (the teacher is at {self.teacher_to_real:.2f} to real ones)"

    def text(self) -> str:
        return json.dumps({
            "images": self.images, "score": self.score, "to_real": self.to_real, "to_teacher": self.to_teacher,
            "teacher_to_real": self.teacher_to_real, "key": self.key,
        })  # fmt: skip


def figures_in(text: str) -> Figures | None:
    """The figures that `Figures.text` wrote; None for anything else, such as the last line of a killed run."""
    try:
        row = json.loads(text)
        by_steps = ({int(n): value for n, value in row[name].items()} for name in ("to_real", "to_teacher"))
        return Figures(row["images"], *by_steps, row["teacher_to_real"], row["key"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def best_of(out: Path) -> Figures | None:
    """The figures of the student in `out/best`, if there is one."""
    path = out / BEST / NOTES
    return figures_in(path.read_text("utf-8")) if path.exists() else None


def evaluations_of(out: Path) -> list[Figures]:
    """The figures of a run in order, the last ones of pictures that were trained on twice."""
    path = out / "evaluations.jsonl"
    found = [figures_in(line) for line in (path.read_text("utf-8").splitlines() if path.exists() else [])]
    by_images = {figures.images: figures for figures in found if figures is not None}
    return [by_images[images] for images in sorted(by_images)]


def baseline_of(
    yardstick: Yardstick | None, teacher: DiffusionModel, recipe: Recipe, out: Path, *, tell: Tell
) -> Baseline | None:
    """What is seen in the real pictures and in the teacher's, which are drawn unless they are in `out`.

    Every process has to call this; the first, which alone has the yardstick, draws and has the result. The teacher must
    not be sharded yet; where its UNet lies elsewhere than its VAE, it is with it while it draws.
    """
    found: deque[Baseline | None] = deque(maxlen=1)
    wait_through(map(found.append, _measured(yardstick, teacher, recipe, out, tell)) if yardstick else ())
    return found.pop() if found else None


def _measured(
    yardstick: Yardstick, teacher: DiffusionModel, recipe: Recipe, out: Path, tell: Tell
) -> Iterator[Baseline | None]:
    """None for each picture that has been drawn, then the result."""
    home, device = teacher.device, next(teacher.vae.parameters()).device
    pipeline = student_pipeline(teacher, teacher.unet)
    scheduler = getattr(diffusers, teacher.scheduler_config.get("_class_name", "DDIMScheduler"))
    pipeline.scheduler = scheduler.from_config(teacher.scheduler_config)
    pipeline.set_progress_bar_config(disable=True)
    way = ways_of(pipeline, (TEACHER_STEPS,), guidance=yardstick.guidance, size=yardstick.size)[TEACHER_STEPS]
    way, folder = replace(way, draw=_undisturbed(recipe, device)(way.draw)), out / "evaluation"
    drawn = DrawnSet("teacher", "teacher", way, orders_of(yardstick.prompts), PictureCache(folder))
    if drawn.missing():
        teacher.unet.to(device)
        yield from _drawn(drawn, tell)
        teacher.unet.to(home)
    observer, measures = yardstick.observer, MeasureCache(folder)
    name = next(iter(observer.parts))
    real, drawings = (observe(some, [observer], measures).parts[name] for some in (yardstick.real, drawn))
    rows = np.isfinite(real).all(axis=1) & np.isfinite(drawings).all(axis=1)
    gaussians = gaussian_of(real[rows]), gaussian_of(drawings[rows])
    key = f"{observer.name}-{observer.version} {int(rows.sum())} {yardstick.size} {way.key}"
    yield Baseline(key, rows, *gaussians, frechet_distance(*gaussians))


def _drawn(drawn: DrawnSet, tell: Tell) -> Iterator[None]:
    told, count = time.monotonic(), len(drawn)
    tell(f"the teacher draws {count} pictures to evaluate the student by; once for this folder")
    for done, _ in enumerate(drawn.read(range(count)), start=1):
        if time.monotonic() - told > TOLD_SECONDS:
            tell(f"the teacher's pictures: {done}/{count}")
            told = time.monotonic()
        yield None


class Evaluation:
    """Measures the averaged student when it is called, in every process; the first draws, and keeps the best one.

    `baseline`: in the first process. `keep` writes a student into a folder, whole or not at all.
    """

    def __init__(
        self, yardstick: Yardstick | None, baseline: Baseline | None, teacher: DiffusionModel, trainer: Trainer,
        recipe: Recipe, out: Path, *, keep: Keep, tell: Tell,
    ) -> None:  # fmt: skip
        self.yardstick, self.baseline, self.teacher, self.trainer = yardstick, baseline, teacher, trainer
        self.recipe, self.out, self.keep, self.tell = recipe, out, keep, tell
        self.steps = tuple(dict.fromkeys((1, recipe.student.num_timesteps)))

    def __call__(self, tracker: Tracker | None) -> None:
        weights = self.trainer.whole(STUDENT, average=True)
        wait_through(self._evaluated(weights, tracker) if weights is not None else ())

    def _evaluated(self, weights: nn.Module, tracker: Tracker | None) -> Iterator[None]:
        assert self.yardstick is not None and self.baseline is not None
        unet = drawing_unet(self.trainer.method.student.unet, weights).to(self.teacher.device)
        was_training = unet.training
        pipeline = student_pipeline(self.teacher, unet.eval(), prediction_type=self.recipe.student.prediction_type)
        pipeline.set_progress_bar_config(disable=True)
        to_real, to_teacher = {}, {}
        for steps in self.steps:
            seen = []
            for part in self._looked_at(pipeline, steps):
                seen.append(part)
                yield
            crowd = gaussian_of(np.concatenate(seen))
            to_real[steps] = frechet_distance(crowd, self.baseline.real)
            to_teacher[steps] = frechet_distance(crowd, self.baseline.teacher)
        unet.train(was_training)
        figures = Figures(self.trainer.images, to_real, to_teacher, self.baseline.teacher_to_real, self.baseline.key)
        self._keep_best(weights, figures)
        with (self.out / "evaluations.jsonl").open("a", encoding="utf-8") as file:
            file.write(figures.text() + "\n")
        if tracker is not None:
            names = {"real": to_real, "teacher": to_teacher}
            found = {f"evaluate/to_{name}_{n}_steps": v for name, some in names.items() for n, v in some.items()}
            tracker.scalars(found | {"evaluate/teacher_to_real": figures.teacher_to_real}, figures.images)

    def _looked_at(self, pipeline: DiffusionPipeline, steps: int) -> Iterator[Float[np.ndarray, "n d"]]:
        """Features of the student's pictures, a batch at a time."""
        yardstick, baseline = self.yardstick, self.baseline
        assert yardstick is not None and baseline is not None
        places, size = np.flatnonzero(baseline.rows).tolist(), batch_of(yardstick.size)
        for first in range(0, len(places), size):
            some = places[first : first + size]
            prompts = [yardstick.prompts[place] for place in some]
            with _undisturbed(self.recipe, self.teacher.device):
                pictures = draw(pipeline, prompts, seeds=some, steps=steps, guidance=0.0, size=yardstick.size)
            yield next(iter(yardstick.observer.split(yardstick.observer.observe(pictures, prompts)).values()))

    def _keep_best(self, weights: nn.Module, figures: Figures) -> None:
        best = best_of(self.out)
        is_best = best is None or best.key != figures.key or figures.score < best.score
        if is_best:
            self.keep(weights, self.out / BEST, {NOTES: figures.text()})
        of = "the best so far" if is_best or best is None else f"the best is of {best.images:,} pictures"
        self.tell(f"evaluation after {figures.images:,} pictures, Fréchet distance: {figures.line()}; {of}")


@contextmanager
def _undisturbed(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Draw in the run's own precision, where a VAE bears it; its random numbers and compiled code stay as they were."""
    dtype = autocast_dtype(recipe.train.precision, device)
    dtype = None if dtype is torch.float16 else dtype
    autocast = torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)
    with torch.random.fork_rng(devices=[]), autocast, torch.compiler.set_stance("force_eager"):
        yield


def _steps(count: int) -> str:
    return f"{count} step{'s' if count > 1 else ''}"

"""What `import onestroke` offers; the command line calls the same functions."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import yaml
from diffusers import DiffusionPipeline

from onestroke.build import add_trainer, pipeline_of, source_of, teacher_of
from onestroke.config import Recipe, load_recipe, recipe_from
from onestroke.data.comicset.dataset import write_comicset as comicset
from onestroke.data.source import Broken, batches
from onestroke.distill.add import STUDENT
from onestroke.export import export_folder, student_pipeline
from onestroke.families.model import DiffusionModel
from onestroke.sample import make_fast
from onestroke.train.run import Observer, run_training
from onestroke.train.samples import SamplePainter
from onestroke.train.trainer import Trainer

__all__ = ["comicset", "distill", "load"]


def load(model: str = "embedded") -> DiffusionPipeline:
    """A pipeline ready to draw: "embedded" (the shipped student), "embedded-teacher", or any model onestroke reads.

    `load()(prompt, num_inference_steps=1, guidance_scale=0.0).images[0]` draws with the student.
    """
    pipeline = pipeline_of(model)
    return make_fast(pipeline) if pipeline.device.type == "cpu" else pipeline


def distill(
    recipe: Recipe | str | Path = "mini",
    out: str | Path = "runs/distill",
    *,
    overrides: Iterable[str] = (),
    minutes: float | None = None,
    observe: Observer = lambda progress, left: None,
) -> Path:
    """Distil a teacher by ADD; returns the folder of the student, a diffusers pipeline.

    `recipe`: a `Recipe`, a YAML file, or a packaged name. `overrides`: "section.key=value". A run that was stopped is
    continued from `out`; broken pictures are skipped, counted and logged at the end.
    `observe(progress, seconds_left)` is called after every step.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    elif overrides:
        recipe = recipe_from(recipe.model_dump(), overrides)
    out = Path(out)
    teacher = teacher_of(recipe)
    source = source_of(recipe.data, seed=recipe.seed)
    trainer = add_trainer(recipe, teacher)
    size = (recipe.data.size, recipe.data.size)
    settings = recipe.train
    broken = Broken(len(source), recipe.data.max_broken_share)

    def batches_from(first_slot: int):
        return batches(
            source,
            batch_size=settings.batch_size,
            size=size,
            first_slot=first_slot,
            last_slot=settings.num_images,
            seed=recipe.seed,
            random_flip=recipe.data.random_flip,
            crop=recipe.data.crop,
            num_workers=recipe.data.num_workers,
            broken=broken,
        )

    painter = SamplePainter(teacher, trainer, recipe, [source.caption(index) for index in range(min(4, len(source)))])
    run_training(
        trainer,
        batches_from,
        out,
        recipe_text=yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False),
        minutes=minutes,
        checkpoint_minutes=settings.checkpoint_minutes,
        keep_checkpoints=settings.keep_checkpoints,
        observe=observe,
        on_samples=painter,
        sample_images=settings.sample_images,
    )
    if broken:
        logging.getLogger(__name__).warning("%s", broken)
    return export_student(trainer, teacher, recipe, out / "student")


def export_student(trainer: Trainer, teacher: DiffusionModel, recipe: Recipe, out: Path) -> Path:
    """Write the averaged student as a diffusers folder with its model card."""
    from onestroke.card import model_card

    unet = trainer.averages[STUDENT]
    pipeline = student_pipeline(teacher, unet, prediction_type=recipe.student.prediction_type)
    return export_folder(pipeline, out, card=model_card(recipe, images=trainer.images))

"""What `import onestroke` offers; the command line calls the same functions."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path

import yaml
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn

from onestroke.build import (
    add_trainer,
    encoded_of,
    pipeline_of,
    sizes_of,
    source_of,
    teacher_of,
    whole_teacher,
    yardstick_of,
)
from onestroke.config import LoraRecipe, Recipe, load_recipe, recipe_from, recipe_text
from onestroke.data.comicset.dataset import write_comicset as comicset
from onestroke.data.facts import identity_of
from onestroke.data.loader import batches
from onestroke.data.source import Broken, StoredSource
from onestroke.distill.add import STUDENT
from onestroke.distill.lora import Adapter
from onestroke.export import export_folder, student_pipeline
from onestroke.families.model import DiffusionModel
from onestroke.fast import make_fast
from onestroke.lora import factors_of, merge_lora, save_lora
from onestroke.train.anchoring import anchors_of, learn_anchors, weights_after_anchors
from onestroke.train.evaluation import BEST, Evaluation, Tell, baseline_of
from onestroke.train.folder import check_recipe
from onestroke.train.ranks import check_same, joined, num_ranks, rank
from onestroke.train.run import Observer, run_training
from onestroke.train.samples import SamplePainter
from onestroke.train.sharpening import sharpen
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
    tell: Tell = logging.getLogger(__name__).info,
) -> Path:
    """Distil a teacher by ADD; returns the folder of the student, a diffusers pipeline.

    `recipe`: a `Recipe`, a YAML file, or a packaged name. `overrides`: "section.key=value". A run that was stopped is
    continued from `out`; broken pictures are skipped, counted and logged at the end.
    `observe(progress, seconds_left)` is called after every step, `tell(line)` with what is found now and then. Under
    torchrun all processes train together, and the first alone observes and writes.
    """
    with joined():
        return _distil(recipe, Path(out), overrides, minutes, observe, tell)


def _distil(
    recipe: Recipe | str | Path,
    out: Path,
    overrides: Iterable[str],
    minutes: float | None,
    observe: Observer,
    tell: Tell,
) -> Path:
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    elif overrides:
        recipe = recipe_from(recipe.model_dump(), overrides)
    text = recipe_text(recipe)
    check_same(f"{text}out: {out}")
    teacher = teacher_of(recipe)
    source = source_of(recipe.data, seed=recipe.seed)
    size = sizes_of(recipe, source, teacher)
    settings = recipe.train
    yardstick, baseline = None, None
    if settings.evaluate_images:
        if rank() == 0:
            check_recipe(out, text)  # the teacher draws nothing into the folder of another run
            yardstick = yardstick_of(recipe, source)
        baseline = baseline_of(yardstick, teacher, recipe, out, tell=tell)
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    anchors = None
    if recipe.anchors.count:
        if rank() == 0:
            check_recipe(out, text)
        anchors = anchors_of(teacher, source, recipe, out / "anchors", is_late=lambda: _is_past(deadline), tell=tell)
    trainer = add_trainer(recipe, teacher, anchors=anchors)
    is_ready = anchors is not None or not recipe.anchors.count
    if anchors is not None and recipe.anchors.images:
        is_ready = learn_anchors(trainer, anchors, recipe, out, minutes=_minutes_to(deadline), tell=tell)
    if not is_ready:
        return export_student(trainer, teacher, recipe, out / "student")
    if recipe.anchors.kept:
        trainer.mix_in(STUDENT, weights_after_anchors(trainer, out), recipe.anchors.kept)
    encoded = encoded_of(recipe, source, trainer.method)
    pictures = identity_of(source, size) if isinstance(source, StoredSource) else {}
    check_same(
        yaml.safe_dump(pictures), what="set of pictures", fix="Give every process the same folder, with the same files."
    )
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
            num_crops=recipe.data.crops_per_image,
            num_workers=recipe.data.num_workers,
            broken=broken,
            encoded=encoded,
            rank=rank(),
            num_ranks=num_ranks(),
        )

    painter = SamplePainter(teacher, trainer, recipe, [source.caption(index) for index in range(min(4, len(source)))])
    evaluation = Evaluation(
        yardstick,
        baseline,
        teacher,
        trainer,
        recipe,
        out,
        keep=lambda weights, folder, notes: write_student(weights, teacher, recipe, folder, trainer.images, notes),
        tell=tell,
    )
    is_finished = run_training(
        trainer,
        batches_from,
        out,
        recipe_text=text,
        pictures=pictures,
        minutes=_minutes_to(deadline),
        checkpoint_minutes=settings.checkpoint_minutes,
        keep_checkpoints=settings.keep_checkpoints,
        observe=observe,
        on_samples=painter,
        sample_images=settings.sample_images,
        on_evaluate=evaluation if settings.evaluate_images else None,
        evaluate_images=settings.evaluate_images,
        on_alarm=settings.on_alarm,
    )
    if broken:
        logging.getLogger(__name__).warning("%s", broken)
    if not (is_finished and recipe.sharpen.images):
        return export_student(trainer, teacher, recipe, out / "student")
    left = _minutes_to(deadline)
    finer = sharpen(trainer, source, recipe, out, minutes=left, tell=tell)
    weights = finer.whole(STUDENT, average=True)
    if weights is not None:
        write_student(weights, teacher, recipe, out / "student", trainer.images, sharpened=finer.images)
    return out / "student"


def _is_past(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


def _minutes_to(deadline: float | None) -> float | None:
    return None if deadline is None else (deadline - time.monotonic()) / 60


def export_student(trainer: Trainer, teacher: DiffusionModel, recipe: Recipe, out: Path) -> Path:
    """Write the averaged student as a diffusers folder with its model card; a LoRA student's adapter beside it.

    `lora/` loads on the teacher by diffusers' `load_lora_weights`; `lora-kohya.safetensors` is for other programs. Of
    several processes the first writes.
    """
    weights = trainer.whole(STUDENT, average=True)
    return out if weights is None else write_student(weights, teacher, recipe, out, trainer.images)


def write_student(
    weights: nn.Module,
    teacher: DiffusionModel,
    recipe: Recipe,
    out: Path,
    images: int,
    notes: Mapping[str, str] | None = None,
    *,
    sharpened: int = 0,
) -> Path:
    """The same of a student's weights after `images` pictures; `notes`: text files for the folder, by name.

    `sharpened`: the prompts of what came after ADD.
    """
    from onestroke.card import model_card

    unet, teacher = weights, whole_teacher(teacher)
    if recipe.student.lora is not None:
        unet = _merged(weights, teacher, recipe.student.lora, out)
    pipeline = student_pipeline(teacher, unet, prediction_type=recipe.student.prediction_type)
    return export_folder(pipeline, out, card=model_card(recipe, images=images, sharpened=sharpened), notes=notes)


def _merged(adapter: nn.Module, teacher: DiffusionModel, recipe: LoraRecipe, out: Path) -> UNet2DConditionModel:
    """Write the adapter beside `out`, that of the best student as best-lora; the teacher's UNet with it merged in."""
    assert isinstance(adapter, Adapter)
    factors = factors_of(adapter.named(), recipe.scaling / recipe.rank)
    is_sdxl = teacher.family.name == "sdxl"
    name = "best-lora" if out.name == BEST else "lora"
    diffusers_file = out.parent / name / "pytorch_lora_weights.safetensors"
    save_lora(factors, diffusers_file, teacher.unet, layout="diffusers", is_sdxl=is_sdxl)
    save_lora(factors, out.parent / f"{name}-kohya.safetensors", teacher.unet, layout="kohya", is_sdxl=is_sdxl)
    unet = deepcopy(teacher.unet)
    merge_lora(unet, factors)
    return unet

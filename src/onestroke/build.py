"""Composition root: the only place that turns a recipe's names into objects."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from onestroke.config import DataRecipe, Recipe
from onestroke.data.comicset.dataset import ComicSource
from onestroke.data.folder import open_folder
from onestroke.data.source import Source
from onestroke.distill.add import ADD
from onestroke.distill.features import load_features
from onestroke.distill.student import build_student
from onestroke.embedded import STUDENT, TEACHER, embedded_student, embedded_teacher
from onestroke.errors import RecipeError, ResourceError
from onestroke.families.load import from_pipeline, load_pipeline
from onestroke.families.model import DiffusionModel
from onestroke.train.trainer import Trainer, TrainSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
COMICSET_IMAGES = 1_000_000  # pictures in an epoch of the rendered set, which has no last picture


def pipeline_of(name: str, *, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """A pipeline by name: "embedded" (the student), "embedded-teacher", a folder, a hub id, or a checkpoint file."""
    if name == STUDENT:
        return embedded_student(dtype=dtype)
    if name == TEACHER:
        return embedded_teacher(dtype=dtype)
    return load_pipeline(name, dtype=dtype)


def device_of(name: str) -> torch.device:
    """The device called `name`; "auto" takes the best there is."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available[name]:
        raise ResourceError(f"this machine has no {name} device", where="train.device", fix='Set it to "auto".')
    return torch.device(name)


def teacher_of(recipe: Recipe) -> DiffusionModel:
    """The frozen teacher on its device; "embedded" names the embedded teacher here."""
    source = TEACHER if recipe.teacher.source == STUDENT else recipe.teacher.source
    pipeline = pipeline_of(source)
    device = device_of(recipe.train.device)
    pipeline.to(device, torch.float64 if recipe.train.precision == "float64" else torch.float32)
    for name in ("unet", "vae"):
        getattr(pipeline, name).to(memory_format=torch.channels_last)
    return from_pipeline(pipeline, source=source)


def source_of(recipe: DataRecipe, *, seed: int = 0) -> Source:
    """The training pictures."""
    if recipe.source == "comicset":
        return ComicSource(COMICSET_IMAGES, size=recipe.size, seed=seed)
    return open_folder(Path(recipe.source))


def add_trainer(recipe: Recipe, teacher: DiffusionModel) -> Trainer:
    """A trainer for ADD of `teacher`, before its first step."""
    settings = recipe.train
    multiple = max(8, teacher.vae_scale_factor)  # diffusers' pipelines draw multiples of 8 only
    if recipe.data.size % multiple:
        raise RecipeError(
            f"{recipe.data.size} pixels do not divide by {multiple}",
            where="data.size",
            fix=f"Set it to {recipe.data.size // multiple * multiple or multiple}.",
        )
    dtype = torch.float64 if settings.precision == "float64" else torch.float32
    student = build_student(teacher, recipe.student, seed=recipe.seed).to(teacher.device, dtype)
    student.to(memory_format=torch.channels_last)
    features = load_features(recipe.discriminator.features, source=recipe.discriminator.features_source)
    method = ADD(teacher, student, features.to(teacher.device, dtype), recipe)
    method.heads.to(dtype)
    autocast = DTYPES[settings.precision] if settings.precision in ("bfloat16", "float16") else None
    return Trainer(method, TrainSettings(settings.num_images, settings.batch_size, settings.micro_batch_size, autocast))

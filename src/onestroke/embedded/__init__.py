"""The comic model that ships in the package: teacher, student and judge, loaded with no download."""

from __future__ import annotations

from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

from onestroke.embedded.judge import Judge, load_judge
from onestroke.sample import student_scheduler

GUIDANCE = 1.5  # of the teacher in every figure; `benchmarks/validation.py` compares others
TEACHER, STUDENT = "embedded-teacher", "embedded"  # names that stand where a model folder may stand


def weights_folder() -> Path:
    """Where the package keeps the weights."""
    with as_file(files(__package__).joinpath("weights")) as folder:
        return folder


def embedded_teacher(*, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """The guided many-step model of 128 px comic characters."""
    return StableDiffusionXLPipeline.from_pretrained(
        weights_folder() / "teacher", torch_dtype=dtype, local_files_only=True
    )


def embedded_student(*, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """The 1-to-4-step model: the student's UNet and sampler, the teacher's other parts (stored once)."""
    unet = UNet2DConditionModel.from_pretrained(
        weights_folder() / "student", subfolder="unet", torch_dtype=dtype, local_files_only=True
    )
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        weights_folder() / "teacher", unet=unet, torch_dtype=dtype, local_files_only=True
    )
    pipeline.scheduler = student_scheduler(pipeline.scheduler.config)
    return pipeline


@cache
def embedded_judge() -> Judge:
    """The network that names the attributes of a comic picture."""
    return load_judge(weights_folder() / "judge.safetensors")

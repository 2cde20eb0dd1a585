"""Write a student for everybody else: a diffusers folder with its model card, and one checkpoint file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError

from onestroke.errors import ResourceError
from onestroke.families.load import FAMILIES
from onestroke.families.model import DiffusionModel
from onestroke.sample import student_scheduler
from onestroke.types import PredictionType


def student_pipeline(
    teacher: DiffusionModel, unet: UNet2DConditionModel, *, prediction_type: PredictionType | None = None
) -> DiffusionPipeline:
    """A pipeline of the teacher's family around the student's UNet, sharing the teacher's other parts."""
    kind = next(pipeline for pipeline, family in FAMILIES.items() if family is teacher.family)
    scheduler = student_scheduler(teacher.scheduler_config, prediction_type=prediction_type or teacher.prediction_type)
    parts = {"vae": teacher.vae, "unet": unet, "scheduler": scheduler}
    parts |= {"text_encoder": teacher.text_encoders[0], "tokenizer": teacher.tokenizers[0]}
    if teacher.family.name == "sdxl":
        parts |= {"text_encoder_2": teacher.text_encoders[1], "tokenizer_2": teacher.tokenizers[1]}
        parts |= {"force_zeros_for_empty_prompt": teacher.zero_blank_prompt, "add_watermarker": False}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return kind(**parts)


def export_folder(
    pipeline: DiffusionPipeline,
    out: Path,
    *,
    card: str = "",
    notes: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write the pipeline as a diffusers folder, whole or not at all; a folder written before is replaced.

    `AutoPipelineForText2Image.from_pretrained(out)` and `AutoPipelineForImage2Image` load it. `card`: README.md;
    `notes`: further text files by name.
    """
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        _saved_as(pipeline, dtype, temporary)
        forget_origins(temporary)
        for name, text in {"README.md": card or "# onestroke student\n", **(notes or {})}.items():
            (temporary / name).write_text(text, "utf-8")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ResourceError("the student could not be written", where=str(out), fix="Free disk space.") from error
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(temporary, out)
    shutil.rmtree(old, ignore_errors=True)
    return out


def forget_origins(folder: Path) -> None:
    """Take out of the configs in `folder` where each part was loaded from: paths of the machine that trained it."""
    for path in sorted(folder.rglob("*.json")):
        tree = json.loads(path.read_text("utf-8"))
        if isinstance(tree, dict) and tree.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(tree, indent=2) + "\n", "utf-8")


def _saved_as(pipeline: DiffusionPipeline, dtype: torch.dtype, folder: Path) -> None:
    """Save in `dtype` without changing the pipeline's own weights."""
    before = pipeline.dtype
    if dtype == before:
        pipeline.save_pretrained(folder, safe_serialization=True)
        return
    from copy import deepcopy

    modules = {name: deepcopy(part) for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    copy = type(pipeline)(**{**pipeline.components, **modules, **_flags(pipeline)})
    copy.to(dtype).save_pretrained(folder, safe_serialization=True)


def _flags(pipeline: DiffusionPipeline) -> dict:
    keys = ("force_zeros_for_empty_prompt", "requires_safety_checker")
    return {key: pipeline.config[key] for key in keys if key in pipeline.config}

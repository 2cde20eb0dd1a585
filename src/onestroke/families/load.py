"""Load a teacher or student: a diffusers folder, a hub id, a single checkpoint file, or a pipeline in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from onestroke.errors import ModelError
from onestroke.families import sd, sdxl
from onestroke.families.model import DiffusionModel
from onestroke.schedule import PREDICTION_TYPES, NoiseSchedule

FAMILIES = {StableDiffusionXLPipeline: sdxl, StableDiffusionPipeline: sd}


def load_pipeline(source: str | Path, *, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """The diffusers pipeline at `source`: a folder, a hub id, or one `.safetensors` checkpoint (read offline).

    Raises `ModelError` for what is missing, unreadable or of another family.
    """
    path = Path(source)
    if path.is_file():
        from onestroke.families.single_file import load_single_file

        return load_single_file(path, dtype=dtype)
    if path.is_dir() and not (path / "model_index.json").exists():
        raise ModelError("this folder has no model_index.json", where=str(source), fix="Give a diffusers model folder.")
    looks_local = str(source).startswith((".", "/", "~")) or str(source).count("/") > 1
    if not path.exists() and looks_local:
        raise ModelError("there is no such file or folder", where=str(source), fix="Check the path of the model.")
    try:
        pipeline = DiffusionPipeline.from_pretrained(str(source), torch_dtype=dtype, use_safetensors=True)
    except Exception as error:  # diffusers, transformers, safetensors and the hub each raise their own kinds
        raise ModelError(
            f"the model cannot be loaded ({type(error).__name__}: {_first_line(error)})",
            where=str(source),
            fix="Give a diffusers folder with safetensors weights, a hub id, or one .safetensors checkpoint.",
        ) from error
    return _checked(pipeline, str(source))


def from_pipeline(pipeline: DiffusionPipeline, *, source: str = "") -> DiffusionModel:
    """The parts of a diffusers pipeline of the SDXL or SD 1.x/2.x family."""
    _checked(pipeline, source)
    family = FAMILIES[type(pipeline)]
    config = dict(pipeline.scheduler.config)
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise ModelError(
            f"prediction type {kind!r} is not supported",
            where=source,
            fix=f"Use a model of one of {', '.join(PREDICTION_TYPES)}.",
        )
    encoders = [pipeline.text_encoder] + ([pipeline.text_encoder_2] if family is sdxl else [])
    tokenizers = [pipeline.tokenizer] + ([pipeline.tokenizer_2] if family is sdxl else [])
    for module in (pipeline.unet, pipeline.vae, *encoders):
        module.requires_grad_(False).eval()
    return DiffusionModel(
        family,
        pipeline.unet,
        pipeline.vae,
        encoders,
        tokenizers,
        NoiseSchedule.from_config(config),
        kind,
        config,
        bool(pipeline.config.get("force_zeros_for_empty_prompt", False)),
        source,
    )


def load_model(source: str | Path, *, dtype: torch.dtype = torch.float32) -> DiffusionModel:
    """`load_pipeline`, taken apart."""
    return from_pipeline(load_pipeline(source, dtype=dtype), source=str(source))


def _checked(pipeline: DiffusionPipeline, source: str) -> DiffusionPipeline:
    if type(pipeline) not in FAMILIES:
        raise ModelError(
            f"{type(pipeline).__name__} is not supported",
            where=source,
            fix="Use a model of the SDXL or SD 1.x/2.x family.",
        )
    return pipeline


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]

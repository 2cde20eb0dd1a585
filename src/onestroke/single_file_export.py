"""Write a diffusers pipeline as one `.safetensors` checkpoint in the LDM layout (A1111, ComfyUI, kohya)."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor
from transformers import CLIPTokenizer

from onestroke.errors import ModelError
from onestroke.families import ldm_keys
from onestroke.families.clip_vocabulary import clip_vocabulary
from onestroke.families.single_file import CONFIG_KEY, Configs, packaged_configs
from onestroke.tensor_files import write_tensors

_MODELSPEC_PREDICTION = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
_MODELSPEC_ARCHITECTURE = {
    "sdxl": "stable-diffusion-xl-v1-base",
    "sd15": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
}
_SD2_LAYERS = 23  # diffusers drops OpenCLIP-H's 24th layer, which SD 2.x does not use


def save_single_file(
    pipeline: DiffusionPipeline,
    path: Path,
    *,
    dtype: torch.dtype = torch.float16,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write UNet, VAE and text encoders in `dtype` to `path`, whole or not at all, and return `path`.

    The metadata holds the modelspec entries, the sampler the model is meant for, the configs that `load_single_file`
    reads, and `metadata`, which may replace all but the configs. v-prediction and zero terminal SNR are marked by the
    tensors `v_pred` and `ztsnr`. "sample" prediction is known to onestroke only: other tools have no mark for it. A
    safety checker is left out. Raises `ModelError` for another family, adapters that are not fused, and weights that
    do not fit `dtype`; `ResourceError` if the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ModelError("a single checkpoint is a .safetensors file", where=str(path), fix="Name it so.")
    notes = checkpoint_metadata(pipeline, path.stem) | dict(metadata)
    notes[CONFIG_KEY] = json.dumps(pipeline_configs(pipeline))
    tensors = {key: _cast(tensor, dtype, key) for key, tensor in checkpoint_tensors(pipeline).items()}
    write_tensors(path, tensors | _markers(pipeline), notes, what="the checkpoint")
    return path


def checkpoint_tensors(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    """All weights under their checkpoint keys, in their own dtype; a pipeline on the meta device will do."""
    unet_of = partial(ldm_keys.unet_place, config=pipeline.unet.config)
    vae_of = partial(ldm_keys.vae_place, config=pipeline.vae.config)
    unet = ldm_keys.to_ldm(pipeline.unet.state_dict(), unet_of, ldm_keys.UNET_PREFIX)
    vae = ldm_keys.to_ldm(pipeline.vae.state_dict(), vae_of, ldm_keys.VAE_PREFIX)
    return unet | vae | _text_tensors(pipeline)


def _text_tensors(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    first = pipeline.text_encoder.state_dict()
    family = family_of(pipeline)
    if family == "sdxl":
        second = pipeline.text_encoder_2.state_dict()
        return ldm_keys.to_ldm(first, ldm_keys.clip_place, ldm_keys.SDXL_CLIP_PREFIX) | ldm_keys.to_ldm(
            second, ldm_keys.open_clip_place, ldm_keys.SDXL_OPEN_CLIP_PREFIX
        )
    if family == "sd15":
        return ldm_keys.to_ldm(first, ldm_keys.clip_place, ldm_keys.SD_CLIP_PREFIX)
    return _with_unused_layer(
        ldm_keys.to_ldm(first, ldm_keys.open_clip_place, ldm_keys.SD_OPEN_CLIP_PREFIX),
        pipeline.text_encoder.config.num_hidden_layers,
    )


def _with_unused_layer(tensors: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """SD 2.x checkpoints hold 24 layers and readers expect them; the last is never used, so a copy stands in."""
    if num_layers != _SD2_LAYERS:
        return tensors
    last, unused = f".resblocks.{_SD2_LAYERS - 1}.", f".resblocks.{_SD2_LAYERS}."
    return tensors | {key.replace(last, unused): tensor.clone() for key, tensor in tensors.items() if last in key}


def family_of(pipeline: DiffusionPipeline) -> str:
    """The packaged family whose layout fits: SD 2.x is told from 1.x by its text encoder, OpenCLIP's with GELU."""
    if isinstance(pipeline, StableDiffusionXLPipeline):
        return "sdxl"
    if isinstance(pipeline, StableDiffusionPipeline):
        return "sd15" if pipeline.text_encoder.config.hidden_act == "quick_gelu" else "sd2"
    raise ModelError(
        f"{type(pipeline).__name__} has no single-file layout",
        fix="Use a model of the SDXL or SD 1.x/2.x family, or save a diffusers folder.",
    )


def _cast(tensor: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    cast = tensor.detach().to("cpu", dtype).contiguous()
    if not torch.isfinite(cast).all():
        raise ModelError(f"a weight is not finite in {dtype}", where=key, fix="Write bfloat16 or float32.")
    return cast


def _markers(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    """The community's marks: empty tensors whose names count. Readers look for `ztsnr` beside `v_pred` only."""
    config = pipeline.scheduler.config
    if config.get("prediction_type") != "v_prediction":
        return {}
    names = ["v_pred", "ztsnr"] if config.get("rescale_betas_zero_snr") else ["v_pred"]
    return {name: torch.empty(0) for name in names}


def checkpoint_metadata(pipeline: DiffusionPipeline, title: str) -> dict[str, str]:
    """modelspec (Stability AI's metadata standard, 1.0.0) and the sampler that the pipeline carries."""
    scheduler = pipeline.scheduler
    prediction = scheduler.config.get("prediction_type", "epsilon")
    spacing = str(scheduler.config.get("timestep_spacing", ""))
    notes = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _architecture(pipeline, prediction),
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.resolution": _resolution(pipeline),
        "modelspec.prediction_type": _MODELSPEC_PREDICTION.get(prediction, prediction),
        "onestroke.scheduler": type(scheduler).__name__,
        "onestroke.timestep_spacing": spacing,
    }
    if type(scheduler).__name__ == "EulerAncestralDiscreteScheduler" and spacing == "trailing":
        notes["modelspec.usage_hint"] = "Sampler: Euler a (ancestral). Timestep spacing: trailing."
    return notes


def _architecture(pipeline: DiffusionPipeline, prediction: str) -> str:
    """The modelspec name for a released architecture; another name for one that only looks like it."""
    family = family_of(pipeline)
    released = packaged_configs(family)["unet/config.json"]
    own = pipeline.unet.config
    decisive = ("block_out_channels", "down_block_types", "cross_attention_dim", "in_channels")
    if any(_plain(own.get(key)) != released[key] for key in decisive):
        return f"onestroke/{family}-custom"
    is_768 = family == "sd2" and prediction == "v_prediction"
    return "stable-diffusion-v2-768-v" if is_768 else _MODELSPEC_ARCHITECTURE[family]


def _plain(value):
    return list(value) if isinstance(value, tuple | list) else value


def _resolution(pipeline: DiffusionPipeline) -> str:
    """Width x height, in pixels."""
    side = pipeline.unet.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    scale = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    return f"{width * scale}x{height * scale}"


def pipeline_configs(pipeline: DiffusionPipeline) -> Configs:
    """The pipeline's configs by their paths in a diffusers folder, without the paths it was loaded from."""
    configs: Configs = {"model_index.json": _index(pipeline)}
    names = ["", "_2"] if isinstance(pipeline, StableDiffusionXLPipeline) else [""]
    for name in ("unet", "vae"):
        configs[f"{name}/config.json"] = _portable(json.loads(getattr(pipeline, name).to_json_string()))
    configs["scheduler/scheduler_config.json"] = _portable(json.loads(pipeline.scheduler.to_json_string()))
    for end in names:
        encoder = getattr(pipeline, f"text_encoder{end}")
        configs[f"text_encoder{end}/config.json"] = _portable(encoder.config.to_dict())
        for file, content in _tokenizer_files(getattr(pipeline, f"tokenizer{end}")).items():
            configs[f"tokenizer{end}/{file}"] = content
    return configs


def _index(pipeline: DiffusionPipeline) -> dict:
    encoders = [name for name in ("text_encoder", "text_encoder_2") if getattr(pipeline, name, None) is not None]
    index: dict = {"_class_name": type(pipeline).__name__}
    index |= {name: ["transformers", type(getattr(pipeline, name)).__name__] for name in encoders}
    if "force_zeros_for_empty_prompt" in pipeline.config:
        index["force_zeros_for_empty_prompt"] = bool(pipeline.config["force_zeros_for_empty_prompt"])
    return index


def _portable(config: dict) -> dict:
    """A config without machine paths, dtype and library versions, which belong to the run that saved it."""
    dropped = ("_name_or_path", "name_or_path", "dtype", "torch_dtype", "transformers_version")
    return {key: value for key, value in config.items() if key not in dropped}


def _tokenizer_files(tokenizer) -> dict[str, dict]:
    """The tokenizer's files; for CLIP's own vocabulary, which is packaged, only what differs between models."""
    if isinstance(tokenizer, CLIPTokenizer) and tokenizer.get_vocab() == clip_vocabulary():
        own = {"pad_token": str(tokenizer.pad_token), "model_max_length": tokenizer.model_max_length}
        return {"tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer", **own}}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        names = ("tokenizer.json", "tokenizer_config.json")
        return {name: _portable(json.loads(Path(folder, name).read_text(encoding="utf-8"))) for name in names}

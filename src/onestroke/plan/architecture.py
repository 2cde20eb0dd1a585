"""A model's architecture by its configs alone, and an untrained model of it: what sizes and speeds depend on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from onestroke.errors import ModelError
from onestroke.families.clip_vocabulary import clip_tokenizer
from onestroke.families.load import FAMILIES
from onestroke.families.model import DiffusionModel
from onestroke.families.single_file import CONFIG_KEY, packaged_configs, read_header, recognise, with_prediction
from onestroke.schedule import NoiseSchedule

PACKAGED = ("sdxl", "sd15", "sd2")
_BY_CLASS = {kind.__name__: family for kind, family in FAMILIES.items()}
_DTYPE = ("torch_dtype", "dtype")  # transformers would build in it
_FIX = "Give a diffusers folder, a hub id, one .safetensors checkpoint, or one of sdxl, sd15, sd2."


@dataclass(frozen=True)
class Architecture:
    """The configs of a pipeline, by their paths in a diffusers folder. `folder`: where its own tokenizers lie."""

    configs: Mapping[str, Any]
    source: str
    folder: Path | None = None

    @property
    def family(self) -> ModuleType:
        return _BY_CLASS[self.configs["model_index.json"]["_class_name"]]

    @property
    def encoder_names(self) -> tuple[str, ...]:
        return ("text_encoder", "text_encoder_2") if self.family.name == "sdxl" else ("text_encoder",)

    def untrained(self) -> DiffusionModel:
        """A model with random weights in float32 on the current default device, frozen, as the family loads one."""
        configs, family = self.configs, self.family
        unet = UNet2DConditionModel.from_config(configs["unet/config.json"])
        vae = AutoencoderKL.from_config(configs["vae/config.json"])
        kinds = (CLIPTextModel, CLIPTextModelWithProjection)
        encoders = []
        for kind, name in zip(kinds, self.encoder_names, strict=False):
            settings = {key: value for key, value in configs[f"{name}/config.json"].items() if key not in _DTYPE}
            encoders.append(kind(CLIPTextConfig(**settings)))
        for module in (unet, vae, *encoders):
            module.requires_grad_(False).eval()
        scheduler, index = configs["scheduler/scheduler_config.json"], configs["model_index.json"]
        with torch.device("cpu"):
            schedule = NoiseSchedule.from_config(scheduler)
        return DiffusionModel(
            family,  # pyright: ignore
            unet,
            vae,
            encoders,
            [self._tokenizer(name.replace("text_encoder", "tokenizer")) for name in self.encoder_names],
            schedule,
            scheduler.get("prediction_type", "epsilon"),
            dict(scheduler),
            bool(index.get("force_zeros_for_empty_prompt", False)),
            self.source,
        )

    def _tokenizer(self, name: str) -> CLIPTokenizer:
        if self.folder is not None:
            return CLIPTokenizer.from_pretrained(self.folder, subfolder=name, local_files_only=True)
        config = self.configs.get(f"{name}/tokenizer_config.json", {})
        given = {
            key: config[key] for key in ("pad_token", "model_max_length") if isinstance(config.get(key), str | int)
        }
        return clip_tokenizer(**given)


def architecture_of(source: str) -> Architecture:
    """The architecture of a diffusers folder, hub id or checkpoint, or "sdxl", "sd15", "sd2"; no weights are read.

    Raises `ModelError` where configs are missing or of another family.
    """
    path = Path(source)
    if source in PACKAGED:
        return Architecture(packaged_configs(source), source)
    if path.is_file():
        return Architecture(_file_configs(path), source)
    try:
        configs = _folder_configs(path) if path.is_dir() else _hub_configs(source)
        found = Architecture(configs, source, path if path.is_dir() else None)
        _ = found.family
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"no configs of an SDXL or SD model are there ({type(error).__name__})", where=source, fix=_FIX
        ) from error
    return found


def _file_configs(path: Path) -> Mapping[str, Any]:
    header = read_header(path)
    is_own = CONFIG_KEY in header.metadata
    configs = json.loads(header.metadata[CONFIG_KEY]) if is_own else packaged_configs(recognise(header))
    return with_prediction(configs, header, None, is_own=is_own)


def _folder_configs(folder: Path) -> Mapping[str, Any]:
    names = ["model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
    configs = {name: json.loads((folder / name).read_text("utf-8")) for name in names}
    encoders = folder.glob("text_encoder*/config.json")
    return configs | {f"{path.parent.name}/config.json": json.loads(path.read_text("utf-8")) for path in encoders}


def _hub_configs(source: str) -> Mapping[str, Any]:
    index = DiffusionPipeline.load_config(source)
    configs = {"model_index.json": index}
    configs["unet/config.json"] = UNet2DConditionModel.load_config(source, subfolder="unet")
    configs["vae/config.json"] = AutoencoderKL.load_config(source, subfolder="vae")
    scheduler = SchedulerMixin.load_config(source, subfolder="scheduler")
    configs["scheduler/scheduler_config.json"] = scheduler
    for name in ("text_encoder", "text_encoder_2"):
        if index.get(name, [None])[0] == "transformers":
            config = CLIPTextConfig.from_pretrained(source, subfolder=name)
            configs[f"{name}/config.json"] = config.to_dict()
    return configs

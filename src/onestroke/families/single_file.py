"""Load one `.safetensors` checkpoint in the LDM layout (A1111, ComfyUI, kohya) without a network.

The family is recognised by tensor names; its configs and the CLIP vocabulary are packaged in `configs`. Checkpoints
that onestroke wrote carry their own configs in the metadata, so that any size of model comes back as it was.

A checkpoint's prediction type is not written in its weights. It is taken, in this order, from: the argument
`prediction_type`; the configs in onestroke's own checkpoints; the community's marker tensor `v_pred` (with `ztsnr`:
zero terminal SNR); the metadata `modelspec.prediction_type` ("v" or "epsilon"); else it is epsilon. The released SD 2.x
768 px models predict v and carry no such sign: load them with `prediction_type="v_prediction"`.

The packaged schedulers are Euler, not the PNDM of the released SD models, since only Euler can rescale to zero SNR; the
packaged SD 2.x UNet computes its attention in float32, as the 768 px model needs in half precision.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import (
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import SafetensorError, safe_open
from torch import nn

from onestroke.errors import ModelError
from onestroke.families import ldm_keys
from onestroke.families.clip_vocabulary import clip_tokenizer
from onestroke.families.ldm_keys import PlaceOf
from onestroke.schedule import PREDICTION_TYPES
from onestroke.types import PredictionType

CONFIG_KEY = "onestroke_config"  # in the metadata: JSON of {"unet/config.json": {...}, ...}
PIPELINES = {cls.__name__: cls for cls in (StableDiffusionXLPipeline, StableDiffusionPipeline)}
TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
_SCHEDULER = "scheduler/scheduler_config.json"
_MODELSPEC_PREDICTION: dict[str, PredictionType] = {"v": "v_prediction", "epsilon": "epsilon", "sample": "sample"}
_FIX = "Give an SDXL base or SD 1.x/2.x checkpoint with UNet, text encoders and VAE, or a diffusers folder."

Configs = dict[str, dict]  # path in a diffusers folder -> its JSON


@dataclass(frozen=True)
class Header:
    """What a checkpoint says about itself before a weight is read."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    def has(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self.shapes)


def load_single_file(
    path: Path, *, dtype: torch.dtype = torch.float32, prediction_type: PredictionType | None = None
) -> DiffusionPipeline:
    """The SDXL or SD 1.x/2.x pipeline in one checkpoint, with all weights in `dtype`; nothing is fetched.

    `prediction_type` overrides what the checkpoint says of itself (see above). Raises `ModelError` for an unreadable
    file, another kind of model, and weights that do not fit the family's architecture.
    """
    header = read_header(Path(path))
    own = _own_configs(header)
    configs = own or packaged_configs(recognise(header))
    configs = with_prediction(configs, header, prediction_type, is_own=own is not None)
    _check_unet(header, configs)
    try:
        return _assemble(header, configs, dtype)
    except ModelError:
        raise
    except Exception as error:  # diffusers, transformers and safetensors each raise their own kinds
        line = (str(error).strip().splitlines() or [""])[0][:200]
        raise ModelError(
            f"the checkpoint cannot be loaded ({type(error).__name__}: {line})", where=str(path), fix=_FIX
        ) from error


def read_header(path: Path) -> Header:
    """Tensor shapes and metadata of a safetensors file."""
    if path.suffix != ".safetensors":
        raise ModelError(
            "only .safetensors checkpoints are read",
            where=str(path),
            fix="Convert the checkpoint: pickled files can run code.",
        )
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - not a mapping
            return Header(path, shapes, dict(file.metadata() or {}))
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"this file is not a readable safetensors file ({error})", where=str(path), fix="Download or copy it again."
        ) from error


_FOREIGN = {
    "a LoRA or another adapter": ("lora_up.", "lora_down.", "lora_A.", "lora_B.", "hada_w1_a", "lokr_w1"),
    "an SD3 checkpoint": ("joint_blocks.",),
    "a Flux checkpoint": ("double_blocks.",),
    "a ControlNet": ("control_model.", "controlnet_cond_embedding."),
    "an EDM checkpoint (Playground v2.5, CosXL)": ("edm_mean", "edm_vpred.sigma_max"),
    "the SDXL refiner": ("conditioner.embedders.0.model.",),
}


def recognise(header: Header) -> str:
    """The packaged family of a checkpoint by its tensor names: "sdxl", "sd15" or "sd2"; `ModelError` for another."""
    for kind, signs in _FOREIGN.items():
        if any(sign in key for key in header.shapes for sign in signs):
            raise _unsupported(header, f"this is {kind}")
    if not header.has(ldm_keys.UNET_PREFIX):
        layout = "a diffusers UNet without its folder" if header.has("down_blocks.") else "no checkpoint that is known"
        raise _unsupported(header, f"this is {layout}")
    if not header.has(ldm_keys.VAE_PREFIX) and not header.has("vae."):
        raise _unsupported(header, "this checkpoint has no VAE")
    families = {
        "sdxl": ldm_keys.SDXL_OPEN_CLIP_PREFIX,
        "sd15": ldm_keys.SD_CLIP_PREFIX,
        "sd2": ldm_keys.SD_OPEN_CLIP_PREFIX,
    }
    found = [family for family, prefix in families.items() if header.has(prefix)]
    if len(found) != 1:
        raise _unsupported(header, "this checkpoint has no text encoder that is known")
    return found[0]


def _unsupported(header: Header, what: str) -> ModelError:
    return ModelError(what, where=str(header.path), fix=_FIX)


def packaged_configs(family: str) -> Configs:
    """The public configs of "sdxl" (base 1.0), "sd15" or "sd2" (2.x base), by their paths in a diffusers folder."""
    root = resources.files("onestroke.families").joinpath("configs", family)
    folders = [item for item in root.iterdir() if item.is_dir()]
    files = {f"{folder.name}/{file.name}": file for folder in folders for file in folder.iterdir()}
    files["model_index.json"] = root.joinpath("model_index.json")
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items()}


def _own_configs(header: Header) -> Configs | None:
    """The configs that onestroke wrote into the metadata, or None; `ModelError` if they are not whole."""
    if CONFIG_KEY not in header.metadata:
        return None
    try:
        configs = json.loads(header.metadata[CONFIG_KEY])
        names = _needed(configs["model_index.json"]["_class_name"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(header) from error
    if not all(isinstance(configs.get(name), dict) for name in names):
        raise _damaged(header)
    return configs


def _needed(class_name: str) -> list[str]:
    """The config files without which a pipeline of this class cannot be built; `KeyError` for another class."""
    ends = ["", "_2"] if PIPELINES[class_name] is StableDiffusionXLPipeline else [""]
    encoders = [f"text_encoder{end}/config.json" for end in ends]
    tokenizers = [f"tokenizer{end}/tokenizer_config.json" for end in ends]
    return ["unet/config.json", "vae/config.json", _SCHEDULER, *encoders, *tokenizers]


def _damaged(header: Header) -> ModelError:
    return ModelError(
        "the configs in this checkpoint's metadata are damaged",
        where=f"{header.path}: {CONFIG_KEY}",
        fix="Export the model again.",
    )


def with_prediction(configs: Configs, header: Header, override: PredictionType | None, *, is_own: bool) -> Configs:
    """The configs with the prediction type and terminal SNR that the caller or the checkpoint states."""
    stated = override or (None if is_own else stated_prediction(header))
    scheduler, unet = dict(configs[_SCHEDULER]), dict(configs["unet/config.json"])
    if stated:
        scheduler["prediction_type"] = stated
    if not is_own and "ztsnr" in header.shapes:
        scheduler["rescale_betas_zero_snr"] = True
    if not is_own and scheduler.get("prediction_type") == "v_prediction":
        scheduler["timestep_spacing"] = "trailing"  # starts at the last timestep, where zero SNR matters
        if header.has(ldm_keys.SD_OPEN_CLIP_PREFIX):
            unet["sample_size"] = 96  # the SD 2.x that predict v are the 768 px ones
    return configs | {_SCHEDULER: scheduler, "unet/config.json": unet}


def stated_prediction(header: Header) -> PredictionType | None:
    """What a community checkpoint says that it predicts, by its marker tensor or its modelspec metadata."""
    if "v_pred" in header.shapes:
        return "v_prediction"
    stated = header.metadata.get("modelspec.prediction_type")
    if stated is None or stated in _MODELSPEC_PREDICTION:
        return _MODELSPEC_PREDICTION.get(stated or "")
    raise ModelError(
        f"prediction type {stated!r} is not known",
        where=f"{header.path}: modelspec.prediction_type",
        fix=f"Load it with prediction_type= one of {', '.join(PREDICTION_TYPES)}.",
    )


def _check_unet(header: Header, configs: Configs) -> None:
    """Every UNet tensor of the architecture is there, in its shape, and no other: one line instead of a traceback."""
    config = configs["unet/config.json"]
    conv_in = header.shapes.get(f"{ldm_keys.UNET_PREFIX}input_blocks.0.0.weight", (0, 0))
    if conv_in[1] == 9:
        raise _unsupported(header, "this is an inpainting checkpoint (9 input channels)")
    with init_empty_weights():
        state = UNet2DConditionModel.from_config(config).state_dict()
    expected = ldm_keys.to_ldm(state, partial(ldm_keys.unet_place, config=config), ldm_keys.UNET_PREFIX)
    for key, tensor in expected.items():
        if header.shapes.get(key) != tuple(tensor.shape):
            raise _unsupported(
                header,
                f"the UNet is of another architecture ({key} should be {list(tensor.shape)}, "
                f"is {list(header.shapes[key]) if key in header.shapes else 'missing'})",
            )
    surplus = [key for key in header.shapes if key.startswith(ldm_keys.UNET_PREFIX) and key not in expected]
    if surplus:
        raise _unsupported(header, f"the UNet is of another architecture ({surplus[0]} is not known)")


def _assemble(header: Header, configs: Configs, dtype: torch.dtype) -> DiffusionPipeline:
    """UNet and VAE by diffusers' converter; text encoders, tokenizers and scheduler by ours, which need no hub.

    diffusers tells SDXL's two text encoders apart by their widths, so equal ones would be mixed up.
    """
    index = configs["model_index.json"]
    cls = PIPELINES[index["_class_name"]]
    names = ["", "_2"] if cls is StableDiffusionXLPipeline else [""]
    parts: dict[str, object] = {"scheduler": _scheduler(header, configs[_SCHEDULER])}
    for name in names:
        parts[f"text_encoder{name}"] = _text_encoder(header, configs, f"text_encoder{name}", dtype)
        parts[f"tokenizer{name}"] = _tokenizer(header, configs, f"tokenizer{name}")
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder, "unet/config.json"), configs["unet/config.json"])
        _write(Path(folder, "vae/config.json"), configs["vae/config.json"])
        _write(Path(folder, "model_index.json"), _safe_index(index, parts))
        return cls.from_single_file(str(header.path), config=folder, local_files_only=True, torch_dtype=dtype, **parts)


def _safe_index(index: dict, parts: dict[str, object]) -> dict:
    """diffusers imports what an index names, so only our classes are named, whatever the file says."""
    flags = {key: bool(index[key]) for key in ("force_zeros_for_empty_prompt",) if key in index}
    flags |= {} if "text_encoder_2" in parts else {"requires_safety_checker": False}
    models = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    given = {name: [type(part).__module__.split(".")[0], type(part).__name__] for name, part in parts.items()}
    return {"_class_name": index["_class_name"], **flags, **models, **given}


def _write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _scheduler(header: Header, config: dict) -> SchedulerMixin:
    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        raise _damaged(header)
    return cls.from_config(config)


def _text_encoder(header: Header, configs: Configs, name: str, dtype: torch.dtype) -> nn.Module:
    """A CLIP text encoder with its weights from the checkpoint, in either layout."""
    config = dict(configs[f"{name}/config.json"])
    class_name = configs["model_index.json"].get(name, ["", ""])[-1]
    if class_name not in TEXT_ENCODERS:
        raise _damaged(header)
    with init_empty_weights():
        model = getattr(transformers, class_name)(transformers.CLIPTextConfig(**config))
    prefix, place_of = text_layout(header, name)
    with safe_open(header.path, framework="pt") as file:
        state = {}
        for key in model.state_dict():
            place = place_of(key)
            stored = file.get_tensor(_stored_key(header, prefix, place.key))
            state[key] = place.take(stored).to(dtype)
    model.load_state_dict(state, assign=True)
    return model.to(dtype).eval()


def text_layout(header: Header, name: str) -> tuple[str, PlaceOf]:
    """Prefix and layout of the text encoder that diffusers calls `name`."""
    if name == "text_encoder_2":
        return ldm_keys.SDXL_OPEN_CLIP_PREFIX, ldm_keys.open_clip_place
    if header.has(ldm_keys.SDXL_CLIP_PREFIX):
        return ldm_keys.SDXL_CLIP_PREFIX, ldm_keys.clip_place
    if header.has(ldm_keys.SD_OPEN_CLIP_PREFIX):
        return ldm_keys.SD_OPEN_CLIP_PREFIX, ldm_keys.open_clip_place
    return ldm_keys.SD_CLIP_PREFIX, ldm_keys.clip_place


def _stored_key(header: Header, prefix: str, key: str) -> str:
    """The tensor's key in this checkpoint; some old merges of SD 1.x leave `text_model.` out."""
    for candidate in (prefix + key, prefix + key.removeprefix("text_model.")):
        if candidate in header.shapes:
            return candidate
    raise _unsupported(header, f"the text encoder is incomplete ({prefix}{key} is missing)")


def _tokenizer(header: Header, configs: Configs, name: str):
    """CLIP's tokenizer, or the one that the checkpoint brings along."""
    config = configs[f"{name}/tokenizer_config.json"]
    if f"{name}/tokenizer.json" not in configs:
        return clip_tokenizer(pad_token=config["pad_token"], model_max_length=config["model_max_length"])
    if config.get("tokenizer_class") not in TOKENIZERS:
        raise _damaged(header)
    with tempfile.TemporaryDirectory() as folder:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            _write(Path(folder, file), configs[f"{name}/{file}"])
        return getattr(transformers, config["tokenizer_class"]).from_pretrained(folder, local_files_only=True)

"""Where each tensor of a diffusers model stands in a single LDM checkpoint, the layout of A1111, ComfyUI and kohya.

The mapping is a pure function of the diffusers name (and of the model's config), for any number of blocks. Names are
those of the original latent-diffusion, CLIP and OpenCLIP modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from onestroke.errors import ModelError

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
SDXL_CLIP_PREFIX = "conditioner.embedders.0.transformer."
SDXL_OPEN_CLIP_PREFIX = "conditioner.embedders.1.model."
SD_CLIP_PREFIX = "cond_stage_model.transformer."
SD_OPEN_CLIP_PREFIX = "cond_stage_model.model."


@dataclass(frozen=True)
class Place:
    """`key` in the checkpoint, without the model's prefix, and how the tensor is laid down there."""

    key: str
    third: int | None = None  # which third of a fused query-key-value tensor, along the first axis
    transposed: bool = False
    as_conv: bool = False  # a linear weight d d stored as a 1x1 convolution d d 1 1

    def lay(self, tensor: Tensor) -> Tensor:
        """diffusers' tensor as the checkpoint has it (one third of it where `third` is set)."""
        if self.transposed:
            return tensor.T.contiguous()
        return tensor[:, :, None, None] if self.as_conv else tensor

    def take(self, stored: Tensor) -> Tensor:
        """The checkpoint's tensor as diffusers has it: `lay` the other way round."""
        if self.third is not None:
            stored = stored.chunk(3)[self.third].contiguous()
        if self.transposed:
            return stored.T.contiguous()
        return stored.reshape(stored.shape[:2]) if self.as_conv else stored


PlaceOf = Callable[[str], Place]


def to_ldm(state: Mapping[str, Tensor], place_of: PlaceOf, prefix: str) -> dict[str, Tensor]:
    """A diffusers state dict under its checkpoint keys; meta tensors will do."""
    laid: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        place = place_of(name)
        if place.third is None:
            laid[prefix + place.key] = place.lay(tensor)
        else:
            thirds.setdefault(prefix + place.key, {})[place.third] = tensor
    return laid | {key: torch.cat([parts[i] for i in range(3)]) for key, parts in thirds.items()}


_UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_place(name: str, config: Mapping) -> Place:
    """The place of a tensor of a `UNet2DConditionModel` with this `config`."""
    words = name.split(".")
    if words[0] in ("down_blocks", "up_blocks"):
        is_sampler = words[2].endswith("samplers")  # its place says conv already
        module, inner = _unet_block(words, config), words[5 if is_sampler else 4 :]
    else:
        module, inner = _named_start(words, _UNET_TOP), words[_start_length(words, _UNET_TOP) :]
    if "resnets" in words:
        inner = [_known(_UNET_RESNET, inner[0], name), *inner[1:]]
    return Place(".".join([_present(module, name), *inner]))


def _unet_block(words: list[str], config: Mapping) -> str | None:
    """The LDM module of down_blocks.b.kind.i or up_blocks.b.kind.i: LDM numbers the layers of all blocks in one row."""
    per_block = config["layers_per_block"]
    if not isinstance(per_block, int):
        raise ModelError(
            "a UNet with different numbers of layers in its blocks has no single-file layout",
            where="layers_per_block",
            fix="Save it as a diffusers folder.",
        )
    side, block, kind, layer = words[0], int(words[1]), words[2], int(words[3])
    place = {"resnets": 0, "attentions": 1}
    if side == "down_blocks":
        first = 1 + block * (per_block + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + per_block}.0.op"
        return f"input_blocks.{first + layer}.{place[kind]}" if kind in place else None
    first = block * (per_block + 1)
    if kind == "upsamplers":
        after = 2 if "CrossAttn" in config["up_block_types"][block] else 1
        return f"output_blocks.{first + per_block}.{after}.conv"
    return f"output_blocks.{first + layer}.{place[kind]}" if kind in place else None


_VAE_TOP = {
    "conv_in": "conv_in",
    "conv_out": "conv_out",
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.1": "mid.block_2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}


def vae_place(name: str, config: Mapping) -> Place:
    """The place of a tensor of an `AutoencoderKL` with this `config`."""
    if name.startswith(("quant_conv.", "post_quant_conv.")):
        return Place(name)
    half, *words = name.split(".")
    if words[0] in ("down_blocks", "up_blocks"):
        module, inner = _vae_block(words, len(config["block_out_channels"])), words[4:]
    else:
        module, inner = _named_start(words, _VAE_TOP), words[_start_length(words, _VAE_TOP) :]
    as_conv = False
    if "attentions" in words:
        as_conv = inner[0] != "group_norm" and inner[-1] == "weight"
        inner = [_known(_VAE_ATTENTION, inner[0], name), inner[-1]]
    inner = ["nin_shortcut" if word == "conv_shortcut" else word for word in inner]
    return Place(".".join([half, _present(module, name), *inner]), as_conv=as_conv)


def _vae_block(words: list[str], num_levels: int) -> str | None:
    """LDM numbers the decoder's levels by resolution, so from the end."""
    side, block, kind, layer = words[0], int(words[1]), words[2], int(words[3])
    level = f"down.{block}" if side == "down_blocks" else f"up.{num_levels - 1 - block}"
    samplers = {"downsamplers": "downsample", "upsamplers": "upsample"}
    if kind == "resnets":
        return f"{level}.block.{layer}"
    return f"{level}.{samplers[kind]}" if kind in samplers else None


def clip_place(name: str) -> Place:
    """The place of a tensor of a `CLIPTextModel` in OpenAI's layout, which is transformers' older one."""
    return Place(f"text_model.{_bare(name)}")


_OPEN_CLIP_TOP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_QUERY_KEY_VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def open_clip_place(name: str) -> Place:
    """The place of a tensor of a CLIP text encoder in OpenCLIP's layout: fused in_proj, transposed projection."""
    bare = _bare(name)
    if bare == "text_projection.weight":
        return Place("text_projection", transposed=True)
    if bare in _OPEN_CLIP_TOP:
        return Place(_OPEN_CLIP_TOP[bare])
    if not bare.startswith("encoder.layers."):
        raise _no_place(name)
    layer, inner = bare.removeprefix("encoder.layers.").split(".", 1)
    module, kind = inner.rsplit(".", 1)
    if module in _QUERY_KEY_VALUE:
        return Place(f"transformer.resblocks.{layer}.attn.in_proj_{kind}", third=_QUERY_KEY_VALUE.index(module))
    return Place(f"transformer.resblocks.{layer}.{_known(_OPEN_CLIP_LAYER, module, name)}.{kind}")


def _bare(name: str) -> str:
    """transformers 5.6 dropped the prefix from `CLIPTextModel`, not from `CLIPTextModelWithProjection`."""
    return name.removeprefix("text_model.")


def _start_length(words: list[str], table: Mapping[str, str]) -> int:
    return next((n for n in (3, 2, 1) if ".".join(words[:n]) in table), 0)


def _named_start(words: list[str], table: Mapping[str, str]) -> str | None:
    return table.get(".".join(words[: _start_length(words, table)]))


def _known(table: Mapping[str, str], word: str, name: str) -> str:
    return _present(table.get(word), name)


def _present(module: str | None, name: str) -> str:
    if module is None:
        raise _no_place(name)
    return module


def _no_place(name: str) -> ModelError:
    return ModelError(
        "the single-file layout has no place for this tensor",
        where=name,
        fix="Fuse LoRA layers and unwrap compiled models first, or save a diffusers folder.",
    )

"""The ADD method of a recipe around untrained networks: on a device for timing, or as shapes alone for planning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from onestroke.config import Recipe
from onestroke.distill.add import ADD
from onestroke.distill.anchors import Anchors, Drawn
from onestroke.distill.conditions import is_shared
from onestroke.distill.features import FeatureNetwork, untrained_features
from onestroke.distill.frozen import lower
from onestroke.distill.student import build_student
from onestroke.families.model import DiffusionModel
from onestroke.plan.architecture import Architecture
from onestroke.types import Condition

CLIP_G14 = {"hidden_size": 1024, "intermediate_size": 4096, "projection_dim": 1024, "num_hidden_layers": 24,
            "num_attention_heads": 16, "vocab_size": 49408, "hidden_act": "gelu"}  # fmt: skip


class UntrainedText(nn.Module):
    """In the place of `TextEmbedder` with a CLIP of its own, in the shape of CLIP-ViT-g-14."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G14)).requires_grad_(False).eval()
        self.dim = CLIP_G14["projection_dim"]

    @torch.no_grad()
    def forward(self, captions: Iterable[str], condition: Condition) -> Tensor:
        ids = torch.zeros(len(condition.text), 77, dtype=torch.long, device=condition.text.device)
        return self.encoder(ids).text_embeds


class UntrainedImage(nn.Module):
    """In the place of `ImageEmbedder` with a network of its own."""

    is_shared = False

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__()
        self.network, self.dim = network, network.embed_dim

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.network.embed(images)


class Parts(NamedTuple):
    """A method and its networks by the names that a plan shows, each listed once."""

    method: ADD
    networks: dict[str, list[nn.Module]]


def untrained_method(recipe: Recipe, architecture: Architecture, *, device: torch.device | str) -> Parts:
    """ADD as `build.add_trainer` puts it together in float32, with random weights; nothing large is read.

    Frozen weights are bfloat16 where the recipe says so by name, none are float8. On "meta" it has shapes alone. A CLIP
    that only the discriminator has is taken to be CLIP-ViT-g-14, and a tiny autoencoder to be as large as TAESD.
    """
    settings = recipe.discriminator
    plain = recipe.model_copy(update={"decode": recipe.decode.model_copy(update={"autoencoder": None})})
    with torch.device(device):
        model = architecture.untrained()
        student = build_student(model, recipe.student, seed=recipe.seed)
        features = untrained_features(settings.features)
        text = None if settings.text_encoder == "teacher" else UntrainedText()
        image = None if is_shared(settings) else UntrainedImage(untrained_features(settings.image_encoder))
        for module in (model.unet, model.vae, student):
            module.to(memory_format=torch.channels_last)
        method = ADD(model, student, features.to(device), plain, embed_text=text, embed_image=image)  # pyright: ignore
        method.anchors = untrained_anchors(recipe, model) if recipe.anchors.count else None
        if recipe.decode.autoencoder is not None:
            method.decode.tiny = tiny_autoencoder_for(model)
    if recipe.train.frozen_precision == "bfloat16":
        lower(method.frozen, torch.bfloat16)
    method.recipe = recipe
    networks = {
        "teacher UNet": [model.unet],
        "VAE": [model.vae, *([method.decode.tiny] if method.decode.tiny else [])],
        "text encoders": [*model.text_encoders, *([text] if text else [])],
        "feature networks": [features, *([image] if image else [])],
        "student": [student],
        "heads": [method.heads],
    }
    return Parts(method, networks)


class UntrainedAnchors(Anchors):
    """Anchors whose noise is no particular one, which fake numbers could not tell."""

    def noise(self, rows: Sequence[int]) -> Tensor:
        return torch.zeros(len(rows), *self.shards[0].pictures.shape[1:])


def untrained_anchors(recipe: Recipe, model: DiffusionModel) -> Anchors:
    """One, of the size that all have."""
    size = (recipe.data.size, recipe.data.size)
    side = recipe.data.size // model.vae_scale_factor
    stations, channels = recipe.student.num_timesteps, model.unet.config.in_channels
    pictures = torch.zeros(1, stations, channels, side, side, dtype=torch.float16, device="cpu")
    drawn = Drawn(pictures, pictures[:, :, 0], pictures)
    return UntrainedAnchors([drawn], ("a picture",), recipe.seed, size)


def tiny_autoencoder_for(model: DiffusionModel) -> AutoencoderTiny:
    """An untrained one in TAESD's shape, for latents of the model's own kind."""
    levels = len(model.vae.config.block_out_channels)
    tiny = AutoencoderTiny(
        latent_channels=model.vae.config.latent_channels,
        encoder_block_out_channels=(64,) * levels,
        decoder_block_out_channels=(64,) * levels,
        num_encoder_blocks=(1,) + (3,) * (levels - 1),
        num_decoder_blocks=(3,) * (levels - 1) + (1,),
    )
    return tiny.requires_grad_(False).eval().to(memory_format=torch.channels_last)


def materialise(networks: Iterable[nn.Module]) -> None:
    """Turn meta parameters and buffers into the active mode's (a `FakeTensorMode`'s) on the CPU, in place."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # originals are kept, so that no other tensor takes their id

    def made_of(tensor: Tensor) -> Tensor:
        if tensor.device.type != "meta":
            return tensor
        if id(tensor) not in made:
            like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            new = nn.Parameter(like, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else like
            made[id(tensor)] = (tensor, new)
        return made[id(tensor)][1]

    for network in networks:
        for module in network.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = made_of(tensor)

"""Latents to pictures for the discriminator and the pixel loss, in as little memory as the recipe grants."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from jaxtyping import Float
from torch import Tensor

from onestroke.config import DecodeRecipe
from onestroke.distill.crops import Crops
from onestroke.errors import ModelError, RecipeError
from onestroke.families.model import DiffusionModel
from onestroke.operations import checkpointed
from onestroke.schedule import exact


class Decoder:
    """`latents -> images`, differentiable in the latents, by the teacher's VAE or a tiny autoencoder.

    A decoder keeps its maps at full resolution for the backward pass, many times the student's own at 1024 px. With
    `chunk`, so many pictures are decoded at a time, and once more in the backward pass: the same gradients. With
    `scale` below 1 latents are shrunk first and smaller pictures come out. With `margin`, no more is decoded than the
    latents under the part that is looked at and so many around it. `tiny`: the autoencoder, or None.
    """

    def __init__(self, model: DiffusionModel, recipe: DecodeRecipe) -> None:
        self.model, self.recipe = model, recipe
        self.tiny = None if recipe.autoencoder is None else load_tiny_autoencoder(recipe.autoencoder, model)

    def __call__(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 _ _"]:
        """Images, about [-1, 1] and not clamped, of `scale` times the latents' own picture size."""
        return self._in_chunks(self._shrunk(latents))

    def parts(self, latents: Float[Tensor, "b c h w"], crops: Crops) -> Float[Tensor, "b 3 _ _"]:
        """`crops` of the images that a call gives: exactly those, or, with a `margin`, nearly.

        What lies further off is missing from the decoder's normalisation and attention, for real latents as for the
        student's.
        """
        if self.recipe.margin is None:
            return crops.of(self(latents))
        latents, factor = self._shrunk(latents), self.model.vae_scale_factor
        under = crops.coarser(factor, self.recipe.margin, latents.shape[-2:])
        return crops.inside(under, factor).of(self._in_chunks(under.of(latents)))

    def picture_size(self, latents: Float[Tensor, "b c h w"]) -> tuple[int, int]:
        """Height and width of the images that a call gives."""
        height, width = (self.model.vae_scale_factor * self._side(side) for side in latents.shape[-2:])
        return height, width

    def resized(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 _ _"]:
        """Real pictures at the size that is decoded to, so that size tells nothing of who drew a picture."""
        if self.recipe.scale == 1:
            return images
        factor = self.model.vae_scale_factor
        size = [factor * self._side(side // factor) for side in images.shape[-2:]]
        return F.interpolate(images, size=size, mode="bicubic", antialias=True)

    def _in_chunks(self, latents: Tensor) -> Tensor:
        if self.recipe.chunk is None:
            return self._decoded(latents)
        return torch.cat([self._recomputed(part) for part in latents.split(self.recipe.chunk)])

    def _recomputed(self, latents: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and latents.requires_grad):
            return self._decoded(latents)
        result = checkpointed(self._decoded, latents, preserve_rng_state=False)
        assert isinstance(result, Tensor)
        return result

    def _decoded(self, latents: Tensor) -> Tensor:
        if self.tiny is None:
            return self.model.decode_latents(latents)
        return exact(self.tiny.decode((latents / self.tiny.config.scaling_factor).to(self.tiny.dtype)).sample)

    def _shrunk(self, latents: Tensor) -> Tensor:
        """Averaged over areas: latents are a picture of sorts, and noise in them averages out."""
        if self.recipe.scale == 1:
            return latents
        size = [self._side(side) for side in latents.shape[-2:]]
        return F.interpolate(exact(latents), size=size, mode="area")

    def _side(self, side: int) -> int:
        return max(1, round(self.recipe.scale * side))


def load_tiny_autoencoder(source: str, model: DiffusionModel) -> AutoencoderTiny:
    """A frozen diffusers `AutoencoderTiny` from a folder or hub id, such as madebyollin/taesdxl for SDXL.

    Raises `ModelError` where it cannot be loaded, `RecipeError` where it reads other latents than the teacher's VAE
    makes.
    """
    where = f"decode.autoencoder {source}"
    try:
        tiny = AutoencoderTiny.from_pretrained(source, use_safetensors=True)
    except Exception as error:  # diffusers, safetensors and the hub each raise their own kinds
        raise ModelError(
            f"no tiny autoencoder can be loaded ({type(error).__name__})",
            where=where,
            fix="Give a folder or hub id of a diffusers AutoencoderTiny in safetensors (madebyollin/taesdxl for SDXL).",
        ) from error
    assert isinstance(tiny, AutoencoderTiny)
    theirs = (tiny.config.latent_channels, 2 ** (len(tiny.config.decoder_block_out_channels) - 1))
    ours = (model.vae.config.latent_channels, model.vae_scale_factor)
    if theirs != ours:
        raise RecipeError(
            f"it decodes {theirs[0]} channels {theirs[1]}-fold, the teacher's VAE {ours[0]} channels {ours[1]}-fold",
            where=where,
            fix="Give the tiny autoencoder of the teacher's own family.",
        )
    return tiny.requires_grad_(False).eval().to(model.device, model.vae.dtype, memory_format=torch.channels_last)

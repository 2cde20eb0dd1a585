"""A loaded diffusers model with its family's differences behind five methods.

Prediction types, time ids and text encoders end here: nobody after this room sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from jaxtyping import Float, Int
from torch import Tensor, nn

from onestroke.errors import ModelError
from onestroke.schedule import NoiseSchedule, exact
from onestroke.types import Condition, PredictionType


class Family(Protocol):
    """What differs between SDXL and SD 1.x/2.x."""

    name: str

    def encode_prompts(self, model: DiffusionModel, prompts: Sequence[str]) -> Condition:
        """Text embeddings of `prompts`, without time ids."""
        ...

    def blank_prompts(self, model: DiffusionModel, like: Condition) -> Condition:
        """What classifier-free guidance steers away from: the pipeline's own negative prompt when none is given."""
        ...

    def with_sizes(self, condition: Condition, sizes: Int[Tensor, "b 4"], target: tuple[int, int]) -> Condition:
        """Add the micro-conditioning; `sizes` original height, width, crop top, left; `target` height, width."""
        ...

    def call_unet(self, unet: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The UNet's raw output."""
        ...


@dataclass
class DiffusionModel:
    """The parts of a text-to-image pipeline. The text encoders and VAE are frozen; the UNet's owner decides."""

    family: Family
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: list[nn.Module]
    tokenizers: list
    schedule: NoiseSchedule
    prediction_type: PredictionType
    scheduler_config: dict
    zero_blank_prompt: bool = False  # SDXL's force_zeros_for_empty_prompt
    source: str = ""

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def default_size(self) -> int:
        """The picture side that the UNet was trained at, in pixels."""
        return self.unet.config.sample_size * self.vae_scale_factor

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """That of what the frozen networks hand out: float32 at least, whatever their weights are kept in."""
        return torch.promote_types(torch.float32, self.vae.dtype)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Text embeddings of `prompts`; SDXL's time ids are added by `with_sizes`."""
        return self.family.encode_prompts(self, list(prompts))

    def blank_prompts(self, like: Condition) -> Condition:
        return self.family.blank_prompts(self, like)

    def with_sizes(self, condition: Condition, sizes: Int[Tensor, "b 4"], target: tuple[int, int]) -> Condition:
        return self.family.with_sizes(condition, sizes, target)

    def full_size(self, condition: Condition, size: tuple[int, int]) -> Condition:
        """The condition for drawing at `size` (height, width): original size = target size, no crop."""
        rows = torch.tensor([[*size, 0, 0]] * len(condition.text))
        return self.family.with_sizes(condition, rows, size)

    def encode_images(
        self, images: Float[Tensor, "b 3 h w"], generator: Callable[[torch.Size], Tensor] | None = None
    ) -> Float[Tensor, "b c _ _"]:
        """Scaled latents; the posterior's mean, or a sample from it where `generator` gives unit noise of a shape."""
        posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        latents = posterior.mean
        if generator is not None:
            latents = latents + posterior.std * generator(latents.shape)
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return (exact(latents) - shift) * self.vae.config.scaling_factor

    def decode_latents(self, latents: Float[Tensor, "b c _ _"]) -> Float[Tensor, "b 3 h w"]:
        """Images, not clamped, in float32 at least; gradients flow through."""
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return exact(self.vae.decode((latents / self.vae.config.scaling_factor + shift).to(self.vae.dtype)).sample)

    def denoiser(self, unet: nn.Module | None = None, *, prediction_type: PredictionType | None = None) -> Denoiser:
        """`(x_t, t, condition) -> x0` by this model's UNet, or by `unet` (a student)."""
        kind = prediction_type or self.prediction_type
        if kind == "epsilon" and self.schedule.ends_in_pure_noise:
            raise ModelError(
                "with zero terminal SNR no noise prediction says what x0 is",
                where=self.source,
                fix='Set student.prediction_type to "v_prediction" or "sample", or leave it out.',
            )
        return Denoiser(self.unet if unet is None else unet, self.family, self.schedule, kind)


class Denoiser(nn.Module):
    """A UNet whose output is read as `x0`."""

    def __init__(
        self, unet: nn.Module, family: Family, schedule: NoiseSchedule, prediction_type: PredictionType
    ) -> None:
        super().__init__()
        self.unet = unet
        self.family, self.schedule, self.prediction_type = family, schedule, prediction_type

    def forward(self, x_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"], condition: Condition) -> Tensor:
        """The predicted `x0` (b c h w, float32 at least): clean latents behind `x_t` at timesteps `t`."""
        output = self.family.call_unet(self.unet, x_t, t, condition)
        return self.schedule.to_x0(output, x_t, t, self.prediction_type)


def guided(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition, blank: Condition, scale: Tensor | float
) -> Tensor:
    """`x0` under classifier-free guidance, both halves in one call (arXiv 2207.12598, eq. 6).

    Guiding `x0` and guiding the output agree: `x0` is affine in the output at one `x_t`. `scale` 1 is unguided.
    """
    if isinstance(scale, float | int) and scale == 1:
        return denoiser(x_t, t, condition)
    both = joined(condition, blank)
    with_text, without = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    return without + scale * (with_text - without)


def joined(one: Condition, two: Condition) -> Condition:
    """The pictures of `one`, then those of `two`."""

    def cat(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.cat([a, b])

    return Condition(torch.cat([one.text, two.text]), cat(one.pooled, two.pooled), cat(one.time_ids, two.time_ids))

"""Sharpening: a finished student learns to draw what an unsharp mask would make of its own pictures.

Latents that a network predicts lie near the mean of what they might have been, and decode to softer lines than those of
pictures; a student learns its teacher's softness, and adds its own. A mask over the decoded pictures mends much of it.
Here it goes into the weights, and costs nothing when the student draws. The student as it was draws, timestep by
timestep, as it is drawn with, and its own pictures under the mask are what each prediction is held against: they fit
together pixel by pixel, so that a plain mean absolute error does not blur, and nothing but sharpness is learnt.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from onestroke.config import SharpenRecipe
from onestroke.distill.decoding import Decoder
from onestroke.families.model import Denoiser, DiffusionModel, joined
from onestroke.randomness import normal
from onestroke.schedule import student_timesteps
from onestroke.train.method import Loss, OptimizerSettings, Player
from onestroke.types import Batch, Condition

STREAM = "sharpening, timestep {}"  # of the noise


class Asked(NamedTuple):
    """What the student drew on its way from pure noise, and from what, all timesteps of all prompts in one batch."""

    x_s: Float[Tensor, "n c h w"]
    s: Int[Tensor, " n"]
    x0: Float[Tensor, "n c h w"]
    condition: Condition


def unsharp(images: Float[Tensor, "b 3 h w"], amount: float, radius: float) -> Float[Tensor, "b 3 h w"]:
    """`images`, in [-1, 1], with `amount` times what a Gaussian blur takes from them added, in [-1, 1] again.

    `radius`: the blur's standard deviation in pixels. As in Pillow's `UnsharpMask` with 100 `amount` percent and a
    threshold of 0.
    """
    reach = math.ceil(3 * radius)
    bell = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=images.device) / radius).square())
    bell = (bell / bell.sum()).to(images).expand(images.shape[1], 1, 1, -1)
    blurred = F.pad(images, (reach,) * 4, mode="replicate")
    for kernel in (bell, bell.mT):
        blurred = F.conv2d(blurred, kernel, groups=images.shape[1])
    return (images + amount * (images - blurred)).clamp(-1, 1)


class Sharpening:
    """A method whose student sees its own pictures, as `before` draws them, under the mask.

    A picture of the run is one prompt with its noise, drawn at each of the student's timesteps.
    """

    def __init__(
        self,
        model: DiffusionModel,
        student: Denoiser,
        trained: nn.Module,
        before: Denoiser,
        decode: Decoder,
        recipe: SharpenRecipe,
        optimizer: OptimizerSettings,
        *,
        num_timesteps: int,
        ema_images: float,
        seed: int,
    ) -> None:
        self.model, self.student, self.before, self.decode = model, student, before, decode
        self.recipe, self.seed = recipe, seed
        self.timesteps = student_timesteps(num_timesteps, num_train_timesteps=len(model.schedule))
        self.players = {"student": Player(trained, optimizer, ema_images=ema_images)}

    @property
    def frozen(self) -> list[nn.Module]:
        """The networks that are not trained."""
        model = self.model
        tiny = [] if self.decode.tiny is None else [self.decode.tiny]
        return [model.unet, self.before.unet, model.vae, *model.text_encoders, *tiny]

    def rollout(self, batch: Batch, due: frozenset[str]) -> tuple[Tensor, Tensor]:
        """The student's pictures, and what they are held against; both n 3 h w, timesteps times prompts."""
        with torch.no_grad():
            asked = self.asked(batch)
            wanted = unsharp(self.decode(asked.x0).clamp(-1, 1), self.recipe.amount, self.recipe.radius)
        return self.decode(self.student(asked.x_s, asked.s, asked.condition)), wanted

    @torch.no_grad()
    def asked(self, batch: Batch) -> Asked:
        """The way of the student as it was, from pure noise, with new noise over each picture before."""
        model = self.model
        size = batch.picture_size
        condition = model.full_size(model.encode_prompts(batch.captions), size)
        shape = [model.unet.config.in_channels, *(side // model.vae_scale_factor for side in size)]
        x0, inputs, pictures = torch.zeros(len(batch), *shape, dtype=model.dtype, device=model.device), [], []
        s = torch.tensor(self.timesteps, device=model.device).repeat_interleave(len(batch))
        for place, each in enumerate(s.split(len(batch))):
            eps = normal(shape, self.seed, STREAM.format(place), batch.slots).to(x0)
            inputs.append(model.schedule.student_input(x0, eps, each))
            x0 = self.before(inputs[-1], each, condition).to(x0)
            pictures.append(x0)
        return Asked(torch.cat(inputs), s, torch.cat(pictures), reduce(joined, [condition] * len(pictures)))

    def loss(self, player: str, rollout: tuple[Tensor, Tensor]) -> Loss:
        drawn, wanted = rollout
        return Loss((drawn - wanted).abs().mean())

    def finish_step(self, due: frozenset[str]) -> None:
        """Nothing to do."""

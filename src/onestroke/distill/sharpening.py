"""Sharpening: a finished student learns from its own pictures, under an unsharp mask and a step further.

Latents that a network predicts lie near the mean of what they might have been, and decode to softer lines than those of
pictures; a student learns its teacher's softness, and adds its own. A mask over the decoded pictures mends much of it.
Here it goes into the weights, and costs nothing when the student draws. The student as it was draws, timestep by
timestep, as it is drawn with, and its own pictures under the mask are what each prediction is held against: they fit
together pixel by pixel, so that a plain mean absolute error does not blur, and nothing but sharpness is learnt.

At pure noise the student can also look ahead: what it makes of its first picture under the same noise is better, keeps
to the words, and lies near enough to be learnt. Neither asks a teacher for anything: no prompt has to come twice.

What round upon round of masks exaggerates, the latents themselves, a gain below 1 takes back. A gain above 1 of the
words has the student draw more of them: what leads from no words to a caption is followed a little further.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from onestroke.config import SharpenRecipe
from onestroke.distill.decoding import Decoder
from onestroke.distill.features import FeatureNetwork
from onestroke.distill.perceptual import perceptual_distance
from onestroke.families.model import Denoiser, DiffusionModel, joined
from onestroke.randomness import normal
from onestroke.schedule import student_timesteps
from onestroke.train.method import Loss, OptimizerSettings, Player
from onestroke.types import Batch, Condition

STREAM = "sharpening, timestep {}"  # of the noise


class Asked(NamedTuple):
    """What the student is asked, and what it is to draw, timestep by timestep; first all prompts at pure noise."""

    x_s: Float[Tensor, "n c h w"]
    s: Int[Tensor, " n"]
    target: Float[Tensor, "n c h w"]
    condition: Condition


class Compared(NamedTuple):
    """Pictures, in [-1, 1]; the first `count` of both are those at pure noise, one for each prompt."""

    drawn: Float[Tensor, "n 3 h w"]
    wanted: Float[Tensor, "n 3 h w"]
    count: int


def unsharp(
    images: Float[Tensor, "b 3 h w"], amount: float | Float[Tensor, "b 1 1 1"], radius: float
) -> Float[Tensor, "b 3 h w"]:
    """`images`, in [-1, 1], with `amount` times what a Gaussian blur takes from them added, in [-1, 1] again.

    `amount`: of all or of each. `radius`: the blur's standard deviation in pixels. As in Pillow's `UnsharpMask` with
    100 `amount` percent and a threshold of 0.
    """
    reach = math.ceil(3 * radius)
    bell = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=images.device) / radius).square())
    bell = (bell / bell.sum()).to(images).expand(images.shape[1], 1, 1, -1)
    blurred = F.pad(images, (reach,) * 4, mode="replicate")
    for kernel in (bell, bell.mT):
        blurred = F.conv2d(blurred, kernel, groups=images.shape[1])
    return (images + amount * (images - blurred)).clamp(-1, 1)


class Sharpening:
    """A method whose student sees pictures of its own, as `before` draws them.

    A picture of the run is one prompt with its noise, drawn at pure noise and, one in `recipe.later_every`, at each of
    the student's later timesteps.
    """

    def __init__(
        self,
        model: DiffusionModel,
        student: Denoiser,
        trained: nn.Module,
        before: Denoiser,
        decode: Decoder,
        features: FeatureNetwork,
        recipe: SharpenRecipe,
        optimizer: OptimizerSettings,
        *,
        num_timesteps: int,
        ema_images: float,
        seed: int,
    ) -> None:
        self.model, self.student, self.before = model, student, before
        self.decode, self.features = decode, features
        self.recipe, self.seed = recipe, seed
        self.timesteps = student_timesteps(num_timesteps, num_train_timesteps=len(model.schedule))
        self.players = {"student": Player(trained, optimizer, ema_images=ema_images)}

    @property
    def frozen(self) -> list[nn.Module]:
        """The networks that are not trained."""
        model = self.model
        tiny = [] if self.decode.tiny is None else [self.decode.tiny]
        return [model.unet, self.before.unet, model.vae, *model.text_encoders, self.features, *tiny]

    def rollout(self, batch: Batch, due: frozenset[str]) -> Compared:
        """The student's pictures, and what they are held against."""
        with torch.no_grad():
            asked = self.asked(batch)
            wanted = self.decode(asked.target).clamp(-1, 1)
            if any(self.recipe.amounts):
                amounts = wanted.new_tensor(self.recipe.amounts).repeat_interleave(
                    torch.tensor([len(batch), len(wanted) - len(batch)], device=wanted.device)
                )
                wanted = unsharp(wanted, amounts[:, None, None, None], self.recipe.radius)
        drawn = self.decode(self.student(asked.x_s, asked.s, asked.condition))
        return Compared(drawn, wanted, len(batch))

    @torch.no_grad()
    def asked(self, batch: Batch) -> Asked:
        """The way of the student as it was, from pure noise, with new noise over each picture before.

        With `recipe.ahead` the first target is what the second timestep makes of the picture without new noise: DDIM's
        step (arXiv 2010.02502, eq. 12, sigma = 0), as a student learns two of its teacher's in progressive distillation
        (arXiv 2202.00512). `recipe.text_gain` is of the words that the first target is drawn with (see `emphasized`),
        and `recipe.gain` of that target; later timesteps begin from what the student is to draw, with plain words.
        """
        model, size = self.model, batch.picture_size
        condition = model.full_size(model.encode_prompts(batch.captions), size)
        shape = [model.unet.config.in_channels, *(side // model.vae_scale_factor for side in size)]
        x0 = torch.zeros(len(batch), *shape, dtype=model.dtype, device=model.device)
        goes_on = (batch.slots % self.recipe.later_every == 0).nonzero()[:, 0].to(model.device)
        rows, parts = torch.arange(len(batch), device=model.device), []
        for place, timestep in enumerate(self.timesteps):
            if place == 1:
                rows, x0, condition = goes_on, x0[goes_on], condition[goes_on]
            if not len(rows):
                break
            s = torch.full((len(rows),), timestep, device=model.device)
            eps = normal(shape, self.seed, STREAM.format(place), batch.slots[rows.cpu()]).to(x0)
            x_s = model.schedule.student_input(x0, eps, s)
            words = condition if place else self.emphasized(condition)
            x0 = target = self.before(x_s, s, words).to(x0)
            if place == 0:
                if self.recipe.ahead:
                    second = torch.full_like(s, self.timesteps[1])
                    target = self.before(model.schedule.add_noise(x0, eps, second), second, words).to(x0)
                x0, target = self.recipe.gain * x0, self.recipe.gain * target
            parts.append(Asked(x_s, s, target, condition))
        x_s, s, target, conditions = zip(*parts, strict=True)
        return Asked(torch.cat(x_s), torch.cat(s), torch.cat(target), reduce(joined, conditions))

    def emphasized(self, condition: Condition) -> Condition:
        """`condition`, its text `recipe.text_gain` times as far from that of an empty prompt, token by token.

        Classifier-free guidance's extrapolation (arXiv 2207.12598, eq. 6) of what the UNet is told, not of what it
        predicts: one call suffices, and a student that was never shown blank prompts follows.
        """
        if self.recipe.text_gain == 1:
            return condition
        empty = self.model.encode_prompts([""])
        text = torch.lerp(empty.text.to(condition.text), condition.text, self.recipe.text_gain)
        if condition.pooled is None:
            return replace(condition, text=text)
        pooled = torch.lerp(empty.pooled.to(condition.pooled), condition.pooled, self.recipe.text_gain)
        return replace(condition, text=text, pooled=pooled)

    def loss(self, player: str, rollout: Compared) -> Loss:
        """Both terms are means over the predictions that so many prompts have on average."""
        drawn, wanted, count = rollout
        far = (drawn - wanted).abs().mean(dim=(1, 2, 3))
        pixel = far.sum() / (count * self.recipe.predictions(len(self.timesteps)))
        terms, total = {"pixel": pixel.detach(), "first": far[:count].mean().detach()}, pixel
        if self.recipe.perceptual:
            seen = perceptual_distance(self.features, drawn[:count], wanted[:count]).mean()
            terms["perceptual"], total = seen.detach(), pixel + self.recipe.perceptual * seen
        return Loss(total, terms)

    def finish_step(self, due: frozenset[str]) -> None:
        """Nothing to do."""

"""Adversarial Diffusion Distillation (ADD, arXiv 2311.17042): two players, a student and the discriminator's heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from onestroke.config import OptimizerRecipe, Recipe
from onestroke.distill.conditions import ImageEmbedder, TextEmbedder
from onestroke.distill.discriminator import Discriminator
from onestroke.distill.features import FeatureNetwork
from onestroke.distill.losses import (
    adversarial_loss,
    distillation_loss,
    distillation_weight,
    hinge_loss,
    r1_features,
    r1_penalty,
)
from onestroke.distill.student import choose_timesteps
from onestroke.distill.teacher import Target, negative_condition, noise_free_target, teacher_target, teacher_timesteps
from onestroke.families.model import DiffusionModel
from onestroke.randomness import normal, stratified, uniform
from onestroke.train.method import Loss, OptimizerSettings, Player
from onestroke.types import Batch, Condition

STUDENT, DISCRIMINATOR = "student", "discriminator"


@dataclass(frozen=True)
class Rollout:
    """What both players' losses are made of. Gradients flow to the student through `x0` alone."""

    x0: Float[Tensor, "b c h w"]  # the student's pictures: pixels or latents, as the distance wants
    fake: list[Tensor]  # features of the student's pictures
    real: list[Tensor] | None  # features of the data's, if the discriminator is due
    target: Target | None  # the teacher's pictures, in the space of `x0`, if the student is due
    c_text: Tensor | None
    c_img: Tensor | None
    has_image: Bool[Tensor, " b"]  # false where the student was given pure noise
    r1_gamma: float  # 0 in the steps between those that have the penalty


class ADD:
    """The method. `trained` are the students' and heads' modules; everything else stays frozen."""

    def __init__(
        self,
        teacher: DiffusionModel,
        student: nn.Module,
        features: FeatureNetwork,
        recipe: Recipe,
    ) -> None:
        self.model, self.recipe, self.features = teacher, recipe, features
        self.teacher = teacher.denoiser()
        self.student = teacher.denoiser(student, prediction_type=recipe.student.prediction_type)
        settings = recipe.discriminator
        device = teacher.device
        self.embed_text = TextEmbedder(teacher, settings.text_encoder).to(device)
        self.embed_image = ImageEmbedder(features, settings).to(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.heads = Discriminator(
                features.widths,
                is_spatial=features.is_spatial,
                conditioning=settings.conditioning,
                text_dim=self.embed_text.dim,
                image_dim=self.embed_image.dim,
            ).to(device)
        self.players: Mapping[str, Player] = {
            STUDENT: _player(student, recipe.student_optimizer, ema_images=recipe.student.ema_images),
            DISCRIMINATOR: _player(self.heads, recipe.discriminator_optimizer),
        }

    def rollout(self, batch: Batch, due: frozenset[str]) -> Rollout:
        """One student prediction, decoded once; features and teacher target for the players that are due."""
        model, seed, slots = self.model, self.recipe.seed, batch.slots
        assert batch.images is not None, "the discriminator looks at pictures"
        images = batch.images.to(model.device)
        with torch.no_grad():
            latents = model.encode_images(images)
            condition = self._condition(batch)
            fractions = uniform(seed, "s", slots)
            s = choose_timesteps(fractions, self.recipe.student, num_train_timesteps=len(model.schedule))
            eps = normal(latents.shape[1:], seed, "eps", slots).to(latents)
            x_s = model.schedule.student_input(latents, eps, s)
        with torch.set_grad_enabled(STUDENT in due):
            x0 = self.student(x_s, s.to(model.device), condition)
            pixels = model.decode_latents(x0)
            fake = self.features(self._part(pixels, slots, "fake crop"))
        target = self._target(x0, condition, batch) if STUDENT in due and self.recipe.losses.distill_weight else None
        with torch.no_grad():
            is_decoded = self.recipe.discriminator.real == "reconstructed"
            shown = model.decode_latents(latents) if is_decoded else images
            real, c_img = self._seen(self._part(shown, slots, "real crop"), due)
            c_text = self.embed_text(batch.captions, condition) if self.heads.uses_text else None
        has_image = (s != len(model.schedule) - 1).to(model.device)
        distance = self.recipe.losses.distance
        compared = pixels if distance == "pixel" else x0
        return Rollout(compared, fake, real, target, c_text, c_img, has_image, self._r1_gamma(batch))

    def loss(self, player: str, rollout: Rollout) -> Loss:
        return self._student_loss(rollout) if player == STUDENT else self._discriminator_loss(rollout)

    def finish_step(self, due: frozenset[str]) -> None:
        """Spectral norm's power iteration advances once per step of the heads, not once per forward pass."""
        if DISCRIMINATOR in due:
            self.heads.advance_spectral_norm()

    def _part(self, images: Tensor, slots: Tensor, stream: str) -> Tensor:
        """The part of each picture that the feature network is shown."""
        share = self.recipe.discriminator.crop
        if share == 1:
            return images
        height, width = (max(1, round(share * side)) for side in images.shape[-2:])
        tops, lefts = (
            (uniform(self.recipe.seed, f"{stream} {axis}", slots) * (room + 1)).long().tolist()
            for axis, room in (("top", images.shape[-2] - height), ("left", images.shape[-1] - width))
        )
        parts = [image[:, y : y + height, x : x + width] for image, y, x in zip(images, tops, lefts, strict=True)]
        return torch.stack(parts).contiguous(memory_format=torch.channels_last)

    def _r1_gamma(self, batch: Batch) -> float:
        """The penalty's weight in this step of the heads; the slots number it, whatever part of the batch this is."""
        losses = self.recipe.losses
        step = int(batch.slots.min()) // self.recipe.train.batch_size // self.recipe.discriminator_optimizer.every
        return losses.r1_gamma * losses.r1_every if step % losses.r1_every == 0 else 0.0

    def _seen(self, images: Tensor, due: frozenset[str]) -> tuple[list[Tensor] | None, Tensor | None]:
        """Features of the real pictures, if the discriminator is due, and their embedding, if heads are given it."""
        wanted, embedded = DISCRIMINATOR in due, self.heads.uses_image
        if wanted and embedded and self.embed_image.is_shared:
            return self.features.forward_and_embed(images)
        return self.features(images) if wanted else None, self.embed_image(images) if embedded else None

    def _condition(self, batch: Batch) -> Condition:
        sizes = batch.sizes.to(self.model.device)
        return self.model.with_sizes(self.model.encode_prompts(batch.captions), sizes, batch.picture_size)

    def _target(self, x0: Tensor, condition: Condition, batch: Batch) -> Target:
        """The teacher's picture of the student's, in the space of the distance."""
        recipe, seed, slots = self.recipe, self.recipe.seed, batch.slots
        low, high = recipe.teacher.guidance
        with torch.no_grad():
            t = teacher_timesteps(
                stratified(seed, "t", slots), recipe.teacher, num_train_timesteps=len(self.model.schedule)
            ).to(x0.device)
            eps = normal(x0.shape[1:], seed, "teacher eps", slots).to(x0)
            is_guided = (low, high) != (1, 1)
            scale = (low + (high - low) * uniform(seed, "guidance", slots)).to(x0) if is_guided else 1.0
            blank = self.model.blank_prompts(condition)
            if recipe.losses.weighting == "nfsd":
                negative = negative_condition(self.model, recipe.teacher.negative_prompt, condition)
                target = noise_free_target(self.teacher, x0, eps, t, condition, blank, negative, scale)
            else:
                target = teacher_target(self.teacher, x0, eps, t, condition, blank, scale)
            if recipe.losses.distance == "pixel":
                target = target._replace(x0=self.model.decode_latents(target.x0))
        return target

    def _student_loss(self, rollout: Rollout) -> Loss:
        """`L_adv + lambda * L_distill` (eq. 1)."""
        recipe = self.recipe.losses
        logits = self.heads(rollout.fake, rollout.c_text, rollout.c_img, rollout.has_image)
        adversarial = adversarial_loss(logits)
        total = recipe.adversarial_weight * adversarial
        terms = {"adversarial": adversarial.detach()}
        if rollout.target is not None:
            weight = distillation_weight(recipe.weighting, rollout.target.alpha_t, rollout.target.sigma_t)
            distillation = distillation_loss(rollout.x0, rollout.target.x0, weight.flatten())
            total = total + recipe.distill_weight * distillation
            terms["distillation"] = distillation.detach()
        return Loss(total, terms)

    def _discriminator_loss(self, rollout: Rollout) -> Loss:
        """Hinge loss plus R1 on each head's input features of real pictures (eq. 3)."""
        gamma = rollout.r1_gamma
        real_features = r1_features(rollout.real) if gamma else rollout.real
        conditions = (rollout.c_text, rollout.c_img, rollout.has_image)
        real = self.heads(real_features, *conditions)
        fake = self.heads([feature.detach() for feature in rollout.fake], *conditions)
        hinge = hinge_loss(real, fake)
        terms = {"hinge": hinge.detach()}
        for k, (r, f) in enumerate(zip(real, fake, strict=True)):
            terms |= {f"real_{k}": r.mean().detach(), f"fake_{k}": f.mean().detach()}
            terms |= {f"real_positive_{k}": (r > 0).float().mean(), f"fake_negative_{k}": (f < 0).float().mean()}
        if not gamma:
            return Loss(hinge, terms)
        penalty = r1_penalty(real, real_features, gamma=gamma)
        return Loss(hinge + penalty, terms | {"r1": penalty.detach()})


def _player(module: nn.Module, recipe: OptimizerRecipe, *, ema_images: float | None = None) -> Player:
    settings = OptimizerSettings(**recipe.model_dump(exclude={"every"}))
    return Player(module, settings, every=recipe.every, ema_images=ema_images)

"""Adversarial Diffusion Distillation (ADD, arXiv 2311.17042): two players, a student and the discriminator's heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from onestroke.config import OptimizerRecipe, Recipe
from onestroke.distill.anchors import Anchors, Lesson, anchor_loss, anchored
from onestroke.distill.conditions import ImageEmbedder, TextEmbedder
from onestroke.distill.crops import Crops, random_crops
from onestroke.distill.decoding import Decoder
from onestroke.distill.discriminator import Discriminator
from onestroke.distill.features import FeatureNetwork
from onestroke.distill.lora import trained_part
from onestroke.distill.losses import (
    adversarial_loss,
    distillation_loss,
    distillation_weight,
    hinge_loss,
    r1_features,
    r1_penalty,
)
from onestroke.distill.perceptual import Perception
from onestroke.distill.student import choose_timesteps
from onestroke.distill.teacher import Target, negative_condition, noise_free_target, teacher_target, teacher_timesteps
from onestroke.families.model import DiffusionModel, joined
from onestroke.randomness import normal, stratified, uniform
from onestroke.train.method import Loss, OptimizerSettings, Player
from onestroke.types import Batch, Condition

STUDENT, DISCRIMINATOR = "student", "discriminator"


class Anchored(NamedTuple):
    """What the student draws from the anchors' noise, and the anchors."""

    drawn: Float[Tensor, "a c h w"]
    lesson: Lesson
    expected: float  # anchors that a batch of this size has on average


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
    anchored: Anchored | None = None  # if the student is due and there are anchors


class ADD:
    """The method. `trained` are the students' and heads' modules; everything else stays frozen."""

    def __init__(
        self,
        teacher: DiffusionModel,
        student: nn.Module,
        features: FeatureNetwork,
        recipe: Recipe,
        *,
        embed_text: TextEmbedder | None = None,
        embed_image: ImageEmbedder | None = None,
        anchors: Anchors | None = None,
    ) -> None:
        self.anchors = anchors
        self.model, self.recipe, self.features = teacher, recipe, features
        self.teacher = teacher.denoiser()
        self.student = teacher.denoiser(student, prediction_type=recipe.student.prediction_type)
        self.decode = Decoder(teacher, recipe.decode)
        self.perception = Perception(self.decode, features, recipe.discriminator.crop, recipe.seed)
        settings = recipe.discriminator
        device = teacher.device
        self.embed_text = (embed_text or TextEmbedder(teacher, settings.text_encoder)).to(device)
        self.embed_image = (embed_image or ImageEmbedder(features, settings)).to(device)
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
            STUDENT: _player(trained_part(student), recipe.student_optimizer, ema_images=recipe.student.ema_images),
            DISCRIMINATOR: _player(self.heads, recipe.discriminator_optimizer),
        }

    def rollout(self, batch: Batch, due: frozenset[str]) -> Rollout:
        """One student prediction, decoded once; features and teacher target for the players that are due."""
        model, seed, slots = self.model, self.recipe.seed, batch.slots
        with torch.no_grad():
            images, latents = self._given(batch)
            condition = self._condition(batch)
            fractions = uniform(seed, "s", slots)
            s = choose_timesteps(fractions, self.recipe.student, num_train_timesteps=len(model.schedule))
            eps = normal(latents.shape[1:], seed, "eps", slots).to(latents)
            x_s = model.schedule.student_input(latents, eps, s)
        with torch.set_grad_enabled(STUDENT in due):
            x0, anchored = self._drawn(x_s, s, condition, batch, due)
            pixels, looked_at = self._decoded(x0, slots, "fake crop")
            fake = self.features(looked_at)
        target = self._target(x0, condition, batch) if STUDENT in due and self.recipe.losses.distill_weight else None
        with torch.no_grad():
            shown = self._real(images, latents, slots)
            real, c_img = self._seen(shown, due, batch.image_embeddings)
            c_text = self._worded(batch, condition) if self.heads.uses_text else None
        has_image = (s != len(model.schedule) - 1).to(model.device)
        distance = self.recipe.losses.distance
        compared = pixels if distance == "pixel" else x0
        return Rollout(compared, fake, real, target, c_text, c_img, has_image, self._r1_gamma(batch), anchored)

    def _drawn(
        self, x_s: Tensor, s: Tensor, condition: Condition, batch: Batch, due: frozenset[str]
    ) -> tuple[Tensor, Anchored | None]:
        """The student's prediction, and in the same call, so that all processes make one, that of the anchors."""
        model, anchors, settings = self.model, self.anchors, self.recipe.anchors
        if anchors is None or STUDENT not in due:
            return self.student(x_s, s.to(model.device), condition), None
        rows = anchors.rows_of(batch.slots, settings.every)
        with torch.no_grad():
            lesson = anchors.lesson(batch.slots, settings.every, anchored(self.recipe), model.schedule, x_s)
            if rows:
                told = model.encode_prompts([anchors.captions[row] for row in rows])
                condition = joined(condition, model.full_size(told, anchors.size))
                x_s, s = torch.cat([x_s, lesson.x_s]), torch.cat([s, lesson.s])
        x0 = self.student(x_s, s.to(model.device), condition)
        return x0[: len(batch)], Anchored(x0[len(batch) :], lesson, len(batch) / settings.every)

    @property
    def frozen(self) -> list[nn.Module]:
        """The networks that no player trains."""
        model, given = self.model, [self.embed_text.encoder, self.embed_image.network, self.decode.tiny]
        return [model.unet, model.vae, *model.text_encoders, self.features, *(net for net in given if net is not None)]

    @property
    def looks_at_whole_pictures(self) -> bool:
        """Whether the image condition is an embedding of the data's own pictures, whole and at full size."""
        settings = self.recipe.discriminator
        return settings.crop == 1 and settings.real == "data" and self.recipe.decode.scale == 1

    def loss(self, player: str, rollout: Rollout) -> Loss:
        return self._student_loss(rollout) if player == STUDENT else self._discriminator_loss(rollout)

    def finish_step(self, due: frozenset[str]) -> None:
        """Spectral norm's power iteration advances once per step of the heads, not once per forward pass."""
        if DISCRIMINATOR in due:
            self.heads.advance_spectral_norm()

    def _decoded(self, latents: Tensor, slots: Tensor, stream: str) -> tuple[Tensor | None, Tensor]:
        """Pictures of latents, whole where the pixel loss compares them, and the part that the heads look at."""
        crops = self._crops(self.decode.picture_size(latents), slots, stream)
        if crops is None:
            pixels = self.decode(latents)
            return pixels, pixels
        if self.recipe.losses.distance == "pixel":
            pixels = self.decode(latents)
            return pixels, crops.of(pixels)
        return None, self.decode.parts(latents, crops)

    def _real(self, images: Tensor | None, latents: Tensor, slots: Tensor) -> Tensor:
        """The part of the data's pictures that the heads look at."""
        if self.recipe.discriminator.real == "reconstructed":
            return self._decoded(latents, slots, "real crop")[1]
        images = self.decode.resized(images)
        crops = self._crops(images.shape[-2:], slots, "real crop")
        return images if crops is None else crops.of(images)

    def _crops(self, size: Sequence[int], slots: Tensor, stream: str) -> Crops | None:
        """Where the heads look in pictures of this size; None: everywhere."""
        share = self.recipe.discriminator.crop
        return None if share == 1 else random_crops(size, share, slots, seed=self.recipe.seed, stream=stream)

    def _r1_gamma(self, batch: Batch) -> float:
        """The penalty's weight in this step of the heads; the slots number it, whatever part of the batch this is."""
        losses = self.recipe.losses
        step = min(batch.slots.tolist()) // self.recipe.train.batch_size // self.recipe.discriminator_optimizer.every
        return losses.r1_gamma * losses.r1_every if step % losses.r1_every == 0 else 0.0

    def _given(self, batch: Batch) -> tuple[Tensor | None, Tensor]:
        """The batch's images, where it has any, and their latents, encoded unless they come with it."""
        images = None if batch.images is None else batch.images.to(self.model.device)
        if batch.latents is None:
            assert images is not None, "a batch holds images or latents"
            return images, self.model.encode_images(images)
        return images, batch.latents.to(self.model.device, self.model.dtype)

    def _worded(self, batch: Batch, condition: Condition) -> Tensor:
        given = batch.text_embeddings
        if given is None:
            return self.embed_text(batch.captions, condition)
        return given.to(self.model.device, self.model.dtype)

    def _seen(
        self, images: Tensor, due: frozenset[str], known: Tensor | None
    ) -> tuple[list[Tensor] | None, Tensor | None]:
        """Features of the real pictures, if the discriminator is due, and their embedding, if heads are given it."""
        wanted, embedded = DISCRIMINATOR in due, self.heads.uses_image
        if embedded and known is not None and self.looks_at_whole_pictures:
            return self.features(images) if wanted else None, known.to(self.model.device, self.model.dtype)
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
                target = target._replace(x0=self.decode(target.x0))
        return target

    def _student_loss(self, rollout: Rollout) -> Loss:
        """`L_adv + lambda * L_distill` (eq. 1), and the anchors' distance where there are some."""
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
        if rollout.anchored is not None:
            settings, (drawn, lesson, expected) = self.recipe.anchors, rollout.anchored
            anchor = anchor_loss(drawn, lesson.target, lesson.worded, expected, emphasis=settings.emphasis)
            terms["anchor"] = anchor.detach()
            if settings.perceptual and len(drawn):
                seen = self.perception.distance(drawn, lesson.target, lesson.slots).sum() / expected
                terms["perceptual"], anchor = seen.detach(), anchor + settings.perceptual * seen
            total = total + settings.weight * anchor
        return Loss(total, terms)

    def _discriminator_loss(self, rollout: Rollout) -> Loss:
        """Hinge loss plus R1 on each head's input features of real pictures (eq. 3)."""
        gamma = rollout.r1_gamma
        real_features = r1_features(rollout.real) if gamma else rollout.real
        real, fake = self._judged(real_features, [feature.detach() for feature in rollout.fake], rollout)
        hinge = hinge_loss(real, fake)
        terms = {"hinge": hinge.detach()}
        for k, (r, f) in enumerate(zip(real, fake, strict=True)):
            terms |= {f"real_{k}": r.mean().detach(), f"fake_{k}": f.mean().detach()}
            terms |= {f"real_positive_{k}": (r > 0).float().mean(), f"fake_negative_{k}": (f < 0).float().mean()}
        if not gamma:
            return Loss(hinge, terms)
        penalty = r1_penalty(real, real_features, gamma=gamma)
        return Loss(hinge + penalty, terms | {"r1": penalty.detach()})

    def _judged(self, real: list[Tensor], fake: list[Tensor], rollout: Rollout) -> tuple[list[Tensor], list[Tensor]]:
        """Logits of both sets of pictures: in one call, unless R1 is to differentiate those of the real ones alone."""
        conditions = (rollout.c_text, rollout.c_img, rollout.has_image)
        if rollout.r1_gamma:
            return self.heads(real, *conditions), self.heads(fake, *conditions)
        both = [torch.cat(pair) for pair in zip(real, fake, strict=True)]
        logits = self.heads(both, *(None if c is None else c.repeat(2, *[1] * (c.ndim - 1)) for c in conditions))
        halves = [head.chunk(2) for head in logits]
        return [half[0] for half in halves], [half[1] for half in halves]


def _player(module: nn.Module, recipe: OptimizerRecipe, *, ema_images: float | None = None) -> Player:
    settings = OptimizerSettings(**recipe.model_dump(exclude={"every"}))
    return Player(module, settings, every=recipe.every, ema_images=ema_images)

"""Anchors: pictures that the guided teacher draws from known noise, for the student to draw from it in one step.

At pure noise a teacher predicts the mean of all pictures, whatever the noise is: nothing there tells a student that
another noise is another picture, and a discriminator asks for it only faintly. Pairs of noise and picture, as an ODE
solver gives them, do (DMD, arXiv 2311.18828, section 3.2, the regression loss; here between latents).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from onestroke.data.plan import picture_at
from onestroke.families.model import Denoiser, DiffusionModel
from onestroke.randomness import normal, uniform
from onestroke.schedule import student_timesteps
from onestroke.train.method import Loss, OptimizerSettings, Player
from onestroke.types import Batch

STREAM = "anchor"  # of the noise
OTHERS = 0.25  # of the pictures before ADD, for the student's other timesteps


@dataclass(frozen=True)
class Anchors:
    """Captions, noise by number, and what the teacher drew of both."""

    latents: Float[Tensor, "n c h w"]  # scaled, float16
    captions: Sequence[str]
    seed: int
    size: tuple[int, int]  # height, width of the pictures

    def __len__(self) -> int:
        return len(self.latents)

    def noise(self, rows: Sequence[int]) -> Float[Tensor, "b c h w"]:
        """What these anchors were drawn from."""
        return normal(self.latents.shape[1:], self.seed, STREAM, torch.tensor(list(rows)))

    def rows_of(self, slots: Int[Tensor, " b"], every: int) -> list[int]:
        """Which anchors go with these pictures of the run: one to each slot that divides by `every`."""
        numbers = [slot // every for slot in slots.tolist() if slot % every == 0]
        return [picture_at(n, len(self), seed=self.seed) for n in numbers]


def anchor_loss(drawn: Float[Tensor, "a c h w"], anchors: Float[Tensor, "a c h w"], expected: float) -> Tensor:
    """Squared distance, averaged over a latent's elements and over `expected` anchors (DMD, eq. 9, in latents).

    Parts of a batch hold more or fewer anchors than others: what one of them counts does not depend on that.
    """
    return (drawn - anchors).square().mean(dim=(1, 2, 3)).sum() / expected


class Anchoring:
    """A method whose student sees anchors alone: what comes before ADD. Each picture of the run is one anchor.

    A quarter of them is noised afresh, for the student's other timesteps, which would else be forgotten meanwhile.
    """

    def __init__(
        self,
        model: DiffusionModel,
        student: Denoiser,
        trained: nn.Module,
        anchors: Anchors,
        optimizer: OptimizerSettings,
        *,
        num_timesteps: int = 4,
    ) -> None:
        self.model, self.student, self.anchors = model, student, anchors
        self.timesteps = torch.tensor(student_timesteps(num_timesteps, num_train_timesteps=len(model.schedule)))
        self.players = {"student": Player(trained, optimizer)}

    def rollout(self, batch: Batch, due: frozenset[str]) -> tuple[Tensor, Tensor]:
        """The student's latents and the teacher's."""
        model, device, seed = self.model, self.model.device, self.anchors.seed
        rows = self.anchors.rows_of(batch.slots, 1)
        with torch.no_grad():
            condition = model.full_size(model.encode_prompts(batch.captions), self.anchors.size)
            target = self.anchors.latents[rows].to(device, model.dtype)
            s = self._timesteps(uniform(seed, "anchor s", batch.slots))
            fresh = normal(target.shape[1:], seed, "anchor eps", batch.slots)
            is_first = (s == self.timesteps[0])[:, None, None, None]
            noise = torch.where(is_first, self.anchors.noise(rows), fresh).to(target)
            x_s = model.schedule.student_input(target, noise, s)
        return self.student(x_s, s.to(device), condition), target

    def _timesteps(self, fractions: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
        """The noisiest but for the last `OTHERS` of the fractions, which are spread over the other ones."""
        others = self.timesteps[1:]
        if not len(others):
            return self.timesteps.expand(len(fractions))
        place = ((fractions - (1 - OTHERS)) / OTHERS * len(others)).floor().long()
        return torch.where(fractions < 1 - OTHERS, self.timesteps[0], others[place.clamp(min=0)])

    def loss(self, player: str, rollout: tuple[Tensor, Tensor]) -> Loss:
        drawn, target = rollout
        loss = anchor_loss(drawn, target, len(target))
        return Loss(loss, {"anchor": loss.detach()})

    def finish_step(self, due: frozenset[str]) -> None:
        """Nothing to do."""

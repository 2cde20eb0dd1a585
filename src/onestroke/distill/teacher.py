"""The teacher's target: the student's picture, noised again and denoised in one guided step (ADD, section 3.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from onestroke.config import TeacherRecipe
from onestroke.distill.losses import nfsd_target
from onestroke.families.model import Denoiser, DiffusionModel, guided
from onestroke.types import Condition


class Target(NamedTuple):
    """`x0` in latents, and the rates at which the teacher was asked, b 1 1 1."""

    x0: Float[Tensor, "b c h w"]
    alpha_t: Tensor
    sigma_t: Tensor


def teacher_timesteps(fractions: Tensor, recipe: TeacherRecipe, *, num_train_timesteps: int) -> Tensor:
    """Uniform between the recipe's two shares of the schedule (the paper gives no distribution); b, int64."""
    shares = recipe.min_t + fractions * (recipe.max_t - recipe.min_t)
    return (shares * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)


@torch.no_grad()
def teacher_target(
    teacher: Denoiser,
    x0_student: Float[Tensor, "b c h w"],
    eps: Float[Tensor, "b c h w"],
    t: Int[Tensor, " b"],
    condition: Condition,
    blank: Condition,
    scale: Float[Tensor, " b"] | float,
) -> Target:
    """One teacher evaluation with classifier-free guidance `scale` (one suffices: table 1f); carries no gradient.

    The number 1 is unguided, and asks the teacher for half as much as a tensor of ones.
    """
    schedule = teacher.schedule
    x_t = schedule.add_noise(x0_student.detach(), eps, t)
    x0 = guided(teacher, x_t, t, condition, blank, _per_picture(scale, x_t))
    return Target(x0, *schedule.rates(t, x_t))


@torch.no_grad()
def noise_free_target(
    teacher: Denoiser,
    x0_student: Float[Tensor, "b c h w"],
    eps: Float[Tensor, "b c h w"],
    t: Int[Tensor, " b"],
    condition: Condition,
    blank: Condition,
    negative: Condition,
    scale: Float[Tensor, " b"] | float,
) -> Target:
    """As `teacher_target`, by noise-free score distillation (arXiv 2310.17590)."""
    schedule = teacher.schedule
    x_t = schedule.add_noise(x0_student.detach(), eps, t)
    predictions = [schedule.from_x0(teacher(x_t, t, c), x_t, t, "epsilon") for c in (condition, blank, negative)]
    alpha, sigma = schedule.rates(t, x_t)
    x0 = nfsd_target(x0_student, *predictions, t, alpha, sigma, scale=_per_picture(scale, x_t))
    return Target(x0, alpha, sigma)


def _per_picture(scale: Tensor | float, like: Tensor) -> Tensor | float:
    return scale.view(-1, 1, 1, 1).to(like) if isinstance(scale, Tensor) else scale


def negative_condition(model: DiffusionModel, prompt: str, like: Condition) -> Condition:
    """The embedding of one negative prompt for every picture of `like`."""
    one = model.encode_prompts([prompt])
    rows = len(like.text)
    pooled = None if one.pooled is None else one.pooled.expand(rows, -1)
    return Condition(one.text.expand(rows, -1, -1), pooled, like.time_ids)

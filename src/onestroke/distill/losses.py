"""The losses of Adversarial Diffusion Distillation (ADD, arXiv 2311.17042, section 3), as pure functions.

`logits` are a list, one tensor b n per head, of one logit for each position; high means real.
Rates `alpha_t`, `sigma_t` and weights hold one number per picture, shaped b or b 1 1 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

DistillationKind = Literal["exponential", "sds", "nfsd"]


def adversarial_loss(logits: Sequence[Float[Tensor, "b _"]]) -> Float[Tensor, ""]:
    """`- sum_k E[D_k]`, the student's adversarial loss on the logits of its own images (ADD, eq. 2).

    The mean is over pictures and positions, so that neither resolution nor batch changes its weight; heads are summed.
    """
    return -_total([head.mean() for head in logits])


def hinge_loss(
    real_logits: Sequence[Float[Tensor, "b _"]], fake_logits: Sequence[Float[Tensor, "b _"]]
) -> Float[Tensor, ""]:
    """`sum_k E_real[max(0, 1 - D_k)] + E_fake[max(0, 1 + D_k)]`, the discriminator's loss without R1 (ADD, eq. 3).

    2 per head for an undecided discriminator (all logits 0); means as in `adversarial_loss`.
    """
    real = _total([(1 - head).relu().mean() for head in real_logits])
    fake = _total([(1 + head).relu().mean() for head in fake_logits])
    return real + fake


def r1_features(features: Sequence[Tensor]) -> list[Tensor]:
    """The same features cut off from what made them and ready for `r1_penalty`."""
    return [feature.detach().requires_grad_() for feature in features]


def r1_penalty(
    logits: Sequence[Float[Tensor, "b _"]], features: Sequence[Float[Tensor, "b ..."]], *, gamma: float = 1e-5
) -> Float[Tensor, ""]:
    """`gamma * sum_k E_real[ || d(sum of head k's logits) / d(features k) ||^2 ]` (ADD, eq. 3; R1: arXiv 1801.04406).

    `features[k]` is what head k read of real images, from `r1_features`. The gradient is that of a picture's summed
    logits: of their mean, it would be (positions)^2 times smaller, and of a batch's mean (b * positions)^2 times, which
    switches the penalty off. A sum over the batch is as good as one per picture because no picture's logits depend on
    another's features. Differentiable in the heads' parameters; the mean is over pictures.
    """
    assert len(logits) == len(features), f"{len(logits)} heads, {len(features)} features"
    return gamma * _total([_squared_gradient(*pair).mean() for pair in zip(logits, features, strict=True)])


def _squared_gradient(logits: Tensor, feature: Tensor) -> Float[Tensor, " b"]:
    (gradient,) = torch.autograd.grad(logits.sum(), feature, create_graph=True)
    exact = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return rearrange(exact.square(), "b ... -> b (...)").sum(dim=1)


def distillation_weight(kind: DistillationKind, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """c(t), which multiplies the squared error (ADD, section 3.3); shaped like `alpha_t`.

    "exponential": `alpha_t`, so that higher noise counts less.
    "sds", "nfsd": `alpha_t / (2 sigma_t) * w(t)`. Since x0_student - x0_teacher = sigma_t / alpha_t * (eps_hat - eps),
    the gradient of `c(t) * ||x0_student - x0_teacher||^2` is `w(t) (eps_hat - eps)`, score distillation's.
    w(t) = sigma_t^2 (our choice, as DreamFusion's, arXiv 2209.14988), so c(t) = alpha_t sigma_t / 2, bounded by 1/4.
    """
    if kind == "exponential":
        return alpha_t
    assert kind in ("sds", "nfsd"), f"distillation weight {kind!r}"
    return alpha_t * sigma_t / 2


def distillation_loss(
    x0_student: Float[Tensor, "b c h w"], x0_teacher: Float[Tensor, "b c h w"], weight: Float[Tensor, "b ..."]
) -> Float[Tensor, ""]:
    """`E[ c(t) * mean((x0_student - sg(x0_teacher))^2) ]`; no gradient to the teacher (ADD, eq. 4).

    Pixels or latents. The squared error is a MEAN over a picture's elements (the paper does not say): ADD's lambda of
    2.5 refers to this mean, at any resolution. Its gradient is therefore that of the summed error divided by
    b * c * h * w; see `distillation_weight`. `weight`: c(t), b or b 1 1 1.
    """
    error = rearrange((x0_student - x0_teacher.detach()).square(), "b ... -> b (...)").mean(dim=1)
    return (weight.reshape(len(error)) * error).mean()


def student_loss(
    logits: Sequence[Float[Tensor, "b _"]],
    x0_student: Float[Tensor, "b c h w"],
    x0_teacher: Float[Tensor, "b c h w"],
    alpha_t: Float[Tensor, "b ..."],
    *,
    kind: DistillationKind = "exponential",
    distill_weight: float = 2.5,
) -> Float[Tensor, ""]:
    """Adversarial plus distillation loss of the student: `L_adv + lambda * L_distill` (ADD, eq. 1).

    `logits`: one tensor per head, on the student's images. `x0_*`: pixels in [-1, 1] or latents. `alpha_t`, in (0, 1],
    is the signal rate at which the teacher re-noised them, of which `kind` makes c(t) (sigma_t^2 = 1 - alpha_t^2).
    """
    weight = distillation_weight(kind, alpha_t, (1 - alpha_t.square()).sqrt())
    return adversarial_loss(logits) + distill_weight * distillation_loss(x0_student, x0_teacher, weight)


def nfsd_target(
    x0_student: Float[Tensor, "b c h w"],
    eps_text: Float[Tensor, "b c h w"],
    eps_blank: Float[Tensor, "b c h w"],
    eps_negative: Float[Tensor, "b c h w"],
    t: Int[Tensor, " b"],
    alpha_t: Float[Tensor, "b ..."],
    sigma_t: Float[Tensor, "b ..."],
    *,
    scale: float | Float[Tensor, "b 1 1 1"] = 7.5,
    threshold: int = 200,
) -> Float[Tensor, "b c h w"]:
    """The teacher's target under noise-free score distillation (NFSD, arXiv 2310.17590; no gradient).

    `x0_student - sigma_t / alpha_t * (delta_D + scale * delta_C)`, delta_C = eps_text - eps_blank, delta_D = eps_blank
    for t < `threshold` (of 1000) and eps_blank - eps_negative from there on. Unlike SDS's, it holds no sampled noise.
    `eps_*`: the teacher's noise predictions at the re-noised `x0_student` under the prompt, the blank prompt and one
    that names defects ("unrealistic, blurry, low quality, ..."). With `distillation_weight("nfsd", ...)` the gradient
    of the summed error is `w(t) * (delta_D + scale * delta_C)`.
    """
    is_late = rearrange(t < threshold, "b -> b 1 1 1").to(eps_blank.device)
    delta_d = torch.where(is_late, eps_blank, eps_blank - eps_negative)
    delta = delta_d + scale * (eps_text - eps_blank)
    ratio = rearrange((sigma_t / alpha_t).reshape(len(x0_student)), "b -> b 1 1 1")
    return (x0_student - ratio * delta).detach()


def _total(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum()

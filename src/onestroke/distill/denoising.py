"""Pretraining as a method: one player, the denoising loss (DDPM, arXiv 2006.11239, eq. 14; v: arXiv 2202.00512)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from onestroke.families.model import DiffusionModel
from onestroke.randomness import normal, stratified, uniform
from onestroke.train.method import Loss, OptimizerSettings, Player
from onestroke.types import Batch, Condition

LOGIT_DEVIATION = 1.0  # of logit(t / T) (SD3, arXiv 2403.03206, eq. 19)


@dataclass(frozen=True)
class DenoisingSettings:
    optimizer: OptimizerSettings
    blank_share: float = 0.1  # captions dropped, for classifier-free guidance
    uniform_share: float = 1.0  # of the timesteps; the others are logit-normal
    logit_mean: float = -0.7  # of logit(t / T) of these
    ema_images: float = 20_000
    seed: int = 0


class Hint(Protocol):
    """A second task for the UNet's middle block, dropped after training; its `module` is trained along."""

    module: nn.Module

    def loss(self, middle: Float[Tensor, "b d h w"], batch: Batch) -> Tensor:
        """What is added to the denoising loss."""
        ...


@dataclass(frozen=True)
class Noised:
    """One batch on its way into the UNet."""

    x_t: Float[Tensor, "b c h w"]
    target: Float[Tensor, "b c h w"]
    t: Int[Tensor, " b"]
    condition: Condition  # some captions dropped
    batch: Batch


class Denoising:
    """Train a model's UNet, and its text encoders with it where `train_text`.

    `emphasis(slots)`: what the error counts at each place of a latent beyond 1, times the signal's share of the noised
    latent, `alphas_cumprod[t]`: little where the noise still hides what is where.
    `blank_odds(slots)`: how likely each picture's caption is dropped, beside a mean of 1; None: all alike.
    """

    def __init__(
        self,
        model: DiffusionModel,
        settings: DenoisingSettings,
        *,
        train_text: bool = True,
        hint: Hint | None = None,
        emphasis: Callable[[Int[Tensor, " b"]], Float[Tensor, "b h w"]] | None = None,
        blank_odds: Callable[[Int[Tensor, " b"]], Float[Tensor, " b"]] | None = None,
    ) -> None:
        self.model, self.settings, self.hint, self.emphasis = model, settings, hint, emphasis
        self.blank_odds = blank_odds
        parts: dict[str, nn.Module] = {"unet": model.unet.train()}
        if train_text:
            parts |= {f"text_{i}": encoder.train() for i, encoder in enumerate(model.text_encoders)}
        if hint is not None:
            parts["hint"] = hint.module
        self.players: Mapping[str, Player] = {
            "denoiser": Player(nn.ModuleDict(parts), settings.optimizer, ema_images=settings.ema_images)
        }

    @property
    def frozen(self) -> list[nn.Module]:
        """The networks that are not trained."""
        trained = {id(part) for part in self.players["denoiser"].module.children()}
        networks = [self.model.unet, self.model.vae, *self.model.text_encoders]
        return [network for network in networks if id(network) not in trained]

    def rollout(self, batch: Batch, due: frozenset[str]) -> Noised:
        """Noised latents and what belongs to them."""
        model, seed = self.model, self.settings.seed
        device = model.device
        x0 = self._latents(batch)
        fractions = timestep_fractions(
            stratified(seed, "t", batch.slots), self.settings.uniform_share, self.settings.logit_mean
        )
        t = (fractions * len(model.schedule)).long()
        eps = normal(x0.shape[1:], seed, "eps", batch.slots).to(device)
        x_t = model.schedule.add_noise(x0, eps, t)
        target = model.schedule.target(x0, eps, t, model.prediction_type)
        condition = model.with_sizes(model.encode_prompts(batch.captions), batch.sizes, batch.picture_size)
        odds = 1.0 if self.blank_odds is None else self.blank_odds(batch.slots)
        keep = (uniform(seed, "blank", batch.slots) >= self.settings.blank_share * odds).to(device)
        return Noised(x_t, target, t.to(device), _masked(condition, model.blank_prompts(condition), keep), batch)

    @torch.no_grad()
    def _latents(self, batch: Batch) -> Tensor:
        if batch.latents is not None:
            return batch.latents.to(self.model.device)
        assert batch.images is not None, "a batch holds images or latents"
        return self.model.encode_images(batch.images.to(self.model.device))

    def loss(self, player: str, rollout: Noised) -> Loss:
        """Mean squared error of the network's output, with its emphasis; the hint's loss beside it."""
        r, middle = rollout, []
        hook = self.model.unet.mid_block.register_forward_hook(lambda block, given, output: middle.append(output))
        output = self.model.family.call_unet(self.model.unet, r.x_t, r.t, r.condition).float()
        hook.remove()
        error = (output - r.target).square()
        total, terms = error.mean(), {"denoising": error.mean()}
        if self.emphasis is not None:
            alpha, _ = self.model.schedule.rates(r.t, error)
            weight = 1 + alpha.square() * self.emphasis(r.batch.slots).to(error)[:, None]
            total = (weight * error).mean()
        if self.hint is not None:
            hint = self.hint.loss(middle[0], r.batch)
            total, terms = total + hint, terms | {"hint": hint}
        return Loss(total, terms)

    def finish_step(self, due: frozenset[str]) -> None:
        """Nothing to do."""


def timestep_fractions(uniform: Float[Tensor, " b"], uniform_share: float, mean: float) -> Float[Tensor, " b"]:
    """Numbers in [0, 1) from uniform ones: `uniform_share` of them uniform, the others logit-normal about `mean`."""
    if uniform_share == 1:
        return uniform
    rest = ((uniform - uniform_share) / (1 - uniform_share)).clamp(min=1e-6)
    drawn = torch.sigmoid(mean + LOGIT_DEVIATION * torch.special.ndtri(rest))
    return torch.where(uniform < uniform_share, uniform / max(uniform_share, 1e-6), drawn)


def _masked(condition: Condition, blank: Condition, keep: Tensor) -> Condition:
    """`condition` where `keep` (b, bool), else `blank`."""
    text = torch.where(keep[:, None, None], condition.text, blank.text.to(condition.text.dtype))
    if condition.pooled is None:
        return Condition(text, None, condition.time_ids)
    pooled = torch.where(keep[:, None], condition.pooled, blank.pooled.to(condition.pooled.dtype))
    return Condition(text, pooled, condition.time_ids)

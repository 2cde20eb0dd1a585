"""Pretraining as a method: one player, the denoising loss (DDPM, arXiv 2006.11239, eq. 14; v: arXiv 2202.00512)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onestroke.families.model import DiffusionModel
from onestroke.randomness import normal, stratified, uniform
from onestroke.train.method import Loss, OptimizerSettings, Player
from onestroke.types import Batch, Condition


@dataclass(frozen=True)
class DenoisingSettings:
    optimizer: OptimizerSettings
    blank_share: float = 0.1  # captions dropped, for classifier-free guidance
    ema_images: float = 20_000
    seed: int = 0


class Denoising:
    """Train a model's UNet, and its text encoders with it where `train_text`."""

    def __init__(self, model: DiffusionModel, settings: DenoisingSettings, *, train_text: bool = True) -> None:
        self.model, self.settings = model, settings
        parts: dict[str, nn.Module] = {"unet": model.unet.train()}
        if train_text:
            parts |= {f"text_{i}": encoder.train() for i, encoder in enumerate(model.text_encoders)}
        self.players: Mapping[str, Player] = {
            "denoiser": Player(nn.ModuleDict(parts), settings.optimizer, ema_images=settings.ema_images)
        }

    def rollout(self, batch: Batch, due: frozenset[str]) -> tuple[Tensor, Tensor, Tensor, Condition]:
        """Noised latents, the target, timesteps and the condition with some captions dropped."""
        model, seed = self.model, self.settings.seed
        device = model.device
        x0 = self._latents(batch)
        t = (stratified(seed, "t", batch.slots) * len(model.schedule)).long()
        eps = normal(x0.shape[1:], seed, "eps", batch.slots).to(device)
        x_t = model.schedule.add_noise(x0, eps, t)
        target = model.schedule.target(x0, eps, t, model.prediction_type)
        condition = model.with_sizes(model.encode_prompts(batch.captions), batch.sizes, batch.picture_size)
        keep = (uniform(seed, "blank", batch.slots) >= self.settings.blank_share).to(device)
        return x_t, target, t.to(device), _masked(condition, model.blank_prompts(condition), keep)

    @torch.no_grad()
    def _latents(self, batch: Batch) -> Tensor:
        if batch.latents is not None:
            return batch.latents.to(self.model.device)
        assert batch.images is not None, "a batch holds images or latents"
        return self.model.encode_images(batch.images.to(self.model.device))

    def loss(self, player: str, rollout: tuple[Tensor, Tensor, Tensor, Condition]) -> Loss:
        """Mean squared error of the network's output, uniform over timesteps."""
        x_t, target, t, condition = rollout
        output = self.model.family.call_unet(self.model.unet, x_t, t, condition).float()
        return Loss((output - target).square().mean())

    def finish_step(self, due: frozenset[str]) -> None:
        """Nothing to do."""


def _masked(condition: Condition, blank: Condition, keep: Tensor) -> Condition:
    """`condition` where `keep` (b, bool), else `blank`."""
    text = torch.where(keep[:, None, None], condition.text, blank.text.to(condition.text.dtype))
    if condition.pooled is None:
        return Condition(text, None, condition.time_ids)
    pooled = torch.where(keep[:, None], condition.pooled, blank.pooled.to(condition.pooled.dtype))
    return Condition(text, pooled, condition.time_ids)

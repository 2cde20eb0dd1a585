"""The training loop: who steps when, on what, and how it is saved. It knows players and losses, no formulas."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onestroke.errors import NonFiniteLoss
from onestroke.train.method import Method, OptimizerSettings, Player
from onestroke.train.optimizers import build_optimizer
from onestroke.types import Batch


@dataclass(frozen=True)
class TrainSettings:
    """`num_images` ends the run and shapes the learning rate; one step uses `batch_size` pictures."""

    num_images: int
    batch_size: int
    micro_batch_size: int | None = None  # pictures at once; gradients add up to the whole batch
    autocast: torch.dtype | None = None


@dataclass(frozen=True)
class Progress:
    """One finished step."""

    step: int
    images: int
    seconds: float
    terms: Mapping[str, float]


class Trainer:
    """The state of a run: players' weights, their averages, their optimizers, and the position in pictures."""

    def __init__(self, method: Method, settings: TrainSettings) -> None:
        self.method, self.settings = method, settings
        self.step = self.images = self.first_images = 0
        self.optimizers = {
            name: build_optimizer(player.module, player.optimizer) for name, player in method.players.items()
        }
        self.averages = {
            name: deepcopy(player.module).requires_grad_(False)
            for name, player in method.players.items()
            if player.ema_images
        }

    def run(self, batches_from: Callable[[int], Iterator[Batch]]) -> Iterator[Progress]:
        """Train until `num_images`; `batches_from(first_slot)` yields batches of `batch_size` pictures.

        Yields after every step, when weights, averages and position agree: the moment to save, draw or stop.
        Raises `NonFiniteLoss` before anything is changed.
        """
        remaining = self.settings.num_images - self.images
        if remaining < self.settings.batch_size:
            return
        started = time.monotonic()
        for batch in batches_from(self.images):
            terms = self._step(batch)
            yield Progress(self.step, self.images, time.monotonic() - started, terms)
            if self.settings.num_images - self.images < self.settings.batch_size:
                return

    def _step(self, batch: Batch) -> dict[str, float]:
        players = self.method.players
        due = frozenset(name for name, player in players.items() if self.step % player.every == 0)
        terms: dict[str, Tensor] = {}
        for part, share in _micro_batches(batch, self.settings.micro_batch_size):
            self._backward(part, due, share, terms)
        norms = {name: _clip(players[name]) for name in sorted(due)}
        self._check_finite(terms, norms)
        self.images += len(batch)
        for name in sorted(due):
            self._update(name)
        self.method.finish_step(due)
        self.step += 1
        return {key: value.item() for key, value in terms.items()} | {f"{n}/grad_norm": v for n, v in norms.items()}

    def _backward(self, batch: Batch, due: frozenset[str], share: float, terms: dict[str, Tensor]) -> None:
        """Add the gradients of one micro-batch, which is `share` of the step's batch."""
        players = self.method.players
        dtype = self.settings.autocast
        device = next(next(iter(players.values())).module.parameters()).device.type
        with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None), _only(players, due):
            rollout = self.method.rollout(batch, due)
            for name in sorted(due):
                with _only(players, {name}):
                    loss = self.method.loss(name, rollout)
                    with torch.autocast(device, enabled=False):
                        (loss.total * share).backward(retain_graph=name != max(due))
                for key, value in {"loss": loss.total, **loss.terms}.items():
                    value = value.detach().float() * share
                    terms[f"{name}/{key}"] = terms.get(f"{name}/{key}", torch.zeros_like(value)) + value

    def _update(self, name: str) -> None:
        player, optimizer = self.method.players[name], self.optimizers[name]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(player.optimizer, self.images, self.settings.num_images)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if player.ema_images:
            decay = ema_decay(player.ema_images, self.images, self.settings.batch_size * player.every)
            _average(self.averages[name], player.module, decay)

    def _check_finite(self, terms: Mapping[str, Tensor], norms: Mapping[str, float]) -> None:
        broken = [key for key, value in terms.items() if not torch.isfinite(value)]
        broken += [f"{name}/grad_norm" for name, norm in norms.items() if not math.isfinite(norm)]
        if broken:
            raise NonFiniteLoss(
                f"{', '.join(broken)} is not finite",
                where=f"step {self.step}, picture {self.images}",
                fix="The last checkpoint is whole. Lower the learning rate or train in float32.",
            )

    def state(self) -> dict:
        """All that a bit-identical continuation needs."""
        return {
            "step": self.step,
            "images": self.images,
            "players": {name: player.module.state_dict() for name, player in self.method.players.items()},
            "averages": {name: module.state_dict() for name, module in self.averages.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
        }

    def load_state(self, state: Mapping) -> None:
        self.step, self.images = state["step"], state["images"]
        self.first_images = self.images
        for name, player in self.method.players.items():
            player.module.load_state_dict(state["players"][name])
            self.optimizers[name].load_state_dict(state["optimizers"][name])
        for name, module in self.averages.items():
            module.load_state_dict(state["averages"][name])


def learning_rate(settings: OptimizerSettings, images: int, num_images: int) -> float:
    """The rate after `images` pictures: linear warm-up, then as `settings.decay` says."""
    warm = min(1.0, images / settings.warmup_images) if settings.warmup_images else 1.0
    if settings.decay == "constant":
        return settings.learning_rate * warm
    progress = min(1.0, images / num_images)
    if settings.decay == "linear":
        return settings.learning_rate * warm * min(1.0, max(0.02, (1 - progress) / 0.4))
    return settings.learning_rate * warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def ema_decay(half_life: float, images: int, step_images: int) -> float:
    """Decay per step for an average with `half_life` pictures, shorter early on (a twentieth of those seen)."""
    return 0.5 ** (step_images / max(min(half_life, 0.05 * images), 1e-8))


@torch.no_grad()
def _average(average: nn.Module, module: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)
    for mean, value in zip(average.buffers(), module.buffers(), strict=True):
        mean.copy_(value)


def _clip(player: Player) -> float:
    limit = player.optimizer.max_grad_norm or math.inf
    return nn.utils.clip_grad_norm_(player.module.parameters(), limit).item()


def _micro_batches(batch: Batch, size: int | None) -> Iterator[tuple[Batch, float]]:
    """Parts of at most `size` pictures, each with its share of the batch."""
    size = size or len(batch)
    for first in range(0, len(batch), size):
        part = batch.rows(slice(first, first + size))
        yield part, len(part) / len(batch)


@contextmanager
def _only(players: Mapping[str, Player], names) -> Iterator[None]:
    """Let only the parameters of `names` require gradients: no loss reaches another player's weights."""
    before = {name: next(player.module.parameters()).requires_grad for name, player in players.items()}
    for name, player in players.items():
        player.module.requires_grad_(name in names)
    try:
        yield
    finally:
        for name, player in players.items():
            player.module.requires_grad_(before[name])

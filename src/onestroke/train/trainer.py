"""The training loop: who steps when, on what, and how it is saved. It knows players and losses, no formulas."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from onestroke.divided import mapped
from onestroke.errors import NonFiniteLoss
from onestroke.precision import training_attention
from onestroke.schedule import exact
from onestroke.train.method import Method, OptimizerSettings, Player
from onestroke.train.optimizers import build_optimizer
from onestroke.train.ranks import mean_of, num_ranks, rank
from onestroke.train.sharding import average_gradients, gathered, local, outline, shard, sharded_copy
from onestroke.train.speed import Speed
from onestroke.train.views import Views, parts_of
from onestroke.types import Batch


@dataclass(frozen=True)
class TrainSettings:
    """`num_images` ends the run and shapes the learning rate; one step uses `batch_size` pictures, of all processes."""

    num_images: int
    batch_size: int
    micro_batch_size: int | None = None  # pictures at once in a process; gradients add up to the whole batch
    autocast: torch.dtype | None = None
    sharded: frozenset[str] = frozenset()  # players whose weights, averages and optimizers are split over the processes
    device: str = "cpu"  # where sharded players go
    shows_speed: bool = False  # count operations: one picture more is computed before the first step
    peak: float | None = None  # operations a second that a device could do at best, if known


@dataclass(frozen=True)
class Progress:
    """One finished step."""

    step: int
    images: int
    seconds: float
    terms: Mapping[str, float]
    speed: Mapping[str, float] = field(default_factory=dict)


class Trainer:
    """The state of a run: players' weights, their averages, their optimizers, and the position in pictures."""

    def __init__(self, method: Method, settings: TrainSettings) -> None:
        self.method, self.settings = method, settings
        self.step = self.images = self.first_images = 0
        self.outlines = {name: outline(method.players[name].module) for name in sorted(settings.sharded)}
        for name in self.outlines:
            shard(method.players[name].module, torch.device(settings.device))
        self.speed = Speed(settings.peak) if settings.shows_speed else None
        self.rates: dict[str, float] = {}  # what a player's learning rate is multiplied by, after an alarm
        self.optimizers = {
            name: build_optimizer(player.module, player.optimizer) for name, player in method.players.items()
        }
        self.views = Views(method, divides=settings.micro_batch_size is None)
        self.earlier: dict[str, tuple[Mapping[str, Tensor], float]] = {}
        self.averages = {
            name: self._copy(name, player.module).requires_grad_(False)
            for name, player in method.players.items()
            if player.ema_images
        }

    def _copy(self, name: str, module: nn.Module) -> nn.Module:
        return sharded_copy(module, self.outlines[name]) if name in self.outlines else deepcopy(module)

    def run(self, batches_from: Callable[[int], Iterator[Batch]]) -> Iterator[Progress]:
        """Train until `num_images`; `batches_from(first_slot)` yields this process's parts of the batches.

        Yields after every step, when weights, averages and position agree: the moment to save, draw or stop.
        Raises `NonFiniteLoss` before anything is changed.
        """
        remaining = self.settings.num_images - self.images
        if remaining < self.settings.batch_size:
            return
        started = before = time.monotonic()
        for batch in batches_from(self.images):
            due, counting = self._due(), time.monotonic()
            if self.speed is not None:
                self.speed.count(due, lambda one=batch.rows(slice(-1, None)), due=due: self._try(one, due))
            before += time.monotonic() - counting
            terms, now = self._step(batch), time.monotonic()
            speed = {} if self.speed is None else self.speed.of(due, len(batch) * num_ranks(), now - before)
            yield Progress(self.step, self.images, now - started, terms, speed)
            if self.settings.num_images - self.images < self.settings.batch_size:
                return
            before = time.monotonic()

    def _due(self) -> frozenset[str]:
        """The players that take part in this step."""
        return frozenset(name for name, player in self.method.players.items() if self.step % player.every == 0)

    def _try(self, batch: Batch, due: frozenset[str]) -> None:
        """A step's losses and their gradients, which are dropped."""
        self._backward(batch, due, 1.0, {})
        self.views.give_gradients(sorted(due))
        for name in due:
            self.method.players[name].module.zero_grad(set_to_none=True)

    def _step(self, batch: Batch) -> dict[str, float]:
        players, due = self.method.players, self._due()
        terms: dict[str, Tensor] = {}
        for part, share in parts_of(batch, self.settings.micro_batch_size):
            self._backward(part, due, share, terms)
        self.views.give_gradients(sorted(due))
        for name in sorted(due):
            average_gradients(players[name].module.parameters())
        terms = mean_of(terms)
        norms = {name: _clip(players[name]) for name in sorted(due)}
        self._check_finite(terms, norms)
        self.images += len(batch) * num_ranks()
        for name in sorted(due):
            self._update(name)
        self.method.finish_step(due)
        self.step += 1
        return {key: value.item() for key, value in terms.items()} | {f"{n}/grad_norm": v for n, v in norms.items()}

    def _backward(self, batch: Batch, due: frozenset[str], share: float, terms: dict[str, Tensor]) -> None:
        """Add the gradients of one micro-batch, which is `share` of the step's batch; of several threads, to theirs."""
        shares = self.views.sharing(batch)
        gathered: list[dict[str, Tensor]] = [{} for _ in shares]

        def backward(k: int) -> None:
            method, part, its_share = shares[k]
            self._backward_of(method, part, due, share * its_share, gathered[k])

        with training_attention(self._device, batch.num_pixels):  # of all threads: it is no thread's own
            if len(shares) == 1:
                backward(0)
            else:
                mapped(backward, range(len(shares)), len(shares))
        for more in gathered:
            _gather(terms, more)

    @property
    def _device(self) -> str:
        return next(next(iter(self.method.players.values())).module.parameters()).device.type

    def _backward_of(
        self, method: Method, batch: Batch, due: frozenset[str], share: float, terms: dict[str, Tensor]
    ) -> None:
        """Add the gradients of pictures that are `share` of the step's batch."""
        players, device, dtype = method.players, self._device, self.settings.autocast
        autocast = torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None)
        with autocast, _only(players, due):
            rollout = method.rollout(batch, due)
            for name in sorted(due):
                with _only(players, {name}):
                    loss = method.loss(name, rollout)
                    with torch.autocast(device, enabled=False):
                        (loss.total * share).backward(retain_graph=name != max(due))
                found = {"loss": loss.total, **loss.terms}.items()
                _gather(terms, {f"{name}/{key}": exact(value.detach()) * share for key, value in found})

    def _update(self, name: str) -> None:
        player, optimizer = self.method.players[name], self.optimizers[name]
        for group in optimizer.param_groups:
            rate = learning_rate(player.optimizer, self.images, self.settings.num_images)
            group["lr"] = rate * self.rates.get(name, 1.0)
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
            "rates": dict(self.rates),
        }

    def layout(self) -> dict[str, Tensor]:
        """For `load_newest`: sharded players' tensors by their path in `state`, an optimizer's by its parameter's."""
        found: dict[str, Tensor] = {}
        for name in self.outlines:
            modules = {f"players/{name}": self.method.players[name].module, f"averages/{name}": self.averages.get(name)}
            for path, module in modules.items():
                found |= {f"{path}/{key}": value for key, value in (module.state_dict() if module else {}).items()}
            parameters = [p for group in self.optimizers[name].param_groups for p in group["params"]]
            found |= {f"optimizers/{name}/state/{i}": p for i, p in enumerate(parameters)}
        return found

    def load_state(self, state: Mapping) -> None:
        self.step, self.images = state["step"], state["images"]
        self.first_images = self.images
        self.rates = dict(state.get("rates", {}))
        for name, player in self.method.players.items():
            player.module.load_state_dict(state["players"][name])
            self.optimizers[name].load_state_dict(state["optimizers"][name])
        for name, module in self.averages.items():
            module.load_state_dict(state["averages"][name])

    def whole(self, name: str, *, average: bool) -> nn.Module | None:
        """A player, or its average, with all its weights, to draw with or export; None in all processes but the first.

        Every process has to call this. A sharded player comes as a copy on the CPU, and so does an average with which
        earlier weights are mixed.
        """
        module = self.averages[name] if average else self.method.players[name].module
        if name in self.outlines:
            module = gathered(module, self.outlines[name])
        if rank() != 0:
            return None
        return _mixed(module, *self.earlier[name]) if average and name in self.earlier else module

    def mix_in(self, name: str, earlier: Mapping[str, Tensor], share: float) -> None:
        """From now on a player's average is drawn with and exported as `share` of `earlier`, its weights of once.

        What was learnt first and half forgotten comes back, and what came after hardly suffers: between the ends of one
        training the loss has no hill (WiSE-FT, arXiv 2109.01903). Training itself goes on without.
        """
        self.earlier[name] = (earlier, share)


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
def _mixed(module: nn.Module, earlier: Mapping[str, Tensor], share: float) -> nn.Module:
    mixed = deepcopy(module).cpu()
    for name, parameter in mixed.named_parameters():
        parameter.lerp_(earlier[name].to(parameter), share)
    return mixed


@torch.no_grad()
def _average(average: nn.Module, module: nn.Module, decay: float) -> None:
    torch._foreach_lerp_([local(p) for p in average.parameters()], [local(p) for p in module.parameters()], 1 - decay)
    for mean, value in zip(average.buffers(), module.buffers(), strict=True):
        mean.copy_(value)


def _clip(player: Player) -> float:
    limit = player.optimizer.max_grad_norm or math.inf
    norm = nn.utils.clip_grad_norm_(player.module.parameters(), limit)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def _gather(terms: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    for key, value in more.items():
        terms[key] = terms.get(key, torch.zeros_like(value)) + value


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

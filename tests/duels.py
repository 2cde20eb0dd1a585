"""A trainer of two numbers, and runs of it: what tests of the loop, of runs and of checkpoints share."""

import io
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from onestroke.train.method import Loss, OptimizerSettings, Player
from onestroke.train.run import run_training
from onestroke.train.trainer import Trainer, TrainSettings
from onestroke.types import Batch


class Number(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))


class Duel:
    """Two numbers: `left` goes to the mean of the batch's slots, `right` to `left`; `breaks` can spoil a loss."""

    frozen = ()

    def __init__(self, *, breaks=lambda step, name, loss: loss, **settings) -> None:
        optimizer = OptimizerSettings(**{"learning_rate": 0.1, "max_grad_norm": None} | settings)
        self.players = {
            "left": Player(Number(0.0), optimizer, ema_images=8), "right": Player(Number(1.0), optimizer, every=2)
        }  # fmt: skip
        self.breaks, self.step = breaks, 0
        self.seen: list[tuple] = []  # who required gradients, and when

    def rollout(self, batch: Batch, due: frozenset[str]):
        self.seen.append(("rollout", *self._open()))
        return batch.slots.double().mean(), self.players["left"].module.value.detach()

    def loss(self, player: str, rollout) -> Loss:
        self.seen.append((player, *self._open()))
        value = self.players[player].module.value
        total = (value - rollout[player == "right"]).square()
        return Loss(self.breaks(self.step, player, total), {"distance": total.detach().sqrt()})

    def finish_step(self, due: frozenset[str]) -> None:
        self.step += 1

    def _open(self) -> list[str]:
        return [name for name, player in self.players.items() if player.module.value.requires_grad]


def duel(num_images: int = 40, **kinds) -> Trainer:
    return Trainer(Duel(**kinds), TrainSettings(num_images, 4))


def slots(first_slot: int) -> Iterator[Batch]:
    while True:
        numbers = torch.arange(first_slot, first_slot + 4)
        yield Batch(torch.zeros(4, 3, 1, 1), ("",) * 4, numbers, torch.zeros(4, 4).long())
        first_slot += 4


def run(trainer: Trainer, out: Path, *, recipe="a: 1\n", every=0.0, observe=lambda progress, left: None, **rest):
    """A run that saves after every step; whether its end was reached."""
    return run_training(trainer, slots, out, recipe_text=recipe, checkpoint_minutes=every, observe=observe, **rest)


def flat(state, name: str = "") -> dict[str, object]:
    """A checkpoint's numbers by their path."""
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flat(value, f"{name}/{key}").items()}
    if isinstance(state, list | tuple):
        return {k: v for i, value in enumerate(state) for k, v in flat(value, f"{name}/{i}").items()}
    return {name: state}


def assert_identical(one: dict, two: dict) -> None:
    first, second = flat(one), flat(two)
    assert first.keys() == second.keys() and len(first) > 10
    for name, value in first.items():
        other = second[name]
        same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert same, name


def copied(state: dict) -> dict:
    """As a checkpoint would keep it: later steps do not reach it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)

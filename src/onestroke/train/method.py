"""The seam between a training method and the trainer: players, a rollout they share, and a loss for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from onestroke.types import Batch


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW, in 8 bits too, or Muon; a warm-up, then a constant, cosine or late linear learning rate over the run."""

    learning_rate: float
    kind: str = "adamw"  # adamw | adamw8bit | muon: orthogonalised momentum for the matrices, AdamW for the rest
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_images: int = 0
    decay: str = "constant"  # constant | cosine: to a tenth of the peak at the run's last picture | linear: over its
    # last 40%, to a fiftieth
    max_grad_norm: float | None = 1.0


@dataclass(frozen=True)
class Player:
    """One set of weights with its own optimizer. `ema_images` is the half-life of the weights' average, in pictures."""

    module: nn.Module
    optimizer: OptimizerSettings
    every: int = 1  # takes part in every n-th step
    ema_images: float | None = None


@dataclass(frozen=True)
class Loss:
    """What a player minimises, and the numbers worth watching (detached scalars, by name)."""

    total: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)


class Method(Protocol):
    """A way to train: ADD, pretraining, and whatever comes next, without a change to the trainer.

    Updates are simultaneous: each loss is computed at the step's starting weights, then every due optimizer steps.
    """

    players: Mapping[str, Player]

    @property
    def frozen(self) -> Sequence[nn.Module]:
        """The networks that no player trains."""
        ...

    def rollout(self, batch: Batch, due: frozenset[str]) -> Any:
        """What the due players share, computed once; with gradient only for those of them that need it."""
        ...

    def loss(self, player: str, rollout: Any) -> Loss:
        """The loss of one due player; only its own parameters require gradients while this runs."""
        ...

    def finish_step(self, due: frozenset[str]) -> None:
        """Called once after the due optimizers stepped (spectral norm advances here)."""
        ...

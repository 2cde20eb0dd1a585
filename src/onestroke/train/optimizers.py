"""The optimizers that players are trained with: AdamW, and Muon for matrices with AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from onestroke.train.method import OptimizerSettings

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024, "Muon": singular values end in about [0.7, 1.2]
NUM_ITERATIONS = 5
MOMENTUM = 0.95
UPDATE_RMS = 0.2  # arXiv 2502.16982, section 2.2: an update as large as AdamW's
OTHER_RATE = 0.2  # found by short runs of the embedded teacher, where 4e-3 and 8e-4 did best
MIN_SIDE = 48  # a thinner matrix (a UNet's last convolution) has little to orthogonalise


def build_optimizer(module: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer of all of a module's parameters; its learning rate stands in every group's "lr"."""
    s = settings
    if s.kind == "muon":
        matrices = matrices_of(module)
        chosen = {id(matrix) for matrix in matrices}
        others = [p for p in module.parameters() if id(p) not in chosen]
        rates = {"learning_rate": s.learning_rate, "weight_decay": s.weight_decay, "betas": s.betas, "eps": s.eps}
        return Muon(matrices, others, **rates)
    return torch.optim.AdamW(module.parameters(), s.learning_rate, s.betas, s.eps, s.weight_decay)


def matrices_of(module: nn.Module) -> list[nn.Parameter]:
    """The weights of linear and convolutional layers with at least `MIN_SIDE` rows and columns."""
    weights = (m.weight for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    return [w for w in weights if min(len(w), w[0].numel()) >= MIN_SIDE]


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, on `matrices`; AdamW on `others`.

    Convolutions count as matrices of their output channels by all else. `torch.optim.Muon` takes no convolutions and no
    second group. `learning_rate` is that of the matrices; the others learn at `OTHER_RATE` times it.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        *,
        learning_rate: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
    ) -> None:
        groups = [{"params": list(matrices), "is_matrix": True}, {"params": list(others), "is_matrix": False}]
        defaults = {"lr": learning_rate, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            update = self._orthogonal_step if group["is_matrix"] else self._adam_step
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update(parameter, self.state[parameter], group)

    def _orthogonal_step(self, parameter: Tensor, state: dict, group: dict) -> None:
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
        ahead = parameter.grad.lerp(state["momentum"], MOMENTUM)  # Nesterov
        rows, columns = len(ahead), ahead[0].numel()
        update = orthogonalised(ahead.reshape(rows, columns)).view_as(ahead).to(parameter.dtype)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * UPDATE_RMS * max(rows, columns) ** 0.5)

    def _adam_step(self, parameter: Tensor, state: dict, group: dict) -> None:
        if not state:
            state["step"] = torch.zeros(())
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        first, second = group["betas"]
        state["mean"].lerp_(parameter.grad, 1 - first)
        state["square"].lerp_(parameter.grad.square(), 1 - second)
        count = state["step"].item()
        rate = OTHER_RATE * group["lr"]
        parameter.mul_(1 - rate * group["weight_decay"])
        scale = (state["square"] / (1 - second**count)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["mean"], scale, value=-rate / (1 - first**count))


def orthogonalised(matrix: Float[Tensor, "r c"]) -> Float[Tensor, "r c"]:
    """U V^T of the matrix's singular value decomposition, roughly: five Newton-Schulz steps in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.bfloat16()
    x = x.T if len(matrix) > len(matrix[0]) else x
    x = x / (x.norm() + 1e-7)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if len(matrix) > len(matrix[0]) else x

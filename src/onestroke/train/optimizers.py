"""The optimizers of players: AdamW, also in 8 bits, and Muon for matrices with AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from onestroke.precision import fast_dtype
from onestroke.train.eight_bit import AdamW8bit
from onestroke.train.method import OptimizerSettings

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024, "Muon": singular values end in about [0.7, 1.2]
NUM_ITERATIONS = 5
MOMENTUM = 0.95
UPDATE_RMS = 0.2  # arXiv 2502.16982, section 2.2: an update as large as AdamW's
OTHER_RATE = 0.2  # found by short runs of the embedded teacher, where 4e-3 and 8e-4 did best
BATCH_NUMBERS = 2**24  # of matrices that are orthogonalised at once
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
    if s.kind == "adamw8bit":
        return AdamW8bit(module.parameters(), s)
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
            due = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["is_matrix"]:
                for parameters in _alike(due):
                    self._orthogonal_step(parameters, group)
            else:
                for parameter in due:
                    self._adam_step(parameter, self.state[parameter], group)

    def _orthogonal_step(self, parameters: list[Tensor], group: dict) -> None:
        """On matrices of one shape."""
        for state in (self.state[parameter] for parameter in parameters):
            if not state:
                state["momentum"] = torch.zeros_like(parameters[0])
        gradients = [parameter.grad for parameter in parameters]
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov
        shape = parameters[0].shape
        rows, columns = _sides(parameters[0])
        updates = orthogonalised(torch.stack([matrix.reshape(rows, columns) for matrix in ahead]))
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        rate = group["lr"] * UPDATE_RMS * max(rows, columns) ** 0.5
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.add_(update.view(shape).to(parameter.dtype), alpha=-rate)

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


def _sides(weight: Tensor) -> tuple[int, int]:
    """Rows and columns of a layer's weight as a matrix."""
    return len(weight), weight[0].numel()


def _alike(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Batches of weights of one shape, in order, of at most `BATCH_NUMBERS` numbers or a single weight."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        by_shape.setdefault(parameter.shape, []).append(parameter)
    for shape, found in by_shape.items():
        size = max(1, BATCH_NUMBERS // shape.numel())
        yield from (found[first : first + size] for first in range(0, len(found), size))


def orthogonalised(matrices: Float[Tensor, "b r c"]) -> Float[Tensor, "b r c"]:
    """U V^T of each matrix's singular value decomposition, roughly: five Newton-Schulz steps in the fast dtype."""
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(fast_dtype(matrices.device))
    x = x.mT if is_tall else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x

"""AdamW whose two moments take a byte each a weight (arXiv 2110.02861), by torchao."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from onestroke.compiler import check_compiler
from onestroke.errors import RecipeError, ResourceError
from onestroke.train.method import OptimizerSettings

WHERE = "kind: adamw8bit"
BLOCK = 256  # numbers that share a scale
BYTES = 2 * (1 + 4 / BLOCK)  # of both moments, a weight
MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW8bit(torch.optim.Optimizer):
    """`torchao.optim.AdamW8bit`, given each parameter as the flat run of numbers that it is in memory.

    torchao's own takes no weights in channels_last, and compiles its step once for each shape; runs of the same length
    share one. Its state here is made of plain tensors, so that a checkpoint needs no class of torchao's. Parameters of
    fewer than 4096 numbers, or a number that 256 does not divide, keep their moments in float32.
    Raises ResourceError where torchao or a compiler is missing, RecipeError for weights that are not float32.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> None:
        super().__init__(parameters, {"lr": settings.learning_rate})
        own = self._own()
        device = own[0].device
        if any(p.dtype != torch.float32 for p in own):
            fix = "Use adamw, or train in float32 or bfloat16 (train.precision)."
            raise RecipeError("8-bit moments are for float32 weights", where=WHERE, fix=fix)
        try:
            from torchao.optim import AdamW8bit as Flat
        except ImportError as error:
            fix = "Install it: pip install 'onestroke[torchao]'."
            raise ResourceError("8-bit moments need torchao", where=WHERE, fix=fix) from error
        check_compiler(device, where=WHERE)
        self.runs = [nn.Parameter(_run(p.detach(), p), requires_grad=False) for p in own]
        s = settings
        self.flat = Flat(self.runs, s.learning_rate, s.betas, s.eps, s.weight_decay, block_size=BLOCK)

    def _own(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for run, parameter in zip(self.runs, self._own(), strict=True):
            run.data = _run(parameter.detach(), parameter)
            run.grad = None if parameter.grad is None else _run(parameter.grad, parameter)
        self.flat.param_groups[0]["lr"].fill_(self.param_groups[0]["lr"])  # its compiled step reads a tensor
        with warnings.catch_warnings():  # AdamW8bit's own classes, to PyTorch's cache of compiled code
            warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching.*")
            self.flat.step()
        for run in self.runs:
            run.grad = None

    def state_dict(self) -> dict:
        states = {
            number: {"step": state["step"], **{name: _plain(state[name]) for name in MOMENTS}}
            for number, state in self.flat.state_dict()["state"].items()
        }
        return {"state": states, "param_groups": super().state_dict()["param_groups"]}

    def load_state_dict(self, state_dict: Mapping) -> None:
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        states = {
            number: {
                "step": state["step"],
                **{name: self._quantised(state[name], self.runs[number], name) for name in MOMENTS},
            }
            for number, state in state_dict["state"].items()
        }
        self.flat.load_state_dict({"state": states, "param_groups": self.flat.state_dict()["param_groups"]})

    def _quantised(self, plain: Tensor | Mapping[str, Tensor], run: Tensor, name: str) -> Tensor:
        if isinstance(plain, Tensor):
            return plain
        made = self.flat._subclass_zeros(run, name == MOMENTS[0], BLOCK)
        made.codes.copy_(plain["codes"])
        made.scale.copy_(plain["scale"])
        return made


def _run(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` flat, in the order in which the numbers of `like` lie in memory; a view where its own lie so too."""
    order = sorted(range(like.ndim), key=lambda axis: -like.stride(axis))
    return tensor.permute(order).reshape(-1)


def _plain(moment: Tensor) -> Tensor | dict[str, Tensor]:
    """A moment without torchao's class: codes and the scales of their blocks."""
    return {"codes": moment.codes, "scale": moment.scale} if hasattr(moment, "codes") else moment

"""Floating-point operations, counted as they run; and gradient checkpointing that a count sees through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

aten = torch.ops.aten


def _as_it_is(formula: Callable) -> Callable:
    """A registered formula, which takes tensors; `FlopCounterMode` would otherwise hand it shapes."""

    def count(*args, **kwargs) -> int:
        return formula(*args, **kwargs)

    count._get_raw = True  # pyright: ignore - the mark that it looks for
    return count


CPU_FORMULAS = {  # what `FlopCounterMode` leaves out: attention on a CPU, which is where fake tensors are
    aten._scaled_dot_product_flash_attention_for_cpu: _as_it_is(sdpa_flop),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _as_it_is(sdpa_backward_flop),
}
FORMULAS = flop_registry | CPU_FORMULAS


def operations_of(func, args: tuple, kwargs: dict, output) -> int:
    """Of one call, as PyTorch's `FlopCounterMode` counts them (a multiply-add is two), and attention's on a CPU."""
    formula = FORMULAS.get(func._overloadpacket)
    return 0 if formula is None else formula(*args, **kwargs, out_val=output)


class OperationCounter(TorchDispatchMode):
    """While it is on: `total`, the operations that ran, but those that `checkpointed` did a second time.

    Everything runs as it does without: `FlopCounterMode` would take some operations apart. Compiled code is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self.again = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if not self.again:
            self.total += operations_of(func, args, kwargs or {}, output)
        return output


def checkpointed(function: Callable, *inputs, preserve_rng_state: bool = True):
    """`function(*inputs)`, whose maps are computed again in the backward pass in place of being kept.

    Modes that have a number `again` find it above 0 while that goes on.
    """
    return checkpoint(
        function, *inputs, use_reentrant=False, context_fn=_contexts, preserve_rng_state=preserve_rng_state
    )


def checkpointed_block(block: torch.nn.Module, *inputs) -> Tensor:
    """`checkpointed`, as diffusers' `enable_gradient_checkpointing` wants it."""
    return checkpointed(block.__call__, *inputs)


def _contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _again()


@contextmanager
def _again() -> Iterator[None]:
    modes = [mode for mode in _get_current_dispatch_mode_stack() if hasattr(mode, "again")]
    for mode in modes:
        mode.again += 1
    try:
        yield
    finally:
        for mode in modes:
            mode.again -= 1

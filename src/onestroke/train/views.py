"""A method seen by several threads: one set of weights, and of all else one for each.

Threads that share every layer of a small network wait for each other at the end of each; threads that share a batch
wait once a step, as processes would, without their copies of weights and optimizers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn

from onestroke.divided import may_be_shared, threads_for
from onestroke.train.method import Method
from onestroke.types import Batch


class Views:
    """Who computes which pictures of a step; views are made when they are first needed.

    `divides` is off where a batch comes in micro-batches: there memory counts, and threads need more of it.
    """

    def __init__(self, method: Method, *, divides: bool = True) -> None:
        self.method, self.divides, self.made = method, divides, []

    def sharing(self, batch: Batch) -> list[tuple[Method, Batch, float]]:
        """The method, what it computes, and what share of the batch that is; of several threads, a view for each."""
        count = self.count(len(batch))
        if count == 1:
            return [(self.method, batch, 1.0)]
        while len(self.made) < count:
            self.made.append(view_of(self.method))
        return [(view, *part) for view, part in zip(self.made, parts_of(batch, -(-len(batch) // count)), strict=False)]

    def count(self, num_rows: int) -> int:
        """How many threads share a batch of so many pictures."""
        count = threads_for(num_rows)
        modules = [player.module for player in self.method.players.values()]
        return count if self.divides and count > 1 and may_be_shared(*modules, *self.method.frozen) else 1

    def give_gradients(self, names: Iterable[str]) -> None:
        """Add what the views gathered for these players to the method's own gradients, always in the same order."""
        for name in names:
            parameters = list(self.method.players[name].module.parameters())
            for view in self.made:
                pairs = list(zip(parameters, view.players[name].module.parameters(), strict=True))
                assert all(mine.data_ptr() == other.data_ptr() for mine, other in pairs), f"{name}'s weights have moved"
                _add([(mine, other) for mine, other in pairs if other.grad is not None])


def parts_of(batch: Batch, size: int | None) -> Iterator[tuple[Batch, float]]:
    """Parts of at most `size` pictures, each with its share of the batch."""
    size = size or len(batch)
    for first in range(0, len(batch), size):
        part = batch.rows(slice(first, first + size))
        yield part, len(part) / len(batch)


def view_of(method: Method) -> Method:
    """`method` over the same weights, with gradients, hooks and tokenizers of its own.

    Whether a weight takes a gradient, and which, is then a thread's own affair. What optimizers and `finish_step`
    write into weights and buffers the view sees.
    """
    trained = [player.module for player in method.players.values()]
    memo: dict[int, object] = {id(p): _alike(p) for module in trained for p in module.parameters()}
    for module in (*trained, *method.frozen):
        memo |= {id(t): t for t in (*module.parameters(), *module.buffers()) if id(t) not in memo}
    memo |= {id(module): module for module in sys.modules.values()}
    return deepcopy(method, memo)


def _alike(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)


def _add(pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
    sums: list[Tensor] = []
    more: list[Tensor] = []
    for mine, other in pairs:
        if mine.grad is None:
            mine.grad = other.grad
        else:
            sums.append(mine.grad)
            more.append(other.grad)
        other.grad = None
    if sums:
        torch._foreach_add_(sums, more)

"""Bytes and operations of a computation, counted operation by operation, on real tensors or on fake ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from onestroke.operations import operations_of


class Tracker(TorchDispatchMode):
    """While it is on: bytes alive of what was allocated since, their peak, and floating-point operations, by part.

    Storages are counted once, at the first operation that puts one out, until Python lets go of them. What a kernel
    allocates and frees inside itself is not seen. `recomputed`: the operations that were done a second time, which the
    parts count too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.recomputed = self.again = 0
        self.peak_part = ""
        self.operations: dict[str, int] = {}
        self.peaks: dict[str, int] = {}
        self._part = ""
        self._sizes: dict[int, int] = {}
        self._known: weakref.WeakSet = weakref.WeakSet()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count operations, and the peak of what is alive, under `name` too; parts nest, the innermost counts."""
        before, self._part = self._part, name
        self.peaks[name] = max(self.peaks.get(name, 0), self.alive)
        try:
            yield
        finally:
            self._part = before

    def know(self, *tensors: Tensor) -> None:
        """Leave these storages out, though operations may put them out again."""
        for tensor in tensors:
            self._known.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        count = operations_of(func, args, kwargs or {}, output)
        if count:
            self.operations[self._part] = self.operations.get(self._part, 0) + count
            self.recomputed += count if self.again else 0
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return output

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.alive += size
        weakref.finalize(storage, self._let_go, size).atexit = False
        if self.alive > self.peak:
            self.peak, self.peak_part = self.alive, self._part
        if self.alive > self.peaks.get(self._part, 0):
            self.peaks[self._part] = self.alive

    def _let_go(self, size: int) -> None:
        self.alive -= size


@contextmanager
def cuda_casts() -> Iterator[None]:
    """Norms in float32 under autocast, as it has them on a GPU and not on a CPU: they keep twice the bytes.

    By replacing torch's functions, not by a mode: none is on where gradient checkpointing computes a block again.
    """
    names = ("group_norm", "layer_norm")
    plain = {name: getattr(F, name) for name in names}

    def cast(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def exact(value):
            return value.float() if isinstance(value, Tensor) else value

        def call(x: Tensor, *args, **kwargs) -> Tensor:
            if not torch.is_autocast_enabled("cpu"):
                return norm(x, *args, **kwargs)
            return norm(exact(x), *map(exact, args), **{name: exact(value) for name, value in kwargs.items()})

        return call

    for name in names:
        setattr(F, name, cast(plain[name]))
    try:
        yield
    finally:
        for name in names:
            setattr(F, name, plain[name])

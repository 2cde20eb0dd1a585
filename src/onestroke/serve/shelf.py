"""Which models are in memory: all of them, or those last drawn with where a budget leaves no room for more."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch

from onestroke.errors import ResourceError
from onestroke.serve.drawer import Drawer

GB = 1e9


class Shelf:
    """Models under a budget of bytes; for the worker thread alone."""

    def __init__(self, drawers: Sequence[Drawer], budget: int | None = None) -> None:
        """`budget`: bytes of weights that may be loaded at once. Raises `ResourceError` where one alone exceeds it."""
        self.drawers, self.budget, self.num_loads = list(drawers), budget, 0
        self._order = list(drawers)  # the one drawn with last stands at the end
        if budget is None:
            return
        for drawer in drawers:
            if drawer.num_bytes > budget:
                raise ResourceError(
                    f"the model has {drawer.num_bytes / GB:.2f} GB of weights and the budget is {budget / GB:.2f} GB",
                    where=drawer.name,
                    fix="Give a larger --memory-gb.",
                )
        self._make_room(0, keep=self.drawers[0])

    @property
    def num_bytes(self) -> int:
        """Of the weights that are loaded."""
        return sum(drawer.num_bytes for drawer in self.drawers if drawer.is_loaded)

    def bring(self, drawer: Drawer) -> None:
        """Load `drawer`, if it is not; those that were not drawn with for longest make room."""
        if self.budget is None:
            return
        self._order.remove(drawer)
        self._order.append(drawer)
        if drawer.is_loaded:
            return
        self._make_room(drawer.num_bytes, keep=drawer)
        drawer.restore()
        self.num_loads += 1

    def _make_room(self, num_bytes: int, *, keep: Drawer) -> None:
        assert self.budget is not None
        for drawer in self._order:
            if self.num_bytes + num_bytes <= self.budget:
                return
            if drawer is not keep and drawer.is_loaded:
                drawer.release()
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

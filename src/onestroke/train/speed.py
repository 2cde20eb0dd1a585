"""How fast a run goes: pictures and operations a second, and what share of the devices' peak that is."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from onestroke.operations import OperationCounter
from onestroke.train.ranks import num_ranks


class Speed:
    """`operations`: of a picture, by the players that were due; counted once for each such set. `peak`: of a device."""

    def __init__(self, peak: float | None) -> None:
        self.peak = peak
        self.operations: dict[frozenset[str], int] = {}

    def count(self, due: frozenset[str], step: Callable[[], None]) -> None:
        """Count what `step`, a step of one picture that changes nothing, does; nothing where that is known.

        Recomputation is left out, and blocks that are compiled run uncompiled: their operations are seen only so.
        """
        if due in self.operations:
            return
        with torch.compiler.set_stance("force_eager"), OperationCounter() as counter:
            step()
        self.operations[due] = counter.total

    def of(self, due: frozenset[str], num_images: int, seconds: float) -> Mapping[str, float]:
        """Numbers for the log, of a step of `num_images` pictures of all processes that took so long."""
        pictures = num_images / max(seconds, 1e-9)
        done = pictures * self.operations[due]
        rows = {"speed/pictures_a_second": pictures, "speed/teraflops_a_second": done / 1e12}
        if self.peak is not None:
            rows["speed/model_flop_utilisation"] = done / (self.peak * num_ranks())
        return rows

"""What looks at pictures: a network or a formula that turns each into a few numbers, and what could not be loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8

from onestroke.evaluate.quality import GRIDS, contrast, folded, laplacian_sharpness, saturation

Pictures = UInt8[np.ndarray, "n h w 3"]
Observe = Callable[[Pictures, Sequence[str]], Float[np.ndarray, "n d"]]
BATCH = 16  # pictures in floating point at once
LOOKS_VERSION = "1"  # goes up when a formula of `looks` changes, so that the cache measures again


@dataclass(frozen=True)
class Observer:
    """Turns pictures and their prompts into rows of numbers, each picture by itself.

    `parts`: the names of what stands side by side in a row, and how many numbers each has. `version`: weights and code,
    by which the cache tells one observer from another.
    """

    name: str
    version: str
    parts: Mapping[str, int]
    observe: Observe

    def split(self, rows: Float[np.ndarray, "n d"]) -> dict[str, np.ndarray]:
        """The parts of the rows, by name."""
        ends = np.cumsum(list(self.parts.values()))
        return dict(zip(self.parts, np.split(rows, ends[:-1], axis=1), strict=True))


def looks() -> Observer:
    """Saturation, contrast, sharpness, and what repeats at each of the grids that feature networks leave."""

    def look(pictures: Pictures) -> np.ndarray:
        single = [measure(pictures)[:, None] for measure in (saturation, contrast, laplacian_sharpness)]
        return np.concatenate([*single, *(folded(pictures, grid) for grid in GRIDS)], axis=1)

    def observe(pictures: Pictures, prompts: Sequence[str]) -> np.ndarray:
        return np.concatenate([look(pictures[i : i + BATCH]) for i in range(0, len(pictures), BATCH)])

    parts = {"saturation": 1, "contrast": 1, "sharpness": 1} | {f"grid {g.name}": 4 * g.side**2 for g in GRIDS}
    return Observer("looks", LOOKS_VERSION, parts, observe)


def in_batches(call: Callable[[Pictures], torch.Tensor], pictures: Pictures, batch_size: int) -> np.ndarray:
    """`call` on a few pictures at a time, without gradients, as float32 rows."""
    with torch.inference_mode():
        parts = [call(pictures[i : i + batch_size]).float().cpu() for i in range(0, len(pictures), batch_size)]
    return torch.cat(parts).numpy()

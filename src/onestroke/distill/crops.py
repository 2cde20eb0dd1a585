"""The parts of pictures that the discriminator is shown: of one size, each picture's at its own place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from onestroke.randomness import uniform


@dataclass(frozen=True)
class Crops:
    """A rectangle of `height` x `width` in each of b maps, its corner at (tops[i], lefts[i])."""

    tops: Sequence[int]
    lefts: Sequence[int]
    height: int
    width: int

    def of(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c _ _"]:
        """The rectangles, cut out; channels last in memory."""
        parts = [
            one[:, y : y + self.height, x : x + self.width]
            for one, y, x in zip(maps, self.tops, self.lefts, strict=True)
        ]
        return torch.stack(parts).contiguous(memory_format=torch.channels_last)

    def coarser(self, factor: int, margin: int, size: Sequence[int]) -> Crops:
        """The rectangles of a map of `size`, `factor` times smaller, over these and `margin` more where there is."""
        heights, widths = ((side + factor - 2) // factor + 1 + 2 * margin for side in (self.height, self.width))
        height, width = min(heights, size[0]), min(widths, size[1])
        tops, lefts = (
            [min(max(0, start // factor - margin), whole - part) for start in starts]
            for starts, whole, part in ((self.tops, size[0], height), (self.lefts, size[1], width))
        )
        return Crops(tops, lefts, height, width)

    def inside(self, others: Crops, factor: int) -> Crops:
        """These in what `others`, of a map `factor` times smaller, cut out, once it is enlarged."""
        tops, lefts = (
            [start - factor * corner for start, corner in zip(starts, corners, strict=True)]
            for starts, corners in ((self.tops, others.tops), (self.lefts, others.lefts))
        )
        return Crops(tops, lefts, self.height, self.width)


def random_crops(size: Sequence[int], share: float, slots: Int[Tensor, " b"], *, seed: int, stream: str) -> Crops:
    """Crops of `share` of each side of pictures of `size` (height, width); each slot's place is uniform."""
    height, width = (max(1, round(share * side)) for side in size)
    tops, lefts = (
        (uniform(seed, f"{stream} {axis}", slots) * (room + 1)).long().tolist()
        for axis, room in (("top", size[0] - height), ("left", size[1] - width))
    )
    return Crops(tops, lefts, height, width)

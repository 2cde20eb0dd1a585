"""How a picture is cut to the size of its batch: scaled to cover it, cropped, perhaps mirrored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from onestroke.data.buckets import Size

Crop = Literal["random", "center"]

_PLACEMENT, _CROPS = 18, 20  # streams of randomness, clear of those of `data.plan`, `data.source` and comicset


class Placement(NamedTuple):
    """How a picture is cut: scaled to `height` x `width` pixels, of which the part from `top`, `left` on is taken."""

    height: int
    width: int
    top: int
    left: int
    flip: bool


def place(
    picture: tuple[int, int], size: tuple[int, int], rng: np.random.Generator, *, crop: Crop, random_flip: bool
) -> Placement:
    """Scale a picture to cover `size` and choose the part to keep; sizes are height, width in pixels.

    Always draws three numbers from `rng`, so that options do not shift one another.
    """
    scale = max(size[0] / picture[0], size[1] / picture[1])
    height, width = (max(want, round(scale * have)) for want, have in zip(size, picture, strict=True))
    down, right, flip = rng.random(3)
    rooms = height - size[0], width - size[1]
    if crop == "center":
        top, left = (room // 2 for room in rooms)
    else:
        top, left = (int(share * (room + 1)) for share, room in zip((down, right), rooms, strict=True))
    return Placement(height, width, top, left, bool(random_flip and flip < 0.5))


def cut(image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int], placement: Placement) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The part of `image` that `placement` keeps, at `size`, with antialiasing.

    Resamples only that part, so a picture a thousand times longer than wide costs no more memory than another.
    """
    height, width, top, left, flip = placement
    down, right = image.shape[0] / height, image.shape[1] / width
    box = (left * right, top * down, min((left + size[1]) * right, image.shape[1]),
           min((top + size[0]) * down, image.shape[0]))  # fmt: skip
    resampling = Image.Resampling.LANCZOS if down > 1 else Image.Resampling.BICUBIC
    part = np.asarray(Image.fromarray(image).resize((size[1], size[0]), resampling, box=box))
    return np.ascontiguousarray(part[:, ::-1]) if flip else part


def centre_cut(image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The middle of `image`, scaled to cover `size`, unmirrored."""
    placement = place(image.shape[:2], size, np.random.default_rng(0), crop="center", random_flip=False)
    return cut(image, size, placement)


@dataclass(frozen=True)
class Framing:
    """How pictures are cut: which part of them, and whether mirrored.

    `num_crops`: a picture's random crops are chosen from so many that are its own; None: each slot has a new one.
    """

    seed: int
    crop: Crop = "center"
    random_flip: bool = False
    num_crops: int | None = None

    def at_slot(self, slot: int, index: int, picture: Size, size: Size) -> Placement:
        """What slot `slot` shows of picture `index`, of `picture` pixels, at `size`."""
        rng = np.random.default_rng((self.seed, _PLACEMENT, slot))
        if self.crop == "center" or self.num_crops is None:
            return place(picture, size, rng, crop=self.crop, random_flip=self.random_flip)
        choice, _, flip = rng.random(3)
        number = int(choice * self.num_crops)
        return self._own(number, index, picture, size)._replace(flip=bool(self.random_flip and flip < 0.5))

    def all_of(self, index: int, picture: Size, size: Size) -> list[Placement]:
        """Every placement that `at_slot` can give for picture `index`; crops without number are no list."""
        assert self.crop == "center" or self.num_crops is not None
        count = 1 if self.crop == "center" else self.num_crops
        crops = dict.fromkeys(self._own(number, index, picture, size) for number in range(count or 1))
        flips = (False, True) if self.random_flip else (False,)
        return [crop._replace(flip=flip) for crop in crops for flip in flips]

    def _own(self, number: int, index: int, picture: Size, size: Size) -> Placement:
        rng = np.random.default_rng((self.seed, _CROPS, index, number))
        return place(picture, size, rng, crop=self.crop, random_flip=False)


def micro_sizes(picture: Size, size: Size, placement: Placement) -> tuple[int, int, int, int]:
    """SDXL's micro-conditioning but the target: height and width before scaling, top and left of the crop."""
    # SDXL flips before it crops, so crop left is measured in the flipped picture.
    left = placement.width - size[1] - placement.left if placement.flip else placement.left
    return (*picture, placement.top, left)

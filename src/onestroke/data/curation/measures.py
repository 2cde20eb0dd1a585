"""What pixels alone tell of a picture: size, sharpness, flatness, borders, text, colour. Scores, not verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageFilter
from scipy import ndimage

SMALL, COARSE, TINY = 384, 256, 128  # pixels of the longer side of the copies that are measured, at most
ENOUGH = 3 * SMALL // 2  # pixels of the longer side from which those copies can be made
_NEAR = 16  # levels within which a pixel has the border's colour
_ROWS = 64  # rows of a border that are looked at together
_CONTRAST = 20  # levels by which ink differs from the paper around it


@dataclass(frozen=True)
class Views:
    """A picture and its smaller copies, each made once."""

    picture: Image.Image  # RGB
    size: tuple[int, int]  # width, height of the whole, of which `picture` may be a reduced copy

    @cached_property
    def image(self) -> UInt8[np.ndarray, "h w 3"]:
        return np.asarray(self.picture)

    @cached_property
    def light(self) -> UInt8[np.ndarray, "h2 w2"]:
        """Brightness; of the longer side, COARSE to SMALL pixels are left where there are more."""
        longest = max(self.picture.size)
        factor = longest // COARSE
        if longest > SMALL and -(-longest // factor) <= SMALL:
            part = self.coarse if factor == -(-longest // COARSE) else self.picture.reduce(factor)
            return np.asarray(part.convert("L"))
        return np.asarray(_shrunk(self.picture.convert("L"), SMALL))

    @cached_property
    def coarse(self) -> Image.Image:
        """At most COARSE pixels a side."""
        return _reduced(self.picture, COARSE)

    @cached_property
    def tiny(self) -> UInt8[np.ndarray, "h3 w3 3"]:
        """At most TINY pixels a side."""
        return np.asarray(_reduced(self.coarse, TINY))


def _reduced(picture: Image.Image, longest: int) -> Image.Image:
    """Each pixel the mean of a square of pixels: quicker than any other way."""
    factor = -(-max(picture.size) // longest)
    return picture.reduce(factor) if factor > 1 else picture


def _shrunk(picture: Image.Image, longest: int) -> Image.Image:
    width, height = picture.size
    if max(height, width) <= longest:
        return picture
    scale = longest / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return picture.resize(size, Image.Resampling.BOX, reducing_gap=2.0)


def shorter_side(views: Views) -> float:
    """Pixels."""
    return float(min(views.size))


def aspect(views: Views) -> float:
    """Longer side by shorter, from 1 on."""
    return max(views.size) / min(views.size)


def sharpness(views: Views) -> float:
    """The share of the edges' steepness that blurring once more takes away (after Crété et al. 2007), in [0, 1].

    About 0.9 for hard edges, below 0.4 where they are some pixels wide at 256 pixels a side; 1 where there are none.
    """
    light = views.light.astype(np.int16)
    before = lost = 0
    for axis in (0, 1):
        # The difference of two neighbours in a moving average of nine is a ninth of that of the pixels at its ends.
        rows = light.T if axis else light
        wide = np.concatenate([rows[3::-1], rows, rows[:-5:-1]])  # mirrored at both ends
        long = wide[9:] - wide[:-9]
        steep = np.abs(rows[1:] - rows[:-1])
        steep *= 9 * (steep > 3)  # levels: compression ripples less
        before += int(steep.sum(dtype=np.int32))  # at most 384 x 384 x 2295
        steep -= np.abs(long)
        lost += int(np.maximum(steep, 0).sum(dtype=np.int32))
    return lost / before if before > 9 * 2e-2 * light.size else 1.0


def flatness(views: Views) -> float:
    """The share of a grid of cells, 32 along the shorter side, in which nothing differs by more than 12 levels."""
    tile = max(2, min(views.tiny.shape[:2]) // 32)  # pixels: one alone differs from nothing
    if min(views.tiny.shape[:2]) < tile:
        return 1.0
    height, width = (side // tile * tile for side in views.tiny.shape[:2])
    planes = np.ascontiguousarray(views.tiny[:height, :width].transpose(2, 0, 1))
    down = planes.reshape(3, height // tile, tile, width)
    high, low = (
        reduce(extreme, (part[..., at::tile] for at in range(tile)))
        for extreme, part in ((np.maximum, down.max(axis=2)), (np.minimum, down.min(axis=2)))
    )
    return float(((high - low).max(axis=0) <= 12).mean())


def borders(views: Views) -> float:
    """The share of the area that lies in one-coloured bars or a frame.

    A plain background is no border: the edge of one runs straight along the whole of what it encloses.
    """
    planes = np.stack([np.asarray(band) for band in views.coarse.split()])
    _, height, width = planes.shape
    top, bottom = _bar(planes), _bar(planes[:, ::-1])
    inner = planes[:, top : height - bottom] if top + bottom < height else planes
    turned = inner.swapaxes(1, 2)
    left, right = _bar(turned), _bar(turned[:, ::-1])
    inside = max(0, height - top - bottom) * max(0, width - left - right)
    return 1 - inside / (height * width)


def _bar(planes: UInt8[np.ndarray, "3 h w"]) -> int:
    """The height of the bar at the top; 0 where its lower edge is not a straight line."""
    _, height, width = planes.shape
    row = np.sort(planes[:, 0], axis=1)
    color = (row[:, (width - 1) // 2] + row[:, width // 2].astype(float)) / 2  # the median
    first = next((row for at in range(0, height, _ROWS)
                  for row in at + np.flatnonzero(_differs(planes[:, at : at + _ROWS], color).mean(axis=1) > 0.02)),
                 0)  # fmt: skip
    if first == 0:
        return 0
    sides = _differs(planes[:, first : first + 3], color)  # 3 w
    across = np.flatnonzero(sides.any(axis=0))
    extent = across[-1] - across[0] + 1
    enclosed = sides.mean(axis=1).max() * width / extent
    return int(first) if enclosed > 0.85 and extent > 0.5 * width else 0


def _differs(planes: UInt8[np.ndarray, "3 h w"], color: Float[np.ndarray, " 3"]) -> Bool[np.ndarray, "h w"]:
    """Whether a channel is more than `_NEAR` levels from the colour; in whole bytes, which are quick."""
    planes = np.ascontiguousarray(planes)
    low = np.maximum(np.ceil(color - _NEAR), 0).astype(np.uint8)
    span = np.minimum(np.floor(color + _NEAR), 255).astype(np.uint8) - low
    apart = (planes - low[:, None, None]) > span[:, None, None]  # what lies below `low` wraps around
    return apart[0] | apart[1] | apart[2]


def text_share(views: Views) -> float:
    """The share of the area under lines of text: rows of at least four marks of a letter's size and shape."""
    light = views.light
    paper = _blurred(light).astype(np.int16)
    ink = (paper - light) > _CONTRAST if 2 * np.count_nonzero(light > 110) > light.size else (light - paper) > _CONTRAST
    marks, count = ndimage.label(ink, np.ones((3, 3)))
    if count < 30:
        return 0.0
    lines = np.zeros(light.shape, bool)
    letters = np.zeros(light.shape, np.int32)
    for down, right in ndimage.find_objects(marks):
        height, width = down.stop - down.start, right.stop - right.start
        if 3 <= height <= 30 and width <= 6 * height:
            lines[down, max(0, right.start - height) : right.stop + height] = True
            letters[(down.start + down.stop) // 2, (right.start + right.stop) // 2] += 1
    found, count = ndimage.label(lines)
    if not count:
        return 0.0
    held = np.bincount(found.ravel(), letters.ravel(), minlength=count + 1)
    area = np.bincount(found.ravel(), minlength=count + 1)
    wide = [0] + [r.stop - r.start > 3 * (d.stop - d.start) for d, r in ndimage.find_objects(found)]
    return float(area[(held >= 4) & (np.array(wide) > 0)].sum() / light.size)


def _blurred(light: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    """The mean around each pixel, over some 25 pixels a side."""
    picture = Image.fromarray(light)
    rough = picture.reduce(4).filter(ImageFilter.BoxBlur(3))
    return np.asarray(rough.resize(picture.size, Image.Resampling.BILINEAR))


def chroma(views: Views) -> float:
    """How far the colours lie from any tint of grey: what a line in brightness leaves of Cb and Cr, RMS in levels."""
    red, green, blue = views.tiny.reshape(-1, 3).T.astype(np.float64)
    light = 0.299 * red + 0.587 * green + 0.114 * blue
    centred = light - light.mean()
    spread = float(centred @ centred) + 25 * len(light)  # 5 levels: flat light explains nothing
    rest = 0.0
    for tint in (0.564 * (blue - light), 0.713 * (red - light)):
        tint -= tint.mean() + centred * (float(centred @ tint) / spread)
        rest += float(tint @ tint)
    return float(np.sqrt(rest / len(light)))


MEASURES: Mapping[str, Callable[[Views], float]] = {
    "size": shorter_side,
    "aspect": aspect,
    "blur": sharpness,
    "flat": flatness,
    "borders": borders,
    "text": text_share,
    "greyscale": chroma,
}

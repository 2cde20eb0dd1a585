"""What pixels alone tell of a picture: size, sharpness, flatness, borders, text, colour. Scores, not verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFilter
from scipy import ndimage

SMALL, TINY = 384, 128  # pixels of the longer side of the copies that are measured
_NEAR = 16  # levels within which a pixel has the border's colour
_CONTRAST = 20  # levels by which ink differs from the paper around it


@dataclass(frozen=True)
class Views:
    """A picture and its smaller copies, each made once."""

    image: UInt8[np.ndarray, "h w 3"]

    @cached_property
    def small(self) -> UInt8[np.ndarray, "h2 w2 3"]:
        return _shrunk(self.image, SMALL)

    @cached_property
    def tiny(self) -> UInt8[np.ndarray, "h3 w3 3"]:
        return _shrunk(self.small, TINY)

    @cached_property
    def light(self) -> UInt8[np.ndarray, "h2 w2"]:
        return np.asarray(Image.fromarray(self.small).convert("L"))


def _shrunk(image: UInt8[np.ndarray, "h w 3"], longest: int) -> UInt8[np.ndarray, "h2 w2 3"]:
    height, width = image.shape[:2]
    if max(height, width) <= longest:
        return image
    scale = longest / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX, reducing_gap=2.0))


def shorter_side(views: Views) -> float:
    """Pixels."""
    return float(min(views.image.shape[:2]))


def aspect(views: Views) -> float:
    """Longer side by shorter, from 1 on."""
    return max(views.image.shape[:2]) / min(views.image.shape[:2])


def sharpness(views: Views) -> float:
    """The share of the edges' steepness that blurring once more takes away (after Crété et al. 2007), in [0, 1].

    About 0.9 for hard edges, below 0.4 where they are some pixels wide at 384 pixels a side; 1 where there are none.
    """
    light = views.light.astype(np.float32)
    before = lost = 0.0
    for axis in (0, 1):
        steep = np.abs(np.diff(light, axis=axis))
        again = np.abs(np.diff(ndimage.uniform_filter1d(light, 9, axis=axis), axis=axis))
        edges = steep > 3  # levels: compression ripples less
        before += float(steep[edges].sum())
        lost += float(np.maximum(steep - again, 0)[edges].sum())
    return lost / before if before > 2e-2 * light.size else 1.0


def flatness(views: Views) -> float:
    """The share of a grid of cells, 32 along the shorter side, in which nothing differs by more than 12 levels."""
    tile = max(2, min(views.tiny.shape[:2]) // 32)  # pixels: one alone differs from nothing
    if min(views.tiny.shape[:2]) < tile:
        return 1.0
    height, width = (side // tile * tile for side in views.tiny.shape[:2])
    cells = views.tiny[:height, :width].reshape(height // tile, tile, width // tile, tile, 3)
    spread = cells.max(axis=(1, 3)).astype(int) - cells.min(axis=(1, 3))
    return float((spread.max(axis=-1) <= 12).mean())


def borders(views: Views) -> float:
    """The share of the area that lies in one-coloured bars or a frame.

    A plain background is no border: the edge of one runs straight along the whole of what it encloses.
    """
    image = views.small.astype(np.int16)
    height, width = image.shape[:2]
    top, bottom = _bar(image), _bar(image[::-1])
    turned = image[top : height - bottom].swapaxes(0, 1) if top + bottom < height else image.swapaxes(0, 1)
    left, right = _bar(turned), _bar(turned[::-1])
    inside = max(0, height - top - bottom) * max(0, width - left - right)
    return 1 - inside / (height * width)


def _bar(image: np.ndarray) -> int:
    """The height of the bar at the top; 0 where its lower edge is not a straight line."""
    color = np.median(image[0], axis=0)
    differs = (np.abs(image - color).max(axis=-1) > _NEAR).mean(axis=1)  # h
    content = np.flatnonzero(differs > 0.02)
    if not len(content) or content[0] == 0:
        return 0
    first = int(content[0])
    sides = np.abs(image[first : first + 3] - color).max(axis=-1) > _NEAR  # 3 w
    across = np.flatnonzero(sides.any(axis=0))
    enclosed = differs[first : first + 3].max() * image.shape[1] / (across[-1] - across[0] + 1)
    is_wide = across[-1] - across[0] + 1 > 0.5 * image.shape[1]
    return first if enclosed > 0.85 and is_wide else 0


def text_share(views: Views) -> float:
    """The share of the area under lines of text: rows of at least four marks of a letter's size and shape."""
    light = views.light
    paper = np.asarray(Image.fromarray(light).filter(ImageFilter.BoxBlur(12))).astype(np.int16)
    ink = (paper - light) > _CONTRAST if np.median(light) > 110 else (light - paper) > _CONTRAST
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


def chroma(views: Views) -> float:
    """How far the colours lie from any tint of grey: what a line in brightness leaves of Cb and Cr, RMS in levels."""
    pixels = views.tiny.reshape(-1, 3).astype(np.float64)
    light = pixels @ np.array([0.299, 0.587, 0.114])
    tints = np.stack([0.564 * (pixels[:, 2] - light), 0.713 * (pixels[:, 0] - light)], axis=1)
    centred = light - light.mean()
    slope = centred @ tints / (float(centred @ centred) + 25 * len(light))  # 5 levels: flat light explains nothing
    rest = tints - tints.mean(axis=0) - centred[:, None] * slope
    return float(np.sqrt((rest**2).sum(axis=1).mean()))


MEASURES: Mapping[str, Callable[[Views], float]] = {
    "size": shorter_side,
    "aspect": aspect,
    "blur": sharpness,
    "flat": flatness,
    "borders": borders,
    "text": text_share,
    "greyscale": chroma,
}

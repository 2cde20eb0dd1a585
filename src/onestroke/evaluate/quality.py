"""What averages hide, measured on single pictures: dull or loud colours, smeared lines, a periodic grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from einops import reduce
from jaxtyping import Float, Int, UInt8
from scipy.ndimage import uniform_filter, zoom

from onestroke.evaluate.intervals import Interval, Replicates

Pictures = UInt8[np.ndarray, "n h w 3"]
MIN_PATCHES = 8  # along a side, for a grid to be told from content


def laplacian_sharpness(pictures: Pictures) -> Float[np.ndarray, " n"]:
    """Variance of the 4-neighbour Laplacian of the luma in [0, 1], inside the border: low is smeared, high is noisy."""
    luma = _luma(pictures)
    centre = luma[:, 1:-1, 1:-1]
    around = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]
    return (around - 4 * centre).var(axis=(1, 2))


def saturation(pictures: Pictures) -> Float[np.ndarray, " n"]:
    """Mean chroma, the greatest minus the least of R, G and B, in [0, 1].

    Chroma, not HSV saturation (chroma over value): that is large and random in the near-black of ink lines.
    """
    rgb = np.asarray(pictures, dtype=np.float64) / 255
    return (rgb.max(axis=-1) - rgb.min(axis=-1)).mean(axis=(1, 2))


def contrast(pictures: Pictures) -> Float[np.ndarray, " n"]:
    """Standard deviation of the luma in [0, 1] (RMS contrast): at most 0.5."""
    return _luma(pictures).std(axis=(1, 2))


@dataclass(frozen=True)
class PatchGrid:
    """Where a grid is looked for: lines `stride` pixels apart, in the picture as a feature network sees it.

    `is_resized`: the network first scales the picture to whole patches (DINOv2); others leave it as it is.
    """

    stride: int
    is_resized: bool = False

    @property
    def name(self) -> str:
        return f"{self.stride} px"

    @property
    def side(self) -> int:
        """Numbers along a side of what is kept of a patch: pixels are pooled to 8 at most."""
        return self.stride // -(-self.stride // 8)


# VAEs and convolutional nets halve the picture; DINOv2's patches are 14 pixels wide.
GRIDS = (PatchGrid(8), PatchGrid(14, is_resized=True), PatchGrid(16), PatchGrid(32))


def folded(pictures: Pictures, grid: PatchGrid) -> Float[np.ndarray, "n s"]:
    """What each quarter of a picture repeats every `grid.stride` pixels: its patches' mean luma, in grey levels.

    The local mean over a patch is taken away first, and with it what is coarser than a patch. A row holds the quarters
    top left, bottom right, top right, bottom left, each a patch of `grid.side`^2 numbers; zeros where a side holds
    fewer than `MIN_PATCHES`. (Our own measure, like `grid_amplitude`.)
    """
    luma, stride = 255 * _luma(pictures), grid.stride
    if min(luma.shape[1:]) < MIN_PATCHES * stride:
        return np.zeros((len(luma), 4 * grid.side**2))
    if grid.is_resized:
        scale = [round(side / stride) * stride / side for side in luma.shape[1:]]
        luma = zoom(luma, (1, *scale), order=1, grid_mode=True, mode="nearest")
    fine = luma - uniform_filter(luma, (0, stride, stride), mode="nearest")
    rows, columns = (side // stride // 2 for side in fine.shape[1:])
    height, width = rows * stride, columns * stride  # of a quarter: whole patches, the grid's phase the same in all
    top, bottom, left, right = slice(height), slice(height, 2 * height), slice(width), slice(width, 2 * width)
    quarters = ((top, left), (bottom, right), (top, right), (bottom, left))
    return np.concatenate([_mean_patch(fine[:, v, h], grid) for v, h in quarters], axis=1)


def _mean_patch(fine: Float[np.ndarray, "n h w"], grid: PatchGrid) -> Float[np.ndarray, "n s"]:
    pool = grid.stride // grid.side
    return reduce(fine, "n (r i p) (c j q) -> n (i j)", "mean", i=grid.side, j=grid.side, p=pool, q=pool)


def grid_amplitude(
    folded_a: Float[np.ndarray, "n s"], folded_b: Float[np.ndarray, "n s"], blocks: Int[np.ndarray, " n"]
) -> Interval:
    """The grid that pictures a have and pictures b have not: its root mean square in grey levels, 0 without one.

    Rows pair up. The root of the product of the mean difference in one quarter with that in the quarter across, which
    shares neither rows nor columns with it; and only products of different pictures. So neither chance nor content that
    all pictures have in one place counts, but only what repeats over the whole picture. Jackknife interval.
    """
    difference = folded_a - folded_b
    quarters = np.split(difference, 4, axis=1)
    one, other = (np.concatenate(some, axis=1) for some in (quarters[0::2], quarters[1::2]))
    size = int(blocks.max()) + 1
    sums_one, sums_other = (np.stack([x[blocks == k].sum(axis=0) for k in range(size)]) for x in (one, other))
    same = np.bincount(blocks, (one * other).sum(axis=1))
    counts = np.bincount(blocks)
    values = []
    for left_out in (-1, *range(size)):
        keep = np.arange(size) != left_out
        product = sums_one[keep].sum(axis=0) @ sums_other[keep].sum(axis=0) - same[keep].sum()
        n = counts[keep].sum()
        values.append(product / (n * (n - 1)) / one.shape[1])
    interval = Replicates(float(values[0]), np.array(values[1:])).interval()
    return Interval(*(float(np.sqrt(max(0.0, end))) for end in (interval.value, interval.low, interval.high)))


def _luma(pictures: Pictures) -> Float[np.ndarray, "n h w"]:
    return np.asarray(pictures, dtype=np.float64) @ np.array([0.299, 0.587, 0.114]) / 255  # Rec. 601

"""Aspect-ratio buckets: the picture sizes that batches come in, and which picture goes into which.

Sizes are height, width in pixels. A picture goes to the bucket whose aspect ratio is nearest on a logarithmic scale:
the one whose crop leaves out least of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int, UInt32

from onestroke.errors import DataError

Size = tuple[int, int]  # height, width

# The sizes that SDXL was trained at (arXiv 2307.01952, appendix I): height, and its widths. That of 704 x 1344 has no
# turned twin there.
_SDXL_WIDE = {
    512: (2048, 1984, 1920, 1856), 576: (1792, 1728, 1664), 640: (1600, 1536), 704: (1472, 1408, 1344),
    768: (1344, 1280), 832: (1216, 1152), 896: (1152, 1088), 960: (1088, 1024),
}  # fmt: skip
_SDXL_TALL = [(long, short) for short, longs in _SDXL_WIDE.items() for long in longs]
SDXL_SIZES: tuple[Size, ...] = (
    *((short, long) for short, longs in _SDXL_WIDE.items() for long in longs),
    (1024, 1024),
    *(size for size in _SDXL_TALL if size != (1344, 704)),
)
SDXL_SIDE = 1024
_LEVELS = 512  # aspect ratios that the search for the best buckets tells apart


@dataclass(frozen=True)
class Buckets:
    """The sizes in use and the pictures of each, by index."""

    sizes: tuple[Size, ...]
    members: tuple[UInt32[np.ndarray, " n"], ...] = field(repr=False)
    unreadable: UInt32[np.ndarray, " n"] = field(repr=False, default_factory=lambda: np.empty(0, np.uint32))

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def num_pictures(self) -> int:
        return sum(map(len, self.members))

    def size_by_picture(self) -> dict[int, Size]:
        """The size of each picture that goes into a bucket, by index."""
        rows = zip(self.sizes, self.members, strict=True)
        return {index: size for size, members in rows for index in members.tolist()}


def one_bucket(num_pictures: int, size: Size) -> Buckets:
    """All pictures at one size."""
    return Buckets((size,), (np.arange(num_pictures, dtype=np.uint32),))


def sdxl_buckets(side: int, *, multiple: int) -> tuple[Size, ...]:
    """SDXL's sizes, scaled so that the square one has `side` pixels a side; each side a multiple of `multiple`."""

    def scaled(length: int) -> int:
        return max(1, round(length * side / SDXL_SIDE / multiple)) * multiple

    return tuple(sorted({(scaled(height), scaled(width)) for height, width in SDXL_SIZES}))


def computed_buckets(pictures: Int[np.ndarray, "n 2"], side: int, *, multiple: int, most: int) -> tuple[Size, ...]:
    """The `most` sizes at most whose crops leave out least of these pictures, on average; found exactly.

    Chosen among the sizes of sides from half to twice `side` and areas near its square, but never above it, at
    1/16 of `side` apart. `pictures`: heights and widths; rows with a zero (unreadable) count for nothing.
    """
    step = max(1, round(side / 16 / multiple)) * multiple
    wanted = _log_aspects(pictures[(pictures > 0).all(axis=1)])
    candidates = _candidates(side, step)
    if not len(wanted):
        return ((side, side),)
    aspects = _log_aspects(np.array(candidates))
    low, high = wanted.min(), max(wanted.max(), wanted.min() + 1e-9)
    counts, edges = np.histogram(wanted, bins=_LEVELS, range=(low, high))
    levels = (edges[:-1] + edges[1:]) / 2
    return tuple(candidates[place] for place in _fewest_lost(levels[counts > 0], counts[counts > 0], aspects, most))


def assign(pictures: Int[np.ndarray, "n 2"], sizes: Sequence[Size], *, batch_size: int) -> Buckets:
    """Put each picture into its bucket. Pictures of a bucket that cannot fill a batch go to the next nearest one.

    `pictures`: heights and widths; rows with a zero (unreadable) go into none. Raises DataError where no bucket
    comes to hold `batch_size` pictures.
    """
    is_readable = (pictures > 0).all(axis=1)
    readable, unreadable = (np.flatnonzero(rows).astype(np.uint32) for rows in (is_readable, ~is_readable))
    wanted = _log_aspects(pictures[readable])
    left = sorted(set(sizes), key=lambda size: (size[1] / size[0], size))
    while True:
        aspects = _log_aspects(np.array(left))
        nearest = np.searchsorted((aspects[:-1] + aspects[1:]) / 2, wanted)
        counts = np.bincount(nearest, minlength=len(left))
        short = [place for place, count in enumerate(counts) if count < batch_size]
        if not short:
            return Buckets(tuple(left), tuple(readable[nearest == place] for place in range(len(left))), unreadable)
        if len(left) == 1:
            raise DataError(
                f"no bucket can fill a batch of {batch_size}: {len(readable)} pictures can be read in all",
                where="data.buckets",
                fix="Lower train.batch_size, or give more pictures.",
            )
        left.pop(min(short, key=lambda place: (counts[place], place)))


def share_lost(picture: Size, size: Size) -> float:
    """The share of a picture that the crop to a bucket leaves out."""
    apart = picture[1] / picture[0] / (size[1] / size[0])
    return 1 - min(apart, 1 / apart)


def _log_aspects(sizes: Int[np.ndarray, "n 2"]) -> Float[np.ndarray, " n"]:
    heights, widths = np.asarray(sizes, dtype=np.float64).reshape(-1, 2).T
    return np.log(widths / heights)


def _candidates(side: int, step: int) -> list[Size]:
    """For each height the widest size that does not exceed the area of the square, and the same turned; by aspect."""
    sizes = set()
    for first in range(max(step, side // 2 // step * step), 2 * side + 1, step):
        second = side * side // first // step * step
        if side // 2 <= second <= 2 * side:
            sizes |= {(first, second), (second, first)}
    return sorted(sizes | {(side, side)}, key=lambda size: (size[1] / size[0], size))


def _fewest_lost(levels: np.ndarray, counts: np.ndarray, aspects: np.ndarray, most: int) -> list[int]:
    """Which of `aspects` (log, ascending) to keep, `most` at most, so that the sum of shares lost is least.

    A picture between two neighbours that are kept goes to the nearer one, so that the sum falls apart into a part for
    each pair of neighbours, and the best choice of k ends in the best choice of k - 1.
    """
    lost = counts * (1 - np.exp(-np.abs(levels[None] - aspects[:, None])))  # candidate, level
    num = len(aspects)
    place = np.searchsorted(aspects, levels)  # candidates below each level
    before = [lost[i, place <= i].sum() for i in range(num)]  # i is the first one kept
    after = [lost[i, place > i].sum() for i in range(num)]  # i is the last one kept
    between = np.full((num, num), np.inf)
    for i in range(num):
        for j in range(i + 1, num):
            inside = (place > i) & (place <= j)
            between[i, j] = np.minimum(lost[i, inside], lost[j, inside]).sum()
    best, came_from, choices = np.array(before), [], []
    for count in range(1, min(most, num) + 1):
        if count > 1:
            sums = best[:, None] + between
            came_from.append(sums.argmin(axis=0))
            best = sums.min(axis=0)
        choices.append((float((best + after).min()), count, int((best + after).argmin())))
    _, count, last = min(choices, key=lambda choice: (round(choice[0], 9), choice[1]))
    kept = [last]
    for sources in reversed(came_from[: count - 1]):
        kept.append(int(sources[kept[-1]]))
    return kept[::-1]

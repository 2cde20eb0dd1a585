"""Near copies: the perceptual hash, the search for hashes that are close, and the proof on small pictures.

The hash is the signs of the 128 lowest cosine coefficients of the brightness. A crop changes them all, so a picture
asks with the hashes of 81 windows of itself, and of their mirror images, for others that look like one of them: bits
are cut into bands, and who shares a band is compared (multi-index hashing, Norouzi et al. 2012). What is close is then
laid over the other by the window that fits best, in colour: a recoloured picture is no copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8, UInt64
from PIL import Image

SIDE = 32  # pixels of a thumbnail's side
NUM_BITS = 128
MAX_DISTANCE = 24  # bits in which two hashes may differ before the pictures are compared; 64 is chance
MARGINS = (0.0, 0.05, 0.1)  # shares of the side that a window leaves out at either end
PER_BUCKET = 64  # members of a bucket that are compared: keeps the search linear where many share a band
_WINDOWS = tuple(product(MARGINS, MARGINS))  # of one axis
_SCALE = 2**16  # the cosines are rounded to whole numbers, so that sums are exact and the same on every machine
_LIGHT = np.array([299.0, 587.0, 114.0])  # thousandths of red, green and blue in the brightness
_CHUNK = 64  # pictures that ask at once
_READ = 2048  # pictures that are hashed at once
GIVE_UP = 90.0  # levels of 255: pairs that differ more before the best window is searched are left at that
GIVE_UP_LATER = 60.0  # the same after the first search; the next two lower the difference by 15 at most
_FINE, _REACH, _CELLS = 0.0125, 0.15, 12  # step and end of the margins tried in the proof; cells a side compared there


def thumbnail(picture: Image.Image) -> UInt8[np.ndarray, "32 32 3"]:
    """The picture squeezed to 32 x 32 pixels."""
    kind = Image.Resampling.BOX if min(picture.size) >= SIDE else Image.Resampling.BICUBIC
    return np.asarray(picture.resize((SIDE, SIDE), kind, reducing_gap=2.0))


@cache
def _frequencies() -> tuple[np.ndarray, np.ndarray]:
    """Vertical and horizontal frequency of each bit, in half waves a side, lowest first; not (0, 0)."""
    pairs = [pair for pair in product(range(16), repeat=2) if pair != (0, 0)]
    return tuple(np.array(sorted(pairs, key=lambda p: (p[0] ** 2 + p[1] ** 2, p))[:NUM_BITS]).T)


@cache
def _basis() -> Float[np.ndarray, "w k 32"]:
    """Cosines of each window of an axis, averaged over the pixels, as whole numbers."""
    edges, count = np.linspace(0, 1, SIDE + 1), _frequencies()[0].max() + 1
    rows = []
    for start, end in _WINDOWS:
        x = np.clip((edges - start) / (1 - start - end), 0, 1)
        waves = [x] + [np.sin(np.pi * k * x) / (np.pi * k) for k in range(1, count)]
        rows.append([np.rint(_SCALE * np.diff(wave)) for wave in waves])
    return np.array(rows)


def window_bits(thumbs: UInt8[np.ndarray, "n 32 32 3"]) -> Bool[np.ndarray, "n 81 128"]:
    """The hash of every window of each picture; the first is the whole picture's."""
    light = thumbs.astype(np.float64) @ _LIGHT  # n 32 32
    basis = _basis()
    flat = basis.reshape(-1, SIDE)
    waves = (flat @ light @ flat.T).reshape(len(thumbs), *basis.shape[:2], *basis.shape[:2])  # n wy ky wx kx
    down, right = _frequencies()
    chosen = waves.transpose(0, 1, 3, 2, 4)[..., down, right]  # n wy wx 128
    return (chosen > 0).reshape(len(thumbs), -1, NUM_BITS)


def whole_words(thumbs: UInt8[np.ndarray, "n 32 32 3"]) -> UInt64[np.ndarray, "n 2"]:
    """The hash of each whole picture, packed."""
    basis, (down, right) = _basis()[0], _frequencies()
    parts = [np.empty((0, 2), np.uint64)]
    for at in range(0, len(thumbs), _READ):
        waves = basis @ (thumbs[at : at + _READ].astype(np.float64) @ _LIGHT) @ basis.T  # n ky kx
        parts.append(packed(waves[:, down, right] > 0))
    return np.concatenate(parts)


def mirrored(bits: Bool[np.ndarray, "*n 128"]) -> Bool[np.ndarray, "*n 128"]:
    """The hash of the mirror image: waves that are odd from left to right change their sign."""
    return bits ^ (_frequencies()[1] % 2 == 1)


def packed(bits: Bool[np.ndarray, "*n 128"]) -> UInt64[np.ndarray, "*n 2"]:
    return np.ascontiguousarray(np.packbits(bits, axis=-1)).view(np.uint64)


def unpacked(words: UInt64[np.ndarray, "n 2"]) -> Bool[np.ndarray, "n 128"]:
    return np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1).astype(bool)


def close_pairs(
    thumbs: UInt8[np.ndarray, "n 32 32 3"], index: Index | None = None, *, start: int = 0, stop: int | None = None
) -> Iterator[Int[np.ndarray, "m 3"]]:
    """Rows (i, j, window) where some window of picture i looks like the whole of picture j, best window of each pair.

    `start` and `stop` bound i, so that a search may be cut into parts. Windows from 81 on are mirrored. Chunks come in
    order of i. The time grows as n log n: bands have log2(n) bits, and of a bucket `PER_BUCKET` members are compared.
    """
    if len(thumbs) < 2:
        return
    index, stop = index or Index(whole_words(thumbs)), len(thumbs) if stop is None else stop
    for first in range(start, stop, _CHUNK):
        bits = window_bits(thumbs[first : min(first + _CHUNK, stop)])
        asked = np.concatenate([bits, mirrored(bits)], axis=1)  # n 162 128
        yield _closest(asked, first, index)


class Index:
    """The hashes of whole pictures, and for each band of bits the pictures sorted by it."""

    def __init__(self, words: UInt64[np.ndarray, "n 2"]) -> None:
        self.words = words
        self.width = int(np.clip(np.ceil(np.log2(len(words))), 12, 21))
        self.orders, self.starts = [], []
        parts = [words[at : at + _READ] for at in range(0, len(words), _READ)]
        values = np.concatenate([self.values(unpacked(part)).astype(np.int32) for part in parts])
        for value in values.T:
            order = np.argsort(value, kind="stable").astype(np.int32)
            self.orders.append(order)
            self.starts.append(np.searchsorted(value[order], np.arange(2**self.width + 1)).astype(np.int32))

    def values(self, bits: Bool[np.ndarray, "*n 128"]) -> Int[np.ndarray, "*n bands"]:
        count = NUM_BITS // self.width
        weights = 1 << np.arange(self.width)
        return bits[..., : count * self.width].reshape(*bits.shape[:-1], count, self.width) @ weights


def _closest(asked: np.ndarray, first: int, index: Index) -> Int[np.ndarray, "m 3"]:
    """The close pairs of the pictures that ask, of which number `first` is the first."""
    num_windows = asked.shape[1]
    values = index.values(asked).reshape(-1, NUM_BITS // index.width)
    questions = packed(asked).reshape(-1, 2)
    found = []
    asked_halves, halves = (np.ascontiguousarray(words.T) for words in (questions, index.words))
    for band, (order, starts) in enumerate(zip(index.orders, index.starts, strict=True)):
        start = starts[values[:, band]]
        counts = np.minimum(starts[values[:, band] + 1] - start, PER_BUCKET)
        question = np.repeat(np.arange(len(values), dtype=np.int32), counts)
        skipped = (start - (np.cumsum(counts) - counts)).astype(np.int32)  # from a row here to its place in the order
        other = order.take(np.arange(len(question), dtype=np.int32) + skipped.take(question))
        distance = np.zeros(len(question), np.uint8)
        in_first = (2 * band + 1) * index.width <= NUM_BITS  # the half that the band, the same in both, lies in
        for half in (1, 0) if in_first else (0, 1):  # that half says less, and of few is asked
            distance += np.bitwise_count(asked_halves[half].take(question) ^ halves[half].take(other))
            close = np.flatnonzero(distance <= MAX_DISTANCE)
            question, other, distance = question[close], other[close], distance[close]
        picture = first + question // num_windows
        rows = np.stack([picture, other, question % num_windows, distance], axis=1, dtype=np.int64)
        found.append(rows[picture != other])
    rows = np.concatenate(found)
    rows = rows[np.lexsort((rows[:, 2], rows[:, 3], rows[:, 1], rows[:, 0]))]
    _, best = np.unique(rows[:, :2], axis=0, return_index=True)
    return rows[best][:, :3]


# The proof


@cache
def _cuts() -> Float[np.ndarray, "s e cells 32"]:
    """What each of the cells of a window is made of, by the margins at its start and its end."""
    margins = np.arange(round(_REACH / _FINE) + 1) * _FINE
    edges = np.linspace(0, 1, SIDE + 1)
    cuts = np.empty((len(margins), len(margins), _CELLS, SIDE), np.float32)
    for (i, start), (j, end) in product(enumerate(margins), repeat=2):
        cells = start + (1 - start - end) * np.linspace(0, 1, _CELLS + 1)
        low, high = np.maximum(edges[:-1], cells[:-1, None]), np.minimum(edges[1:], cells[1:, None])
        share = np.maximum(high - low, 0)
        cuts[i, j] = share / share.sum(axis=1, keepdims=True)
    return cuts


def differences(
    ones: UInt8[np.ndarray, "m 32 32 3"], others: UInt8[np.ndarray, "m 32 32 3"], windows: Int[np.ndarray, " m"]
) -> Float[np.ndarray, " m"]:
    """How far each other is from the window of its one that fits best, searched around `windows`; 0 is the same.

    The mean of the largest tenth of the differences of 12 x 12 cells, in levels of 255: a part that changed colour
    counts, however small the part of the picture.
    """
    if not len(windows):
        return np.empty(0)
    cuts, axis = _cuts(), len(_WINDOWS)
    tall = (cuts[0, 0] @ others.reshape(len(others), SIDE, -1).astype(np.float32)).reshape(-1, SIDE, 3)  # m*cells 32 3
    whole = (cuts[0, 0] @ tall).reshape(-1, _CELLS, _CELLS, 3)
    flipped = windows >= axis**2
    whole[flipped] = whole[flipped, :, ::-1]
    margins = np.rint(np.array(_WINDOWS) / _FINE).astype(np.int64)
    down, right = margins[windows % axis**2 // axis], margins[windows % axis]  # m 2
    ones = ones.astype(np.float32)
    _, result = _refined(ones, whole, down, right, 0)
    near = np.arange(len(result))
    for step, give_up in ((2, GIVE_UP), (1, GIVE_UP_LATER), (1, GIVE_UP_LATER)):
        kept = result[near] <= give_up
        near, ones, whole, down, right = (x[kept] for x in (near, ones, whole, down, right))
        if not len(near):
            break
        right, _ = _refined(ones, whole, down, right, step)
        # the same along the other axis: turn the pictures
        down, result[near] = _refined(ones.swapaxes(1, 2), whole.swapaxes(1, 2), right, down, step)
    return result


def _refined(ones: np.ndarray, whole: np.ndarray, fixed: np.ndarray, free: np.ndarray, step: int):
    """The margins of the second axis, up to a step from `free`, that fit best while the first axis stays; the fit."""
    cuts, count = _cuts(), len(ones)
    cells = cuts[fixed[:, 0], fixed[:, 1]] @ ones.reshape(count, SIDE, -1)  # m cells 32*3
    across = cells.reshape(count, _CELLS, SIDE, 3).transpose(0, 2, 1, 3).reshape(count, SIDE, -1)  # m 32 cells*3
    steps = np.array(list(product((-step, 0, step), repeat=2)) if step else [(0, 0)])
    tries = np.clip(free[:, None] + steps, 0, len(cuts) - 1)  # m 9 2
    chosen = cuts[tries[..., 0], tries[..., 1]].reshape(count, -1, SIDE)  # m 9*cells 32
    drawn = (chosen @ across).reshape(count, len(steps), _CELLS, _CELLS, 3).swapaxes(2, 3)
    apart = np.abs(drawn - whole[:, None]).max(axis=-1).reshape(count, len(steps), -1)
    top = apart.shape[-1] // 10
    fits = np.partition(apart, -top, axis=-1)[..., -top:].mean(axis=-1)  # m 9
    best = fits.argmin(axis=1)
    return tries[np.arange(count), best], fits.min(axis=1)

"""Which pictures are copies of a better one: the same bytes, the same pixels, or nearly the same to look at.

Of copies the largest is kept, then the one with the longest caption, then the first. Who is no copy of a kept picture
stays, so that a chain of small changes is not taken for one picture.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as compute_arrow
import pyarrow.parquet as parquet
from jaxtyping import Float, Int, UInt8, UInt64

from onestroke.data.curation.near import SIDE, Index, close_pairs, differences
from onestroke.data.curation.recipe import CurationRecipe

_AT_ONCE = 512  # pairs compared
NUM_CLOSE_CALLS = 12  # pairs nearest to the threshold, on either side, kept for the page
_ALMOST = 100  # pairs beyond the threshold that a search remembers for that
_BYTES = SIDE * SIDE * 3  # of a thumbnail
_COLUMNS = ("place", "width", "height", "caption", "pixels", "thumb", "dropped")
Pairs = tuple[Int[np.ndarray, "k 2"], Float[np.ndarray, " k"]]  # two rows, smaller first, and how they differ


class Thumbs:
    """Thumbnails in a file, one after the other; what is asked for is read, and nothing stays in memory."""

    def __init__(self, path: Path, rows: Int[np.ndarray, " n"] | None = None) -> None:
        self.path, self._file = path, open(path, "rb")  # noqa: SIM115 - for as long as the object lives
        self._rows = np.arange(os.fstat(self._file.fileno()).st_size // _BYTES) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice | Int[np.ndarray, " m"]) -> UInt8[np.ndarray, "m 32 32 3"]:
        wanted = self._rows[rows]
        found = np.empty((len(wanted), SIDE, SIDE, 3), np.uint8)
        for number, row in enumerate(wanted.tolist()):
            os.preadv(self._file.fileno(), [found[number]], row * _BYTES)
        return found


@dataclass(frozen=True)
class Survivors:
    """What is known of the pictures that reach this stage; rows in order of place."""

    place: Int[np.ndarray, " n"]
    rank: Int[np.ndarray, " n"]  # 0: the one to keep, of whatever copies
    pixels: UInt64[np.ndarray, "n 2"]  # digests
    thumbs: UInt8[np.ndarray, "n 32 32 3"] | Thumbs


@dataclass(frozen=True)
class Copies:
    """Rows of pictures that are dropped, the rows they are copies of, and how far they are from them."""

    exact: dict[int, int]
    near: dict[int, tuple[int, float]]
    close_calls: list[tuple[int, int, float]]  # pairs of kept and other pictures, nearest to the threshold


def gather(shards: Iterable[Path], thumbs: Path) -> Survivors:
    """The survivors of all measured shards; their thumbnails go to the file `thumbs` and stay there."""
    places, areas, chars, pixels = [], [], [], []
    with open(thumbs, "wb") as file:
        for path in shards:
            table = parquet.read_table(path, columns=list(_COLUMNS))
            table = table.filter(compute_arrow.is_null(table["dropped"]))
            places.append(table["place"].to_numpy())
            areas.append(table["width"].to_numpy().astype(np.int64) * table["height"].to_numpy())
            chars.append(compute_arrow.utf8_length(table["caption"]).to_numpy().astype(np.int64))
            pixels.append(np.frombuffer(b"".join(table["pixels"].to_pylist()), np.uint64).reshape(-1, 2))
            file.writelines(table["thumb"].to_pylist())
    place = np.concatenate(places)
    order = np.lexsort((place, -np.concatenate(chars), -np.concatenate(areas)))
    rank = np.empty(len(place), np.int64)
    rank[order] = np.arange(len(place))
    return Survivors(place, rank, np.concatenate(pixels), Thumbs(thumbs))


def find_copies(
    survivors: Survivors, recipe: CurationRecipe, *, search: Callable[[Int[np.ndarray, " m"]], Pairs] | None = None
) -> Copies:
    """`search`: finds the near pairs among rows of the survivors; None: in this process."""
    exact = _exact(survivors) if recipe.exact.enabled else {}
    if not recipe.near.enabled:
        return Copies(exact, {}, [])
    rows = np.setdiff1d(np.arange(len(survivors.place)), np.fromiter(exact, np.int64, len(exact)))
    pairs, apart = search(rows) if search else near_pairs(survivors.thumbs, rows, recipe.near.at_most)
    near = _greedy(pairs, apart, survivors.rank, recipe.near.at_most)
    return Copies(exact, near, _close_calls(pairs, apart, near, recipe.near.at_most))


def _close_calls(pairs: np.ndarray, apart: np.ndarray, near: dict, at_most: float) -> list[tuple[int, int, float]]:
    order = [k for k in np.argsort(np.abs(apart - at_most), kind="stable") if not set(pairs[k].tolist()) <= near.keys()]
    sides = [[k for k in order if (apart[k] <= at_most) == inside][:NUM_CLOSE_CALLS] for inside in (True, False)]
    return [(*pairs[k].tolist(), float(apart[k])) for side in sides for k in side]


def _exact(survivors: Survivors) -> dict[int, int]:
    """Row -> the best row of the same pixels, which the same bytes have as well."""
    first, second = survivors.pixels.T
    order = np.lexsort((survivors.rank, second, first))
    same = (survivors.pixels[order[1:]] == survivors.pixels[order[:-1]]).all(axis=1)
    starts = np.flatnonzero(np.r_[True, ~same]) if len(order) else np.empty(0, np.int64)
    best = np.repeat(order[starts], np.diff(np.r_[starts, len(order)]))
    copies = order != best
    return dict(zip(order[copies].tolist(), best[copies].tolist(), strict=True))


def near_pairs(
    thumbs: UInt8[np.ndarray, "n 32 32 3"] | Thumbs,
    rows: Int[np.ndarray, " m"],
    at_most: float,
    *,
    compare: Callable | None = None,
) -> Pairs:
    """Pairs of `rows`: all that differ by up to `at_most`, and some that differ more."""
    chosen = thumbs[rows] if isinstance(thumbs, np.ndarray) else Thumbs(thumbs.path, rows)
    pairs, apart = search_part(chosen, None, at_most, compare=compare)
    return rows[pairs], apart


def search_part(
    thumbs: UInt8[np.ndarray, "n 32 32 3"] | Thumbs,
    index: Index | None,
    at_most: float,
    *,
    start: int = 0,
    stop: int | None = None,
    compare: Callable | None = None,
) -> Pairs:
    """The near pairs whose asking picture lies in [start, stop), and some that differ more than `at_most`.

    `compare`: the user's function of two thumbnails, in place of ours.
    """
    found: dict[tuple[int, int], float] = {}
    almost: dict[tuple[int, int], float] = {}
    for close in close_pairs(thumbs, index, start=start, stop=stop):
        for part in np.split(close, range(_AT_ONCE, len(close), _AT_ONCE)):
            ones, others = thumbs[part[:, 0]], thumbs[part[:, 1]]
            if compare is None:
                apart = differences(ones, others, part[:, 2])
            else:
                apart = [compare(one, other) for one, other in zip(ones, others, strict=True)]
            for i, j, value in zip(part[:, 0].tolist(), part[:, 1].tolist(), map(float, apart), strict=True):
                pairs = found if value <= at_most else almost
                pair = (min(i, j), max(i, j))
                pairs[pair] = min(value, pairs.get(pair, value))
        almost = _nearest(almost) if len(almost) > 10 * _ALMOST else almost
    return _as_pairs({**_nearest(almost), **found})


def merged(parts: Iterable[Pairs]) -> Pairs:
    """The pairs of all parts of a search; of those found twice, the smaller difference."""
    found: dict[tuple[int, int], float] = {}
    for pairs, apart in parts:
        for (i, j), value in zip(pairs.tolist(), apart.tolist(), strict=True):
            found[i, j] = min(value, found.get((i, j), value))
    return _as_pairs(found)


def _nearest(almost: dict[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    return dict(sorted(almost.items(), key=lambda item: (item[1], item[0]))[:_ALMOST])


def _as_pairs(found: dict[tuple[int, int], float]) -> Pairs:
    pairs = sorted(found)
    return np.array(pairs, np.int64).reshape(-1, 2), np.array([found[pair] for pair in pairs])


def _greedy(pairs: np.ndarray, apart: np.ndarray, rank: np.ndarray, at_most: float) -> dict[int, tuple[int, float]]:
    """Best first: who is near to a kept row is dropped for the nearest such row."""
    beside = defaultdict(list)
    for (i, j), value in zip(pairs.tolist(), apart.tolist(), strict=True):
        if value <= at_most:
            beside[i].append((value, j))
            beside[j].append((value, i))
    dropped: dict[int, tuple[int, float]] = {}
    kept: set[int] = set()
    for row in sorted(beside, key=lambda r: rank[r]):
        near = min(((value, other) for value, other in beside[row] if other in kept), default=None)
        if near is None:
            kept.add(row)
        else:
            dropped[row] = (near[1], near[0])
    return dropped

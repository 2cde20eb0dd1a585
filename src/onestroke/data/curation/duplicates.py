"""Which pictures are copies of a better one: the same bytes, the same pixels, or nearly the same to look at.

Of copies the largest is kept, then the one with the longest caption, then the first. Who is no copy of a kept picture
stays, so that a chain of small changes is not taken for one picture.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as compute_arrow
import pyarrow.parquet as parquet
from jaxtyping import Float, Int, UInt8

from onestroke.data.curation.near import SIDE, close_pairs, differences
from onestroke.data.curation.recipe import CurationRecipe

_AT_ONCE = 512  # pairs compared
NUM_CLOSE_CALLS = 12  # pairs nearest to the threshold, on either side, kept for the page
_COLUMNS = ("place", "width", "height", "caption", "sha256", "pixels", "thumb", "dropped")


@dataclass(frozen=True)
class Survivors:
    """What is known of the pictures that reach this stage; rows in order of place."""

    place: Int[np.ndarray, " n"]
    rank: Int[np.ndarray, " n"]  # 0: the one to keep, of whatever copies
    sha256: np.ndarray  # n, 16 bytes each: half of the digest is as good
    pixels: np.ndarray  # n, bytes
    thumbs: UInt8[np.ndarray, "n 32 32 3"]  # on the disk


@dataclass(frozen=True)
class Copies:
    """Rows of pictures that are dropped, the rows they are copies of, and how far they are from them."""

    exact: dict[int, int]
    near: dict[int, tuple[int, float]]
    close_calls: list[tuple[int, int, float]]  # pairs of kept and other pictures, nearest to the threshold


def gather(shards: Iterable[Path], thumbs: Path) -> Survivors:
    """The survivors of all measured shards; their thumbnails go to the file `thumbs`, which memory only maps."""
    places, areas, chars, digests, pixels = [], [], [], [], []
    with open(thumbs, "wb") as file:
        for path in shards:
            table = parquet.read_table(path, columns=list(_COLUMNS))
            table = table.filter(compute_arrow.is_null(table["dropped"]))
            places.append(table["place"].to_numpy())
            areas.append(table["width"].to_numpy().astype(np.int64) * table["height"].to_numpy())
            chars.append(np.array([len(text) for text in table["caption"].to_pylist()], np.int64))
            digests += [value[:16] for value in table["sha256"].to_pylist()]
            pixels += table["pixels"].to_pylist()
            file.writelines(table["thumb"].to_pylist())
    place = np.concatenate(places)
    order = np.lexsort((place, -np.concatenate(chars), -np.concatenate(areas)))
    rank = np.empty(len(place), np.int64)
    rank[order] = np.arange(len(place))
    shape = (len(place), SIDE, SIDE, 3)
    pictures = np.memmap(thumbs, np.uint8, "r", shape=shape) if len(place) else np.empty(shape, np.uint8)
    return Survivors(place, rank, np.array(digests, object), np.array(pixels, object), pictures)


def find_copies(
    survivors: Survivors,
    recipe: CurationRecipe,
    *,
    compare: Callable | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Copies:
    """`compare`: the user's function of two thumbnails, in place of ours."""
    exact = _exact(survivors) if recipe.exact.enabled else {}
    if not recipe.near.enabled:
        return Copies(exact, {}, [])
    rows = np.setdiff1d(np.arange(len(survivors.place)), np.fromiter(exact, np.int64, len(exact)))
    pairs, apart = near_pairs(survivors.thumbs, rows, recipe.near.at_most, compare=compare, on_progress=on_progress)
    near = _greedy(pairs, apart, survivors.rank, recipe.near.at_most)
    return Copies(exact, near, _close_calls(pairs, apart, near, recipe.near.at_most))


def _close_calls(pairs: np.ndarray, apart: np.ndarray, near: dict, at_most: float) -> list[tuple[int, int, float]]:
    order = [k for k in np.argsort(np.abs(apart - at_most), kind="stable") if not set(pairs[k].tolist()) <= near.keys()]
    sides = [[k for k in order if (apart[k] <= at_most) == inside][:NUM_CLOSE_CALLS] for inside in (True, False)]
    return [(*pairs[k].tolist(), float(apart[k])) for side in sides for k in side]


def _exact(survivors: Survivors) -> dict[int, int]:
    """Row -> the best row of the same bytes or pixels."""
    best: dict[bytes, int] = {}
    order = np.argsort(survivors.rank, kind="stable")
    copies = {}
    for row in order.tolist():
        keys = b"b" + survivors.sha256[row], b"p" + survivors.pixels[row]
        first = min((best[key] for key in keys if key in best), key=lambda r: survivors.rank[r], default=row)
        for key in keys:
            best.setdefault(key, first)
        if first != row:
            copies[row] = first
    return copies


def near_pairs(
    thumbs: UInt8[np.ndarray, "n 32 32 3"],
    rows: Int[np.ndarray, " m"],
    at_most: float,
    *,
    compare: Callable | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Int[np.ndarray, "k 2"], Float[np.ndarray, " k"]]:
    """Pairs of `rows`, smaller number first, and how they differ: all up to `at_most`, and some that differ more."""
    found: dict[tuple[int, int], float] = {}
    almost: dict[tuple[int, int], float] = {}  # a few beyond the threshold, for the page
    chosen = thumbs if len(rows) == len(thumbs) else _Picked(thumbs, rows)
    for close in close_pairs(chosen):
        for part in np.split(close, range(_AT_ONCE, len(close), _AT_ONCE)):
            one, other = rows[part[:, 0]], rows[part[:, 1]]
            if compare is None:
                apart = differences(thumbs[one], thumbs[other], part[:, 2])
            else:
                apart = [compare(thumbs[i], thumbs[j]) for i, j in zip(one, other, strict=True)]
            for i, j, value in zip(one.tolist(), other.tolist(), map(float, apart), strict=True):
                pairs = found if value <= at_most else almost
                pair = (min(i, j), max(i, j))
                pairs[pair] = min(value, pairs.get(pair, value))
        if len(almost) > 1000:
            almost = dict(sorted(almost.items(), key=lambda item: (item[1], item[0]))[:100])
        on_progress(int(close[-1, 0]) if len(close) else 0, len(rows))
    found = {**almost, **found}
    pairs = sorted(found)
    return np.array(pairs, np.int64).reshape(-1, 2), np.array([found[pair] for pair in pairs])


class _Picked:
    """Rows of an array that stays on the disk, read slice by slice."""

    def __init__(self, array: np.ndarray, rows: np.ndarray) -> None:
        self.array, self.rows = array, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> np.ndarray:
        return self.array[self.rows[part]]


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

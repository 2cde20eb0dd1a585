"""Precision, recall, density and coverage by nearest neighbours, a few rows of distances at a time.

Precision and recall after arXiv 1904.06991 (section 2), density and coverage after arXiv 2002.09797 (section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from onestroke.errors import DataError
from onestroke.evaluate.distances import Features
from onestroke.evaluate.intervals import Replicates

NEAREST = 5  # k of k-th nearest neighbour, as in arXiv 2002.09797
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Manifold:
    """Features with the squared distance of each to its k-th nearest other one, for all blocks and without each."""

    features: Float[np.ndarray, "n d"]
    blocks: Int[np.ndarray, " n"]
    radii: Float[np.ndarray, "v n"]  # first with all blocks, then without block 0, 1 ...
    nearest: int


@dataclass(frozen=True)
class Neighbourhood:
    """How two sets lie among each other: shares in [0, 1], but density, which may exceed 1.

    `precision`: share of fake pictures inside the real manifold (real enough?). `recall`: share of real pictures inside
    the fake one (all kinds there?). `density`: how many real balls a fake picture lies in, over k. `coverage`: share of
    real pictures with a fake one in their ball.
    """

    precision: Replicates
    recall: Replicates
    density: Replicates
    coverage: Replicates


def manifold(features: Features, blocks: Int[np.ndarray, " n"], *, nearest: int = NEAREST) -> Manifold:
    """The balls around the features. Raises DataError where fewer than `nearest` others are left without a block."""
    x = np.asarray(features, dtype=np.float64)
    kept = _variants(blocks)
    if min(keep.sum() for keep in kept) <= nearest:
        raise DataError(f"{len(x)} pictures are too few for {nearest} neighbours", fix=f"Take {2 * nearest + 2} more.")
    radii = np.full((len(kept), len(x)), np.inf)
    for first in range(0, len(x), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        distances = _squared_distances(x[rows], x)
        distances[np.arange(len(distances)), np.arange(first, first + len(distances))] = np.inf  # not to itself
        for v, keep in enumerate(kept):
            radii[v, rows] = np.partition(distances[:, keep], nearest - 1, axis=1)[:, nearest - 1]
    return Manifold(x, blocks, radii, nearest)


def neighbourhood(real: Manifold, fake: Manifold) -> Neighbourhood:
    """Precision, recall, density and coverage of `fake` against `real`; both of equal size, in the same blocks."""
    if real.features.shape != fake.features.shape:
        raise DataError(
            f"features shaped {fake.features.shape} against {real.features.shape}",
            fix="Compare equally many pictures through one feature network.",
        )
    assert np.array_equal(real.blocks, fake.blocks) and real.nearest == fake.nearest
    kept = _variants(real.blocks)
    in_real = np.zeros((len(kept), len(fake.features)), dtype=np.int64)  # real balls that hold each fake picture
    recalled, covered = np.zeros((2, len(kept), len(real.features)), dtype=bool)
    for first in range(0, len(real.features), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        distances = _squared_distances(real.features[rows], fake.features)
        for v, keep in enumerate(kept):
            inside = (distances < real.radii[v, rows, None]) & keep
            in_real[v] += inside[keep[rows]].sum(axis=0)
            covered[v, rows] = inside.any(axis=1)
            recalled[v, rows] = ((distances < fake.radii[v]) & keep).any(axis=1)
    return Neighbourhood(
        precision=_shares(in_real > 0, kept),
        recall=_shares(recalled, kept),
        density=_shares(in_real / real.nearest, kept),
        coverage=_shares(covered, kept),
    )


def nearest_distance(features: Features, reference: Features) -> Float[np.ndarray, " n"]:
    """The Euclidean distance of each picture to the nearest of `reference`: great for what resembles no real one."""
    x, y = (np.asarray(z, dtype=np.float64) for z in (features, reference))
    parts = [
        np.sqrt(_squared_distances(x[first : first + ROWS_AT_ONCE], y).min(axis=1))
        for first in range(0, len(x), ROWS_AT_ONCE)
    ]
    return np.concatenate(parts)


def _variants(blocks: Int[np.ndarray, " n"]) -> list[Bool[np.ndarray, " n"]]:
    """Which pictures stay: all, then all but those of each block."""
    return [np.ones(len(blocks), dtype=bool), *(blocks != block for block in range(int(blocks.max()) + 1))]


def _shares(values: np.ndarray, kept: list[Bool[np.ndarray, " n"]]) -> Replicates:
    means = [float(row[keep].mean()) for row, keep in zip(values, kept, strict=True)]
    return Replicates(means[0], np.array(means[1:]))


def _squared_distances(x: Features, y: Features) -> Float[np.ndarray, "n m"]:
    shift = y.mean(axis=0)  # without cancellation where features lie far from zero
    x, y = x - shift, y - shift
    return (np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2 * x @ y.T).clip(0)

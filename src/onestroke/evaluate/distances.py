"""How far one set of pictures is from another: pure functions on features, in float64.

Fréchet and kernel distances with their leave-one-block-out replicates, from the moments and kernel sums of the blocks:
no distance is computed twice over the same pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce as fold

import numpy as np
from jaxtyping import Float, Int

from onestroke.errors import DataError
from onestroke.evaluate.intervals import Replicates

Features = Float[np.ndarray, "n d"]
Kernel = Callable[[Features, Features], Float[np.ndarray, "n m"]]
ROWS_AT_ONCE = 1024
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # of the Gaussian kernel, and what the published distances are multiplied by


@dataclass(frozen=True)
class Moments:
    """Number, mean and centred scatter (the sum of outer products, d x d) of features: what a stream leaves behind."""

    count: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """The unbiased covariance."""
        return self.scatter / (self.count - 1)


def moments(features: Features) -> Moments:
    """The moments of one batch of features; `merge_moments` adds the next."""
    values = _checked(features)
    centred = values - values.mean(axis=0)
    return Moments(len(values), values.mean(axis=0), centred.T @ centred)


def merge_moments(a: Moments, b: Moments) -> Moments:
    """The moments of both batches together, without cancellation (Chan, Golub and LeVeque 1983, eq. 1.5)."""
    count, shift = a.count + b.count, b.mean - a.mean
    scatter = a.scatter + b.scatter + np.outer(shift, shift) * (a.count * b.count / count)
    return Moments(count, a.mean + shift * (b.count / count), scatter)


@dataclass(frozen=True)
class Gaussian:
    """The Gaussian fitted to a set: what the Fréchet distance needs of it, its root R R^T = covariance found once."""

    count: int
    mean: Float[np.ndarray, " d"]
    root: Float[np.ndarray, "d d"]


def gaussian_of(features: Features | Moments) -> Gaussian:
    """The Gaussian with the mean and the unbiased covariance of the features."""
    found = features if isinstance(features, Moments) else moments(features)
    return Gaussian(found.count, found.mean, _root(found.covariance))


def block_gaussians(features: Features, blocks: Int[np.ndarray, " n"]) -> tuple[Gaussian, ...]:
    """The Gaussian of all features, then those without each block; from the blocks' moments."""
    parts = [moments(features[blocks == k]) for k in range(int(blocks.max()) + 1)]
    rest = (parts[:k] + parts[k + 1 :] for k in range(len(parts)))
    return tuple(gaussian_of(fold(merge_moments, some)) for some in (parts, *rest))


def frechet_distance(a: Features | Moments | Gaussian, b: Features | Moments | Gaussian) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two equally large sets (arXiv 1706.08500, eq. 6).

    `|mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A B)^1/2)`. It is biased upwards by about d^2 / 2n, see
    `frechet_bias`: only values at the same n compare. Raises DataError on unequal counts, different widths or
    features that are not finite.
    """
    a, b = (x if isinstance(x, Gaussian) else gaussian_of(x) for x in (a, b))
    _check_alike(a.count, b.count, len(a.mean), len(b.mean))
    # tr((A B)^1/2) is the sum of the singular values of A^1/2 B^1/2: no square root of a rounded-off eigenvalue.
    overlap = np.linalg.svd(a.root.T @ b.root, compute_uv=False).sum()
    distance = np.square(a.mean - b.mean).sum() + np.square(a.root).sum() + np.square(b.root).sum() - 2 * overlap
    return max(0.0, float(distance))


def frechet_replicates(a: Sequence[Gaussian], b: Sequence[Gaussian]) -> Replicates:
    """`frechet_distance` of `block_gaussians`: of all, and without each block, which leaves both sets together."""
    values = [frechet_distance(*pair) for pair in zip(a, b, strict=True)]
    return Replicates(values[0], np.array(values[1:]))


def frechet_bias(covariance: Float[np.ndarray, "d d"], count: int) -> float:
    """What `frechet_distance` gives on average for two sets of `count` from one Gaussian: the floor of a comparison.

    To first order in 1/n, with eigenvalues l of the covariance: 2 sum_i l_i / n from the means, and
    (sum_i l_i + sum_{i != j} l_i l_j / (l_i + l_j)) / n from the covariances. With unit covariance d (d + 5) / 2n.
    Derived by us from the second-order expansion of the Bures distance with Wishart noise.
    """
    values = np.linalg.eigvalsh(covariance).clip(0)
    total = values[:, None] + values[None, :]
    pairs = np.divide(np.outer(values, values), total, out=np.zeros_like(total), where=total > 0)
    off_diagonal = pairs.sum() - np.trace(pairs)
    return float((3 * values.sum() + off_diagonal) / count)


def cubic_kernel(x: Features, y: Features) -> Float[np.ndarray, "n m"]:
    """`(x . y / d + 1)^3`, the kernel distance's (KID, arXiv 1801.01401, section 4)."""
    base = x @ y.T / x.shape[1] + 1
    return base * base * base  # several times faster than a power


def gaussian_kernel(x: Features, y: Features) -> Float[np.ndarray, "n m"]:
    """`exp(-|x - y|^2 / 2 sigma^2)` of features of length 1, times 1000: CMMD's (arXiv 2401.09603, section 4)."""
    x, y = (z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12) for z in (x, y))
    return CMMD_SCALE * np.exp((x @ y.T - 1) / CMMD_SIGMA**2)  # |x - y|^2 = 2 - 2 x . y


def kernel_distance(a: Features, b: Features, *, kernel: Kernel = cubic_kernel) -> float:
    """Kernel distance (KID, arXiv 1801.01401, section 4): the unbiased squared MMD under `kernel`.

    Over the full sets, not over random subsets as in the paper's code: the same expectation, less noise. Near 0, and
    sometimes below it, for equal distributions. Raises DataError like `frechet_distance`. CMMD's published code keeps
    the diagonal, which adds about `2 * 1000 / n` of a biased zero; we leave it out there too.
    """
    return kernel_replicates(a, b, np.zeros(len(a), dtype=np.int64), kernel=kernel).value


def kernel_replicates(
    a: Features, b: Features, blocks: Int[np.ndarray, " n"], *, kernel: Kernel = cubic_kernel
) -> Replicates:
    """`kernel_distance` and its values without each block, from one pass over the pairs of pictures."""
    a, b = _checked(a), _checked(b)
    _check_alike(len(a), len(b), a.shape[1], b.shape[1])
    within = [_block_sums(x, x, blocks, kernel, without_diagonal=True) for x in (a, b)]
    across, counts = _block_sums(a, b, blocks, kernel), np.bincount(blocks)
    values = []
    for left in (None, *range(len(counts))):
        keep = np.arange(len(counts)) != (-1 if left is None else left)
        n = counts[keep].sum()
        same = sum(sums[np.ix_(keep, keep)].sum() for sums in within)
        values.append(float(same / (n * (n - 1)) - 2 * across[np.ix_(keep, keep)].sum() / n**2) if n > 1 else np.nan)
    return Replicates(values[0], np.array(values[1:]))


def _block_sums(
    a: Features, b: Features, blocks: Int[np.ndarray, " n"], kernel: Kernel, *, without_diagonal: bool = False
) -> Float[np.ndarray, "g g"]:
    """Sums of the kernel over the pairs of pictures of each pair of blocks, `ROWS_AT_ONCE` rows of it at a time."""
    order = np.argsort(blocks, kind="stable")
    a, b, of = a[order], b[order], blocks[order]
    starts = np.searchsorted(of, np.arange(of[-1] + 1))
    sums = np.zeros((len(starts), len(starts)))
    for first in range(0, len(a), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        values = kernel(a[rows], b)
        if without_diagonal:
            values[np.arange(len(values)), np.arange(first, first + len(values))] = 0
        np.add.at(sums, of[rows], np.add.reduceat(values, starts, axis=1))
    return sums


def _root(covariance: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    """R with R R^T = covariance, from eigenvalues: singular covariances (n <= d, dead features) are no exception."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(values.clip(0))


def _checked(features: Features) -> Float[np.ndarray, "n d"]:
    values = np.asarray(features, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2:
        raise DataError(f"features shaped {values.shape} are not two pictures or more", fix="Give n x d, n at least 2.")
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).any(axis=1).sum())
        raise DataError(f"{bad} of {len(values)} pictures have features that are not finite")
    return values


def _check_alike(count_a: int, count_b: int, width_a: int, width_b: int) -> None:
    if count_a != count_b:
        raise DataError(
            f"{count_a} pictures against {count_b}",
            fix="Compare equally many: set distances depend on the number of pictures.",
        )
    if width_a != width_b:
        raise DataError(f"features of width {width_a} against {width_b}", fix="Use one feature network for both.")


def seed_spread(features_by_prompt: Float[np.ndarray, "p s d"]) -> Float[np.ndarray, " p"]:
    """For each of p prompts, the mean Euclidean distance between its s pictures (s at least 2); 0 where all agree.

    One number a prompt, to be averaged or paired with another model's.
    """
    return np.array([mean_pairwise_distance(pictures) for pictures in features_by_prompt])


def mean_pairwise_distance(features: Features) -> float:
    """The mean Euclidean distance between two different rows."""
    values = _checked(features)
    values = values - values.mean(axis=0)
    norms = np.square(values).sum(axis=1)
    squared = (norms[:, None] + norms[None, :] - 2 * values @ values.T).clip(0)
    np.fill_diagonal(squared, 0)
    return float(np.sqrt(squared).sum() / (len(values) * (len(values) - 1)))

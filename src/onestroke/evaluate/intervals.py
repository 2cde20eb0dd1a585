"""Intervals: for statistics of whole sets by leaving out blocks of pictures, for per-prompt scores by the bootstrap.

A naive bootstrap of a set distance is biased (a resampled set holds pictures twice, and looks less varied), so that set
distances keep their leave-one-block-out values as `Replicates`. Replicates of two models on the same blocks divide and
subtract: the interval of a ratio keeps the benefit of the pairing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.special import stdtrit

from onestroke.errors import DataError

NUM_BLOCKS = 10
COVERAGE = 0.95


@dataclass(frozen=True)
class Interval:
    """A measured value and the ends of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Replicates:
    """A statistic of whole sets, and its values with one block of pictures left out at a time.

    `a / b` and `a - b` are the ratio and the difference of two such statistics on the same blocks.
    """

    value: float
    left_out: Float[np.ndarray, " g"]

    def __truediv__(self, other: Replicates) -> Replicates:
        with np.errstate(divide="ignore", invalid="ignore"):
            return Replicates(float(np.divide(self.value, other.value)), self.left_out / other.left_out)

    def __sub__(self, other: Replicates) -> Replicates:
        return Replicates(self.value - other.value, self.left_out - other.left_out)

    def interval(self, *, coverage: float = COVERAGE, correct_bias: bool = False) -> Interval:
        """`value +- t * se` with `se^2 = (g-1)/g sum_k (T_k - mean T)^2`, t of Student's with g-1 degrees of freedom.

        Efron 1982, chapter 3, on blocks. `correct_bias` centres it on `g T - (g-1) mean T`: free of a bias in 1/n such
        as that of the Fréchet distance.
        """
        value, blocks = self.value, len(self.left_out)
        with np.errstate(invalid="ignore"):
            error = np.sqrt((blocks - 1) * self.left_out.var())
        if correct_bias:
            value = blocks * value - (blocks - 1) * float(self.left_out.mean())
        reach = float(stdtrit(blocks - 1, 0.5 + coverage / 2) * error)
        return Interval(value, value - reach, value + reach)


def blocks_of(groups: Int[np.ndarray, " n"], num_blocks: int = NUM_BLOCKS) -> Int[np.ndarray, " n"]:
    """The block of each picture, for `Replicates`: pictures of one group (a prompt) share a block.

    `groups` counts up from 0; neighbouring groups share a block. Raises DataError on fewer than two groups a block.
    """
    count = int(groups.max()) + 1 if len(groups) else 0
    if count < 2 * num_blocks:
        raise DataError(f"{count} samples are too few for {num_blocks} blocks", fix=f"Take {2 * num_blocks} at least.")
    return np.asarray(groups, dtype=np.int64) * num_blocks // count


def block_jackknife(
    statistic: Callable[..., float], *samples: np.ndarray, blocks: Int[np.ndarray, " n"] | None = None
) -> Replicates:
    """The replicates of a statistic of whole sets, computed anew without each block.

    `samples` are indexed alike along their first axis, and block k leaves all of them together. `blocks`: the block of
    each row; by default `NUM_BLOCKS` runs of rows. Raises DataError on unequal counts or fewer rows than 2 a block.
    """
    counts = [len(sample) for sample in samples]
    if len(set(counts)) > 1:
        raise DataError(f"samples of {' and '.join(map(str, counts))}", fix="Compare equally many.")
    blocks = blocks_of(np.arange(counts[0])) if blocks is None else blocks
    kept = [blocks != block for block in range(int(blocks.max()) + 1)]
    left_out = [statistic(*(sample[keep] for sample in samples)) for keep in kept]
    return Replicates(float(statistic(*samples)), np.array(left_out))


def mean_replicates(values: Float[np.ndarray, " n"], blocks: Int[np.ndarray, " n"]) -> Replicates:
    """The replicates of a mean, from the sums of the blocks."""
    sums, counts = np.bincount(blocks, values), np.bincount(blocks)
    return Replicates(float(values.mean()), (sums.sum() - sums) / (counts.sum() - counts))


def by_prompt(values: Float[np.ndarray, " n"], groups: Int[np.ndarray, " n"]) -> Float[np.ndarray, " p"]:
    """The mean of the pictures of each prompt, which is what `paired_bootstrap` resamples; groups without any go."""
    counts = np.bincount(groups)
    return (np.bincount(groups, values) / np.maximum(counts, 1))[counts > 0]


def paired_bootstrap(
    differences: Float[np.ndarray, " p"], *, num_resamples: int = 10_000, coverage: float = COVERAGE, seed: int = 0
) -> Interval:
    """Mean of per-prompt scores, or of their differences between two models, with its percentile bootstrap interval.

    The prompts are resampled: `differences` has one number a prompt, so that both models share what is hard about it.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise DataError(f"scores shaped {values.shape} are not one number for each of two prompts or more")
    rng, count = np.random.default_rng(seed), len(values)
    rows = max(1, 2_000_000 // count)
    means = [
        values[rng.integers(count, size=(min(rows, num_resamples - first), count))].mean(axis=1)
        for first in range(0, num_resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [0.5 - coverage / 2, 0.5 + coverage / 2])
    return Interval(float(values.mean()), float(low), float(high))

"""The table of an ablation: each setting's figures with intervals, and the orders that the intervals allow to claim.

An interval holds two kinds of chance. That of the pictures: a block jackknife for the distance, a bootstrap over
prompts for adherence. And that of the training's seed: the spread between the seeds of one setting, pooled over all
settings that have several (of log distances, since distances differ manyfold), which rows of a single seed take too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit

from onestroke.ablation.scores import STEPS, Scores
from onestroke.evaluate.distances import frechet_distance
from onestroke.evaluate.intervals import Interval, block_jackknife, paired_bootstrap

Measure = Literal["distance", "adherence"]
MEASURES: tuple[Measure, ...] = ("distance", "adherence")
COVERAGE = 0.95
TINY = 1e-12  # below any distance that is not rounding


@dataclass(frozen=True)
class Reading:
    """One figure of one setting: the mean over its seeds (the geometric mean of distances), and each seed's."""

    measure: Measure
    steps: int
    value: float
    low: float
    high: float
    by_seed: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """A setting as measured. `failed`: why it has no readings."""

    group: str
    label: str
    paper: str
    seeds: tuple[int, ...]
    readings: tuple[Reading, ...]
    failed: str = ""

    def reading(self, measure: Measure, steps: int) -> Reading:
        return next(r for r in self.readings if (r.measure, r.steps) == (measure, steps))


@dataclass(frozen=True)
class Spread:
    """The standard deviation between seeds, and how many degrees of freedom tell it; none: 0 of 0."""

    deviation: float
    freedom: int

    def reach(self, num_seeds: int) -> float:
        """Half the interval that it adds to a mean of so many seeds; 0 where it is not known."""
        if not self.freedom:
            return 0.0
        return float(stdtrit(self.freedom, 0.5 + COVERAGE / 2)) * self.deviation / math.sqrt(num_seeds)


@dataclass(frozen=True)
class Claim:
    """An order of two rows of a group whose intervals do not touch."""

    group: str
    measure: Measure
    steps: int
    better: str
    worse: str


@dataclass(frozen=True)
class Measured:
    """A row's scores, one a seed."""

    group: str
    label: str
    paper: str
    seeds: tuple[int, ...]
    scores: tuple[Scores, ...]


def rows_of(measured: Sequence[Measured], reference: Float[np.ndarray, "n d"]) -> tuple[Row, ...]:
    """Every setting's readings at every number of steps."""
    readings: list[list[Reading]] = [[] for _ in measured]
    for measure in MEASURES:
        for steps in STEPS:
            columns = [_by_seed(one.scores, measure, steps, reference) for one in measured]
            settings = {tuple(map(id, one.scores)): values for one, values in zip(measured, columns, strict=True)}
            spread = pooled_spread(list(settings.values()))  # a setting that stands in two groups counts once
            for row, one, values in zip(readings, measured, columns, strict=True):
                row.append(_reading(one.scores, values, measure, steps, reference, spread))
    return tuple(
        Row(one.group, one.label, one.paper, one.seeds, tuple(row)) for one, row in zip(measured, readings, strict=True)
    )


def pooled_spread(groups: Sequence[Sequence[float]]) -> Spread:
    """The standard deviation within groups of two values or more, as one: sqrt(sum of squares / sum of (k - 1))."""
    groups = [np.asarray(values, dtype=np.float64) for values in groups if len(values) > 1]
    freedom = sum(len(values) - 1 for values in groups)
    squares = sum(float(np.square(values - values.mean()).sum()) for values in groups)
    return Spread(math.sqrt(squares / freedom), freedom) if freedom else Spread(0.0, 0)


def _by_seed(scores: Sequence[Scores], measure: Measure, steps: int, reference: np.ndarray) -> list[float]:
    """One number a seed, on the scale that means and spreads are taken on: log distance, plain adherence."""
    if measure == "distance":
        return [_log_distance(one.features[steps], reference) for one in scores]
    return [float(one.adherence[steps].mean()) for one in scores]


def _log_distance(features: np.ndarray, reference: np.ndarray) -> float:
    return math.log(max(TINY, frechet_distance(features, reference)))


def _reading(
    scores: Sequence[Scores],
    by_seed: Sequence[float],
    measure: Measure,
    steps: int,
    reference: np.ndarray,
    spread: Spread,
) -> Reading:
    if measure == "distance":
        features = [one.features[steps] for one in scores]

        def mean_log_distance(reference: np.ndarray, *features: np.ndarray) -> float:
            return float(np.mean([_log_distance(one, reference) for one in features]))

        drawn = block_jackknife(mean_log_distance, reference, *features).interval(coverage=COVERAGE)
    else:
        drawn = paired_bootstrap(np.mean([one.adherence[steps] for one in scores], axis=0), coverage=COVERAGE)
    whole = widened(drawn, spread.reach(len(scores)))
    back = math.exp if measure == "distance" else float
    ends = (back(whole.value), back(whole.low), back(whole.high))
    return Reading(measure, steps, *ends, tuple(map(back, by_seed)))


def widened(interval: Interval, reach: float) -> Interval:
    """The interval with an independent uncertainty of +- `reach` added in squares."""
    low = interval.value - math.hypot(interval.value - interval.low, reach)
    return Interval(interval.value, low, interval.value + math.hypot(interval.high - interval.value, reach))


def claims_of(rows: Sequence[Row]) -> tuple[Claim, ...]:
    """The orders within groups that may be claimed: of two rows whose intervals part. Lower distances are better."""
    claims = []
    for group in dict.fromkeys(row.group for row in rows):
        inside = [row for row in rows if row.group == group and not row.failed]
        for measure in MEASURES:
            for steps in STEPS:
                claims += _parted(group, measure, steps, {row.label: row.reading(measure, steps) for row in inside})
    return tuple(claims)


def _parted(group: str, measure: Measure, steps: int, readings: Mapping[str, Reading]) -> list[Claim]:
    is_low_good = measure == "distance"
    best_first = sorted(readings, key=lambda label: readings[label].value, reverse=not is_low_good)
    return [
        Claim(group, measure, steps, a, b)
        for a, b in combinations(best_first, 2)
        if (readings[a].high < readings[b].low if is_low_good else readings[a].low > readings[b].high)
    ]

"""What votes say: Elo by ADD's protocol, Bradley-Terry with bootstrap intervals, and how steady the voters are.

Ties count as half a win. Repeated pairs check the voter and never count in a rating.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import evalica
import numpy as np
import pandas as pd
from scipy.sparse.csgraph import connected_components
from scipy.stats import binomtest

from onestroke.arena.votes import QUESTIONS, Question, Vote
from onestroke.errors import DataError
from onestroke.evaluate.intervals import Interval

START, K = 1000.0, 1.0  # ADD's protocol (arXiv 2311.17042, appendix)
NUM_SHUFFLES = 1000
NUM_RESAMPLES = 1000
COVERAGE = 0.95


@dataclass(frozen=True)
class Games:
    """Comparisons as evalica reads them: who played whom, and who won."""

    xs: list[str]
    ys: list[str]
    winners: list[evalica.Winner]

    def __len__(self) -> int:
        return len(self.xs)

    @property
    def models(self) -> pd.Index:
        return pd.Index(sorted({*self.xs, *self.ys}))


@dataclass(frozen=True)
class Rating:
    """One model on one question, in Elo points: 400 more is ten times the odds; the average model has 1000."""

    model: str
    elo: Interval  # mean and interval over orders of the votes: the order's doing alone, not the sample's
    strength: Interval  # Bradley-Terry, with the bootstrap's interval over votes


@dataclass(frozen=True)
class Duel:
    """Two models against each other on one question."""

    first: str
    second: str
    wins: int  # of the first
    losses: int
    ties: int
    chance: Interval  # that the first is preferred, in [0, 1], by Bradley-Terry
    p_value: float  # of the exact two-sided sign test on the votes that are no ties

    @property
    def preferred(self) -> str | None:
        """The model that a preference is claimed for: the interval leaves out 1/2, and the sign test agrees.

        Both, because a bootstrap of few votes is too sure: of three wins in three it has no width.
        """
        if self.p_value >= 1 - COVERAGE or self.chance.low <= 0.5 <= self.chance.high:
            return None
        return self.first if self.chance.low > 0.5 else self.second

    def seen_from(self, model: str) -> Duel:
        """The same duel with `model`, one of the two, as the first."""
        if model == self.first:
            return self
        chance = Interval(1 - self.chance.value, 1 - self.chance.high, 1 - self.chance.low)
        return Duel(self.second, self.first, self.losses, self.wins, self.ties, chance, self.p_value)


@dataclass(frozen=True)
class Consistency:
    """One voter's answers to one question on pairs that were shown twice, with the sides swapped."""

    voter: str
    question: Question
    count: int
    same: int  # the same model, or a tie, both times
    opposite: int  # one model and then the other
    left: int  # all votes for the picture on the left, and
    right: int  # on the right: far apart, they tell of a habit


@dataclass(frozen=True)
class Outcome:
    """Everything on one question. `ratings`: strongest first."""

    question: Question
    num_votes: int
    ratings: tuple[Rating, ...]
    duels: tuple[Duel, ...]


@dataclass(frozen=True)
class Results:
    """What a votes file says."""

    num_votes: int
    num_repeats: int
    outcomes: tuple[Outcome, ...]
    consistency: tuple[Consistency, ...]


def results_of(votes: Sequence[Vote], *, seed: int = 0) -> Results:
    """All ratings. Raises DataError where no pair was judged."""
    num_repeats = sum(vote.is_repeat for vote in votes)
    if len(votes) == num_repeats:
        raise DataError("there is no vote yet", fix="Vote on a pair first: onestroke arena STUDENT TEACHER.")
    outcomes = tuple(outcome(votes, question, seed=seed) for question in QUESTIONS)
    voters = sorted({vote.voter for vote in votes})
    steadiness = tuple(consistency(votes, voter, question) for voter in voters for question in QUESTIONS)
    return Results(len(votes) - num_repeats, num_repeats, outcomes, steadiness)


def games_of(votes: Sequence[Vote], question: Question) -> Games:
    """The votes that count in a rating."""
    counted = [vote for vote in votes if not vote.is_repeat]
    winner = {"left": evalica.Winner.X, "right": evalica.Winner.Y, "tie": evalica.Winner.Draw}
    return Games(
        [vote.left for vote in counted],
        [vote.right for vote in counted],
        [winner[getattr(vote, question)] for vote in counted],
    )


def outcome(votes: Sequence[Vote], question: Question, *, seed: int = 0) -> Outcome:
    """Ratings and duels on one question."""
    games = games_of(votes, question)
    elo = elo_ratings(games, seed=seed)
    bootstrap = bradley_terry(games, seed=seed)
    strengths = bootstrap.result.scores
    ratings = [
        Rating(
            model,
            elo[model],
            Interval(float(strengths[model]), float(bootstrap.low[model]), float(bootstrap.high[model])),
        )
        for model in games.models
    ]
    duels = (_duel(votes, question, pair, bootstrap) for pair in combinations(games.models, 2))
    return Outcome(
        question,
        len(games),
        tuple(sorted(ratings, key=lambda rating: -rating.strength.value)),
        tuple(duel for duel in duels if duel.wins + duel.losses + duel.ties),
    )


def elo_ratings(games: Games, *, num_shuffles: int = NUM_SHUFFLES, seed: int = 0) -> dict[str, Interval]:
    """Mean rating over shuffled orders of the games, K = 1 from 1000, and where 95% of the orders end.

    With so small a K a model moves by half a point a game at most: few games say little about the distance.
    """
    rng, models = np.random.default_rng(seed), games.models
    ends = np.empty((num_shuffles, len(models)))
    for row in range(num_shuffles):
        order = rng.permutation(len(games))
        shuffled = ([column[i] for i in order] for column in (games.xs, games.ys, games.winners))
        ends[row] = evalica.elo(*shuffled, index=models, initial=START, k=K).scores.reindex(models)
    low, high = np.quantile(ends, [0.5 - COVERAGE / 2, 0.5 + COVERAGE / 2], axis=0)
    return {m: Interval(float(ends[:, i].mean()), float(low[i]), float(high[i])) for i, m in enumerate(models)}


def bradley_terry(games: Games, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> evalica.BootstrapResult:
    """Bradley-Terry strengths in Elo points, and their percentile bootstrap over votes."""
    if len(games) == 1:  # scipy's bootstrap wants two; a doubled game has the same estimate
        games = Games(games.xs * 2, games.ys * 2, games.winners * 2)
    return evalica.bootstrap(
        bradley_terry_points,
        games.xs,
        games.ys,
        games.winners,
        index=games.models,
        n_resamples=num_resamples,
        confidence_level=COVERAGE,
        bootstrap_method="percentile",
        random_state=seed,
    )


def bradley_terry_points(
    xs: Sequence[str],
    ys: Sequence[str],
    winners: Sequence[evalica.Winner],
    index: pd.Index,
    weights: Sequence[float] | None = None,
    **settings,
) -> evalica.BradleyTerryResult:
    """evalica's estimate as `1000 + 400 log10(strength / their geometric mean)`, finite for a shut-out too.

    Where somebody never won or never lost, the likelihood has no maximum (Ford 1957), and evalica answers that all are
    equal. Then every two models are given one tie more.
    """
    weights = [1.0] * len(xs) if weights is None else list(weights)
    if not _has_maximum(xs, ys, winners, index):
        pairs = list(combinations(index, 2))
        xs, ys = [*xs, *(a for a, _ in pairs)], [*ys, *(b for _, b in pairs)]
        winners = [*winners, *(evalica.Winner.Draw for _ in pairs)]
        weights += [1.0] * len(pairs)
    settings |= {"tolerance": 1e-9, "limit": 10_000}
    result = evalica.bradley_terry(xs, ys, winners, index=index, weights=weights, **settings)
    logs = np.log10(result.scores.reindex(index))
    return replace(result, scores=START + 400 * (logs - logs.mean()))


def _has_maximum(xs: Sequence[str], ys: Sequence[str], winners: Sequence[int], index: pd.Index) -> bool:
    """Whether every model can be reached from every other along wins and ties."""
    wins = np.zeros((len(index), len(index)))
    for x, y, winner in zip(index.get_indexer(xs), index.get_indexer(ys), winners):
        wins[x, y] += winner != evalica.Winner.Y
        wins[y, x] += winner != evalica.Winner.X
    return connected_components(wins, connection="strong")[0] == 1


def _duel(votes: Sequence[Vote], question: Question, pair: tuple[str, str], bootstrap: evalica.BootstrapResult) -> Duel:
    first, second = pair
    met = [vote.preferred(question) for vote in votes if vote.models == set(pair) and not vote.is_repeat]
    counts = Counter(met)
    strengths, resampled = bootstrap.result.scores, bootstrap.distribution
    chances = _chance(resampled[first] - resampled[second])
    low, high = np.quantile(chances, [0.5 - COVERAGE / 2, 0.5 + COVERAGE / 2])
    wins, losses = counts[first], counts[second]
    p_value = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    chance = Interval(float(_chance(strengths[first] - strengths[second])), float(low), float(high))
    return Duel(first, second, wins, losses, counts[None], chance, p_value)


def _chance(points):
    """The chance to be preferred with so many points more."""
    return 1 / (1 + 10 ** (-points / 400))


def consistency(votes: Sequence[Vote], voter: str, question: Question) -> Consistency:
    """Repeats against the first time that the voter saw the pair."""
    own = [vote for vote in votes if vote.voter == voter]
    firsts = {(v.prompt, v.seed, v.models): v for v in own if not v.is_repeat}
    twice = [(firsts.get((v.prompt, v.seed, v.models)), v) for v in own if v.is_repeat]
    answers = [(a.preferred(question), b.preferred(question)) for a, b in twice if a is not None]
    sides = Counter(getattr(vote, question) for vote in own)
    return Consistency(
        voter,
        question,
        len(answers),
        sum(a == b for a, b in answers),
        sum(a != b and a is not None and b is not None for a, b in answers),
        sides["left"],
        sides["right"],
    )

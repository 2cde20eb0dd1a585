"""Results as plain lines, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from onestroke.arena.ratings import Consistency, Duel, Outcome, Results
from onestroke.evaluate.intervals import Interval


def lines(results: Results) -> Iterator[str]:
    """Every rating with its interval, what is claimed, and how steady the voters were."""
    yield f"{results.num_votes} votes, and {results.num_repeats} repeats to check the voters"
    for outcome in results.outcomes:
        yield from ("", f"{outcome.question}:", *_outcome(outcome))
    yield from ("", "steadiness, on pairs shown twice:")
    yield from (f"  {_steadiness(row)}" for row in results.consistency)
    yield from ("", "Bradley-Terry's intervals: bootstrap over votes. Elo's: over orders of the votes alone.")


def _outcome(outcome: Outcome) -> Iterator[str]:
    width = max(len(rating.model) for rating in outcome.ratings)
    for rating in outcome.ratings:
        yield f"  {rating.model:<{width}}  Bradley-Terry {_points(rating.strength)}   Elo {_points(rating.elo, 2)}"
    yield from (f"  {_duel(duel)}" for duel in outcome.duels)


def _points(interval: Interval, digits: int = 0) -> str:
    return f"{interval.value:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _duel(duel: Duel) -> str:
    chance = f"{100 * duel.chance.value:.0f}% [{100 * duel.chance.low:.0f}, {100 * duel.chance.high:.0f}]"
    verdict = f"{duel.preferred} is preferred" if duel.preferred else "no preference can be claimed"
    return (
        f"{duel.first} against {duel.second}: {duel.wins} won, {duel.ties} tied, {duel.losses} lost; "
        f"chance {chance}, sign test p = {duel.p_value:.2g}: {verdict}"
    )


def _steadiness(row: Consistency) -> str:
    repeats = f"{row.same} of {row.count} the same, {row.opposite} opposite" if row.count else "no pair shown twice yet"
    return f"{row.voter}, {row.question}: {repeats}; left {row.left} times, right {row.right}"

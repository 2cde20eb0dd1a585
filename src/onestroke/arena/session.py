"""A voter's way through the trials: what is shown, what is kept, what is left."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock

from onestroke.arena.order import Trial
from onestroke.arena.pairs import Pair
from onestroke.arena.votes import Answer, Vote, VoteLog


@dataclass(frozen=True)
class Shown:
    """What the voter may know of a trial: nothing that tells the models, or a repeat, apart."""

    number: int  # from 1
    prompt: str
    left: str  # names of the pictures, made up for this session
    right: str


def _utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Session:
    """The state of one voter's session. Trials that the votes file has are passed over; calls may come from threads."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        labels: tuple[str, str],
        trials: Sequence[Trial],
        log: VoteLog,
        *,
        voter: str,
        now: Callable[[], str] = _utc_now,
    ) -> None:
        self.pairs, self.labels, self.trials, self.log, self.voter, self._now = pairs, labels, trials, log, voter, now
        voted = {(v.prompt, v.seed, v.models, v.is_repeat) for v in log.votes if v.voter == voter}
        self._left = [i for i, trial in enumerate(trials) if self._key(trial) not in voted]
        self._names = [(secrets.token_urlsafe(12), secrets.token_urlsafe(12)) for _ in trials]
        self._is_closed, self._lock = False, Lock()

    @property
    def is_finished(self) -> bool:
        """Whether every pair was voted on, or the voter has closed the session; no vote is taken any more."""
        return self._is_closed or not self._left

    @property
    def votes(self) -> list[Vote]:
        """All votes, of every voter, on these two models."""
        return [vote for vote in list(self.log.votes) if vote.models == frozenset(self.labels)]

    def shown(self) -> tuple[Shown | None, Shown | None]:
        """The trial to vote on, and the one after it, whose pictures the page may fetch beforehand."""
        coming = [] if self.is_finished else self._left[:2]
        found = [Shown(i + 1, self.pairs[self.trials[i].pair].prompt, *self._names[i]) for i in coming]
        return (*found, None, None)[:2]

    def picture(self, name: str) -> Path | None:
        """The file of a picture that is shown now or next; None for any other name."""
        for i in self._left[:2]:
            for side in (0, 1):
                if secrets.compare_digest(self._names[i][side].encode(), name.encode()):
                    trial = self.trials[i]
                    return self.pairs[trial.pair].pictures[side ^ trial.is_swapped]
        return None

    def vote(self, number: int, quality: Answer, adherence: Answer, *, seconds: float) -> bool:
        """Keep a vote on trial `number`; False where that is not the one to vote on, as after a double click."""
        with self._lock:
            if self.is_finished or number != self._left[0] + 1:
                return False
            trial = self.trials[self._left[0]]
            pair, (left, right) = self.pairs[trial.pair], self.labels[:: -1 if trial.is_swapped else 1]
            self.log.append(
                Vote(
                    voter=self.voter,
                    prompt=pair.prompt,
                    seed=pair.seed,
                    left=left,
                    right=right,
                    quality=quality,
                    adherence=adherence,
                    is_repeat=trial.is_repeat,
                    seconds=round(seconds, 2),
                    time=self._now(),
                )
            )
            del self._left[0]
            return True

    def close(self) -> None:
        """Take no more votes: the results may be seen now, and who has seen them votes no longer blind."""
        with self._lock:
            self._is_closed = True

    def _key(self, trial: Trial) -> tuple:
        pair = self.pairs[trial.pair]
        return (pair.prompt, pair.seed, frozenset(self.labels), trial.is_repeat)

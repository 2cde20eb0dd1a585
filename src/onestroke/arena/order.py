"""In which order a voter sees the pairs, which picture stands left, and which pairs come twice."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

REPEAT_SHARE = 0.15  # of the pairs come a second time, their sides swapped
GAP = 6  # trials at least between the two times, where there are so many


@dataclass(frozen=True)
class Trial:
    """One showing of a pair."""

    pair: int
    is_swapped: bool  # the second model stands on the left
    is_repeat: bool = False


def make_trials(num_pairs: int, *, voter: str, seed: int = 0) -> tuple[Trial, ...]:
    """The trials of a voter, the same at every call; each side has the first model in half of the pairs."""
    digest = hashlib.blake2b(f"{seed}/arena/{voter}".encode(), digest_size=8).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "little"))
    swapped = rng.permutation(np.arange(num_pairs) % 2 == rng.integers(2))
    firsts = [Trial(int(pair), bool(swapped[i])) for i, pair in enumerate(rng.permutation(num_pairs))]
    early = max(1, num_pairs - GAP)  # later ones have no room for a second time
    repeated = rng.choice(early, size=min(early, round(REPEAT_SHARE * num_pairs)), replace=False)
    placed = [(float(i), trial) for i, trial in enumerate(firsts)]
    for i in repeated:
        first = firsts[i]
        place = rng.uniform(min(i + GAP, num_pairs), num_pairs)
        placed.append((place, Trial(first.pair, not first.is_swapped, is_repeat=True)))
    return tuple(trial for _, trial in sorted(placed, key=lambda item: item[0]))

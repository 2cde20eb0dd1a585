"""What single pictures are worth, and which part of what was seen is what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from onestroke.evaluate.adherence import AdherenceScore, adherence
from onestroke.evaluate.collect import Collected
from onestroke.evaluate.scorers import OTHER

NameValues = Callable[[Float[np.ndarray, "n d"]], Sequence[Mapping[str, str]]]


@dataclass(frozen=True)
class Networks:
    """Which parts of what was seen are what. `distances`: feature network -> the set distances taken on it.

    `trained_against`: networks that the student's discriminator saw, whose figures gate nothing. `judge`: the network
    whose features `name_values` turns into attribute values. `primary`: the one that is meant where none is named.
    """

    distances: Mapping[str, tuple[str, ...]]
    scorers: tuple[str, ...] = ()
    trained_against: frozenset[str] = frozenset()
    judge: str = ""
    name_values: NameValues | None = None

    @property
    def primary(self) -> str:
        names = [name for name, kinds in self.distances.items() if "fd" in kinds]
        return next((name for name in names if name not in self.trained_against), names[0] if names else "")


@dataclass(frozen=True)
class Scored:
    """Scores with one number a picture, by measure and set; `adherence` in full, by set."""

    rows: Mapping[str, Mapping[str, Float[np.ndarray, " n"]]]
    adherence: Mapping[str, AdherenceScore]


def score(collected: Collected, networks: Networks) -> Scored:
    """What single pictures are worth: adherence by the judge, and the scorers."""
    rows: dict[str, dict[str, np.ndarray]] = {}
    for name in networks.scorers:
        key = name.replace("-", "_")
        for part, of in ((name, key), (name + OTHER, key + OTHER)):
            rows[of] = {label: seen.parts[part][:, 0].astype(float) for label, seen in collected.sets.items()}
    named = [collected.plan.prompts.named[collected.plan.groups[row]] for row in collected.rows] if (
        networks.name_values and collected.plan.prompts.named
    ) else []  # fmt: skip
    if not any(named):
        return Scored(rows, {})
    judged = {label: networks.name_values(seen.parts[networks.judge]) for label, seen in collected.sets.items()}
    adherences = {label: adherence(named, values, reference=named) for label, values in judged.items()}
    rows["adherence"] = {label: np.array(one.per_prompt) for label, one in adherences.items()}
    return Scored(rows, adherences)

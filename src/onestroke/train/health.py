"""What is going wrong in a run, in words: from the numbers of its steps, and from pictures that the student draws.

Losses alone do not tell: a student that draws one picture for every prompt can have losses as healthy as any.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import UInt8

from onestroke.distill.add import DISCRIMINATOR, STUDENT

WINDOW = 50  # steps of the discriminator that are judged together
WON_HINGE = 0.1  # per head; near 1 while student and discriminator are a match
WON_SHARE = 0.98  # of positions that the heads tell right
FALLEN = 0.5  # of the highest value so far
CELLS = 16  # pictures are compared at so many cells a side, so that what differs is what they show and not their grain


@dataclass(frozen=True)
class Alarm:
    """What is wrong, by the figures that say so, and the knob to turn."""

    name: str
    player: str
    what: str
    knob: str

    def __str__(self) -> str:
        return f"{self.what}. {self.knob}"


class Health:
    """Judges a run as it goes. An alarm is told once, and again only after it had ended.

    It begins anew with the process: what was best before a restart is forgotten.
    """

    def __init__(self) -> None:
        self._hinges: deque[float] = deque(maxlen=WINDOW)
        self._shares: deque[float] = deque(maxlen=WINDOW)
        self._highest: dict[str, float] = {}
        self._told: set[str] = set()

    def after_step(self, terms: Mapping[str, float]) -> list[Alarm]:
        """Alarms that begin with a step of these numbers."""
        signs = [
            value
            for name, value in terms.items()
            if name.startswith((f"{DISCRIMINATOR}/real_positive_", f"{DISCRIMINATOR}/fake_negative_"))
        ]
        if not signs:
            return []
        hinge = terms[f"{DISCRIMINATOR}/hinge"] / (len(signs) / 2)
        self._hinges.append(hinge)
        self._shares.append(sum(signs) / len(signs))
        mean_hinge, mean_share = np.mean(self._hinges), np.mean(self._shares)
        has_won = len(self._hinges) == WINDOW and mean_hinge < WON_HINGE and mean_share > WON_SHARE
        alarm = Alarm(
            "discriminator_winning",
            DISCRIMINATOR,
            f"The discriminator is winning: it tells {100 * mean_share:.0f}% right, at a hinge loss of "
            f"{mean_hinge:.2f} a head (near 1 while the two are a match)",
            "Lower discriminator_optimizer.learning_rate, raise losses.r1_gamma, or set "
            "discriminator_optimizer.every=2.",
        )
        return self._begun({alarm: has_won})

    def after_pictures(self, which: str, over_seeds: float, over_prompts: float) -> list[Alarm]:
        """Alarms that begin with these spreads (see `spreads`) of pictures by the "live" or the "average" weights."""
        seeds, prompts = self._share(f"{which} seeds", over_seeds), self._share(f"{which} prompts", over_prompts)
        diversity = Alarm(
            f"diversity_falling_{which}",
            STUDENT,
            f"Diversity is falling: pictures of one prompt differ {100 * seeds:.0f}% as much as at best so far "
            f"({which} weights)",
            "Lower student_optimizer.learning_rate, or raise losses.distill_weight.",
        )
        prompt = Alarm(
            f"prompt_ignored_{which}",
            STUDENT,
            f"The student is ignoring the prompt: pictures of other prompts differ {100 * prompts:.0f}% as much as at "
            f"best so far ({which} weights)",
            "Raise losses.distill_weight, set discriminator.conditioning to text or both, or lower "
            "student_optimizer.learning_rate.",
        )
        return self._begun({diversity: seeds < FALLEN, prompt: prompts < FALLEN})

    def _share(self, name: str, value: float) -> float:
        """`value` as a share of the highest so far."""
        self._highest[name] = max(value, self._highest.get(name, 0.0))
        return value / self._highest[name] if self._highest[name] else 1.0

    def _begun(self, alarms: Mapping[Alarm, bool]) -> list[Alarm]:
        begun = [alarm for alarm, rings in alarms.items() if rings and alarm.name not in self._told]
        self._told -= {alarm.name for alarm, rings in alarms.items() if not rings}
        self._told |= {alarm.name for alarm in begun}
        return begun


def spreads(pictures: UInt8[np.ndarray, "p s h w 3"]) -> tuple[float, float]:
    """How much the pictures of p prompts by s seeds each differ: over the seeds of a prompt, and over the prompts.

    Root mean square differences at 16 x 16 cells, in units of the 256 levels; over prompts, of the same seed.
    """
    _, _, height, width, _ = pictures.shape
    rows, columns = (np.arange(min(CELLS, side)) * side // min(CELLS, side) for side in (height, width))
    cells = np.add.reduceat(np.add.reduceat(pictures.astype(np.float64), rows, axis=2), columns, axis=3)
    areas = np.outer(np.diff([*rows, height]), np.diff([*columns, width]))
    means = cells / areas[:, :, None]
    return _mean_difference(means.swapaxes(0, 1)), _mean_difference(means)


def _mean_difference(pictures: np.ndarray) -> float:
    """The root mean square difference of pictures that differ in the first axis, averaged over their pairs."""
    pairs = [np.sqrt(np.square(a - b).mean(axis=(1, 2, 3))).mean() for a, b in combinations(pictures, 2)]
    return float(np.mean(pairs)) if pairs else 0.0

"""What an evaluation found, as data: readings with intervals and targets, flags, groups, outcomes of the gate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Role = Literal["teacher", "student", "reference"]
Form = Literal["number", "percent", "times", "points", "count"]


@dataclass(frozen=True)
class Measured:
    """One measure of one set: `key` as in the catalog, `label` the set, `network` what it was seen with.

    `count`: pictures of each set; where a column of the prompts was grouped by, `column` and `group` say which.
    """

    key: str
    label: str
    value: float
    low: float | None
    high: float | None
    count: int
    steps: int | None = None
    network: str = ""
    role: Role = "reference"
    column: str = ""
    group: str = ""


@dataclass(frozen=True)
class Missing:
    """Something that was not measured: its name, why, and the way to get it."""

    name: str
    why: str
    fix: str


@dataclass(frozen=True)
class Outcome:
    """What became of one condition of the gate: `line` says it all."""

    passed: bool
    line: str


@dataclass(frozen=True)
class Flag:
    """A set that is broken in one way: its whole interval lies beyond the measure's alarm."""

    label: str
    key: str
    network: str
    says: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Target:
    """A limit in the figure's own unit, e.g. Target("at most", 2.0, name="required")."""

    bound: Literal["at most", "at least"]
    limit: float
    name: str = "target"

    def met(self, value: float) -> bool:
        """Whether `value` lies on the right side; a value that is not a number does not."""
        return value <= self.limit if self.bound == "at most" else value >= self.limit


@dataclass(frozen=True)
class Reading:
    """One model's value of a figure, with its 95% interval."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    role: Role = "reference"
    targets: tuple[Target, ...] = ()

    def certain(self, target: Target) -> bool:
        """Whether the whole interval lies on the same side of the target as the value (False without interval)."""
        if self.low is None or self.high is None:
            return False
        return target.met(self.low) == target.met(self.high) == target.met(self.value)


@dataclass(frozen=True)
class Figure:
    """One measure and what each model reads on it; the teacher at 1 step belongs beside the student.

    `form`: how values are written. A "percent" is stored as a share in [0, 1], "points" as a difference of shares.
    """

    name: str
    meaning: str  # for a reader who has never met the measure
    readings: tuple[Reading, ...]
    better: Literal["lower", "higher", "neither"] = "lower"
    form: Form = "number"
    features: str = ""  # the network whose features were compared
    count: int | None = None  # pictures of each set
    question: str = ""  # what the figure helps to answer: figures of one question stand together
    is_trained_against: bool = False  # the student's discriminator saw these features
    log: bool | None = None  # scale of the drawing; None: logarithmic where values differ more than twentyfold

    @property
    def is_log(self) -> bool:
        values = [x for r in self.readings for x in (r.value, r.low, r.high) if x is not None and math.isfinite(x)]
        above_zero = bool(values) and min(values) > 0
        return above_zero and (self.log if self.log is not None else max(values) > 20 * min(values))

    @property
    def ends(self) -> tuple[float, float]:
        """Where the drawing begins and ends: room for every value, interval and limit."""
        values = [x for r in self.readings for x in (r.value, r.low, r.high, *(t.limit for t in r.targets))]
        values = [x for x in values if x is not None and math.isfinite(x)] or [0.0]
        if self.is_log:
            positive = [x for x in values if x > 0]
            return min(positive) / 1.15, max(positive) * 1.15
        low, high = min(0.0, *values), max(0.0, *values)
        room = 0.04 * (high - low) or 1.0
        return low - room * (low < 0), high + room


@dataclass(frozen=True)
class Highlight:
    """One large number of the page's head, already written out ("38×"), and what it says."""

    value: str
    label: str


@dataclass(frozen=True)
class Note:
    """A paragraph on what the numbers mean, or what to be careful about."""

    heading: str
    text: str


@dataclass(frozen=True)
class GroupTable:
    """One student by the values of one column of the prompts. `heads`: title, network and form of each cell."""

    column: str
    label: str
    heads: tuple[tuple[str, str, Form], ...]
    rows: tuple[tuple[str, int, tuple[Reading | None, ...]], ...]  # value of the column, pictures, cells

"""Draw and look: every set of pictures becomes rows of numbers, a few pictures in memory at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from onestroke.errors import ModelError
from onestroke.evaluate.drawn import MeasureCache
from onestroke.evaluate.observer import Observer
from onestroke.evaluate.pictures import DrawnSet, Failed, PictureSet, Role
from onestroke.evaluate.prompts import PromptSet

CHUNK = 100  # pictures that are held at once
QUICK = 0.3  # what a picture that is not drawn costs, in UNet evaluations: to be read and looked at
OnProgress = Callable[[str, int, int, float | None], None]  # what, done, total, seconds left


@dataclass(frozen=True)
class Plan:
    """What is compared. Row i of every set belongs to prompt `groups[i]` of `prompts`; all sets have equally many rows.

    `reference`: the real pictures that distances are taken to. `base`: the teacher that the student is to replace.
    `varied`: label -> several pictures of each of a few prompts, side by side, `repeats` of each.
    `students`: labels of the sets that are judged, by number of steps.
    """

    prompts: PromptSet
    groups: Int[np.ndarray, " n"]
    reference: PictureSet
    sets: tuple[PictureSet, ...]
    base: str
    students: Mapping[int, str]
    varied: Mapping[str, DrawnSet] = field(default_factory=dict)
    repeats: int = 5
    floor: str | None = None  # the teacher once more, with other seeds
    real: str | None = None  # real pictures other than the reference


@dataclass(frozen=True)
class Observed:
    """What was seen in a set. A row that failed holds NaN, and its reason stands in `failures`."""

    label: str
    role: Role
    steps: int | None
    parts: Mapping[str, Float[np.ndarray, "n d"]]
    failures: Mapping[int, str]

    def __getitem__(self, rows: Int[np.ndarray, " m"]) -> Observed:
        return Observed(self.label, self.role, self.steps, {n: v[rows] for n, v in self.parts.items()}, {})


@dataclass(frozen=True)
class Collected:
    """All that was seen, on the `rows` of the plan that no set failed on.

    `reference` and `sets` hold those rows only. `failures`: label -> row of the plan -> reason.
    """

    plan: Plan
    rows: Int[np.ndarray, " n"]
    reference: Observed
    sets: Mapping[str, Observed]
    varied: Mapping[str, Observed]
    failures: Mapping[str, Mapping[int, str]]

    @property
    def groups(self) -> Int[np.ndarray, " n"]:
        """The prompt of each row, numbered anew from 0 without gaps."""
        return np.unique(self.plan.groups[self.rows], return_inverse=True)[1]

    def subset(self, rows: Int[np.ndarray, " m"]) -> Collected:
        """Only some of the rows, given by their place in `rows`."""
        sets = {label: seen[rows] for label, seen in self.sets.items()}
        return Collected(self.plan, self.rows[rows], self.reference[rows], sets, {}, {})


class Effort:
    """Counts work in UNet evaluations, and from the pace so far tells the time that is left."""

    def __init__(self, plan: Plan, on_progress: OnProgress, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.on_progress, self.clock, self.started = on_progress, clock, clock()
        self.sets = [plan.reference, *plan.sets, *plan.varied.values()]
        self.costs = [_cost(pictures) for pictures in self.sets]
        self.undrawn = [s.missing() if isinstance(s, DrawnSet) else 0 for s in self.sets]
        self.total = sum(_whole(*x) for x in zip(self.sets, self.costs, self.undrawn, strict=True))
        self.spent = 0.0

    def tell(self, place: int, done: int) -> None:
        """Set number `place` has `done` of its pictures."""
        pictures, earlier = self.sets[place], slice(0, place)
        before = zip(self.sets[earlier], self.costs[earlier], self.undrawn[earlier], strict=True)
        this = _whole(pictures, self.costs[place], self.undrawn[place]) * done / max(1, len(pictures))
        self.spent = sum(_whole(*x) for x in before) + this
        elapsed = self.clock() - self.started
        is_telling = elapsed > 5 and self.spent > 0.01 * self.total
        left = elapsed * (self.total - self.spent) / self.spent if is_telling else None
        self.on_progress(pictures.label, done, len(pictures), left)


def _cost(pictures: PictureSet) -> float:
    if not isinstance(pictures, DrawnSet):
        return QUICK
    return pictures.way.steps * (2 if pictures.way.guidance > 1 else 1) + 1.0  # and the VAE


def _whole(pictures: PictureSet, cost: float, undrawn: int) -> float:
    return undrawn * cost + len(pictures) * QUICK


def collect(
    plan: Plan,
    observers: Sequence[Observer],
    cache: MeasureCache,
    *,
    spread_observers: Sequence[Observer] = (),
    on_progress: OnProgress = lambda what, done, total, left: None,
) -> Collected:
    """Draw what is not in the cache and look at everything; a killed run goes on where it stopped.

    `spread_observers` look at the `varied` pictures. Rows that any set failed on are left out of all: counts stay equal
    and pairs whole. Raises ModelError where a model draws nothing at all.
    """
    effort = Effort(plan, on_progress)
    seen: list[Observed] = []
    for place, pictures in enumerate(effort.sets):
        looking = observers if place <= len(plan.sets) else spread_observers
        seen.append(observe(pictures, looking, cache, on_picture=lambda done, place=place: effort.tell(place, done)))
    reference, sets, varied = seen[0], seen[1 : 1 + len(plan.sets)], seen[1 + len(plan.sets) :]
    failed = {row for one in (reference, *sets) for row in one.failures}
    rows = np.array([row for row in range(len(plan.groups)) if row not in failed], dtype=np.int64)
    failures = {one.label: one.failures for one in (reference, *sets, *varied) if one.failures}
    return Collected(
        plan,
        rows,
        reference[rows],
        {one.label: one[rows] for one in sets},
        dict(zip(plan.varied, _without_failed(varied, plan.repeats), strict=True)),
        failures,
    )


def _without_failed(varied: Sequence[Observed], repeats: int) -> list[Observed]:
    """Without the prompts of which any set failed on a picture."""
    count = len(next(iter(varied[0].parts.values()))) // repeats if varied and varied[0].parts else 0
    broken = {row // repeats for one in varied for row in one.failures}
    rows = np.array([p * repeats + r for p in range(count) if p not in broken for r in range(repeats)], dtype=np.int64)
    return [one[rows] for one in varied]


def observe(
    pictures: PictureSet,
    observers: Sequence[Observer],
    cache: MeasureCache,
    *,
    on_picture: Callable[[int], None] = lambda done: None,
) -> Observed:
    """What the observers see in a set, `CHUNK` pictures at a time."""
    parts: dict[str, list[np.ndarray]] = {name: [] for observer in observers for name in observer.parts}
    failures: dict[int, str] = {}
    for first in range(0, len(pictures), CHUNK):
        rows = range(first, min(first + CHUNK, len(pictures)))
        for observer, seen in zip(
            observers, _look(pictures, rows, observers, cache, failures, on_picture), strict=True
        ):
            for name, part in observer.split(seen).items():
                parts[name].append(part)
        if len(failures) == rows.stop:
            reason = failures[0]
            raise ModelError(f"no picture could be drawn ({reason})", where=pictures.label, fix="Try the model alone.")
        on_picture(rows.stop)
    steps = pictures.way.steps if isinstance(pictures, DrawnSet) else None
    whole = {name: np.concatenate(some) for name, some in parts.items()}
    return Observed(pictures.label, pictures.role, steps, whole, failures)


def _look(
    pictures: PictureSet,
    rows: range,
    observers: Sequence[Observer],
    cache: MeasureCache,
    failures: dict[int, str],
    on_picture: Callable[[int], None],
) -> list[np.ndarray]:
    """The rows of each observer for a run of pictures, from the cache where all are there."""
    keys = [f"{pictures.key(row)} {pictures.prompt(row)}" for row in rows]
    names = [f"{observer.name}-{observer.version}" for observer in observers]
    kept = [cache.load(name, keys) for name in names]
    if all(part is not None for part in kept):
        return [part for part in kept if part is not None]
    found: dict[int, np.ndarray] = {}
    for number, (row, picture) in enumerate(pictures.read(rows), start=1):
        if isinstance(picture, Failed):
            failures[row] = picture.reason
        else:
            found[row] = picture
        on_picture(rows.start + number)
    good = sorted(found)
    stack = np.stack([found[row] for row in good]) if good else None
    prompts = [pictures.prompt(row) for row in good]
    for i, observer in enumerate(observers):
        if kept[i] is None:
            seen = np.full((len(rows), sum(observer.parts.values())), np.nan, dtype=np.float32)
            if stack is not None:
                seen[[row - rows.start for row in good]] = observer.observe(stack, prompts)
            kept[i] = seen
            if len(good) == len(rows):  # what failed may succeed the next time
                cache.save(names[i], keys, seen)
    return [part for part in kept if part is not None]

"""From what was seen to what it says: every measure with its interval, for all prompts or for a group of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from onestroke.errors import DataError
from onestroke.evaluate.adherence import AdherenceScore, adherence
from onestroke.evaluate.collect import Collected, Observed
from onestroke.evaluate.distances import (
    Gaussian,
    block_gaussians,
    cubic_kernel,
    frechet_replicates,
    gaussian_kernel,
    kernel_replicates,
    seed_spread,
)
from onestroke.evaluate.features import STYLE
from onestroke.evaluate.findings import Measured, Missing
from onestroke.evaluate.intervals import (
    NUM_BLOCKS,
    Interval,
    Replicates,
    blocks_of,
    by_prompt,
    mean_replicates,
    paired_bootstrap,
)
from onestroke.evaluate.neighbours import Manifold, manifold, neighbourhood
from onestroke.evaluate.pictures import DrawnSet
from onestroke.evaluate.quality import GRIDS, grid_amplitude
from onestroke.evaluate.scorers import OTHER

NEEDED = 2 * NUM_BLOCKS  # prompts that an interval of a set needs
MOST_NEIGHBOURS = 10_000  # pictures of each set in precision, recall, density and coverage: their cost is the square
REFERENCE = ""  # the label under which the reference's features stand beside those of the sets
LOOKS = ("saturation", "contrast", "sharpness")
KERNELS = {"kd": cubic_kernel, "cmmd": gaussian_kernel}
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


def measure_all(collected: Collected, scored: Scored, networks: Networks) -> tuple[list[Measured], list[Missing]]:
    """Every measure of every set; what there are too few pictures for is told with the number that it needs."""
    found, missing = _measure(collected, scored, networks, with_reference=True)
    sizes = [len(rows) for seen in collected.varied.values() for rows in seen.parts.values()]
    if sizes:
        count = sizes[0] // collected.plan.repeats
        if count < NEEDED:
            missing.append(_too_few("spread over seeds", count))
        else:
            found += _spread(collected, networks)
    found += _failures(collected)
    return found, missing


def measure_groups(
    collected: Collected, scored: Scored, networks: Networks, groupings: Mapping[str, Sequence[str]]
) -> tuple[list[Measured], list[Missing]]:
    """The same within each value of each column, but against the teacher only: the real pictures have no columns."""
    found: list[Measured] = []
    missing: list[Missing] = []
    for column, values in groupings.items():
        small: list[str] = []
        of_row = np.array([values[i] for i in collected.plan.groups[collected.rows]])
        for value in sorted(set(of_row)):
            rows = np.flatnonzero(of_row == value)
            part = Scored({k: {s: v[rows] for s, v in of.items()} for k, of in scored.rows.items()}, {})
            some, lacking = _measure(collected.subset(rows), part, networks, with_reference=False)
            found += [replace(one, column=column, group=str(value)) for one in some]
            small += [f"{value} ({len(rows)})"] if lacking else []
        if small:
            why = f"too few pictures in {', '.join(small)}"
            missing.append(
                Missing(f"by {column}: distances, looks and ratios", why, f"A group takes {NEEDED} prompts.")
            )
    return found, missing


def _measure(
    collected: Collected, scored: Scored, networks: Networks, *, with_reference: bool
) -> tuple[list[Measured], list[Missing]]:
    groups, found, missing = collected.groups, [], []
    num_prompts = int(groups.max()) + 1 if len(groups) else 0
    if num_prompts < 2:
        return [], [Missing("everything", f"{num_prompts} prompts are too few", "Take 2 prompts at least.")]
    found += _scores(collected, scored)
    if num_prompts < NEEDED:
        return found, [_too_few("set distances, looks and every ratio", num_prompts)]
    blocks = blocks_of(groups)
    found += [*_kept(collected, scored, blocks), *_looks(collected, blocks), *_style(collected, groups, blocks)]
    for network, kinds in networks.distances.items():
        # a group is small, and the Fréchet distance biased and slow: kernel distances only
        some = kinds if with_reference else [kind for kind in kinds if kind != "fd"]
        found += _distances(collected, network, some, blocks, with_reference=with_reference)
    if with_reference:
        for network in networks.distances:
            found += _neighbours(collected, network, blocks)
    return found, missing


def _failures(collected: Collected) -> Iterator[Measured]:
    """Pictures that could not be drawn, of each student and of whatever else failed."""
    plan = collected.plan
    for pictures in (plan.reference, *plan.sets, *plan.varied.values()):
        count = len(collected.failures.get(pictures.label, {}))
        if count or pictures.label in plan.students.values():
            steps = pictures.way.steps if isinstance(pictures, DrawnSet) else None
            yield Measured("failed", pictures.label, count, None, None, len(pictures), steps, "", pictures.role)


def _too_few(name: str, count: int) -> Missing:
    return Missing(name, f"{count} prompts are too few", f"Take {NEEDED} at least: --num-images {NEEDED}.")


def _distances(
    collected: Collected, network: str, kinds: Iterable[str], blocks: Int[np.ndarray, " n"], *, with_reference: bool
) -> Iterator[Measured]:
    base = collected.plan.base
    features = {
        label: seen.parts[network] for label, seen in (*collected.sets.items(), (REFERENCE, collected.reference))
    }

    fitted: dict[str, tuple[Gaussian, ...]] = {}

    def against(other: str, kind: str, label: str) -> Replicates:
        if kind != "fd":
            return kernel_replicates(features[label], features[other], blocks, kernel=KERNELS[kind])
        for name in (label, other):
            fitted[name] = fitted.get(name) or block_gaussians(features[name], blocks)
        return frechet_replicates(fitted[label], fitted[other])

    def ends(kind: str, distance: Replicates) -> Interval:
        return _within(distance.interval(), 0.0, None) if kind == "fd" else distance.interval()

    for kind in kinds:
        if with_reference:
            to_real = {label: against(REFERENCE, kind, label) for label in collected.sets}
            yield from (_of_set(collected, kind, label, ends(kind, r), network) for label, r in to_real.items())
            if kind == "fd":
                ratios = {label: r / to_real[base] for label, r in to_real.items() if _is_drawn(collected, label)}
                yield from (_of_set(collected, "fd_ratio", k, r.interval(), network) for k, r in ratios.items())
        for label in collected.sets:
            if label != base:
                distance = against(base, kind, label)
                yield _of_set(collected, f"{kind}_teacher", label, ends(kind, distance), network)


def _neighbours(collected: Collected, network: str, blocks: Int[np.ndarray, " n"]) -> Iterator[Measured]:
    some = slice(0, MOST_NEIGHBOURS)
    if len(blocks) > MOST_NEIGHBOURS:  # whole prompts, in as many blocks
        blocks = blocks_of(np.unique(collected.groups[some], return_inverse=True)[1])
    try:
        real: Manifold = manifold(collected.reference.parts[network][some], blocks)
    except DataError:
        return
    for label, seen in collected.sets.items():
        there = neighbourhood(real, manifold(seen.parts[network][some], blocks))
        for key in ("precision", "recall", "density", "coverage"):
            most = None if key == "density" else 1.0
            measured = _of_set(collected, key, label, _within(getattr(there, key).interval(), 0.0, most), network)
            yield replace(measured, count=len(blocks))


def _within(interval: Interval, least: float, most: float | None) -> Interval:
    """The interval without values that the measure cannot take."""
    return Interval(interval.value, *(float(np.clip(end, least, most)) for end in (interval.low, interval.high)))


def _scores(collected: Collected, scored: Scored) -> Iterator[Measured]:
    base, groups = collected.plan.base, collected.groups
    for key, by_label in scored.rows.items():
        if key.endswith(OTHER):
            continue
        for label, values in by_label.items():
            yield _of_set(collected, key, label, paired_bootstrap(by_prompt(values, groups), num_resamples=2000))
        for label in _compared(collected):
            drop = paired_bootstrap(by_prompt(by_label[base] - by_label[label], groups))
            yield _of_set(collected, f"{key}_drop", label, drop)


def _kept(collected: Collected, scored: Scored, blocks: Int[np.ndarray, " n"]) -> Iterator[Measured]:
    """What is left of the teacher's heed of the prompt: adherence is corrected for chance, scores by another prompt."""
    for key, by_label in scored.rows.items():
        if key.endswith(OTHER):
            continue
        other = scored.rows.get(key + OTHER)
        heed = {label: values - other[label] if other else values for label, values in by_label.items()}
        whole = {label: mean_replicates(values, blocks) for label, values in heed.items()}
        for label in _compared(collected):
            yield _of_set(collected, f"{key}_kept", label, (whole[label] / whole[collected.plan.base]).interval())


def _looks(collected: Collected, blocks: Int[np.ndarray, " n"]) -> Iterator[Measured]:
    base = collected.sets[collected.plan.base]
    for key in LOOKS:
        means = {label: mean_replicates(seen.parts[key][:, 0], blocks) for label, seen in collected.sets.items()}
        yield from (_of_set(collected, key, label, mean.interval()) for label, mean in means.items())
        for label in _compared(collected):
            yield _of_set(collected, f"{key}_ratio", label, (means[label] / means[base.label]).interval())
    for grid in GRIDS:
        part = f"grid {grid.name}"
        if not base.parts[part].any():  # pictures too small for it
            continue
        for label in _compared(collected):
            amplitude = grid_amplitude(collected.sets[label].parts[part], base.parts[part], blocks)
            yield _of_set(collected, "grid", label, amplitude, grid.name)


def _style(collected: Collected, groups: Int[np.ndarray, " n"], blocks: Int[np.ndarray, " n"]) -> Iterator[Measured]:
    """How far pictures stray from the mean style of their model's pictures, where prompts name styles of that style."""
    if STYLE not in collected.reference.parts:
        return
    styles = collected.plan.prompts.columns.get("style")
    names = [styles[i] if styles else "" for i in collected.plan.groups[collected.rows]]
    of = np.unique(names, return_inverse=True)[1]
    scale = collected.sets[collected.plan.base].parts[STYLE].std(axis=0).clip(1e-6)
    spreads = {}
    for label in (collected.plan.base, *_compared(collected)):
        rows = collected.sets[label].parts[STYLE] / scale
        means = np.stack([rows[of == k].mean(axis=0) for k in range(int(of.max()) + 1)])
        spreads[label] = mean_replicates(np.linalg.norm(rows - means[of], axis=1), blocks)
    for label, spread in spreads.items():
        yield _of_set(collected, "style_spread", label, spread.interval(), STYLE)
        if label != collected.plan.base:
            ratio = (spread / spreads[collected.plan.base]).interval()
            yield _of_set(collected, "style_spread_ratio", label, ratio, STYLE)


def _spread(collected: Collected, networks: Networks) -> Iterator[Measured]:
    for network in networks.distances:
        spreads = {
            label: seed_spread(_by_prompt(seen, network, collected.plan.repeats))
            for label, seen in collected.varied.items()
            if network in seen.parts
        }
        if collected.plan.base not in spreads:
            continue
        count = len(spreads[collected.plan.base]) * collected.plan.repeats
        blocks = blocks_of(np.arange(len(spreads[collected.plan.base])))
        means = {label: mean_replicates(values, blocks) for label, values in spreads.items()}
        for label, mean in means.items():
            yield replace(_of_set(collected, "spread", label, mean.interval(), network), count=count)
            if label != collected.plan.base:
                ratio = (mean / means[collected.plan.base]).interval()
                yield replace(_of_set(collected, "spread_ratio", label, ratio, network), count=count)


def _by_prompt(seen: Observed, network: str, repeats: int) -> Float[np.ndarray, "p s d"]:
    features = seen.parts[network]
    return features.reshape(-1, repeats, features.shape[1])


def _is_drawn(collected: Collected, label: str) -> bool:
    return collected.sets[label].role != "reference" and label != collected.plan.base


def _compared(collected: Collected) -> list[str]:
    """The drawn sets other than the base: the students, and the teacher at few steps or with other seeds."""
    return [label for label in collected.sets if _is_drawn(collected, label)]


def _of_set(collected: Collected, key: str, label: str, interval: Interval, network: str = "") -> Measured:
    seen = collected.sets[label]
    return Measured(
        key, label, interval.value, interval.low, interval.high, len(collected.rows), seen.steps, network, seen.role
    )

"""From what was seen to what it says: every measure with its interval, for all prompts or for a group of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int

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
from onestroke.evaluate.neighbours import manifold, neighbourhood
from onestroke.evaluate.pictures import DrawnSet
from onestroke.evaluate.quality import GRIDS, grid_amplitude
from onestroke.evaluate.scored import Networks, Scored
from onestroke.evaluate.scorers import OTHER

NEEDED = 2 * NUM_BLOCKS  # prompts that an interval of a set needs
NEEDED_BY_SCORES = 10  # fewer resampled prompts give intervals that are too narrow
MOST_NEIGHBOURS = 10_000  # pictures of each set in precision, recall, density and coverage: their cost is the square
REFERENCE = ""  # the label under which the reference's features stand beside those of the sets
LOOKS = ("saturation", "contrast", "sharpness")
KERNELS = {"kd": cubic_kernel, "cmmd": gaussian_kernel}


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
            some, _ = _measure(collected.subset(rows), part, networks, with_reference=False)
            found += [replace(one, column=column, group=str(value)) for one in some]
            is_small = len(set(collected.groups[rows])) < NEEDED
            small += [f"{value} ({len(rows)})"] if is_small else []
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
    if num_prompts < NEEDED_BY_SCORES:
        why = f"{num_prompts} prompts are too few"
        return [], [Missing("everything", why, f"Take {NEEDED_BY_SCORES} at least, better 1,000: --num-images 1000.")]
    found += _scores(collected, scored)
    if num_prompts < NEEDED:
        return found, [_too_few("set distances, looks and every ratio", num_prompts)]
    blocks = blocks_of(groups)
    kept, lacking = _kept(collected, scored, blocks)
    missing += lacking
    found += [*kept, *_looks(collected, blocks), *_style(collected, groups, blocks)]
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
    some = np.linspace(0, len(blocks) - 1, min(len(blocks), MOST_NEIGHBOURS)).astype(int)  # of every block alike
    blocks = blocks[some]
    real = manifold(collected.reference.parts[network][some], blocks)
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


def _kept(collected: Collected, scored: Scored, blocks: Int[np.ndarray, " n"]) -> tuple[list[Measured], list[Missing]]:
    """What is left of the teacher's heed of the prompt: adherence is corrected for chance, scores by another prompt.

    A share of what may be nothing says nothing: where the teacher's own heed is not surely above 0 it is missing.
    """
    found, missing = [], []
    for key, by_label in scored.rows.items():
        if key.endswith(OTHER):
            continue
        other = scored.rows.get(key + OTHER)
        heed = {label: values - other[label] if other else values for label, values in by_label.items()}
        whole = {label: mean_replicates(values, blocks) for label, values in heed.items()}
        base = whole[collected.plan.base]
        if not base.interval().low > 0:
            why = "the teacher itself may follow prompts no better than chance"
            missing.append(Missing(f"{key}_kept", why, "Take more pictures, or a teacher that follows its prompts."))
            continue
        for label in _compared(collected):
            found.append(_of_set(collected, f"{key}_kept", label, (whole[label] / base).interval()))
    return found, missing


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

"""The worst pictures of a student by each measure, each beside the teacher's of the same prompt and seed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from onestroke.evaluate.collect import Collected
from onestroke.evaluate.grids import Gallery, Tile
from onestroke.evaluate.measures import LOOKS, Networks, Scored
from onestroke.evaluate.neighbours import nearest_distance
from onestroke.evaluate.observer import Pictures
from onestroke.evaluate.pictures import Failed, PictureSet
from onestroke.evaluate.quality import GRIDS
from onestroke.evaluate.scorers import OTHER

NUM_WORST = 16


def worst_pictures(collected: Collected, scored: Scored, networks: Networks, label: str) -> tuple[Gallery, ...]:
    """A gallery for each measure that has a number for single pictures, the worst first."""
    pictures, teacher = (_set(collected, name) for name in (label, collected.plan.base))
    galleries = []
    for title, badness, shown in _rankings(collected, scored, networks, label):
        ranked = np.argsort(-badness, kind="stable")[:NUM_WORST]
        rows = [int(collected.rows[i]) for i in ranked]
        ours, theirs = _read(pictures, rows), _read(teacher, rows)
        tiles = [
            Tile(pictures.prompt(row), f"{shown[i]:.3g}", ours[row], theirs[row])
            for i, row in zip(ranked, rows, strict=True)
            if row in ours and row in theirs
        ]
        galleries.append(Gallery(title, f"{label}; below each, the teacher's picture", tuple(tiles)))
    return tuple(galleries)


def _rankings(
    collected: Collected, scored: Scored, networks: Networks, label: str
) -> Iterator[tuple[str, Float[np.ndarray, " n"], Float[np.ndarray, " n"]]]:
    """Title, how bad each picture is, and the number that is shown with it."""
    seen, base = collected.sets[label], collected.sets[collected.plan.base]
    for key, by_label in scored.rows.items():
        if not key.endswith(OTHER):
            yield f"Lowest {key.replace('_', ' ')}", -by_label[label], by_label[label]
    if networks.primary:
        features = seen.parts[networks.primary]
        away = nearest_distance(features, collected.reference.parts[networks.primary])
        yield f"Least like any real picture ({networks.primary})", away, away
    for key in LOOKS:
        ours, theirs = (one.parts[key][:, 0].astype(float) for one in (seen, base))
        ratio = (ours + 1e-6) / (theirs + 1e-6)
        yield f"{key.capitalize()} furthest from the teacher's (times)", np.abs(np.log(ratio)), ratio
    grid = max(GRIDS, key=lambda g: np.abs((seen.parts[f"grid {g.name}"] - base.parts[f"grid {g.name}"]).mean(0)).max())
    ours = seen.parts[f"grid {grid.name}"]
    common = (ours - base.parts[f"grid {grid.name}"]).mean(axis=0)
    if not ours.any():  # pictures too small for any grid
        return
    along = ours @ common / max(1e-12, float(np.linalg.norm(common)) * np.sqrt(len(common)))
    yield f"Strongest grid of {grid.name} (grey levels)", along, along


def _set(collected: Collected, label: str) -> PictureSet:
    return next(pictures for pictures in collected.plan.sets if pictures.label == label)


def _read(pictures: PictureSet, rows: list[int]) -> dict[int, Pictures]:
    return {row: picture for row, picture in pictures.read(rows) if not isinstance(picture, Failed)}

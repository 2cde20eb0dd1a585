"""Pairs of pictures of the same prompt and seed; drawn once, then read from their folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

from onestroke.errors import RecipeError, ResourceError
from onestroke.sample import draw

CHUNK = 16  # pictures between two writes


@dataclass(frozen=True)
class Contestant:
    """One way to draw: a model by name, at so many steps under so much guidance (0 or 1: none)."""

    model: str
    steps: int
    guidance: float
    stamp: str = ""  # changes when the model's files do

    @property
    def label(self) -> str:
        """Its name in the votes file."""
        return f"{self.model}, {self.steps} step{'s' if self.steps > 1 else ''}"


@dataclass(frozen=True)
class Pair:
    """Two pictures, of the first and the second contestant."""

    prompt: str
    seed: int
    pictures: tuple[Path, Path]


def stamp_of(folder: Path) -> str:
    """A word for the state of a model's files: their names, sizes and times; nothing is read or loaded."""
    files = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
    facts = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16] if facts else ""


def draw_pairs(
    contestants: tuple[Contestant, Contestant],
    prompts: Sequence[str],
    folder: Path,
    *,
    load: Callable[[str], DiffusionPipeline],
    first_seed: int = 0,
    on_progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> tuple[Pair, ...]:
    """A pair for each prompt, seeds counting up. Only what `folder` lacks is drawn, one model in memory at a time."""
    if contestants[0].label == contestants[1].label:
        raise RecipeError(
            "both models are the same at the same number of steps", where="arena", fix="Change --steps or a model."
        )
    seeds = range(first_seed, first_seed + len(prompts))
    paths = [[folder / f"{_key(contestant, *row)}.png" for row in zip(prompts, seeds)] for contestant in contestants]
    for contestant, targets in zip(contestants, paths, strict=True):
        _draw_missing(contestant, list(zip(prompts, seeds, targets)), load, on_progress)
    return tuple(Pair(prompt, seed, both) for prompt, seed, both in zip(prompts, seeds, zip(*paths)))


def _draw_missing(contestant: Contestant, rows: list[tuple[str, int, Path]], load, on_progress) -> None:
    missing = [row for row in rows if not row[2].exists()]
    pipeline = load(contestant.model) if missing else None
    for first in range(0, len(missing), CHUNK):
        chunk = missing[first : first + CHUNK]
        prompts, seeds, paths = ([row[i] for row in chunk] for i in range(3))
        pictures = draw(pipeline, prompts, seeds=seeds, steps=contestant.steps, guidance=contestant.guidance)
        for picture, path in zip(pictures, paths, strict=True):
            _save(picture, path)
        on_progress(contestant.label, len(rows) - len(missing) + first + len(chunk), len(rows))


def _key(contestant: Contestant, prompt: str, seed: int) -> str:
    facts = [contestant.model, contestant.stamp, contestant.steps, contestant.guidance, prompt, seed]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def _save(picture: np.ndarray, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(temporary, "PNG")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ResourceError(
            f"the picture cannot be written ({error.strerror})", where=str(path.parent), fix="Free some space."
        ) from error

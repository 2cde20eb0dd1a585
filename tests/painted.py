"""Models that paint a colour for each prompt, and what evaluation needs around them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from onestroke.evaluate.compare import Looking, Task, Ways
from onestroke.evaluate.observer import Observer, looks
from onestroke.evaluate.pictures import RealSet, Way
from onestroke.evaluate.prompts import PromptSet
from onestroke.evaluate.scored import Networks


def paint(prompts, seeds):
    """A picture that tells prompt and seed: its colour is the prompt's, its noise the seed's."""
    pictures = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        colour = np.random.default_rng(sum(map(ord, prompt))).integers(40, 200, 3)
        noise = np.random.default_rng(seed).integers(-30, 30, (16, 16, 1))
        pictures.append((colour + noise).clip(0, 255).astype(np.uint8))
    return np.stack(pictures)


def mean_colour(version: str = "1") -> Observer:
    return Observer("colour", version, {"colour": 3}, lambda pictures, prompts: pictures.mean(axis=(1, 2)))


def never(*_):
    raise AssertionError("drawn or looked at again")


def noise_pictures(count: int = 5, side: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


class Coloured:
    """A source of real pictures: what `paint` draws."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def caption(self, index: int) -> str:
        return f"prompt {index % 5} of {index}"

    def read(self, index: int, *, slot=None):
        return type("Picture", (), {"image": paint([self.caption(index)], [index])[0]})


def task_of(tmp_path: Path, student=paint, *, count: int = 40, teacher=paint, columns=None, **changes) -> Task:
    source = Coloured(400)
    real, reference = (
        RealSet(n, source, range(k, 400, 2), (16, 16), str) for n, k in (("real pictures", 0), ("ref", 1))
    )
    prompts = PromptSet(tuple(source.caption(i) for i in range(0, 2 * count, 2)), columns or {})
    ways = Ways({1: Way("student", 1, student)}, {1: Way("t1", 1, teacher), 20: Way("t20", 20, teacher, 2.0)})
    return replace(Task(ways, prompts, reference, real, count, tmp_path), **changes)


def colour_looking(**networks) -> Looking:
    known = Networks({"colour": ("fd", "kd")}, **networks)
    return Looking((mean_colour(), looks()), (mean_colour(),), known, {"colour": "mean colour"})

"""What is measured of one run: the judge's features and each prompt's adherence, at few steps, kept in one file."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline
from jaxtyping import Float, UInt8

from onestroke.embedded.held_out import JUDGE, comic_pictures, comic_prompts, judge_observer, judged, value_namer
from onestroke.embedded.judge import Judge
from onestroke.errors import ResourceError
from onestroke.evaluate.adherence import adherence
from onestroke.evaluate.collect import observe
from onestroke.evaluate.drawn import MeasureCache, PictureCache
from onestroke.evaluate.pictures import DrawnSet, orders_of, ways_of
from onestroke.evaluate.prompts import PromptSet
from onestroke.families.fingerprint import fingerprint

STEPS = (1, 4)
NUM_SHOWN = 6  # pictures of each run on the page: the first prompts and seeds of those that are measured

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Scores:
    """A way to draw, measured on n prompts; everything by number of steps."""

    features: Mapping[int, Float[np.ndarray, "n d"]]  # the judge's
    adherence: Mapping[int, Float[np.ndarray, " n"]]  # one number a prompt, whose mean is the adherence
    shown: Mapping[int, UInt8[np.ndarray, "s h w 3"]]


@dataclass(frozen=True)
class Yardstick:
    """What every run is measured against: n held-out prompts, and as many real pictures of others."""

    judge: Judge
    prompts: PromptSet
    reference: Float[np.ndarray, "n d"]
    real: Scores  # of the very pictures that the prompts were written for: what no model is expected to beat

    @property
    def stamp(self) -> str:
        """What scores have to agree in to be compared."""
        return f"{fingerprint(self.judge)}/{len(self.prompts.texts)}"


def make_yardstick(judge: Judge, count: int, cache: Path) -> Yardstick:
    """The captions of the first `count` even held-out pictures, and the features of as many odd ones."""
    prompts = comic_prompts(count)
    halves = [comic_pictures(count, odd=odd, label="real pictures") for odd in (True, False)]
    reference, real = (judged(judge, half, cache).parts[JUDGE] for half in halves)
    followed = _followed(judge, prompts, real)
    return Yardstick(judge, prompts, reference, Scores(dict.fromkeys(STEPS, real), dict.fromkeys(STEPS, followed), {}))


def measure(
    pipeline: DiffusionPipeline,
    yardstick: Yardstick,
    cache: Path,
    *,
    guidance: float = 0.0,
    on_progress: Progress = lambda what, done, total: None,
) -> Scores:
    """Draw a picture for every prompt at each number of steps and judge it; resumable through `cache`."""
    judge, prompts = yardstick.judge, yardstick.prompts
    orders, pictures = orders_of(prompts.texts), PictureCache(cache)
    features, followed, shown = {}, {}, {}
    for steps, way in ways_of(pipeline, STEPS, guidance=guidance).items():

        def tell(done: int, steps: int = steps) -> None:
            on_progress(f"{steps} step{'s' if steps > 1 else ''}", done, len(orders))

        drawn = DrawnSet("drawn", "student", way, orders, pictures)
        features[steps] = observe(drawn, [judge_observer(judge)], MeasureCache(cache), on_picture=tell).parts[JUDGE]
        followed[steps] = _followed(judge, prompts, features[steps])
        few = [picture for _, picture in drawn.read(range(min(NUM_SHOWN, len(orders))))]
        shown[steps] = np.stack(few)
    return Scores(features, followed, shown)


def _followed(judge: Judge, prompts: PromptSet, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    values = value_namer(judge)(features)
    return np.array(adherence(prompts.named, values, reference=prompts.named).per_prompt)


def save_scores(scores: Scores, stamp: str, path: Path) -> None:
    """Write `path` whole or not at all; `stamp`: of the yardstick. Raises ResourceError."""
    parts = {"features": scores.features, "adherence": scores.adherence, "shown": scores.shown}
    arrays = {f"{name}@{steps}": array for name, values in parts.items() for steps, array in values.items()}
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, stamp=np.array(stamp), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ResourceError(
            f"the scores cannot be written ({error.strerror})", where=str(path), fix="Free some space."
        ) from error


def load_scores(path: Path, stamp: str) -> Scores | None:
    """The scores in `path`, or None where there are none by this yardstick."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["stamp"]) != stamp:
                return None
            parts = [{n: file[f"{name}@{n}"] for n in STEPS} for name in ("features", "adherence", "shown")]
    except (FileNotFoundError, KeyError, ValueError, EOFError, zipfile.BadZipFile):  # none, or another version's
        return None
    return Scores(*parts)

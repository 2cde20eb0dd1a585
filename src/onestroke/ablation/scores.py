"""What is measured of one run: the judge's features and each prompt's adherence, at few steps, kept in one file."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline
from jaxtyping import Float, UInt8

from onestroke.data.comicset.captions import Caption
from onestroke.embedded import assess
from onestroke.embedded.judge import Judge
from onestroke.errors import ResourceError
from onestroke.evaluate.metrics import adherence
from onestroke.sample import draw

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
    captions: tuple[Caption, ...]
    reference: Float[np.ndarray, "n d"]
    real: Scores  # of the very pictures that the prompts were written for: what no model is expected to beat

    @property
    def stamp(self) -> str:
        """What scores have to agree in to be compared."""
        return f"{assess.fingerprint(self.judge)}/{len(self.captions)}"


def make_yardstick(judge: Judge, count: int) -> Yardstick:
    """The captions of the first `count` even held-out pictures, and the features of as many odd ones."""
    captions = tuple(assess.prompts(count))
    reference = assess.judge_real(judge, count, odd=True).features
    real = assess.judge_real(judge, count, odd=False)
    followed = _followed(captions, real)
    return Yardstick(
        judge, captions, reference, Scores(dict.fromkeys(STEPS, real.features), dict.fromkeys(STEPS, followed), {})
    )


def measure(
    pipeline: DiffusionPipeline,
    yardstick: Yardstick,
    *,
    guidance: float = 0.0,
    cache: Path | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> Scores:
    """Draw a picture for every prompt at each number of steps and judge it; resumable through `cache`."""
    texts = [caption.text for caption in yardstick.captions]
    features, followed, shown = {}, {}, {}
    for steps in STEPS:

        def tell(done: int, total: int, steps: int = steps) -> None:
            on_progress(f"{steps} step{'s' if steps > 1 else ''}", done, total)

        way = assess.way_of(pipeline, steps=steps, guidance=guidance)
        judged = assess.judge_drawn(yardstick.judge, way, texts, cache=cache, on_progress=tell)
        features[steps] = judged.features
        followed[steps] = _followed(yardstick.captions, judged)
        few = texts[:NUM_SHOWN]
        shown[steps] = draw(pipeline, few, seeds=range(len(few)), steps=steps, guidance=guidance)
    return Scores(features, followed, shown)


def _followed(captions: Sequence[Caption], judged: assess.Judged) -> Float[np.ndarray, " n"]:
    named = [caption.named for caption in captions]
    return np.array(adherence(named, judged.values, reference=named).per_prompt)


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

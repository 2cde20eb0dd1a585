"""The embedded model's own yardstick: held-out comic prompts that name attributes, real pictures, and the judge.

Prompts come from the even held-out pictures, reference pictures from the odd ones: with shared captions a teacher falls
below the distance of real pictures from real pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float

from onestroke.data.comicset.dataset import ComicSource
from onestroke.embedded.judge import FEATURE_WIDTH, Judge
from onestroke.evaluate.collect import Observed, observe
from onestroke.evaluate.drawn import MeasureCache
from onestroke.evaluate.observer import Observer, Pictures, in_batches
from onestroke.evaluate.pictures import RealSet
from onestroke.evaluate.prompts import PromptSet
from onestroke.families.fingerprint import fingerprint

JUDGE = "comic judge"
SPLIT = "held-out"
SIZE = 128  # pixels a side that the judge was trained on
NO_STYLE = "not named"


def comic_prompts(count: int, *, split: str = SPLIT) -> PromptSet:
    """The captions of the first `count` even pictures of a split, what each names, and the style that it asks for."""
    source = ComicSource(2 * count, split)
    captions = [source.described(2 * i) for i in range(count)]
    styles = tuple(caption.named.get("style", NO_STYLE) for caption in captions)
    named = tuple(dict(caption.named) for caption in captions)
    return PromptSet(tuple(caption.text for caption in captions), {"style": styles}, named)


def comic_pictures(count: int, *, odd: bool, label: str, size: int = SIZE, split: str = SPLIT) -> RealSet:
    """The first `count` odd or even pictures of a split."""
    source = ComicSource(2 * count, split, size)
    return RealSet(
        label, source, range(int(odd), 2 * count, 2), (size, size), lambda index: f"comicset {split} {size} {index}"
    )


def judge_observer(judge: Judge) -> Observer:
    """The judge's features, which distances are measured on; pictures of another size are scaled to its own."""

    def features(pictures: Pictures) -> torch.Tensor:
        images = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
        if images.shape[-2:] != (SIZE, SIZE):
            images = F.interpolate(images, size=(SIZE, SIZE), mode="bicubic", antialias=True).clamp(-1, 1)
        return judge.features(images)

    return Observer(
        JUDGE, fingerprint(judge), {JUDGE: FEATURE_WIDTH}, lambda pictures, prompts: in_batches(features, pictures, 50)
    )


def value_namer(judge: Judge):
    """From the judge's features to the likeliest value of every attribute of each picture."""

    @torch.inference_mode()
    def name_values(features: Float[np.ndarray, "n d"]) -> Sequence[Mapping[str, str]]:
        return judge.name_values(torch.from_numpy(np.asarray(features, dtype=np.float32)))

    return name_values


def judged(judge: Judge, pictures, cache: Path) -> Observed:
    """What the judge alone sees in a set of pictures."""
    return observe(pictures, [judge_observer(judge)], MeasureCache(cache))

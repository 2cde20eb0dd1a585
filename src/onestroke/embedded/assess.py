"""Measure models of the embedded kind: held-out prompts, the judge's eyes, and pictures kept between runs.

Prompts come from the even held-out pictures, reference pictures from the odd ones: with shared captions a teacher falls
below the distance of real pictures from real pictures.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float, UInt8

from onestroke.data.comicset.captions import Caption
from onestroke.data.comicset.dataset import ComicSource
from onestroke.embedded.judge import Judge
from onestroke.sample import draw

CHUNK = 250  # pictures between writes to the cache
SPLIT = "held-out"


@dataclass(frozen=True)
class Judged:
    """What the judge says of pictures: features for distances, and each picture's attribute values."""

    features: Float[np.ndarray, "n d"]
    values: tuple[Mapping[str, str], ...]

    def __getitem__(self, rows: slice) -> Judged:
        return Judged(self.features[rows], self.values[rows])


@dataclass(frozen=True)
class Way:
    """One way to draw: a pipeline at so many steps under so much guidance. `name` keys the cache."""

    name: str
    pipeline: DiffusionPipeline
    steps: int
    guidance: float


def prompts(count: int, *, split: str = SPLIT) -> list[Caption]:
    """The captions of the first `count` even pictures of a split."""
    source = ComicSource(2 * count, split)
    return [source.described(2 * i) for i in range(count)]


@torch.inference_mode()
def judge_pictures(judge: Judge, pictures: UInt8[np.ndarray, "n h w 3"], *, batch_size: int = 50) -> Judged:
    """Features and values; pictures of the judge's size (128 px)."""
    features, values = [], []
    for first in range(0, len(pictures), batch_size):
        images = torch.from_numpy(pictures[first : first + batch_size]).float() / 127.5 - 1
        found = judge.features(images.permute(0, 3, 1, 2))
        features.append(found.double().numpy())
        values.extend(judge.name_values(found))
    return Judged(np.concatenate(features), tuple(values))


def real_pictures(count: int, *, odd: bool, split: str = SPLIT) -> UInt8[np.ndarray, "n h w 3"]:
    """The first `count` even or odd pictures of a split, rendered."""
    source = ComicSource(2 * count, split)
    return np.stack([source.read(2 * i + odd).image for i in range(count)])


def judge_real(judge: Judge, count: int, *, odd: bool, split: str = SPLIT) -> Judged:
    """`judge_pictures` of `real_pictures`, a chunk at a time."""
    source = ComicSource(2 * count, split)
    parts = []
    for first in range(0, count, CHUNK):
        rows = range(first, min(first + CHUNK, count))
        parts.append(judge_pictures(judge, np.stack([source.read(2 * i + odd).image for i in rows])))
    return _joined(parts)


@torch.inference_mode()
def judge_reconstructed(judge: Judge, pipeline: DiffusionPipeline, count: int, *, split: str = SPLIT) -> Judged:
    """What the VAE leaves of the even real pictures: the best that any model behind this VAE can do."""
    vae, source, parts = pipeline.vae, ComicSource(2 * count, split), []
    for first in range(0, count, 50):
        rows = range(first, min(first + 50, count))
        pictures = np.stack([source.read(2 * i).image for i in rows])
        images = (torch.from_numpy(pictures).float() / 127.5 - 1).permute(0, 3, 1, 2).to(vae.dtype)
        decoded = vae.decode(vae.encode(images).latent_dist.mean).sample.float().clamp(-1, 1)
        restored = ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        parts.append(judge_pictures(judge, restored))
    return _joined(parts)


def judge_drawn(
    judge: Judge,
    way: Way,
    captions: Sequence[str],
    *,
    first_seed: int = 0,
    cache: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Judged:
    """Draw a picture for each caption, seeds counting up, and judge it; what `cache` holds is not drawn again."""
    parts = []
    for first in range(0, len(captions), CHUNK):
        rows = list(captions[first : first + CHUNK])
        seeds = range(first_seed + first, first_seed + first + len(rows))
        path = cache / f"{_key(way, rows, seeds, judge)}.npz" if cache else None
        part = _load(path) if path and path.exists() else None
        if part is None:
            pictures = draw(way.pipeline, rows, seeds=seeds, steps=way.steps, guidance=way.guidance)
            part = judge_pictures(judge, pictures)
            if path:
                _save(part, path)
        parts.append(part)
        if on_progress:
            on_progress(first + len(rows), len(captions))
    return _joined(parts)


def fingerprint(*modules: torch.nn.Module) -> str:
    """A short name for weights: what the cache tells models apart by."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def way_of(pipeline: DiffusionPipeline, *, steps: int, guidance: float) -> Way:
    """A way to draw, named by its weights, sampler, steps and guidance."""
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    sampler = f"{type(pipeline.scheduler).__name__}-{pipeline.scheduler.config.get('prediction_type')}"
    return Way(f"{fingerprint(*parts)}-{sampler}-{steps}-{guidance:g}", pipeline, steps, guidance)


def _key(way: Way, captions: Sequence[str], seeds: range, judge: Judge) -> str:
    text = json.dumps([way.name, list(captions), seeds.start, fingerprint(judge)])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _load(path: Path) -> Judged | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            return Judged(file["features"], tuple(json.loads(str(file["values"]))))
    except (OSError, ValueError, KeyError):  # half-written by an older crash: draw again
        return None


def _save(part: Judged, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez(file, features=part.features, values=np.array(json.dumps([dict(v) for v in part.values])))
    os.replace(temporary, path)


def _joined(parts: Sequence[Judged]) -> Judged:
    return Judged(np.concatenate([p.features for p in parts]), tuple(v for p in parts for v in p.values))

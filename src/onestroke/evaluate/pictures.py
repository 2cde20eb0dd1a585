"""Sets of pictures to be measured: drawn by a model, real, or put through a VAE; each picture by its row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from diffusers import DiffusionPipeline
from jaxtyping import UInt8

from onestroke.data.framing import cut, place
from onestroke.data.source import BrokenPicture, Source
from onestroke.errors import DataError, ModelError
from onestroke.evaluate.drawn import PictureCache
from onestroke.families.fingerprint import fingerprint
from onestroke.sample import draw

Picture = UInt8[np.ndarray, "h w 3"]
Role = Literal["teacher", "student", "reference"]
BATCH = 16  # pictures of up to 256 x 256 that are drawn, or put through a VAE, at once


@dataclass(frozen=True)
class Failed:
    """A picture that the model could not draw, and why."""

    reason: str


@dataclass(frozen=True)
class Order:
    """What one picture is drawn from."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Way:
    """One way to draw: a model at so many steps under so much guidance.

    `key`: weights, sampler, steps, guidance and size, by which the cache knows its pictures.
    `draw(prompts, seeds)`: n h w 3, uint8.
    """

    key: str
    steps: int
    draw: Callable[[Sequence[str], Sequence[int]], UInt8[np.ndarray, "n h w 3"]]
    guidance: float = 0.0
    batch_size: int = BATCH


class PictureSet(Protocol):
    """Pictures by row; reading one twice gives the same."""

    label: str
    role: Role

    def __len__(self) -> int: ...

    def key(self, row: int) -> str:
        """Names the picture of a row in the cache of measures; equal keys, equal pictures."""
        ...

    def prompt(self, row: int) -> str: ...

    def read(self, rows: Sequence[int]) -> Iterator[tuple[int, Picture | Failed]]:
        """The pictures of some rows as they become ready, not necessarily in order."""
        ...


def ways_of(
    pipeline: DiffusionPipeline,
    steps: Sequence[int],
    *,
    guidance: float = 0.0,
    size: tuple[int, int] | None = None,
) -> dict[int, Way]:
    """Ways to draw with one pipeline, by number of steps; its weights are read once for their key.

    `size`: height, width in pixels, by default the model's own.
    """
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    sampler = f"{type(pipeline.scheduler).__name__} {sorted(pipeline.scheduler.config.items(), key=str)}"
    batch_size = batch_of(size or model_size(pipeline))
    model = f"{fingerprint(*parts)} {hashlib.sha256(sampler.encode()).hexdigest()[:8]}"

    def drawing(count: int):
        def draw_with(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
            return draw(
                pipeline, prompts, seeds=seeds, steps=count, guidance=guidance, size=size, batch_size=batch_size
            )

        return draw_with

    return {
        n: Way(f"{model} {n} {guidance:g} {size}", n, drawing(n), guidance, batch_size) for n in dict.fromkeys(steps)
    }


@dataclass(frozen=True)
class DrawnSet:
    """What a model draws to `orders`; pictures in `cache` are not drawn again."""

    label: str
    role: Role
    way: Way
    orders: Sequence[Order]
    cache: PictureCache

    def __len__(self) -> int:
        return len(self.orders)

    def key(self, row: int) -> str:
        return self.cache.key(self.way.key, self.orders[row].prompt, self.orders[row].seed)

    def prompt(self, row: int) -> str:
        return self.orders[row].prompt

    def missing(self) -> int:
        """How many pictures are still to be drawn."""
        return sum(not self.cache.holds(self.key(row)) for row in range(len(self)))

    def read(self, rows: Sequence[int]) -> Iterator[tuple[int, Picture | Failed]]:
        wanted = []
        for row in rows:
            picture = self.cache.load(self.key(row))
            if picture is None:
                wanted.append(row)
            else:
                yield row, picture
        for first in range(0, len(wanted), self.way.batch_size):
            some = wanted[first : first + self.way.batch_size]
            for row, picture in zip(some, drawn_or_failed(self.way, [self.orders[r] for r in some]), strict=True):
                if not isinstance(picture, Failed):
                    self.cache.save(self.key(row), picture)
                yield row, picture


def drawn_or_failed(way: Way, orders: Sequence[Order]) -> list[Picture | Failed]:
    """The pictures; where a batch fails each is drawn alone, so that one bad prompt costs one picture.

    What no picture is to blame for, such as a device without room, is raised.
    """
    try:
        return list(way.draw([order.prompt for order in orders], [order.seed for order in orders]))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a user's model may raise anything at all
        if len(orders) == 1:
            return [Failed(" ".join(f"{type(error).__name__}: {error}".split())[:300])]
    return [drawn_or_failed(way, [order])[0] for order in orders]


@dataclass(frozen=True)
class RealSet:
    """Real pictures of a source, cut to one size. `key_of(index)`: what tells a picture from an edited one."""

    label: str
    source: Source
    indices: Sequence[int]
    size: tuple[int, int]
    key_of: Callable[[int], str]
    role: Role = "reference"

    def __len__(self) -> int:
        return len(self.indices)

    def key(self, row: int) -> str:
        return f"{self.key_of(self.indices[row])} {self.size}"

    def prompt(self, row: int) -> str:
        return self.source.caption(self.indices[row])

    def read(self, rows: Sequence[int]) -> Iterator[tuple[int, Picture | Failed]]:
        for row in rows:
            try:
                image = self.source.read(self.indices[row]).image
            except BrokenPicture as error:
                yield row, Failed(str(error))
                continue
            placement = place(image.shape[:2], self.size, np.random.default_rng(0), crop="center", random_flip=False)
            yield row, cut(image, self.size, placement)


class ReconstructedSet:
    """What a VAE leaves of real pictures: the best that any model behind this VAE can do."""

    role: Role = "reference"

    def __init__(self, real: RealSet, pipeline: DiffusionPipeline, *, label: str = "VAE reconstructions") -> None:
        self.real, self.pipeline, self.label = real, pipeline, label
        self._vae = fingerprint(pipeline.vae)

    def __len__(self) -> int:
        return len(self.real)

    def key(self, row: int) -> str:
        return f"{self._vae} {self.real.key(row)}"

    def prompt(self, row: int) -> str:
        return self.real.prompt(row)

    def read(self, rows: Sequence[int]) -> Iterator[tuple[int, Picture | Failed]]:
        waiting: list[tuple[int, np.ndarray]] = []
        for row, picture in self.real.read(rows):
            if isinstance(picture, Failed):
                yield row, picture
                continue
            waiting.append((row, picture))
            if len(waiting) == batch_of(self.real.size):
                yield from self._restored(waiting)
                waiting = []
        yield from self._restored(waiting) if waiting else ()

    @torch.inference_mode()
    def _restored(self, waiting: list[tuple[int, np.ndarray]]) -> list[tuple[int, Picture]]:
        vae = self.pipeline.vae
        images = torch.from_numpy(np.stack([picture for _, picture in waiting])).float() / 127.5 - 1
        images = images.permute(0, 3, 1, 2).to(vae.device, vae.dtype)
        decoded = vae.decode(vae.encode(images).latent_dist.mean).sample.float().clamp(-1, 1)
        restored = ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [(row, picture) for (row, _), picture in zip(waiting, restored, strict=True)]


def batch_of(size: tuple[int, int]) -> int:
    """How many pictures of `size` a device is asked for at once: a VAE's memory goes with their area."""
    return max(1, min(BATCH, BATCH * 256**2 // (size[0] * size[1])))


def orders_of(prompts: Sequence[str], *, first_seed: int = 0, repeats: int = 1) -> list[Order]:
    """`repeats` pictures of each prompt, side by side, each with a seed of its own."""
    count = len(prompts)
    return [Order(p, first_seed + i + r * count) for i, p in enumerate(prompts) for r in range(repeats)]


def model_size(pipeline: DiffusionPipeline) -> tuple[int, int]:
    """Height and width in pixels that the pipeline draws by default."""
    sample, factor = pipeline.unet.config.sample_size, pipeline.vae_scale_factor
    height, width = (sample, sample) if isinstance(sample, int) else sample
    return height * factor, width * factor


def check_drawable(size: tuple[int, int]) -> None:
    """Raises ModelError for a size that diffusers' pipelines do not draw."""
    if any(side % 8 or side < 8 for side in size):
        raise ModelError(f"{size[1]} x {size[0]} pixels cannot be drawn", where="--size", fix="Give a multiple of 8.")


def halves(count: int, *, seed: int = 0, shuffled: bool = True) -> tuple[list[int], list[int]]:
    """The two halves of a held-out set, the prompts' and the reference pictures': shared captions flatter a model.

    Shuffled alike at every call, so that a set sorted by style is cut through all styles. Raises DataError below 4.
    """
    if count < 4:
        raise DataError(f"{count} held-out pictures are too few", fix="Give 4 at least, better 2,000.")
    order = np.random.default_rng(seed).permutation(count).tolist() if shuffled else list(range(count))
    return order[0::2], order[1::2]

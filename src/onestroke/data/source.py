"""Pictures with captions as training batches: which picture each slot shows, and how it is cut to size.

Position is one number, the slot, that counts pictures over all epochs. Everything random about slot s is drawn from
(seed, stream, s), so that resuming needs no state and workers change nothing.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import UInt8, UInt32
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from onestroke.errors import DataError
from onestroke.types import Batch

Crop = Literal["random", "center"]

# Streams of randomness. NumPy pads short seeds with zeros, so (seed, 1, 2) and (seed, 1, 2, 0) draw the same numbers:
# these stay clear of the small numbers that comicset's four-part seeds have in their second place.
_PLAN, _SPARES, _PLACEMENT = 16, 17, 18
_MAX_TRIES = 32  # pictures tried for one slot
_JUDGED_FROM = 20  # pictures read before the share of broken ones says anything


class BrokenPicture(Exception):
    """A picture that cannot be decoded: `path`, and the `reason`. Caught by `batches`, which shows a spare instead."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path} ({self.reason})"


@dataclass(frozen=True)
class Picture:
    image: UInt8[np.ndarray, "h w 3"]  # RGB, upright, any size
    caption: str


class Source(Protocol):
    """Captioned pictures by index. Workers hold a copy: reading changes nothing, and open files are not kept."""

    def __len__(self) -> int: ...

    def caption(self, index: int, *, slot: int | None = None) -> str:
        """The caption that `read` gives with the same `index` and `slot`, without reading the picture."""
        ...

    def read(self, index: int, *, slot: int | None = None) -> Picture:
        """Picture `index`; raises BrokenPicture if it cannot be decoded.

        A source with several captions for a picture chooses by `slot`, so that a new epoch brings a new one; with
        None it gives the picture's own caption, the same at every call.
        """
        ...


@lru_cache(maxsize=2)
def plan(num_pictures: int, *, seed: int, epoch: int) -> UInt32[np.ndarray, " n"]:
    """The order in which an epoch shows the pictures: a permutation of 0 .. num_pictures, read-only."""
    order = np.random.default_rng((seed, _PLAN, epoch)).permutation(num_pictures).astype(np.uint32)
    order.setflags(write=False)
    return order


def picture_at(slot: int, num_pictures: int, *, seed: int) -> int:
    """The index of the picture that `slot` shows unless it is broken."""
    epoch, position = divmod(slot, num_pictures)
    return int(plan(num_pictures, seed=seed, epoch=epoch)[position])


@dataclass
class Broken:
    """Which pictures turned out broken so far, and whether they are too many. Counts pictures, not readings."""

    num_pictures: int
    max_share: float = 0.05
    reasons: dict[int, str] = field(default_factory=dict)  # index -> path and reason
    num_seen: int = 0
    _seen: bytearray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._seen = bytearray(self.num_pictures)

    def __len__(self) -> int:
        return len(self.reasons)

    def __str__(self) -> str:
        share = 100 * len(self) / max(self.num_seen, 1)
        line = f"{len(self)} of {self.num_seen} pictures read are broken ({share:.1f}%)"
        return ": ".join([line, *([", ".join(list(self.reasons.values())[:3])] if self.reasons else [])])

    def record(self, index: int, reason: str | None) -> None:
        """Picture `index` was read; `reason` says why it could not be, None if it could."""
        self.num_seen += not self._seen[index]
        self._seen[index] = 1
        if reason is not None:
            self.reasons[index] = reason

    def too_many(self) -> bool:
        """Whether more than `max_share` are broken.

        Judged from 20 pictures on, with three standard errors of grace until all have been read, so that an unlucky
        start does not stop a set with few broken pictures.
        """
        if self.num_seen < min(_JUDGED_FROM, self.num_pictures):
            return False
        grace = 3 * math.sqrt(self.max_share * (1 - self.max_share) * self.num_seen)
        return len(self) > self.max_share * self.num_seen + (grace if self.num_seen < self.num_pictures else 0)

    def error(self) -> DataError:
        return DataError(str(self), fix="Mend or remove these files, or allow a greater share of broken pictures")


class Placement(NamedTuple):
    """How a picture is cut: scaled to `height` x `width` pixels, of which the part from `top`, `left` on is taken."""

    height: int
    width: int
    top: int
    left: int
    flip: bool


def place(
    picture: tuple[int, int], size: tuple[int, int], rng: np.random.Generator, *, crop: Crop, random_flip: bool
) -> Placement:
    """Scale a picture to cover `size` and choose the part to keep; sizes are height, width in pixels.

    Always draws three numbers from `rng`, so that options do not shift one another.
    """
    scale = max(size[0] / picture[0], size[1] / picture[1])
    height, width = (max(want, round(scale * have)) for want, have in zip(size, picture, strict=True))
    down, right, flip = rng.random(3)
    rooms = height - size[0], width - size[1]
    if crop == "center":
        top, left = (room // 2 for room in rooms)
    else:
        top, left = (int(share * (room + 1)) for share, room in zip((down, right), rooms, strict=True))
    return Placement(height, width, top, left, bool(random_flip and flip < 0.5))


def cut(image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int], placement: Placement) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The part of `image` that `placement` keeps, at `size`, with antialiasing.

    Resamples only that part, so a picture a thousand times longer than wide costs no more memory than another.
    """
    height, width, top, left, flip = placement
    down, right = image.shape[0] / height, image.shape[1] / width
    box = (left * right, top * down, min((left + size[1]) * right, image.shape[1]),
           min((top + size[0]) * down, image.shape[0]))  # fmt: skip
    resampling = Image.Resampling.LANCZOS if down > 1 else Image.Resampling.BICUBIC
    part = np.asarray(Image.fromarray(image).resize((size[1], size[0]), resampling, box=box))
    return np.ascontiguousarray(part[:, ::-1]) if flip else part


class _Row(NamedTuple):
    """What a worker hands back for a slot; `image` is None where no picture could be read."""

    slot: int
    image: np.ndarray | None
    caption: str
    sizes: tuple[int, int, int, int]
    tried: list[tuple[int, str | None]]  # picture index, why it could not be read


@dataclass(frozen=True)
class _Rows(Dataset):
    """Row by slot: what runs in the workers."""

    source: Source
    size: tuple[int, int]
    seed: int
    crop: Crop
    random_flip: bool

    def __getitem__(self, slot: int) -> _Row:
        picture, tried = read_slot(self.source, slot, seed=self.seed)
        if picture is None:
            return _Row(slot, None, "", (0, 0, 0, 0), tried)
        rng = np.random.default_rng((self.seed, _PLACEMENT, slot))
        height, width = picture.image.shape[:2]
        placement = place((height, width), self.size, rng, crop=self.crop, random_flip=self.random_flip)
        # SDXL flips before it crops, so crop left is measured in the flipped picture.
        left = placement.width - self.size[1] - placement.left if placement.flip else placement.left
        image = cut(picture.image, self.size, placement)
        return _Row(slot, image, picture.caption, (height, width, placement.top, left), tried)


def read_slot(source: Source, slot: int, *, seed: int) -> tuple[Picture | None, list[tuple[int, str | None]]]:
    """The picture of `slot`, or of a spare if that is broken, and what was tried: index, and why it could not be read.

    Spares are drawn from (seed, slot) alone. None if 32 tries found no picture.
    """
    num_pictures = len(source)
    rng = np.random.default_rng((seed, _SPARES, slot))
    tried: dict[int, str | None] = {}
    index = picture_at(slot, num_pictures, seed=seed)
    for _ in range(_MAX_TRIES):
        if index not in tried:
            try:
                picture = source.read(index, slot=slot)
            except BrokenPicture as error:
                tried[index] = str(error)
            else:
                return picture, [*tried.items(), (index, None)]
        index = int(rng.integers(num_pictures))
    return None, list(tried.items())


def batches(
    source: Source,
    *,
    batch_size: int,
    size: tuple[int, int],
    first_slot: int,
    last_slot: int,
    seed: int,
    random_flip: bool = False,
    crop: Crop = "center",
    num_workers: int = 0,
    broken: Broken | None = None,
) -> Iterator[Batch]:
    """Batches of slots `first_slot` .. `last_slot` - 1 in order, each of `batch_size` pictures but perhaps the last.

    `size`: height, width in pixels. The batch of given slots is the same whatever `num_workers` and `first_slot` are.
    `Batch.sizes` is SDXL's micro-conditioning: height and width of the picture before scaling; top and left of the
    crop in pixels of the scaled and flipped picture. Broken pictures are counted in `broken`, whose DataError ends the
    iteration when they are too many.
    """
    assert batch_size > 0 and 0 <= first_slot <= last_slot and len(source) > 0 and crop in ("random", "center")
    broken = Broken(len(source)) if broken is None else broken
    loader = DataLoader(
        _Rows(source, size, seed, crop, random_flip),
        batch_size,
        sampler=range(first_slot, last_slot),
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        collate_fn=list,  # numpy arrays travel through the queue; tensors would need room in /dev/shm
        worker_init_fn=ignore_interrupt,
        generator=torch.Generator(),  # else the loader draws from the global one
    )
    return _collated(loader, broken)


def ignore_interrupt(_: int) -> None:
    """For `worker_init_fn`."""
    # Ctrl-C and a cluster's SIGTERM reach the whole process group: the trainer decides when to stop, and its workers
    # must outlive its saving. They end with it: the loader tells them so, and they watch for its death.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _collated(loader: DataLoader, broken: Broken) -> Iterator[Batch]:
    for rows in loader:
        for row in rows:
            for index, reason in row.tried:
                broken.record(index, reason)
        if broken.too_many() or any(row.image is None for row in rows):
            raise broken.error()
        images = torch.from_numpy(np.stack([row.image for row in rows]))  # b h w 3
        yield Batch(
            (images.float() / 127.5 - 1).permute(0, 3, 1, 2),  # b 3 h w, channels last in memory
            tuple(row.caption for row in rows),
            torch.tensor([row.slot for row in rows]),
            torch.tensor([row.sizes for row in rows]),
        )

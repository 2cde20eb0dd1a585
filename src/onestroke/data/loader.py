"""Pictures with captions as training batches: reading the picture of each slot, or what is already known of it.

Position is one number, the slot, that counts pictures over all epochs (`data.plan`). Everything random about slot s is
drawn from (seed, stream, s), so that resuming needs no state, and workers and ranks change nothing.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from onestroke.data.buckets import Buckets, Size, one_bucket
from onestroke.data.encodings import Encoded, picture_key, text_key
from onestroke.data.facts import BROKEN, UNKNOWN
from onestroke.data.framing import Crop, Framing, cut, micro_sizes
from onestroke.data.plan import Plan
from onestroke.data.source import Broken, BrokenPicture, Picture, Source
from onestroke.errors import RecipeError
from onestroke.types import Batch

_SPARES = 17  # stream of randomness, as `data.plan` and `data.framing` have theirs
_MAX_TRIES = 32  # pictures tried for one slot


class _Row(NamedTuple):
    """What a worker hands back for a slot; neither image nor latents where no picture could be read."""

    slot: int
    image: np.ndarray | None
    caption: str
    sizes: tuple[int, int, int, int]
    tried: list[tuple[int, str | None]]  # picture index, why it could not be read
    target: Size
    latents: np.ndarray | None = None
    image_embedding: np.ndarray | None = None
    text_embedding: np.ndarray | None = None


@dataclass(frozen=True)
class _Rows(Dataset):
    """Rows by slot: what runs in the workers."""

    source: Source
    plan: Plan
    framing: Framing
    encoded: Encoded | None

    def __getitems__(self, slots: Sequence[int]) -> list[_Row]:
        """The rows of a batch: encodings where they are known, pictures where they are needed."""
        if self.encoded is None:
            return [self._read(slot) for slot in slots]
        rows = [self._known(slot, self.encoded) for slot in slots]
        if self.encoded.needs_images or any(row.latents is None for row in rows):
            return [self._with_image(row) for row in rows]
        return rows

    def _read(self, slot: int) -> _Row:
        size = self.plan.size_of(slot)
        picture, tried = read_slot(self.source, self.plan, slot)
        if picture is None:
            return _Row(slot, None, "", (0, 0, 0, 0), tried, size)
        shape = picture.image.shape[:2]
        placement = self.framing.at_slot(slot, tried[-1][0], shape, size)
        image = cut(picture.image, size, placement)
        return _Row(slot, image, picture.caption, micro_sizes(shape, size, placement), tried, size)

    def _known(self, slot: int, encoded: Encoded) -> _Row:
        """The slot's row without its image; without latents too where they are not known."""
        size = self.plan.size_of(slot)
        index, tried = _whole_at(self.plan, slot, encoded.digests)
        if index is None or encoded.digests[index] == UNKNOWN:
            return _Row(slot, None, "", (0, 0, 0, 0), tried, size)
        shape = (int(encoded.sizes[index, 0]), int(encoded.sizes[index, 1]))
        placement = self.framing.at_slot(slot, index, shape, size)
        key, caption = picture_key(int(encoded.digests[index]), size, placement), self.source.caption(index, slot=slot)
        embedded, worded = encoded.image_embeddings, encoded.text_embeddings
        return _Row(
            slot, None, caption, micro_sizes(shape, size, placement), [*tried, (index, None)], size,
            encoded.latents.get(key),
            None if embedded is None else embedded.get(key),
            None if worded is None else worded.get(text_key(caption)),
        )  # fmt: skip

    def _with_image(self, row: _Row) -> _Row:
        """The same with its image; without encodings if it turns out to be of another picture."""
        read = self._read(row.slot)
        if (read.sizes, read.caption, read.tried[-1:]) != (row.sizes, row.caption, row.tried[-1:]):
            return read
        return row._replace(image=read.image, tried=read.tried)


def read_slot(source: Source, plan: Plan, slot: int) -> tuple[Picture | None, list[tuple[int, str | None]]]:
    """The picture of `slot`, or of a spare if that is broken, and what was tried: index, and why it could not be read.

    Spares are of the same bucket, drawn from (seed, slot) alone. None if 32 tries found no picture.
    """
    tried: dict[int, str | None] = {}
    for index in _candidates(plan, slot):
        if index not in tried:
            try:
                picture = source.read(index, slot=slot)
            except BrokenPicture as error:
                tried[index] = str(error)
            else:
                return picture, [*tried.items(), (index, None)]
    return None, list(tried.items())


def _candidates(plan: Plan, slot: int) -> Iterator[int]:
    rng = np.random.default_rng((plan.seed, _SPARES, slot))
    yield plan.picture_at(slot)
    for _ in range(_MAX_TRIES - 1):
        yield plan.spare(slot, rng)


def _whole_at(plan: Plan, slot: int, digests: np.ndarray) -> tuple[int | None, list[tuple[int, str | None]]]:
    """The index that `read_slot` would come to, by what is known of the pictures, and those known to be broken."""
    tried: dict[int, str | None] = {}
    for index in _candidates(plan, slot):
        if digests[index] != BROKEN:
            return index, list(tried.items())
        tried[index] = f"picture {index} (broken when it was encoded)"
    return None, list(tried.items())


@dataclass(frozen=True)
class _BatchSlots:
    """The slots of each batch that one of several processes reads: its part of every global batch."""

    first: int
    last: int
    batch_size: int
    rank: int
    num_ranks: int

    def __iter__(self) -> Iterator[range]:
        part = self.batch_size // self.num_ranks
        for start in range(self.first, self.last, self.batch_size):
            if self.num_ranks == 1:
                yield range(start, min(start + part, self.last))
            elif start + self.batch_size <= self.last:
                yield range(start + self.rank * part, start + (self.rank + 1) * part)


def batches(
    source: Source,
    *,
    batch_size: int,
    size: Size | Buckets,
    first_slot: int,
    last_slot: int,
    seed: int,
    random_flip: bool = False,
    crop: Crop = "center",
    num_crops: int | None = None,
    num_workers: int = 0,
    broken: Broken | None = None,
    rank: int = 0,
    num_ranks: int = 1,
    encoded: Encoded | None = None,
) -> Iterator[Batch]:
    """Batches of slots `first_slot` .. `last_slot` - 1 in order, each of `batch_size` pictures but perhaps the last.

    `size`: height, width in pixels of all, or buckets, one of which each batch is of; then `first_slot` has to be a
    multiple of `batch_size`. The batch of given slots is the same whatever `num_workers` and `first_slot` are.
    Of several processes each gets its part of every batch, `batch_size` / `num_ranks` pictures of neighbouring slots,
    and no last smaller one; RecipeError where that is not a whole number.
    `Batch.sizes` is SDXL's micro-conditioning: height and width of the picture before scaling; top and left of the
    crop in pixels of the scaled and flipped picture. Broken pictures are counted in `broken`, whose DataError ends the
    iteration when they are too many.
    `encoded`: what was encoded before. A batch has latents, or embeddings, where all of its pictures' are known, and
    images unless they are not needed; everything else about it is as without.
    """
    assert batch_size > 0 and 0 <= first_slot <= last_slot and len(source) > 0 and crop in ("random", "center")
    assert 0 <= rank < num_ranks
    if batch_size % num_ranks:
        what = f"{batch_size} pictures do not divide by {num_ranks} processes"
        raise RecipeError(what, where="train.batch_size", fix=f"Set it to a multiple of {num_ranks}.")
    broken = Broken(len(source)) if broken is None else broken
    buckets = size if isinstance(size, Buckets) else one_bucket(len(source), size)
    for index in buckets.unreadable.tolist():
        broken.record(index, _reason(source, index))
    assert len(buckets) == 1 or first_slot % batch_size == 0, "a batch of two buckets"
    plan, framing = Plan(buckets, batch_size=batch_size, seed=seed), Framing(seed, crop, random_flip, num_crops)
    loader = DataLoader(
        _Rows(source, plan, framing, encoded),
        batch_sampler=_BatchSlots(first_slot, last_slot, batch_size, rank, num_ranks),  # type: ignore[arg-type]
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        collate_fn=list,  # numpy arrays travel through the queue; tensors would need room in /dev/shm
        worker_init_fn=ignore_interrupt,
        generator=torch.Generator(),  # else the loader draws from the global one
    )
    return _collated(loader, broken)


def _reason(source: Source, index: int) -> str:
    """Why the size of a picture cannot be read."""
    try:
        source.size_of(index)
    except BrokenPicture as error:
        return str(error)
    return f"picture {index} (could not be read when the pictures were sorted by size)"


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
        if broken.too_many() or any(row.image is None and row.latents is None for row in rows):
            raise broken.error()
        images = _stacked([row.image for row in rows])  # b h w 3, uint8
        yield Batch(
            None if images is None else (images.float() / 127.5 - 1).permute(0, 3, 1, 2),  # b 3 h w, channels last
            tuple(row.caption for row in rows),
            torch.tensor([row.slot for row in rows]),
            torch.tensor([row.sizes for row in rows]),
            _float(_stacked([row.latents for row in rows])),
            rows[0].target,
            _float(_stacked([row.image_embedding for row in rows])),
            _float(_stacked([row.text_embedding for row in rows])),
        )


def _stacked(arrays: Sequence[np.ndarray | None]) -> torch.Tensor | None:
    """The arrays as one tensor; None where one is missing."""
    given = [array for array in arrays if array is not None]
    return torch.from_numpy(np.stack(given)) if len(given) == len(arrays) else None


def _float(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float()

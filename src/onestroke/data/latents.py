"""Latents kept on the disk, so that the frozen VAE sees each picture once, however often training does.

A shard is one safetensors file, written whole or not at all; what is there is not encoded again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from onestroke.data.framing import cut, place
from onestroke.data.loader import ignore_interrupt
from onestroke.data.plan import picture_at
from onestroke.data.source import BrokenPicture, Source
from onestroke.errors import DataError
from onestroke.tensor_files import write_tensors
from onestroke.types import Batch

SHARD_PICTURES = 2_500
ENCODE_AT_ONCE = 50  # pictures
NUM_COMPARED = 200  # captions that tell one source from another


@dataclass(frozen=True)
class CachedLatents:
    """The latents of the readable ones among a source's first pictures, in memory."""

    latents: Float[Tensor, "n c h w"]  # float16
    indices: Int[Tensor, " n"]  # of the pictures in their source
    sizes: Int[Tensor, "n 4"]  # original height, width, crop top, crop left
    target: tuple[int, int]  # height, width of the pictures

    def __len__(self) -> int:
        return len(self.indices)


def cache_latents(
    folder: Path,
    source: Source,
    encode: Callable[[Float[Tensor, "b 3 h w"]], Float[Tensor, "b c _ _"]],
    *,
    made_by: str,
    count: int,
    size: tuple[int, int],
    num_workers: int = 1,
    log: Callable[[int], None] = lambda done: None,
) -> CachedLatents:
    """The latents of the first `count` pictures of `source`, centre-cropped to `size`; missing shards are made.

    `made_by` names the encoder (a fingerprint of its weights): a folder that another encoder or source filled raises
    DataError, and so does a source without a readable picture. `log` is told the pictures done, after each shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = {"made_by": made_by, "size": list(size), "count": count, "source": _digest(source)}
    shards = []
    for first in range(0, count, SHARD_PICTURES):
        path = folder / f"latents-{first // SHARD_PICTURES:05d}.safetensors"
        if not path.exists():
            rows = range(first, min(first + SHARD_PICTURES, count))
            shard = _encoded(source, encode, rows, size, num_workers)
            write_tensors(path, shard, {"onestroke": json.dumps(page)}, what="the latents")
        shards.append(_read_shard(path, page))
        log(min(first + SHARD_PICTURES, count))
    latents, indices, sizes = (torch.cat([shard[name] for shard in shards]) for name in ("latents", "indices", "sizes"))
    if not len(indices):
        raise DataError(f"none of {count} pictures can be read", fix="Mend the files, or give another folder.")
    return CachedLatents(latents, indices, sizes, size)


def _digest(source: Source) -> str:
    """A short name for a source: its number of pictures, and captions spread over all of them."""
    step = max(1, len(source) // NUM_COMPARED)
    captions = [source.caption(index) for index in range(0, len(source), step)]
    return hashlib.sha256(json.dumps([len(source), captions]).encode()).hexdigest()[:16]


def _encoded(source: Source, encode, rows: range, size: tuple[int, int], num_workers: int) -> dict[str, Tensor]:
    """One shard: latents, indices and sizes of the readable pictures among `rows`."""
    loader = DataLoader(_Cut(source, rows, size), ENCODE_AT_ONCE, num_workers=num_workers, collate_fn=list)
    latents, indices, sizes = [torch.empty(0)], [], []
    for found in loader:
        found = [row for row in found if row is not None]
        if not found:
            continue
        images = torch.from_numpy(np.stack([image for _, image, _ in found]))
        latents.append(encode((images.float() / 127.5 - 1).permute(0, 3, 1, 2)).half())
        indices += [index for index, _, _ in found]
        sizes += [measures for _, _, measures in found]
    kept = torch.cat(latents[1:]).contiguous() if indices else latents[0].half()
    return {"latents": kept, "indices": torch.tensor(indices), "sizes": torch.tensor(sizes).reshape(-1, 4)}


@dataclass(frozen=True)
class _Cut(Dataset):
    source: Source
    rows: range
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int):
        index = self.rows[position]
        try:
            image = self.source.read(index).image
        except BrokenPicture:
            return None
        placement = place(image.shape[:2], self.size, np.random.default_rng(0), crop="center", random_flip=False)
        return index, cut(image, self.size, placement), (*image.shape[:2], placement.top, placement.left)


def _read_shard(path: Path, page: dict) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("onestroke") != json.dumps(page):
            raise DataError(
                "these latents are of another VAE, of other pictures or of another size",
                where=str(path.parent),
                fix="Delete this folder, or train in another one.",
            )
        return {name: file.get_tensor(name) for name in ("latents", "indices", "sizes")}


@dataclass(frozen=True)
class _Rows(Dataset):
    """Latents and caption by slot: what runs in the worker."""

    cache: CachedLatents
    source: Source
    seed: int

    def __getitem__(self, slot: int) -> tuple[int, int, str]:
        row = picture_at(slot, len(self.cache), seed=self.seed)
        return slot, row, self.source.caption(int(self.cache.indices[row]), slot=slot)


def latent_batches(
    cache: CachedLatents,
    source: Source,
    *,
    batch_size: int,
    first_slot: int,
    last_slot: int,
    seed: int,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """As `data.source.batches`, of cached latents in place of images; an epoch is the cache."""
    loader = DataLoader(
        _Rows(cache, source, seed),
        batch_size,
        sampler=range(first_slot, last_slot),
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        collate_fn=list,
        worker_init_fn=ignore_interrupt,
        generator=torch.Generator(),  # else the loader draws from the global one
    )
    for found in loader:
        slots, rows, captions = zip(*found, strict=True)
        picked = torch.tensor(rows)
        yield Batch(
            None, captions, torch.tensor(slots), cache.sizes[picked], cache.latents[picked].float(), cache.target
        )

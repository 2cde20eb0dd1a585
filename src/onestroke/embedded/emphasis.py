"""Where the small things that words name are drawn, so that the denoising loss can heed them.

An expression or a pair of glasses covers a tenth of a picture and has a tenth of the loss: the teacher drew every style
and colour that it was asked for, and one expression in five. Where a picture changes when such a value does is known of
comicset, and counts there as much as the whole picture. A weight that can be told from what the network sees moves no
minimum: at each place, the mean of what may be there stays the best answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from onestroke.data.comicset.character import Character
from onestroke.data.comicset.dataset import ComicSource
from onestroke.data.comicset.render import render
from onestroke.data.comicset.vocabulary import load_style
from onestroke.data.latents import CachedLatents
from onestroke.tensor_files import write_tensors

LARGE = ("hair", "clothes")  # drawn attributes that the loss heeds by their area
LEAST_CHANGE, LEAST_PIXELS = 24, 2  # of 255; of a cell
MOST = 16.0  # times the weight of any other place
SHARD_PICTURES = 2_500


def altered(character: Character) -> Character:
    """The same character with every small part that can be named gone, or where it is always there, another."""
    style = load_style(character.style)
    options = dict(character.options)
    for attribute in style.attributes:
        if attribute.name not in character.values or not attribute.components or attribute.name in LARGE:
            continue
        if attribute.absent:
            options |= {f"{component}Probability": 0 for component in attribute.components}
            continue
        names = [value.name for value in attribute.values]
        other = attribute.values[(names.index(character.values[attribute.name]) + len(names) // 2) % len(names)]
        options |= {option: [choices[0]] for option, choices in other.draw.items()}
    return replace(character, options=options)


def small_parts(character: Character, *, size: int, cells: int) -> Bool[np.ndarray, "h w"]:
    """Which of `cells` x `cells` parts of the picture, `size` pixels a side, change with the small named parts."""
    before, after = (render(which, size=size).astype(np.int16) for which in (character, altered(character)))
    changed = np.abs(before - after).max(axis=2) >= LEAST_CHANGE
    cell = size // cells
    return changed.reshape(cells, cell, cells, cell).sum(axis=(1, 3)) >= LEAST_PIXELS


def emphasis(parts: Bool[Tensor, "*n h w"], share: float) -> Float[Tensor, "*n h w"]:
    """What is added to a weight of 1: on `parts`, together `share` of the whole picture, at most `MOST` a place."""
    cells = parts.shape[-1] * parts.shape[-2]
    each = share * cells / parts.sum(dim=(-2, -1), keepdim=True).clamp(min=1)
    return parts * each.clamp(max=MOST)


def parts_of(
    folder: Path, source: ComicSource, cache: CachedLatents, *, num_workers: int, log: Callable[[int], None]
) -> Bool[Tensor, "n h w"]:
    """The small parts of all pictures of `cache`, kept in its `folder`; missing shards are drawn."""
    shards, cells = [], cache.latents.shape[-1]
    for first in range(0, len(cache), SHARD_PICTURES):
        path = folder / f"parts-{first // SHARD_PICTURES:05d}.safetensors"
        indices = cache.indices[first : first + SHARD_PICTURES].tolist()
        if not path.exists():
            loader = DataLoader(_Parts(source, indices, cells), 50, num_workers=num_workers, collate_fn=np.stack)
            parts = torch.from_numpy(np.concatenate(list(loader)))
            write_tensors(path, {"parts": parts}, what="the small parts")
        shards.append(load_file(path)["parts"])
        log(first + len(indices))
    return torch.cat(shards)


class _Parts(Dataset):
    def __init__(self, source: ComicSource, indices: list[int], cells: int) -> None:
        self.source, self.indices, self.cells = source, indices, cells

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Bool[np.ndarray, "h w"]:
        character = self.source.character(self.indices[position])
        return small_parts(character, size=self.source.size, cells=self.cells)

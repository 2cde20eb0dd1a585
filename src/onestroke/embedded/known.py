"""What training makes of knowing its pictures: comicset's attributes, by the slot that a picture has in a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

from onestroke.config import PretrainRecipe
from onestroke.data.comicset.captions import odds_of_silence
from onestroke.data.comicset.dataset import ComicSource
from onestroke.data.comicset.vocabulary import judged_values
from onestroke.data.latents import CachedLatents
from onestroke.data.plan import picture_at
from onestroke.data.source import Source
from onestroke.embedded.emphasis import emphasis, parts_of
from onestroke.embedded.judge import NOTHING, labels_of
from onestroke.embedded.naming import PictureNaming

VALUES = {name: (NOTHING, *names) for name, names in judged_values().items()}


def rows_at(slots: torch.Tensor, cache: CachedLatents, recipe: PretrainRecipe) -> list[int]:
    """Which of the cached pictures a run shows in these slots."""
    return [picture_at(slot, len(cache), seed=recipe.seed) for slot in slots.tolist()]


def naming_hint(
    source: Source, cache: CachedLatents, recipe: PretrainRecipe, pipeline: StableDiffusionXLPipeline
) -> PictureNaming | None:
    """What the UNet's middle block learns beside the denoising, where the source knows its pictures' attributes."""
    if not isinstance(source, ComicSource):
        return None
    rows = [labels_of(source.character(index), VALUES) for index in cache.indices.tolist()]
    labels = torch.tensor(rows, dtype=torch.int64)

    def labels_at(slots: torch.Tensor) -> torch.Tensor:
        return labels[rows_at(slots, cache, recipe)]

    hint = PictureNaming(pipeline.unet.config.block_out_channels[-1], VALUES, labels_at)
    hint.module.to(pipeline.device)
    return hint


def blank_odds(
    source: Source, cache: CachedLatents, recipe: PretrainRecipe
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """How likely each slot's caption is dropped beside the mean, where the source knows what it could have named."""
    if not isinstance(source, ComicSource):
        return None
    odds = torch.tensor([odds_of_silence(source.character(index)) for index in cache.indices.tolist()])
    odds /= odds.mean()

    def odds_at(slots: torch.Tensor) -> torch.Tensor:
        return odds[rows_at(slots, cache, recipe)]

    return odds_at


def parts_counting(
    out: Path,
    source: Source,
    cache: CachedLatents,
    recipe: PretrainRecipe,
    *,
    num_workers: int,
    log: Callable[[str], None],
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What the small parts of each slot's picture count beyond the rest, where the source knows them."""
    if not isinstance(source, ComicSource) or not recipe.emphasis:
        return None
    parts = parts_of(
        out / "latents",
        source,
        cache,
        num_workers=num_workers,
        log=lambda done: log(f"small parts of {done}/{len(cache)} pictures found"),
    )

    def emphasis_at(slots: torch.Tensor) -> torch.Tensor:
        return emphasis(parts[rows_at(slots, cache, recipe)], recipe.emphasis)

    return emphasis_at

"""What comes after ADD where a recipe says so: the finished student is sharpened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from onestroke.config import Recipe
from onestroke.data.plan import picture_at
from onestroke.data.source import Source
from onestroke.distill.add import STUDENT
from onestroke.distill.sharpening import Sharpening
from onestroke.tensor_files import write_tensors
from onestroke.train.ranks import num_ranks, rank, share_of, wait_for_all
from onestroke.train.run import run_training
from onestroke.train.stage import Teller
from onestroke.train.trainer import Trainer
from onestroke.types import Batch

BETAS = (0.9, 0.99)  # no other player moves, so momentum helps


def sharpen(
    trainer: Trainer,
    source: Source,
    recipe: Recipe,
    out: Path,
    *,
    minutes: float | None,
    tell: Callable[[str], None],
) -> Trainer:
    """Train the student of `trainer`, whose run has ended, on; returns the trainer whose average is to be exported.

    It begins with the weights that `trainer` would have exported, and takes the place of its student. Resumes like any
    run, from `out/sharpening`. A step holds as many predictions as one of ADD, so a share of its prompts.
    """
    folder, method = out / "sharpening", trainer.method
    settings, player = trainer.settings, method.players[STUDENT]
    weights = trainer.whole(STUDENT, average=True)
    if weights is not None:
        write_tensors(folder / "before.safetensors", weights.state_dict(), what="the student before it is sharpened")
    wait_for_all()
    player.module.load_state_dict(load_file(folder / "before.safetensors"))
    trainer.optimizers.clear()  # and with them the memory of moments that are needed no more
    before = method.model.denoiser(
        deepcopy(player.module).eval().requires_grad_(False), prediction_type=recipe.student.prediction_type
    )
    rate = recipe.sharpen.learning_rate or player.optimizer.learning_rate
    kind = "adamw" if player.optimizer.kind == "muon" else player.optimizer.kind
    alone = Sharpening(
        method.model,
        method.student,
        player.module,
        before,
        method.decode,
        method.features,
        recipe.sharpen,
        replace(player.optimizer, kind=kind, betas=BETAS, learning_rate=rate, decay="linear"),
        num_timesteps=recipe.student.num_timesteps,
        ema_images=recipe.student.ema_images,
        seed=recipe.seed,
    )
    each = recipe.sharpen.predictions(recipe.student.num_timesteps)
    images, batch_size = recipe.sharpen.images, num_ranks() * max(1, int(share_of(settings.batch_size) / each))
    micro = settings.micro_batch_size and max(1, int(settings.micro_batch_size / each))
    finer = Trainer(
        alone,
        replace(settings, num_images=images, batch_size=batch_size, micro_batch_size=micro, shows_speed=False),
    )
    # what a run of ADD that has ended may be given anew, but not this one
    own = {"sharpening": recipe.sharpen.model_dump(mode="json"), "begun": {"kept": recipe.anchors.kept}}
    run_training(
        finer,
        lambda slot: prompt_batches(source, recipe, slot, images, batch_size),
        folder,
        recipe_text=yaml.safe_dump(own | recipe.model_dump(mode="json"), sort_keys=False),
        minutes=minutes,
        observe=Teller("sharpening", "first", images, tell),
    )
    return finer


def prompt_batches(source: Source, recipe: Recipe, first_slot: int, last_slot: int, batch_size: int) -> Iterator[Batch]:
    """Captions of the training pictures alone, with the size to draw them at: this process's part of each batch."""
    share, size = share_of(batch_size), (recipe.data.size, recipe.data.size)
    for first in range(first_slot, last_slot - batch_size + 1, batch_size):
        slots = torch.arange(first + rank() * share, first + (rank() + 1) * share)
        captions = tuple(
            source.caption(picture_at(slot, len(source), seed=recipe.seed), slot=slot) for slot in slots.tolist()
        )
        yield Batch(None, captions, slots, torch.zeros(share, 4, dtype=torch.int64), target=size)

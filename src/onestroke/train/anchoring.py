"""What comes before ADD where a recipe says so: the student learns the anchors alone, in a run of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import yaml

from onestroke.config import Recipe
from onestroke.distill.add import STUDENT
from onestroke.distill.anchors import Anchoring, Anchors
from onestroke.train.checkpoint import list_checkpoints
from onestroke.train.ranks import from_first, rank
from onestroke.train.run import run_training
from onestroke.train.trainer import Progress, Trainer

TOLD_SECONDS = 10.0


def learn_anchors(
    trainer: Trainer, anchors: Anchors, recipe: Recipe, out: Path, *, minutes: float | None, tell: Callable[[str], None]
) -> bool:
    """Put what the anchors teach into the student of `trainer` and its average; returns whether that is finished.

    Nothing is done where ADD has begun in `out`. Resumes like any run, from `out/anchoring`.
    """
    if from_first(list_checkpoints(out / "checkpoints") if rank() == 0 else []):
        return True
    method, player, images = trainer.method, trainer.method.players[STUDENT], recipe.anchors.images
    rate = recipe.anchors.learning_rate or player.optimizer.learning_rate
    optimizer = replace(player.optimizer, learning_rate=rate, decay="linear")
    steps = recipe.student.num_timesteps
    alone = Anchoring(method.model, method.student, player.module, anchors, optimizer, num_timesteps=steps)
    settings = replace(trainer.settings, num_images=images, shows_speed=False)
    first = Trainer(alone, settings)
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    finished = run_training(
        first,
        lambda slot: alone.batches_from(slot, images, settings.batch_size),
        out / "anchoring",
        recipe_text=text,
        minutes=minutes,
        observe=_Teller(images, tell),
    )
    if STUDENT in trainer.averages:
        trainer.averages[STUDENT].load_state_dict(player.module.state_dict())
    return finished


class _Teller:
    """Says how far the run is, every ten seconds."""

    def __init__(self, images: int, tell: Callable[[str], None]) -> None:
        self.images, self.tell, self.told = images, tell, time.monotonic()

    def __call__(self, progress: Progress, left: float | None) -> None:
        if time.monotonic() - self.told > TOLD_SECONDS:
            self.told = time.monotonic()
            rate, loss = progress.images / progress.seconds, progress.terms["student/anchor"]
            self.tell(f"anchors: {progress.images:,}/{self.images:,} pictures, {rate:.1f} a second; {loss:.4f}")

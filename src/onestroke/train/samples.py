"""Grids of what the student draws during a run: the live weights and their average, at few steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from onestroke.config import Recipe
from onestroke.distill.add import STUDENT
from onestroke.export import student_pipeline
from onestroke.families.model import DiffusionModel
from onestroke.sample import draw
from onestroke.train.tracking import Tracker
from onestroke.train.trainer import Trainer


class SamplePainter:
    """Draws the same prompts and seeds each time: a column a prompt; live and averaged weights at 1 and 4 steps."""

    def __init__(self, teacher: DiffusionModel, trainer: Trainer, recipe: Recipe, prompts: Sequence[str]) -> None:
        self.teacher, self.trainer, self.recipe, self.prompts = teacher, trainer, recipe, list(prompts)

    def __call__(self, tracker: Tracker) -> None:
        image = self.paint()
        tracker.picture("samples", image, self.trainer.images)
        folder = Path(tracker.path.parent) / "samples"
        folder.mkdir(exist_ok=True)
        from PIL import Image

        Image.fromarray(image).save(folder / f"{self.trainer.images:09d}.png")

    def paint(self) -> np.ndarray:
        """The grid, h w 3 uint8."""
        rows = []
        for unet in (self.trainer.method.players[STUDENT].module, self.trainer.averages[STUDENT]):
            was_training = unet.training
            pipeline = student_pipeline(self.teacher, unet.eval(), prediction_type=self.recipe.student.prediction_type)
            pipeline.set_progress_bar_config(disable=True)
            size = (self.recipe.data.size, self.recipe.data.size)
            for steps in (1, 4):
                with torch.random.fork_rng(devices=[]):
                    images = draw(
                        pipeline, self.prompts, seeds=range(len(self.prompts)), steps=steps, guidance=0.0, size=size
                    )
                rows.append(np.concatenate(list(images), axis=1))
            unet.train(was_training)
        return np.concatenate(rows, axis=0)

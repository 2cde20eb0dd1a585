"""Grids of what the student draws during a run: the live weights and their average, at few steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from onestroke.config import Recipe
from onestroke.distill.add import STUDENT
from onestroke.distill.lora import drawing_unet
from onestroke.export import student_pipeline
from onestroke.families.model import DiffusionModel
from onestroke.sample import draw
from onestroke.train.health import spreads
from onestroke.train.tracking import Tracker
from onestroke.train.trainer import Trainer

NUM_SEEDS = 4  # pictures of a prompt that tell how much seeds differ


class SamplePainter:
    """Draws the same prompts and seeds each time: a column a prompt; live and averaged weights at 1 and 4 steps."""

    def __init__(self, teacher: DiffusionModel, trainer: Trainer, recipe: Recipe, prompts: Sequence[str]) -> None:
        self.teacher, self.trainer, self.recipe, self.prompts = teacher, trainer, recipe, list(prompts)

    def __call__(self, tracker: Tracker | None) -> dict[str, tuple[float, float]]:
        """Paint and keep a grid, and measure how much pictures differ over seeds and over prompts (`health.spreads`).

        In process 0, which has the log; the others help to gather the weights, and return nothing.
        """
        image, measured = self.paint()
        if tracker is None or image is None:
            return {}
        for which, (seeds, prompts) in measured.items():
            tracker.scalars(
                {f"spread/{which}_over_seeds": seeds, f"spread/{which}_over_prompts": prompts}, self.trainer.images
            )
        tracker.picture("samples", image, self.trainer.images)
        folder = Path(tracker.path.parent) / "samples"
        folder.mkdir(exist_ok=True)
        from PIL import Image

        Image.fromarray(image).save(folder / f"{self.trainer.images:09d}.png")
        return measured

    def paint(self) -> tuple[np.ndarray | None, dict[str, tuple[float, float]]]:
        """The grid, h w 3 uint8, and the spreads of live and averaged weights; None in all processes but the first."""
        rows, measured = [], {}
        prompts = [prompt for prompt in self.prompts for _ in range(NUM_SEEDS)]
        for which, average in (("live", False), ("average", True)):
            weights = self.trainer.whole(STUDENT, average=average)
            if weights is None:
                continue
            unet = drawing_unet(self.trainer.method.student.unet, weights).to(self.teacher.device)
            was_training = unet.training
            pipeline = student_pipeline(self.teacher, unet.eval(), prediction_type=self.recipe.student.prediction_type)
            pipeline.set_progress_bar_config(disable=True)
            size = (self.recipe.data.size, self.recipe.data.size)
            for steps in (1, 4):
                with self._drawing():
                    images = draw(
                        pipeline, self.prompts, seeds=range(len(self.prompts)), steps=steps, guidance=0.0, size=size
                    )
                rows.append(np.concatenate(list(images), axis=1))
            with self._drawing():
                seeds = list(range(NUM_SEEDS)) * len(self.prompts)
                images = draw(pipeline, prompts, seeds=seeds, steps=1, guidance=0.0, size=size, batch_size=4)
            measured[which] = spreads(images.reshape(len(self.prompts), NUM_SEEDS, *images.shape[1:]))
            unet.train(was_training)
        return (np.concatenate(rows, axis=0) if rows else None), measured

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Under autocast where the teacher's parts are kept in another dtype than the student; nothing is compiled."""
        is_mixed = self.teacher.vae.dtype == torch.bfloat16
        autocast = torch.autocast(self.teacher.device.type, torch.bfloat16, enabled=is_mixed)
        with torch.random.fork_rng(devices=[]), autocast, torch.compiler.set_stance("force_eager"):
            yield

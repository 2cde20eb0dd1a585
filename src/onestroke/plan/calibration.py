"""A few real steps on this machine with untrained weights: how long a step of the run will take."""

from __future__ import annotations

import time
from statistics import median

import torch

from onestroke.config import Recipe
from onestroke.plan.architecture import Architecture
from onestroke.plan.untrained import untrained_method
from onestroke.precision import autocast_dtype
from onestroke.train.trainer import Trainer, TrainSettings
from onestroke.types import Batch


def measured_step(recipe: Recipe, architecture: Architecture, *, device: torch.device, num_steps: int = 3) -> float:
    """Seconds of a step of `recipe`, the median of `num_steps` after one that warms up. Weights are never read.

    The pictures are noise: making or reading real ones runs beside the step where there is a core for it.
    """
    method = untrained_method(recipe, architecture, device=device).method
    train, size = recipe.train, recipe.data.size
    settings = TrainSettings(10**9, train.batch_size, train.micro_batch_size, autocast_dtype(train.precision, device))
    trainer, times = Trainer(method, settings), []
    for step in range(num_steps + 1):
        started = time.perf_counter()
        trainer._step(_noise(train.batch_size, size, first=step * train.batch_size))
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return median(times[1:])


def _noise(count: int, size: int, *, first: int) -> Batch:
    images = torch.rand(count, 3, size, size) * 2 - 1
    slots = torch.arange(first, first + count)
    return Batch(images, ("a picture",) * count, slots, torch.tensor([[size, size, 0, 0]] * count))

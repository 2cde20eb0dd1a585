"""What comes before ADD where a recipe has anchors: the teacher draws them, and the student learns them alone."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from diffusers import DPMSolverMultistepScheduler
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from onestroke.config import AnchorRecipe, Recipe
from onestroke.data.plan import picture_at
from onestroke.data.source import Source
from onestroke.distill.add import STUDENT
from onestroke.distill.anchors import STREAM, Anchoring, Anchors
from onestroke.errors import DataError, ResourceError
from onestroke.export import student_pipeline
from onestroke.families.fingerprint import fingerprint
from onestroke.families.model import DiffusionModel
from onestroke.precision import autocast_dtype
from onestroke.randomness import normal
from onestroke.train.checkpoint import list_checkpoints
from onestroke.train.ranks import any_rank, from_first, num_ranks, rank, share_of
from onestroke.train.run import run_training
from onestroke.train.trainer import Progress, Trainer
from onestroke.types import Batch

SHARD_PICTURES = 500
DRAWN_AT_ONCE = 25
TOLD_SECONDS = 10.0  # between two lines while the student learns


def anchors_of(
    teacher: DiffusionModel,
    source: Source,
    recipe: Recipe,
    folder: Path,
    *,
    is_late: Callable[[], bool] = lambda: False,
    tell: Callable[[str], None],
) -> Anchors | None:
    """The anchors of a run, in `folder`; missing shards are drawn, several processes sharing the work.

    None where `is_late()` was true before all were drawn; what is there is not drawn again.

    The teacher draws as its owner would, by DPM-Solver++ (arXiv 2211.01095), with captions of the training pictures and
    the middle of the recipe's guidance. A folder that another teacher, source or recipe filled raises DataError.
    """
    settings, count = recipe.anchors, recipe.anchors.count
    picked = [picture_at(i, len(source), seed=recipe.seed) for i in range(min(count, len(source)))]
    captions = [source.caption(picked[i % len(picked)], slot=i) for i in range(count)]
    size = (recipe.data.size, recipe.data.size)
    folder.mkdir(parents=True, exist_ok=True)
    page = json.dumps({
        "made_by": fingerprint(teacher.unet), "steps": settings.steps, "guidance": _guidance(recipe), "size": size,
        "seed": recipe.seed, "captions": hashlib.sha256(json.dumps(captions).encode()).hexdigest()[:16],
    })  # fmt: skip
    firsts = range(0, count, SHARD_PICTURES)
    paths = [folder / f"anchors-{first // SHARD_PICTURES:05d}.safetensors" for first in firsts]
    todo = [i for i, path in enumerate(paths) if not path.exists()]
    if todo:
        home = teacher.device
        teacher.unet.to(next(teacher.vae.parameters()).device)  # a run that splits it keeps it elsewhere until then
        draw = _drawing(teacher, recipe, settings, size)
        tell(f"the teacher draws {count} pictures for the student to begin with; once for this folder")
        for i in todo[rank() :: num_ranks()]:
            if is_late():
                break
            rows = range(firsts[i], min(firsts[i] + SHARD_PICTURES, count))
            parts = [rows[first : first + DRAWN_AT_ONCE] for first in range(0, len(rows), DRAWN_AT_ONCE)]
            drawn = [draw([captions[row] for row in part], torch.tensor(part)) for part in parts]
            _write(paths[i], torch.cat(drawn), page)
            tell(f"the teacher's pictures: {rows[-1] + 1}/{count}")
        teacher.unet.to(home)
    (is_missing,) = any_rank(not all(path.exists() for path in paths[rank() :: num_ranks()]))
    if is_missing:
        return None
    return Anchors(torch.cat([_read(path, page) for path in paths]), captions, recipe.seed, size)


def _guidance(recipe: Recipe) -> float:
    return sum(recipe.teacher.guidance) / 2


def _drawing(
    teacher: DiffusionModel, recipe: Recipe, settings: AnchorRecipe, size: tuple[int, int]
) -> Callable[[Sequence[str], Tensor], Tensor]:
    """From captions and anchors' numbers to latents, as float16 on the CPU."""
    pipeline = student_pipeline(teacher, teacher.unet)
    config = {key: value for key, value in teacher.scheduler_config.items() if key != "algorithm_type"}
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(config, final_sigmas_type="zero")
    pipeline.set_progress_bar_config(disable=True)
    side = [length // teacher.vae_scale_factor for length in size]
    shape = (teacher.unet.config.in_channels, *side)
    device = next(teacher.vae.parameters()).device
    dtype = autocast_dtype(recipe.train.precision, device)

    @torch.no_grad()
    def draw(captions: Sequence[str], rows: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            latents = pipeline(
                prompt=list(captions), latents=normal(shape, recipe.seed, STREAM, rows).to(device, teacher.unet.dtype),
                height=size[0], width=size[1], num_inference_steps=settings.steps, guidance_scale=_guidance(recipe),
                output_type="latent",
            ).images  # fmt: skip
        return latents.half().cpu()

    return draw


def _write(path: Path, latents: Tensor, page: str) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        save_file({"latents": latents.contiguous()}, temporary, metadata={"onestroke": page})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise ResourceError("the anchors could not be written", where=str(path), fix="Free disk space.") from error


def _read(path: Path, page: str) -> Tensor:
    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("onestroke") != page:
            raise DataError(
                "these anchors are of another teacher, of other captions or of another recipe",
                where=str(path.parent),
                fix="Delete this folder, or train in another one.",
            )
        return file.get_tensor("latents")


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
        lambda slot: anchor_batches(anchors, slot, images, settings.batch_size),
        out / "anchoring",
        recipe_text=text,
        minutes=minutes,
        observe=_Teller(images, tell),
    )
    if STUDENT in trainer.averages:
        trainer.averages[STUDENT].load_state_dict(player.module.state_dict())
    return finished


def anchor_batches(anchors: Anchors, first_slot: int, last_slot: int, batch_size: int) -> Iterator[Batch]:
    """The anchors' captions, in the order in which `Anchoring` shows them: this process's part of each batch."""
    share = share_of(batch_size)
    for first in range(first_slot + rank() * share, last_slot - batch_size + 1 + rank() * share, batch_size):
        slots = torch.arange(first, first + share)
        captions = tuple(anchors.captions[row] for row in anchors.rows_of(slots, 1))
        yield Batch(None, captions, slots, torch.zeros(share, 4, dtype=torch.int64), target=anchors.size)


class _Teller:
    """Says how far the run is, every ten seconds."""

    def __init__(self, images: int, tell: Callable[[str], None]) -> None:
        self.images, self.tell, self.told = images, tell, time.monotonic()

    def __call__(self, progress: Progress, left: float | None) -> None:
        if time.monotonic() - self.told > TOLD_SECONDS:
            self.told = time.monotonic()
            rate, loss = progress.images / progress.seconds, progress.terms["student/anchor"]
            self.tell(f"anchors: {progress.images:,}/{self.images:,} pictures, {rate:.1f} a second; {loss:.4f}")

"""What comes before ADD where a recipe has anchors: the teacher draws them, and the student learns them alone."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from onestroke.config import Recipe, recipe_text
from onestroke.data.plan import picture_at
from onestroke.data.source import Source
from onestroke.distill.add import STUDENT
from onestroke.distill.anchors import Anchoring, Anchors, Drawn, anchor_noise, anchored, draw_anchors
from onestroke.distill.student import build_student
from onestroke.divided import mapped, may_be_shared
from onestroke.errors import CheckpointError, DataError
from onestroke.families.fingerprint import fingerprint
from onestroke.families.model import Denoiser, DiffusionModel
from onestroke.precision import autocast_dtype
from onestroke.randomness import uniform
from onestroke.tensor_files import write_tensors
from onestroke.train.checkpoint import list_checkpoints
from onestroke.train.ranks import any_rank, from_first, num_ranks, rank, share_of
from onestroke.train.run import run_training
from onestroke.train.stage import Teller
from onestroke.train.trainer import Trainer
from onestroke.types import Batch, Condition

SHARD_PICTURES = 500
DRAWN_AT_ONCE = 25
TIMED_ANCHORS = 16


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
    the middle of the recipe's guidance. A folder that another teacher, student, source or recipe filled raises
    DataError.
    """
    count = recipe.anchors.count
    picked = [picture_at(i, len(source), seed=recipe.seed) for i in range(min(count, len(source)))]
    captions = [source.caption(picked[i % len(picked)], slot=i) for i in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    student = _first_student(teacher, recipe)
    made_by = [fingerprint(model.unet) for model in (teacher, student) if model]
    parts = [range(first, min(first + SHARD_PICTURES, count)) for first in range(0, count, SHARD_PICTURES)]
    paths = [folder / f"anchors-{rows[0]:07d}-{rows[-1]:07d}.safetensors" for rows in parts]
    pages = [_page(recipe, made_by, captions[rows[0] : rows[-1] + 1]) for rows in parts]
    todo = [i for i, path in enumerate(paths) if not path.exists()]
    for i in sorted({*range(len(paths))} - {*todo}):
        _check_page(paths[i], pages[i])  # before anything is drawn beside it
    if todo:
        home = teacher.device
        teacher.unet.to(next(teacher.vae.parameters()).device)  # a run that splits it keeps it elsewhere until then
        draw = _drawing(teacher, student, recipe)
        tell(f"the teacher draws {count} pictures for the student to begin with; once for this folder")
        for i in todo[rank() :: num_ranks()]:
            if is_late():
                break
            drawn = draw([captions[row] for row in parts[i]], torch.tensor(parts[i]), DRAWN_AT_ONCE)
            write_tensors(paths[i], drawn._asdict(), {"onestroke": pages[i]}, what="the anchors")
            tell(f"the teacher's pictures: {parts[i][-1] + 1}/{count}")
        teacher.unet.to(home)
    (is_missing,) = any_rank(not all(path.exists() for path in paths[rank() :: num_ranks()]))
    if is_missing:
        return None
    shards = [_read(path, page) for path, page in zip(paths, pages, strict=True)]
    return Anchors(shards, captions, recipe.seed, _size(recipe))


def seconds_an_anchor(teacher: DiffusionModel, source: Source, recipe: Recipe) -> float:
    """How long the teacher takes on this machine for each anchor of many; some are drawn, and dropped."""
    draw = _drawing(teacher, _first_student(teacher, recipe), recipe)
    captions = [source.caption(i) for i in range(TIMED_ANCHORS)]
    rows, at_once = torch.arange(TIMED_ANCHORS), TIMED_ANCHORS // max(1, torch.get_num_threads())
    draw(captions[:2], rows[:2], 1)
    started = time.monotonic()
    draw(captions, rows, max(1, at_once))
    return (time.monotonic() - started) / TIMED_ANCHORS


def _first_student(teacher: DiffusionModel, recipe: Recipe) -> Denoiser | None:
    """The student as the run begins with it, where it draws some of what anchors begin from."""
    if not recipe.anchors.given_by_student:
        return None
    unet = build_student(teacher, recipe.student, seed=recipe.seed).eval().requires_grad_(False)
    unet.to(next(teacher.vae.parameters()).device, teacher.dtype, memory_format=torch.channels_last)
    return teacher.denoiser(unet, prediction_type=recipe.student.prediction_type)


def _page(recipe: Recipe, made_by: Sequence[str], captions: Sequence[str]) -> str:
    """What a shard was drawn by and of, to know it again."""
    return json.dumps({
        "made_by": made_by, "steps": recipe.anchors.steps, "guidance": _guidance(recipe), "size": _size(recipe),
        "num_timesteps": recipe.student.num_timesteps, "seed": recipe.seed,
        "given_by_student": recipe.anchors.given_by_student,
        "captions": hashlib.sha256(json.dumps(captions).encode()).hexdigest()[:16],
    })  # fmt: skip


def _size(recipe: Recipe) -> tuple[int, int]:
    return recipe.data.size, recipe.data.size


def _guidance(recipe: Recipe) -> float:
    return sum(recipe.teacher.guidance) / 2


def _drawing(
    teacher: DiffusionModel, student: Denoiser | None, recipe: Recipe
) -> Callable[[Sequence[str], Tensor, int], Drawn]:
    """From captions, anchors' numbers and how many are drawn at once, to anchors; on a CPU each core draws some."""
    size = _size(recipe)
    shape = (teacher.unet.config.in_channels, *(length // teacher.vae_scale_factor for length in size))
    device, denoiser = teacher.device, teacher.denoiser()
    dtype = autocast_dtype(recipe.train.precision, device)

    @torch.no_grad()
    def read(captions: Sequence[str]) -> tuple[Condition, Condition]:
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            condition = teacher.full_size(teacher.encode_prompts(captions), size)
            return condition, teacher.blank_prompts(condition)

    @torch.no_grad()
    def draw_some(group: tuple[tuple[Condition, Condition], Tensor]) -> Drawn:
        (condition, blank), rows = group
        noise = anchor_noise(shape, recipe.seed, rows, recipe.student.num_timesteps).to(device, teacher.dtype)
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            steps, guidance = recipe.anchors.steps, _guidance(recipe)
            own = uniform(recipe.seed, "anchor given", rows) < recipe.anchors.given_by_student
            return draw_anchors(
                teacher,
                denoiser,
                condition,
                blank,
                noise,
                steps=steps,
                guidance=guidance,
                student=student,
                own=own.to(device),
            )

    def draw(captions: Sequence[str], rows: Tensor, at_once: int) -> Drawn:
        firsts = range(0, len(captions), at_once)
        words = (read(captions[first : first + at_once]) for first in firsts)
        groups = zip(words, rows.split(at_once), strict=True)
        threads = torch.get_num_threads()
        if threads > 1 and may_be_shared(teacher.unet):
            parts = mapped(draw_some, groups, threads)
        else:
            parts = [draw_some(group) for group in groups]
        return Drawn(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    return draw


def _check_page(path: Path, page: str) -> None:
    """Raises DataError where another run drew the shard."""
    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("onestroke") != page:
            raise DataError(
                "these anchors are of another teacher, student or recipe, or of other captions",
                where=str(path.parent),
                fix="Delete this folder, or train in another one.",
            )


def _read(path: Path, page: str) -> Drawn:
    """The tensors stay in the file until they are looked at."""
    _check_page(path, page)
    with safe_open(path, "pt") as file:
        return Drawn(*(file.get_tensor(name) for name in Drawn._fields))


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
    alone = Anchoring(
        method.model,
        method.student,
        player.module,
        anchors,
        anchored(recipe),
        optimizer,
        emphasis=recipe.anchors.emphasis,
        perception=method.perception,
        perceptual=recipe.anchors.perceptual,
    )
    settings = replace(trainer.settings, num_images=images, shows_speed=False)
    first = Trainer(alone, settings)
    finished = run_training(
        first,
        lambda slot: anchor_batches(anchors, slot, images, settings.batch_size),
        out / "anchoring",
        recipe_text=recipe_text(recipe),
        minutes=minutes,
        observe=Teller("anchors", "anchor", images, tell),
    )
    if STUDENT in trainer.averages:
        trainer.averages[STUDENT].load_state_dict(player.module.state_dict())
    return finished


def weights_after_anchors(trainer: Trainer, out: Path) -> Mapping[str, Tensor]:
    """The student's weights as `learn_anchors` left them, from `out/anchoring`; put there before ADD begins.

    Every process has to call this; all but the first get nothing.
    """
    path = out / "anchoring" / "student.safetensors"
    (is_missing,) = any_rank(rank() == 0 and not path.exists())
    if is_missing:
        if from_first(list_checkpoints(out / "checkpoints") if rank() == 0 else []):
            raise CheckpointError(
                "the weights that the anchors left are not there", where=str(path), fix="Set anchors.kept to 0."
            )
        weights = trainer.whole(STUDENT, average=False)
        if weights is not None:
            write_tensors(path, dict(weights.named_parameters()), what="the weights that the anchors left")
    return load_file(path) if rank() == 0 else {}


def anchor_batches(anchors: Anchors, first_slot: int, last_slot: int, batch_size: int) -> Iterator[Batch]:
    """The anchors' captions, in the order in which `Anchoring` shows them: this process's part of each batch."""
    share = share_of(batch_size)
    for first in range(first_slot + rank() * share, last_slot - batch_size + 1 + rank() * share, batch_size):
        slots = torch.arange(first, first + share)
        captions = tuple(anchors.captions[row] for row in anchors.rows_of(slots, 1))
        yield Batch(None, captions, slots, torch.zeros(share, 4, dtype=torch.int64), target=anchors.size)

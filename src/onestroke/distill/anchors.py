"""Anchors: pictures that the guided teacher draws from known noise, for the student to draw from it in one step.

At pure noise a teacher predicts the mean of all pictures, whatever the noise is: nothing there tells a student that
another noise is another picture, and a discriminator asks for it only faintly. Pairs of noise and picture, as an ODE
solver gives them, do (DMD, arXiv 2311.18828, section 3.2, the regression loss; here between latents).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from onestroke.config import AnchorRecipe, Recipe
from onestroke.data.plan import picture_at
from onestroke.data.source import Source
from onestroke.errors import DataError, ResourceError
from onestroke.export import student_pipeline
from onestroke.families.fingerprint import fingerprint
from onestroke.families.model import Denoiser, DiffusionModel
from onestroke.precision import autocast_dtype
from onestroke.randomness import normal, uniform
from onestroke.schedule import student_timesteps
from onestroke.train.method import Loss, OptimizerSettings, Player
from onestroke.train.ranks import any_rank, num_ranks, rank, share_of
from onestroke.types import Batch

SHARD_PICTURES = 500
DRAWN_AT_ONCE = 25
STREAM = "anchor"  # of the noise
OTHERS = 0.25  # of the pictures before ADD, for the student's other timesteps


@dataclass(frozen=True)
class Anchors:
    """Captions, noise by number, and what the teacher drew of both."""

    latents: Float[Tensor, "n c h w"]  # scaled, float16
    captions: Sequence[str]
    seed: int
    size: tuple[int, int]  # height, width of the pictures

    def __len__(self) -> int:
        return len(self.latents)

    def noise(self, rows: Sequence[int]) -> Float[Tensor, "b c h w"]:
        """What these anchors were drawn from."""
        return normal(self.latents.shape[1:], self.seed, STREAM, torch.tensor(list(rows)))

    def rows_of(self, slots: Int[Tensor, " b"], every: int) -> list[int]:
        """Which anchors go with these pictures of the run: one to each slot that divides by `every`."""
        numbers = [slot // every for slot in slots.tolist() if slot % every == 0]
        return [picture_at(n, len(self), seed=self.seed) for n in numbers]


def anchor_loss(drawn: Float[Tensor, "a c h w"], anchors: Float[Tensor, "a c h w"], expected: float) -> Tensor:
    """Squared distance, averaged over a latent's elements and over `expected` anchors (DMD, eq. 9, in latents).

    Parts of a batch hold more or fewer anchors than others: what one of them counts does not depend on that.
    """
    return (drawn - anchors).square().mean(dim=(1, 2, 3)).sum() / expected


class Anchoring:
    """A method whose student sees anchors alone: what comes before ADD. Each picture of the run is one anchor.

    A quarter of them is noised afresh, for the student's other timesteps, which would else be forgotten meanwhile.
    """

    def __init__(
        self,
        model: DiffusionModel,
        student: Denoiser,
        trained: nn.Module,
        anchors: Anchors,
        optimizer: OptimizerSettings,
        *,
        num_timesteps: int = 4,
    ) -> None:
        self.model, self.student, self.anchors = model, student, anchors
        self.timesteps = torch.tensor(student_timesteps(num_timesteps, num_train_timesteps=len(model.schedule)))
        self.players = {"student": Player(trained, optimizer)}

    def rollout(self, batch: Batch, due: frozenset[str]) -> tuple[Tensor, Tensor]:
        """The student's latents and the teacher's."""
        model, device, seed = self.model, self.model.device, self.anchors.seed
        rows = self.anchors.rows_of(batch.slots, 1)
        with torch.no_grad():
            condition = model.full_size(model.encode_prompts(batch.captions), self.anchors.size)
            target = self.anchors.latents[rows].to(device, model.dtype)
            s = self._timesteps(uniform(seed, "anchor s", batch.slots))
            fresh = normal(target.shape[1:], seed, "anchor eps", batch.slots)
            is_first = (s == self.timesteps[0])[:, None, None, None]
            noise = torch.where(is_first, self.anchors.noise(rows), fresh).to(target)
            x_s = model.schedule.student_input(target, noise, s)
        return self.student(x_s, s.to(device), condition), target

    def _timesteps(self, fractions: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
        """The noisiest but for the last `OTHERS` of the fractions, which are spread over the other ones."""
        others = self.timesteps[1:]
        if not len(others):
            return self.timesteps.expand(len(fractions))
        place = ((fractions - (1 - OTHERS)) / OTHERS * len(others)).floor().long()
        return torch.where(fractions < 1 - OTHERS, self.timesteps[0], others[place.clamp(min=0)])

    def loss(self, player: str, rollout: tuple[Tensor, Tensor]) -> Loss:
        drawn, target = rollout
        loss = anchor_loss(drawn, target, len(target))
        return Loss(loss, {"anchor": loss.detach()})

    def finish_step(self, due: frozenset[str]) -> None:
        """Nothing to do."""

    def batches_from(self, first_slot: int, last_slot: int, batch_size: int) -> Iterator[Batch]:
        """Captions of the anchors, in the order of `rollout`: this process's part of each batch."""
        share = share_of(batch_size)
        for first in range(first_slot + rank() * share, last_slot - batch_size + 1 + rank() * share, batch_size):
            slots = torch.arange(first, first + share)
            captions = tuple(self.anchors.captions[row] for row in self.anchors.rows_of(slots, 1))
            yield Batch(None, captions, slots, torch.zeros(share, 4, dtype=torch.int64), target=self.anchors.size)


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

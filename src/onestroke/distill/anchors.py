"""Anchors: pictures that the guided teacher draws from known noise, for the student to draw in one step.

At pure noise a teacher predicts the mean of all pictures, whatever the noise is: nothing there tells a student that
another noise is another picture, and a discriminator asks for it only faintly. Pairs of noise and picture, as an ODE
solver gives them, do (DMD, arXiv 2311.18828, section 3.2, the regression loss; here between latents). At its later
timesteps a student is given the picture that it has just drawn, under new noise. The teacher is given the same, its own
picture under new noise, and draws on from there: what went wrong between one timestep and the next is mended, as by a
stochastic solver, and the pictures come nearer to real ones from timestep to timestep. Where a student goes on that
draws already, the teacher can be given that student's picture instead, and mends what this student does wrong: a model
that learns from another's path has never seen where its own leads (DAgger, arXiv 1011.0686).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import DPMSolverMultistepScheduler
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from onestroke.config import Recipe, StudentRecipe
from onestroke.data.plan import picture_at
from onestroke.distill.perceptual import Perception
from onestroke.distill.student import choose_timesteps
from onestroke.families.model import Denoiser, DiffusionModel, joined
from onestroke.randomness import normal, uniform
from onestroke.schedule import NoiseSchedule, beta_settings, student_timesteps
from onestroke.train.method import Loss, OptimizerSettings, Player
from onestroke.types import Batch, Condition

MOST = 16.0  # that words add to the weight of a place, which is 1 without
ROUND = 0.03  # distance, in a latent's units, below which the loss is quadratic


class Drawn(NamedTuple):
    """Some anchors, as the teacher drew them, in float16."""

    pictures: Float[Tensor, "n k c h w"]  # scaled latents: from noise, and from noise over the picture before, k times
    worded: Float[Tensor, "n k h w"]  # how much words still moved each place at timesteps below half; mean 1
    given: Float[Tensor, "n k c h w"]  # what the noise was added to: zeros, then what was drawn at the timestep before


class Lesson(NamedTuple):
    """What the student is shown of some anchors, what it is to draw, and what each place counts."""

    x_s: Float[Tensor, "b c h w"]
    s: Int[Tensor, " b"]
    target: Float[Tensor, "b c h w"]
    worded: Float[Tensor, "b h w"]
    slots: Int[Tensor, " b"]  # of the run's pictures that these go with


@dataclass(frozen=True)
class Anchors:
    """Captions, noise by number, and what the teacher drew of both. All shards but the last are equally long."""

    shards: Sequence[Drawn]
    captions: Sequence[str]
    seed: int
    size: tuple[int, int]  # height, width of the pictures

    def __len__(self) -> int:
        return len(self.captions)

    def __deepcopy__(self, memo: dict) -> Anchors:
        return self  # nothing changes them

    def at(self, rows: Sequence[int]) -> Drawn:
        """These anchors, read from their shards, in float32: the CPU's autocast stacks no float16."""
        length = len(self.shards[0].pictures)
        places = [divmod(row, length) for row in rows]
        return Drawn(*(
            torch.stack([self.shards[shard][part][row].float() for shard, row in places])
            if places
            else self.shards[0][part][:0].float()
            for part in range(len(Drawn._fields))
        ))  # fmt: skip

    def noise(self, rows: Sequence[int]) -> Float[Tensor, "b k c h w"]:
        """What these anchors were drawn from at each of the student's timesteps."""
        count, *shape = self.shards[0].pictures.shape[1:]
        return anchor_noise(shape, self.seed, torch.tensor(list(rows)), count)

    def rows_of(self, slots: Int[Tensor, " b"], every: int) -> list[int]:
        """Which anchors go with these pictures of the run: one to each slot that divides by `every`."""
        numbers = [slot // every for slot in slots.tolist() if slot % every == 0]
        return [picture_at(n, len(self), seed=self.seed) for n in numbers]

    def lesson(
        self, slots: Int[Tensor, " b"], every: int, student: StudentRecipe, schedule: NoiseSchedule, like: Tensor
    ) -> Lesson:
        """The anchors of these slots, each at one of the student's timesteps, in the dtype and place of `like`."""
        rows = self.rows_of(slots, every)
        pictures, worded, given = (part.to(like) for part in self.at(rows))
        if not rows:
            return Lesson(pictures[:, 0], torch.empty(0, dtype=torch.int64), pictures[:, 0], worded[:, 0], slots[:0])
        slots = slots[slots % every == 0]
        fractions = uniform(self.seed, "anchor s", slots)
        s = choose_timesteps(fractions, student, num_train_timesteps=len(schedule))
        timesteps = torch.tensor(student_timesteps(student.num_timesteps, num_train_timesteps=len(schedule)))
        place, each = (s[:, None] == timesteps).long().argmax(1), torch.arange(len(rows))
        noise = self.noise(rows)[each, place].to(like)
        x_s = schedule.student_input(given[each, place], noise, s)
        return Lesson(x_s, s, pictures[each, place], worded[each, place], slots)


def anchor_noise(shape: Sequence[int], seed: int, rows: Int[Tensor, " b"], count: int) -> Float[Tensor, "b k c h w"]:
    """The noise of these anchors at each of `count` timesteps."""
    streams = ("anchor", *(f"anchor, timestep {place}" for place in range(1, count)))
    return torch.stack([normal(shape, seed, stream, rows) for stream in streams], 1)


def anchored(recipe: Recipe) -> StudentRecipe:
    """The student's settings, with the weights that its timesteps have for anchors."""
    weights = recipe.anchors.timestep_weights
    return recipe.student if weights is None else recipe.student.model_copy(update={"timestep_weights": weights})


def draw_anchors(
    model: DiffusionModel,
    teacher: Denoiser,
    condition: Condition,
    blank: Condition,
    noise: Float[Tensor, "n k c h w"],
    *,
    steps: int,
    guidance: float,
    student: Denoiser | None = None,
    own: Bool[Tensor, " n"] | None = None,
) -> Drawn:
    """The guided teacher's pictures by DPM-Solver++ (arXiv 2211.01095), from noise at each of the student's timesteps.

    From pure noise in `steps`, a multiple of their number k; from each later one, over the picture before, in those of
    the steps that are left. `blank`: `model.blank_prompts(condition)`. Where `own` is true, the picture before is not
    the teacher's but the one that `student` drew of what the teacher was given there.
    """
    both = joined(condition, blank)
    before, pictures, moved, given = torch.zeros_like(noise[:, 0]), [], [], []
    for place, station in enumerate(student_timesteps(noise.shape[1], num_train_timesteps=len(model.schedule))):
        solver = DPMSolverMultistepScheduler(
            **beta_settings(model.scheduler_config),
            prediction_type="sample",
            timestep_spacing="trailing",
            final_sigmas_type="zero",
        )
        solver.set_timesteps(steps, device=noise.device)
        begin = solver.timesteps.tolist().index(station)
        solver.set_begin_index(begin)
        t_begin = torch.tensor([station], device=noise.device).expand(len(noise))
        x = x_begin = model.schedule.student_input(before, noise[:, place], t_begin)
        moves = torch.zeros_like(x[:, 0])
        for i, t in enumerate(solver.timesteps[begin:], begin):
            worded, wordless = teacher(torch.cat([x, x]), t.expand(2 * len(x)), both).chunk(2)
            if i >= steps // 2:
                moves += (worded - wordless).square().mean(1)
            x = solver.step(wordless + guidance * (worded - wordless), t, x).prev_sample
        given.append(before)
        pictures.append(x)
        moved.append(moves)
        if student is not None and own is not None:
            x = torch.where(own[:, None, None, None], student(x_begin, t_begin, condition).to(x), x)
        before = x.half().to(x)  # as it is kept
    worded = torch.stack(moved, 1)
    mean = worded.mean(dim=(2, 3), keepdim=True)
    worded = torch.where(mean > 0, worded / mean, torch.ones_like(worded))
    return Drawn(*(part.half().cpu() for part in (torch.stack(pictures, 1), worded, torch.stack(given, 1))))


def anchor_loss(
    drawn: Float[Tensor, "a c h w"],
    anchors: Float[Tensor, "a c h w"],
    worded: Float[Tensor, "a h w"],
    expected: float,
    *,
    emphasis: float,
) -> Tensor:
    """Pseudo-Huber distance `sqrt(m + r^2) - r` (arXiv 2310.14189, section 3.3), `m` the mean square over a latent.

    Averaged over `expected` anchors: parts of a batch hold more or fewer of them, and what one counts does not depend
    on that. The root gives an anchor at a late timestep, which is nearly right, as much of a say as one at pure noise.

    `emphasis`: what the places that words moved count beyond the rest, together, as a share of the whole. What is
    small in the picture and named in the prompt, an expression or a hand, is moved last, when all else is drawn.
    """
    weight = 1 + (emphasis * worded).clamp(max=MOST)
    square = ((drawn - anchors).square().mean(1) * weight).mean(dim=(1, 2))
    return ((square + ROUND**2).sqrt() - ROUND).sum() / expected


class Anchoring:
    """A method whose student sees anchors alone: what comes before ADD. Each picture of the run is one anchor."""

    def __init__(
        self,
        model: DiffusionModel,
        student: Denoiser,
        trained: nn.Module,
        anchors: Anchors,
        recipe: StudentRecipe,
        optimizer: OptimizerSettings,
        *,
        emphasis: float,
        perception: Perception | None = None,
        perceptual: float = 0.0,
    ) -> None:
        self.model, self.student, self.anchors = model, student, anchors
        self.recipe, self.emphasis = recipe, emphasis
        self.perception, self.perceptual = perception, perceptual
        self.players = {"student": Player(trained, optimizer)}

    @property
    def frozen(self) -> list[nn.Module]:
        """The networks that are not trained."""
        seen = [] if self.perception is None else self.perception.modules
        return [self.model.unet, self.model.vae, *self.model.text_encoders, *seen]

    def rollout(self, batch: Batch, due: frozenset[str]) -> tuple[Tensor, Lesson]:
        """The student's latents, and what they are held against."""
        model = self.model
        with torch.no_grad():
            condition = model.full_size(model.encode_prompts(batch.captions), self.anchors.size)
            like = torch.empty(0, dtype=model.dtype, device=model.device)
            lesson = self.anchors.lesson(batch.slots, 1, self.recipe, model.schedule, like)
        return self.student(lesson.x_s, lesson.s.to(model.device), condition), lesson

    def loss(self, player: str, rollout: tuple[Tensor, Lesson]) -> Loss:
        drawn, lesson = rollout
        loss = anchor_loss(drawn, lesson.target, lesson.worded, len(drawn), emphasis=self.emphasis)
        terms = {"anchor": loss.detach()}
        if self.perception is not None and self.perceptual:
            seen = self.perception.distance(drawn, lesson.target, lesson.slots).mean()
            terms["perceptual"], loss = seen.detach(), loss + self.perceptual * seen
        return Loss(loss, terms)

    def finish_step(self, due: frozenset[str]) -> None:
        """Nothing to do."""

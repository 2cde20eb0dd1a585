"""`onestroke bench`: the ADD step beside its unavoidable parts, and drawing with student and teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from onestroke.api import load
from onestroke.build import add_trainer, source_of, teacher_of
from onestroke.commands.machine import use_machine
from onestroke.commands.quiet import quiet_libraries
from onestroke.config import Recipe, load_recipe
from onestroke.data.loader import batches
from onestroke.distill.add import ADD, DISCRIMINATOR, STUDENT, Rollout
from onestroke.distill.student import choose_timesteps
from onestroke.distill.teacher import teacher_timesteps
from onestroke.divided import mapped
from onestroke.embedded import GUIDANCE, TEACHER
from onestroke.embedded import STUDENT as EMBEDDED_STUDENT
from onestroke.evaluate.drawing import contenders, part_timer
from onestroke.evaluate.latency import LatencyRow, PartTimer, measure_latency
from onestroke.evaluate.report import seconds
from onestroke.families.model import guided
from onestroke.precision import training_attention
from onestroke.randomness import normal, uniform
from onestroke.train.trainer import Trainer
from onestroke.types import Batch, Condition

STEP = "whole step"
ENCODED = "whole step, pictures encoded beforehand"  # by `onestroke encode`
MAIN_PARTS = (  # those that the step may exceed by 15% at most
    "student forward and backward", "decode forward and backward", "features forward and backward", "teacher forward",
    "optimizer",
)  # fmt: skip
LIMIT = 1.15
WARM_UPS = 2  # rounds that are not counted


# The training step


@dataclass(frozen=True)
class Part:
    """`run` is timed; `prepare` runs before it and `clean` after it, untimed."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    clean: Callable[[], object] = lambda: None


def run_train_step(batch_size: int, rounds: int, console: Console) -> None:
    """Time the step of the recipe `mini` and its parts in turn; print medians, their sums and the step over each.

    The step is timed twice: as it is, and with latents that `onestroke encode` keeps of a set.
    """
    quiet_libraries()
    use_machine()
    recipe = load_recipe("mini", [f"train.batch_size={batch_size}"])
    times = measure_step(recipe, rounds=rounds)
    console.print(step_table(times, title=f"ADD step, batch {batch_size}, {recipe.data.size} px, {rounds} rounds"))
    every = [name for name in times if name not in (STEP, ENCODED)]
    ratios = {
        "step / the first five parts": step_over(times, MAIN_PARTS),
        "step / all parts": step_over(times, every),
        "step, pictures encoded beforehand / the first five parts": step_over(times, MAIN_PARTS, step=ENCODED),
    }
    for label, ratio in ratios.items():
        console.print(
            f"{label}: {ratio:.2f} (median over rounds; the aim is at most {LIMIT})", markup=False, highlight=False
        )


def step_table(times: Mapping[str, Sequence[float]], *, title: str) -> Table:
    """Medians of the five parts and their sum, of the others and the sum of all, and of the whole steps."""
    medians = {name: median(values) for name, values in times.items()}
    others = [name for name in times if name not in (STEP, ENCODED, *MAIN_PARTS)]
    table = Table("part, alone", "median", title=title)
    for names, label, counted in ((MAIN_PARTS, "sum of these five", MAIN_PARTS),
                                  (others, "sum of all parts", (*MAIN_PARTS, *others))):  # fmt: skip
        for name in names:
            table.add_row(name, seconds(medians[name]))
        table.add_row(label, seconds(sum(medians[name] for name in counted)), style="bold", end_section=True)
    for name in (STEP, ENCODED):
        table.add_row(name, seconds(medians[name]), style="bold")
    return table


def step_over(times: Mapping[str, Sequence[float]], names: Sequence[str], *, step: str = STEP) -> float:
    """How many times longer the step takes than the parts `names`: the median of each round's own ratio."""
    sums = [sum(values) for values in zip(*(times[name] for name in names), strict=True)]
    return median(one / total for one, total in zip(times[step], sums, strict=True))


def measure_step(recipe: Recipe, *, rounds: int) -> dict[str, list[float]]:
    """Seconds of the whole steps and of each part alone, by round; all run once a round, another one first each time.

    The step with encoded pictures has a trainer of its own: R1 comes in as many of its steps.
    """
    endless = recipe.model_copy(update={"train": recipe.train.model_copy(update={"num_images": 10**9})})
    teacher = teacher_of(endless)
    trainer, other = add_trainer(endless, teacher), add_trainer(endless, teacher)
    batch_size, size = recipe.train.batch_size, (recipe.data.size, recipe.data.size)
    data = list(batches(source_of(recipe.data, seed=recipe.seed), batch_size=batch_size, size=size, first_slot=0,
                        last_slot=(rounds + WARM_UPS) * batch_size, seed=recipe.seed))  # fmt: skip
    steps = trainer.run(lambda first_slot: iter(data))
    encoded = [encoded_batch(trainer, batch) for batch in data]
    encoded_steps = other.run(lambda first_slot: iter(encoded))
    parts = {
        STEP: Part(lambda: next(steps)),
        ENCODED: Part(lambda: next(encoded_steps)),
        **step_parts(trainer, data[0]),
    }
    timer = PartTimer(torch.cuda.synchronize) if teacher.device.type == "cuda" else PartTimer()
    names, times = list(parts), {name: [] for name in parts}
    for k in range(rounds + WARM_UPS):
        for name in names[k % len(names):] + names[:k % len(names)]:  # fmt: skip
            part = parts[name]
            part.prepare()
            with training_attention(teacher.device, data[0].num_pixels), timer.part(name):
                part.run()
            part.clean()
        taken = timer.take()
        if k >= WARM_UPS:
            for name in names:
                times[name].append(taken[name])
    return times


def encoded_batch(trainer: Trainer, batch: Batch) -> Batch:
    """The batch as training has it of pictures that were encoded beforehand."""
    model, dtype = trainer.method.model, trainer.settings.autocast
    with torch.no_grad(), torch.autocast(model.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        latents = model.encode_images(batch.images.to(model.device))
    needs_images = trainer.method.recipe.discriminator.real == "data"
    images = batch.images if needs_images else None
    return replace(batch, images=images, latents=latents, target=batch.picture_size)


@dataclass(frozen=True)
class StepInputs:
    """What the parts work on: the inputs that each has inside the step."""

    images: Tensor  # b 3 h w, the real pictures
    condition: Condition
    blank: Condition
    x_s: Tensor  # the student's input, b c h w
    s: Tensor
    x_t: Tensor  # the teacher's input, b c h w
    t: Tensor
    x0: Tensor  # a clean picture in latents, b c h w
    pixels: Tensor  # what the heads look at of it, b 3 _ _
    rollout: Rollout


def step_inputs(method: ADD, batch: Batch) -> StepInputs:
    """The inputs of each part for one batch, made as `ADD.rollout` makes them."""
    model, recipe = method.model, method.recipe
    images, slots = batch.images.to(model.device), batch.slots
    with torch.no_grad():
        rollout = method.rollout(batch, frozenset((STUDENT, DISCRIMINATOR)))
        x0 = model.encode_images(images)
        condition = model.with_sizes(model.encode_prompts(batch.captions), batch.sizes.to(model.device),
                                     batch.picture_size)  # fmt: skip
        steps = len(model.schedule)
        s = choose_timesteps(uniform(recipe.seed, "s", slots), recipe.student, num_train_timesteps=steps)
        t = teacher_timesteps(uniform(recipe.seed, "t", slots), recipe.teacher, num_train_timesteps=steps)
        eps = normal(x0.shape[1:], recipe.seed, "eps", slots).to(x0)
        x_s, x_t = model.schedule.student_input(x0, eps, s), model.schedule.add_noise(x0, eps, t.to(x0.device))
        blank = model.blank_prompts(condition)
        pixels = method._decoded(x0, slots, "fake crop")[1]
    return StepInputs(images, condition, blank, x_s, s.to(x0.device), x_t, t.to(x0.device), x0, pixels,
                      _without_graph(rollout, recipe))  # fmt: skip


def _without_graph(rollout: Rollout, recipe: Recipe) -> Rollout:
    """As most steps have it: without R1 where that comes in every n-th only."""
    gamma = recipe.losses.r1_gamma if recipe.losses.r1_every == 1 else 0.0
    fake = [feature.detach() for feature in rollout.fake]
    return replace(rollout, x0=rollout.x0.detach(), fake=fake, r1_gamma=gamma)


Output = Tensor | list[Tensor]
Call = Callable[[], Output]


def step_parts(trainer: Trainer, batch: Batch) -> dict[str, Part]:
    """Each unavoidable part of the step as something to time alone, the five of `MAIN_PARTS` first.

    Where threads share the step's batch, they share each part's.
    """
    shares = [
        network_parts(method, part, trainer.settings.autocast) for method, part, _ in trainer.views.sharing(batch)
    ]
    networks = {name: _together([share[name] for share in shares]) for name in shares[0]}
    main = {name: networks.get(name) or _optimizer_part(trainer) for name in MAIN_PARTS}
    return main | networks | {"clipping of gradients": _clipping_part(trainer)}


def _together(parts: Sequence[Part]) -> Part:
    """The same part of each thread's pictures."""
    if len(parts) == 1:
        return parts[0]
    return Part(
        lambda: mapped(lambda part: part.run(), parts, len(parts)),
        lambda: [part.prepare() for part in parts],
        lambda: [part.clean() for part in parts],
    )


def network_parts(method: ADD, batch: Batch, dtype: torch.dtype | None) -> dict[str, Part]:
    """What the networks do in a step, under autocast to `dtype`.

    Decoder and feature network see two sets of pictures a step: the student's both ways, the real ones forward.
    """
    assert isinstance(method, ADD)
    device = method.model.device

    def as_in_the_step() -> AbstractContextManager:
        return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def cast(call: Call) -> Call:
        def inside() -> Output:
            with as_in_the_step():
                return call()

        return inside

    def decode(latents: Tensor) -> Tensor:
        """What of the pictures the heads look at."""
        return method._decoded(latents, batch.slots, "fake crop")[1]

    def forward(call: Call) -> Part:
        return Part(torch.no_grad()(cast(call)))

    with as_in_the_step(), training_attention(device, batch.num_pixels):
        inputs = step_inputs(method, batch)
    again = forward(lambda: decode(inputs.x0))
    reconstructed = [again] if method.recipe.discriminator.real == "reconstructed" else []
    target = {"decoding the teacher's target": again} if method.recipe.losses.distance == "pixel" else {}
    return {
        MAIN_PARTS[0]: _both_ways(
            cast(lambda: method.student(inputs.x_s, inputs.s, inputs.condition)), trained=method.players[STUDENT].module
        ),
        MAIN_PARTS[1]: _then(_both_ways_from(inputs.x0, decode, cast), *reconstructed),
        MAIN_PARTS[2]: _then(
            _both_ways_from(inputs.pixels, method.features, cast), forward(lambda: method.features(inputs.pixels))
        ),
        MAIN_PARTS[3]: forward(lambda: _guided_target(method, inputs)),
        "encoding the real pictures": forward(lambda: method.model.encode_images(inputs.images)),
        "text encoders": forward(lambda: method.model.encode_prompts(batch.captions).text),
        **target,
        "heads for the student's loss": _heads_of_student(method, inputs, cast),
        "heads for their own loss": _both_ways(
            cast(lambda: method.loss(DISCRIMINATOR, inputs.rollout).total), trained=method.heads
        ),
    }


def _then(first: Part, *others: Part) -> Part:
    """`first` and what the same network does besides, timed as one."""
    return replace(first, run=lambda: [part.run() for part in (first, *others)])


def _guided_target(method: ADD, inputs: StepInputs) -> Tensor:
    """The teacher with text and without, two halves of one batch."""
    scale = inputs.x_t.new_full((len(inputs.x_t), 1, 1, 1), 2.0)
    return guided(method.teacher, inputs.x_t, inputs.t, inputs.condition, inputs.blank, scale)


def _both_ways(call: Call, *, trained: nn.Module) -> Part:
    """`call` and the backward pass from its output, down to the weights of `trained`."""
    return Part(lambda: _backward(call()), clean=trained.zero_grad)


def _both_ways_from(start: Tensor, call: Callable[[Tensor], Output], cast: Callable[[Call], Call]) -> Part:
    """`call(start)` of a frozen network, and the backward pass down to `start`."""
    return Part(lambda: _backward(cast(lambda: call(start.detach().requires_grad_()))()))


def _heads_of_student(method: ADD, inputs: StepInputs, cast: Callable[[Call], Call]) -> Part:
    """The student's loss from features and pictures on, and the backward pass down to these; heads frozen."""

    def loss() -> Tensor:
        rollout = inputs.rollout
        x0, fake = rollout.x0.clone().requires_grad_(), [feature.clone().requires_grad_() for feature in rollout.fake]
        return method.loss(STUDENT, replace(rollout, x0=x0, fake=fake)).total

    return Part(lambda: _backward(cast(loss)()), lambda: method.heads.requires_grad_(False),
                lambda: method.heads.requires_grad_(True))  # fmt: skip


def _backward(output: Output) -> None:
    outputs = [output] if isinstance(output, Tensor) else output
    torch.autograd.backward(outputs, [torch.ones_like(tensor) for tensor in outputs])


def _optimizer_part(trainer: Trainer) -> Part:
    """Both players' optimizers and the student's average. Zero gradients: as slow as any, and little is learned."""

    def run() -> None:
        for optimizer in trainer.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for name, average in trainer.averages.items():
            weights = [parameter.detach() for parameter in trainer.method.players[name].module.parameters()]
            torch._foreach_lerp_(list(average.parameters()), weights, 0.001)

    return Part(run, lambda: _fill_gradients(trainer))


def _clipping_part(trainer: Trainer) -> Part:
    modules = [player.module for player in trainer.method.players.values()]

    def run() -> None:
        for module in modules:
            nn.utils.clip_grad_norm_(module.parameters(), 1.0).item()

    def clean() -> None:
        for module in modules:
            module.zero_grad(set_to_none=True)

    return Part(run, lambda: _fill_gradients(trainer), clean)


def _fill_gradients(trainer: Trainer) -> None:
    for player in trainer.method.players.values():
        for parameter in player.module.parameters():
            parameter.grad = torch.zeros_like(parameter)


# Drawing


def run_inference(rounds: int, console: Console, *, guidance: float = GUIDANCE, teacher_steps: int = 50) -> None:
    """Time the embedded student at 1, 2 and 4 steps beside the guided teacher, at batch 1 and 16."""
    quiet_libraries()
    use_machine()
    student, teacher = load(EMBEDDED_STUDENT), load(TEACHER)
    timer = part_timer(teacher)
    ways = contenders(student, teacher, timer, guidance=guidance, teacher_steps=teacher_steps)
    console.print(latency_table(measure_latency(ways, timer, num_runs=rounds)))


def latency_table(rows: Sequence[LatencyRow]) -> Table:
    """Medians for the whole batch, by part, and how many times faster than the first row of the batch size."""
    parts = list(dict.fromkeys(name for row in rows for name in row.parts))
    table = Table("", "batch", "total", *parts, "a picture", "speedup")
    for row in rows:
        times = [seconds(row.parts.get(name, 0.0)) for name in parts]
        table.add_row(
            row.label,
            str(row.batch_size),
            seconds(row.total),
            *times,
            seconds(row.total / row.batch_size),
            f"{row.speedup:.1f}x",
        )
    return table

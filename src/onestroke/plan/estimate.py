"""Memory by part and time of a run, from the simulation of a step; and what to change where it does not fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from onestroke.config import OptimizerRecipe, Recipe
from onestroke.distill.add import STUDENT
from onestroke.plan.devices import UTILISATION, Device
from onestroke.plan.simulation import ENCODED_ONCE, Simulation
from onestroke.train.eight_bit import BYTES

FLOAT = 4  # bytes; trained weights, their gradients and averages are float32
RESERVE = 1.05  # PyTorch's allocator holds some blocks that nothing is in


@dataclass(frozen=True)
class Estimate:
    """What one process of a run needs."""

    memory: Mapping[str, int]  # bytes, by part
    step_seconds: float
    num_steps: int
    batch_size: int
    operations: int  # a picture, recomputation left out
    basis: str  # what the step's time rests on, in words

    @property
    def total_memory(self) -> int:
        return round(RESERVE * sum(self.memory.values()))

    @property
    def pictures_an_hour(self) -> float:
        return 3600 * self.batch_size / self.step_seconds

    @property
    def hours(self) -> float:
        return self.num_steps * self.step_seconds / 3600


def memory_by_part(recipe: Recipe, simulation: Simulation) -> dict[str, int]:
    """Bytes of one process without sharding: weights by network, then what training adds."""
    trained = simulation.trained
    optimizers = {STUDENT: recipe.student_optimizer, "discriminator": recipe.discriminator_optimizer}
    weights = {f"{name}, weights": size for name, size in simulation.weights.items()}
    return weights | {
        "gradients": FLOAT * sum(trained.values()) * simulation.gradient_sets,
        "optimizer states": sum(round(state_bytes(optimizers[name]) * count) for name, count in trained.items()),
        "student's average": FLOAT * trained[STUDENT],
        f"activations of {simulation.micro_batch} pictures": simulation.activations,
    }


def checkpoint_bytes(recipe: Recipe, simulation: Simulation) -> int:
    """Of one checkpoint of all processes: trained weights, their optimizers' states, and the student's average."""
    memory = memory_by_part(recipe, simulation)
    weights = FLOAT * sum(simulation.trained.values())
    return weights + memory["optimizer states"] + memory["student's average"]


def state_bytes(optimizer: OptimizerRecipe) -> float:
    """Bytes kept for each weight; Muon keeps one number for matrices, which are nearly all, and two for the rest."""
    return {"adamw": 2 * FLOAT, "adamw8bit": BYTES, "muon": FLOAT}[optimizer.kind]


def estimate(
    recipe: Recipe, simulation: Simulation, *, device: Device | None, count: int = 1, step_seconds: float | None = None
) -> Estimate:
    """An estimate for `count` devices that share each batch; `step_seconds`: of one step, measured on this machine.

    One of `device` and `step_seconds` has to be given.
    """
    batch = recipe.train.batch_size
    once = sum(simulation.operations.values()) - simulation.recomputed
    if step_seconds is None:
        assert device is not None, "an unmeasured step needs a device"
        per_process = math.ceil(batch / count)
        speed = UTILISATION[recipe.train.precision] * device.peak
        step_seconds = per_process * sum(simulation.operations.values()) / speed
        share = UTILISATION[recipe.train.precision]
        basis = f"operations at an assumed {share:.0%} of the device's peak, which no measurement stands behind"
    else:
        basis = "steps measured on this machine, with untrained weights"
    steps = recipe.train.num_images // batch
    return Estimate(memory_by_part(recipe, simulation), step_seconds, steps, batch, once, basis)


def advice(recipe: Recipe, found: Estimate, simulation: Simulation, room: int) -> list[str]:
    """Recipe lines that save memory, those first that cost least, with what each saves; none where it fits."""
    if found.total_memory <= room:
        return []
    missing = found.total_memory - room
    trained, count = simulation.trained[STUDENT], simulation.micro_batch

    def less(size: float) -> str:
        return f"{gib(size)} less" + (", with which it fits" if RESERVE * size >= missing else "")

    lines = []
    if recipe.train.frozen_precision == "float32" and recipe.train.precision == "bfloat16":
        frozen = sum(size for name, size in simulation.weights.items() if name not in (STUDENT, "heads"))
        lines.append(f"train.frozen_precision=bfloat16: {less(frozen / 2)}; weights that are not trained")
    if recipe.student_optimizer.kind == "adamw":
        saved = (state_bytes(recipe.student_optimizer) - BYTES) * trained
        lines.append(f"student_optimizer.kind=adamw8bit: {less(saved)}; needs onestroke[torchao]")
    if recipe.decode.chunk is None:
        lines.append("decode.chunk=1: the decoder's maps of one picture at a time; its work is done once more")
    if not recipe.student.gradient_checkpointing:
        lines.append("student.gradient_checkpointing=true: the student's activations by block; its forward pass twice")
    if count > 1:
        saved = simulation.activations - simulation.activations // count
        lines.append(f"train.micro_batch_size=1: up to {gib(saved)} of activations less, the same gradients")
    if recipe.student.lora is None:
        if recipe.teacher.fp8 == "none":
            lines.append("teacher.fp8=weights: a byte for each weight of its linear layers; needs onestroke[torchao]")
        saved = (2 * FLOAT + state_bytes(recipe.student_optimizer)) * trained + simulation.weights[STUDENT]
        lines.append(f"student.lora.rank=64: about {less(saved)}; only an adapter is trained")
    if recipe.decode.autoencoder is None:
        lines.append("decode.autoencoder=madebyollin/taesdxl (SDXL): a decoder that keeps a fraction of the maps")
    lines.append(f"a device with {gib(found.total_memory)} or more")
    return lines


def cache_line(recipe: Recipe, simulation: Simulation) -> str | None:
    """When `onestroke encode` pays: what it spares a step, and the size of set from which it costs more than that.

    None for pictures that are drawn anew at every reading.
    """
    data = recipe.data
    if data.source == "comicset":
        return None
    if data.crop == "random" and data.crops_per_image is None:
        return "onestroke encode: only with a number of crops, data.crops_per_image"
    cuts = (data.crops_per_image or 1) * (2 if data.random_flip else 1)
    share = sum(simulation.operations.get(part, 0) for part in ENCODED_ONCE) / sum(simulation.operations.values())
    most = recipe.train.num_images // cuts
    times = "once" if cuts == 1 else f"{cuts} times"
    return (
        f"onestroke encode spares {share:.0%} of the operations, and does them {times} for each picture: it pays for a "
        f"set of fewer than {most:,} pictures"
    )


def uncounted_line(recipe: Recipe) -> str | None:
    """What the recipe does before and after ADD, whose hours alone an estimate gives; None for nothing."""
    anchors, sharpen = recipe.anchors, recipe.sharpen
    each = sharpen.predictions(recipe.student.num_timesteps)
    stages = [
        (anchors.count, f"{anchors.count:,} pictures that the teacher draws in {anchors.steps} steps"),
        (anchors.images, f"{anchors.images:,} showings of those to the student alone"),
        (sharpen.images, f"{sharpen.images:,} prompts of sharpening, {each:.3g} predictions each"),
    ]
    named = [text for count, text in stages if count]
    return f"not in these hours: {'; '.join(named)}" if named else None


def gib(size: float) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:,.0f} MiB"

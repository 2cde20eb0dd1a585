"""`onestroke plan`: what a run will need, before anything is loaded."""

from __future__ import annotations

import math
import os

import torch
from rich.console import Console
from rich.table import Table

from onestroke.build import device_of
from onestroke.commands.machine import use_machine
from onestroke.commands.quiet import quiet_libraries
from onestroke.config import Recipe, load_recipe, recipe_from
from onestroke.embedded import STUDENT, TEACHER, weights_folder
from onestroke.errors import ResourceError
from onestroke.plan.architecture import Architecture, architecture_of
from onestroke.plan.calibration import measured_step
from onestroke.plan.devices import device_called
from onestroke.plan.estimate import Estimate, advice, cache_line, checkpoint_bytes, estimate, gib, uncounted_line
from onestroke.plan.simulation import simulate
from onestroke.precision import named_frozen_precision, named_precision

PLACEHOLDERS = {"YOUR_SDXL_MODEL": "sdxl", "YOUR_SD_MODEL": "sd15"}  # what the packaged recipes leave open
SLOWEST_MEASURED = 1e12  # operations a step: with more, this machine's CPU would take minutes


def run_plan(recipe: str, overrides: list[str], device: str | None, count: int, *, console: Console) -> None:
    """Print memory by part, the step's time and the run's, and what to change where it does not fit."""
    quiet_libraries()
    use_machine()
    resolved = load_recipe(recipe, overrides)
    planned = plan_of(resolved, device=device, count=count)
    room = device_called(device).memory if device else machine_memory(resolved)
    simulation, found = planned
    where = f"{count} x {device}" if device else "this machine"
    console.print(memory_table(found, title=f"{resolved.name} at {resolved.data.size} px on {where}, each process"))
    checkpoint = gib(checkpoint_bytes(resolved, simulation))
    for line in (
        f"a step of {found.batch_size} pictures: {found.step_seconds:.3g} s ({found.basis})",
        f"{found.pictures_an_hour:,.0f} pictures an hour; {found.num_steps:,} steps in {found.hours:,.1f} hours",
        f"{found.operations / 1e12:.3g} tera-operations a picture, recomputation left out",
        f"each checkpoint: {checkpoint} on the disk, and in memory while it is written",
        *filter(None, [uncounted_line(resolved), cache_line(resolved, simulation)]),
        *([f"room: {gib(room)}"] if room else []),
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    lines = advice(resolved, found, simulation, room) if room else []
    if lines:
        console.print("this does not fit; what to change:", style="bold")
    for line in lines:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def plan_of(recipe: Recipe, *, device: str | None = None, count: int = 1):
    """The simulated step, and the estimate for `count` of the device called so, or for this machine."""
    architecture = planned_architecture(recipe.teacher.source)
    if device is not None:
        recipe = _settled(recipe, "bfloat16" if recipe.train.precision == "auto" else recipe.train.precision, "cuda")
        share = {"batch_size": math.ceil(recipe.train.batch_size / count)}
        each = recipe.model_copy(update={"train": recipe.train.model_copy(update=share)})
        simulation = simulate(each, architecture, device="cuda")
        return simulation, estimate(recipe, simulation, device=device_called(device), count=count)
    try:
        here = device_of(recipe.train.device)
    except ResourceError as error:
        fix = "Name the device that the run is for: --device h100-80gb."
        raise ResourceError(error.what, where="train.device", fix=fix) from error
    recipe = _settled(recipe, named_precision(recipe.train.precision, here), here)
    simulation = simulate(recipe, architecture, device=here.type)
    step = recipe.train.batch_size * sum(simulation.operations.values())
    if here.type == "cpu" and step > SLOWEST_MEASURED:
        raise ResourceError(
            f"a step takes {step / 1e12:,.0f} tera-operations, too many to try on this machine's CPU",
            where="plan",
            fix="Name the device that the run is for: --device h100-80gb.",
        )
    seconds = measured_step(recipe, architecture, device=here)
    return simulation, estimate(recipe, simulation, device=None, step_seconds=seconds)


def _settled(recipe: Recipe, precision: str, device: torch.device | str) -> Recipe:
    """The recipe with precisions that depend on no machine."""
    frozen = named_frozen_precision(recipe.train.frozen_precision, precision, device)
    return recipe_from(recipe.model_dump(), [f"train.precision={precision}", f"train.frozen_precision={frozen}"])


def planned_architecture(source: str) -> Architecture:
    """That of the embedded teacher, of what a packaged recipe leaves open, or of the model named."""
    if source in (STUDENT, TEACHER):
        return architecture_of(str(weights_folder() / "teacher"))
    return architecture_of(PLACEHOLDERS.get(source, source))


def machine_memory(recipe: Recipe) -> int | None:
    """Bytes that this machine's device has in all; None where the system does not tell."""
    if device_of(recipe.train.device).type == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def memory_table(found: Estimate, *, title: str) -> Table:
    """Bytes by part and in all."""
    table = Table("part", "memory", title=title)
    for name, size in found.memory.items():
        table.add_row(name, gib(size))
    table.add_row("in all, and 5% in reserve", gib(found.total_memory), style="bold")
    return table

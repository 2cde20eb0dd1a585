"""`onestroke distill`: a teacher becomes a student of 1 to 4 steps."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from rich.console import Console

from onestroke.api import distill
from onestroke.commands.machine import use_machine
from onestroke.commands.progress import Display
from onestroke.commands.quiet import quiet_libraries
from onestroke.config import Recipe, load_recipe
from onestroke.embedded import STUDENT, TEACHER
from onestroke.errors import RecipeError
from onestroke.families.load import FAMILIES, from_pipeline, load_pipeline
from onestroke.families.single_file import CONFIG_KEY, packaged_configs, read_header, recognise, with_prediction
from onestroke.train.evaluation import BEST, best_of, evaluations_of
from onestroke.train.ranks import joined, rank

DEFAULT_RECIPES = {"sdxl": "sdxl-anime", "sd": "sd15"}  # by family
PLACEHOLDER = "YOUR_"  # begins what a recipe leaves to the user
OPTIONS = {"teacher.source": "--teacher MODEL", "data.source": "--data FOLDER"}


def run_distill(
    recipe: str | None,
    teacher: str | None,
    student: str | None,
    data: str | None,
    overrides: Sequence[str],
    minutes: float | None,
    out: Path,
    *,
    console: Console,
) -> None:
    """Resolve the recipe, distil with progress, and say where the student is and what to try next."""
    quiet_libraries()
    use_machine()
    with joined():
        console = console if rank() == 0 else Console(quiet=True)
        _distil(recipe, teacher, student, data, overrides, minutes, out, console)


def _distil(
    recipe: str | None,
    teacher: str | None,
    student: str | None,
    data: str | None,
    overrides: Sequence[str],
    minutes: float | None,
    out: Path,
    console: Console,
) -> None:
    resolved = resolve_recipe(recipe, teacher, student, data, overrides)
    total = resolved.train.num_images
    console.print(
        f"{resolved.name}: {resolved.teacher.source} on {resolved.data.source} at {resolved.data.size} px; "
        "stop with Ctrl-C, run again to continue",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    with Display(console, total, "distilling") as observe:
        folder = distill(
            resolved, out, minutes=minutes, observe=observe,
            tell=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
        )  # fmt: skip
    stopped_early = 0 < observe.images <= total - resolved.train.batch_size
    state = f"after {observe.images:,} of {total:,} pictures; run again to continue" if stopped_early else "finished"
    lines = [f"student: {folder} ({state})", *best_lines(out), "next:"]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    for command in next_commands(resolved, folder, out):
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)


def best_lines(out: Path) -> list[str]:
    """Which student of a run is the best by its short evaluations; nothing where there were none."""
    best, found = best_of(out), evaluations_of(out)
    if best is None or not found:
        return []
    last = found[-1]
    if last.images == best.images:
        return [f"best:    {out / BEST} (the one of {best.images:,} pictures, the last that was evaluated)"]
    return [
        f"best:    {out / BEST} (after {best.images:,} pictures, Fréchet distance {best.score:.2f}; the last that was "
        f"evaluated, after {last.images:,}: {last.score:.2f})"
    ]


def resolve_recipe(
    recipe: str | None, teacher: str | None, student: str | None, data: str | None, overrides: Sequence[str] = ()
) -> Recipe:
    """The recipe of a run: a named one, or the default for `teacher`; options override it, `--set` overrides all.

    Raises RecipeError where a recipe's `YOUR_...` is left, naming the option that fills it.
    """
    if recipe is None and teacher is None:
        raise RecipeError(
            "there is nothing to distil",
            where="distill",
            fix="Give a recipe, as in `onestroke distill mini`, or --teacher MODEL.",
        )
    name, settings = (recipe, []) if recipe is not None else _default_recipe(teacher or "")
    given = {"teacher.source": teacher, "student.source": student, "data.source": data}
    # JSON's quoting is YAML's too: a path may look like a number, or hold ": " or "#"
    options = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items() if value is not None]
    resolved = load_recipe(name, [*settings, *options, *overrides])
    _check_placeholders(resolved)
    return resolved


def next_commands(recipe: Recipe, student: Path, out: Path) -> list[str]:
    """What to try with a student, as shell lines."""
    folder = shlex.quote(str(student))
    is_embedded = recipe.teacher.source in (STUDENT, TEACHER)
    prompt = "a laughing person with pink hair and round glasses" if is_embedded else "YOUR PROMPT"
    lines = [f'onestroke generate "{prompt}" --model {folder} --steps {n} --out {n}-step.png' for n in (1, 4)]
    lines += [f"onestroke evaluate {folder}"] if is_embedded else []
    return [*lines, f"tensorboard --logdir {shlex.quote(str(out / 'logs'))}"]


def _default_recipe(teacher: str) -> tuple[str, list[str]]:
    """The packaged recipe that fits `teacher`, and the settings that fit it to the teacher and this machine."""
    if teacher in (STUDENT, TEACHER):
        return "mini", _machine_settings()
    traits = inspect_teacher(teacher)
    return DEFAULT_RECIPES[traits.family], [f"data.size={traits.size}", *_machine_settings()]


def _machine_settings() -> list[str]:
    """A machine without a GPU takes the device there is and its fast precision; no more workers than cores."""
    if torch.cuda.is_available():
        return []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ["train.device=auto", "train.precision=auto", f"data.num_workers={max(1, cores - 1)}"]


@dataclass(frozen=True)
class TeacherTraits:
    """What a default recipe depends on."""

    family: str  # sdxl | sd
    size: int  # pixels a side


def inspect_teacher(source: str) -> TeacherTraits:
    """Family and picture size of a model, from its configs alone: no weights are read. Raises ModelError."""
    try:
        pipeline, unet, vae = _file_configs(Path(source)) if Path(source).is_file() else _folder_configs(source)
        family = {kind.__name__: family.name for kind, family in FAMILIES.items()}[pipeline["_class_name"]]
        return TeacherTraits(family, unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1))
    except (OSError, ValueError, KeyError, TypeError):  # the loader knows how to say what is wrong, or copes
        model = from_pipeline(load_pipeline(source), source=source)
        return TeacherTraits(model.family.name, model.default_size)


def _folder_configs(source: str) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]:
    """The configs of a diffusers folder or hub id: pipeline, UNet, VAE."""
    return (
        DiffusionPipeline.load_config(source),
        UNet2DConditionModel.load_config(source, subfolder="unet"),
        AutoencoderKL.load_config(source, subfolder="vae"),
    )


def _file_configs(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]:
    """The configs that a single checkpoint is loaded with: pipeline, UNet, VAE."""
    header = read_header(path)
    is_own = CONFIG_KEY in header.metadata
    configs = json.loads(header.metadata[CONFIG_KEY]) if is_own else packaged_configs(recognise(header))
    configs = with_prediction(configs, header, None, is_own=is_own)
    return configs["model_index.json"], configs["unet/config.json"], configs["vae/config.json"]


def _check_placeholders(recipe: Recipe) -> None:
    for key, value in _leaves(recipe.model_dump()):
        if isinstance(value, str) and value.startswith(PLACEHOLDER):
            option = OPTIONS.get(key, f"--set {key}=VALUE")
            raise RecipeError(f"{key} is still {value}", where=f"recipe {recipe.name}", fix=f"Give {option}.")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

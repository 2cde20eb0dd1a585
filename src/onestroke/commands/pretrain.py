"""`onestroke pretrain`: a small teacher from nothing, in stages that each go on where they stopped."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from onestroke.build import COMICSET_IMAGES, device_of
from onestroke.commands.machine import use_machine
from onestroke.commands.progress import Display
from onestroke.commands.quiet import quiet_libraries
from onestroke.config import PretrainRecipe
from onestroke.data.comicset.dataset import ComicSource
from onestroke.data.opening import open_pictures
from onestroke.data.source import Source
from onestroke.embedded.fit import Machine
from onestroke.embedded.pretrain import (
    adopt_vae,
    pretrain_decoder,
    pretrain_judge,
    pretrain_latents,
    pretrain_teacher,
    pretrain_text,
    pretrain_vae,
)
from onestroke.errors import DataError


class OutOfTime(Exception):
    """The minutes are over; what is saved is continued by the next run. Never leaves this file."""


def run_pretrain(
    data: str | None,
    recipe: PretrainRecipe,
    minutes: float | None,
    out: Path,
    *,
    device: str = "auto",
    console: Console,
) -> None:
    """Train what is not trained yet, for `minutes` in all, and say what to do next."""
    quiet_libraries()
    use_machine()
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    source = pictures(data, size=recipe.size, console=console)
    machine = Machine(device_of(device), num_workers=max(1, torch.get_num_threads() - 1))
    try:
        finished = _stages(
            source, recipe, machine, out, deadline, console, with_judge=data is None and recipe.start is None
        )
    except OutOfTime:
        finished = False
    for line in closing_lines(out, data, finished=finished):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def pictures(data: str | None, *, size: int, console: Console) -> Source:
    """The user's captioned pictures, wherever `open_pictures` finds them, or the embedded ones."""
    if data is None:
        return ComicSource(COMICSET_IMAGES, size=size)
    source = open_pictures(data, log=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))
    if not len(source):
        raise DataError("there is no captioned picture", where=data, fix="Add pictures with captions.")
    return source


def stage_log(
    title: str, deadline: float, console: Console, *, clock: Callable[[], float] = time.monotonic
) -> Callable[[str], None]:
    """A log for the stages of `fit`, which calls it just after each checkpoint; raises OutOfTime past `deadline`."""

    def log(line: str) -> None:
        console.print(f"{title}: {line}", markup=False, highlight=False, soft_wrap=True)
        if clock() > deadline:
            raise OutOfTime

    return log


def closing_lines(out: Path, data: str | None, *, finished: bool) -> list[str]:
    """Where the teacher is, and the next commands."""
    if not finished:
        return [f"stopped before the end; run the same command again to continue in {out}"]
    teacher = shlex.quote(str(out / "teacher"))
    pictures_option = "" if data is None else f" --data {shlex.quote(data)}"
    prompt = "a laughing person with pink hair" if data is None else "YOUR PROMPT"
    return [
        f"teacher: {out / 'teacher'}",
        "next:",
        f'  onestroke generate "{prompt}" --model {teacher} --steps 50 --guidance 3',
        f"  onestroke distill mini --teacher {teacher}{pictures_option}",
    ]


def _stages(
    source: Source,
    recipe: PretrainRecipe,
    machine: Machine,
    out: Path,
    deadline: float,
    console: Console,
    *,
    with_judge: bool,
) -> bool:
    """VAE, judge, words, latents, decoder, teacher; returns whether the last picture was reached. Raises OutOfTime."""
    if (owner := recipe.vae or recipe.start) is not None:
        adopt_vae(owner, out)
    pretrain_vae(out, source, recipe, machine, log=stage_log("vae", deadline, console))
    _check_time(deadline)
    if with_judge:
        pretrain_judge(out, recipe, machine, log=stage_log("judge", deadline, console))
        _check_time(deadline)
    if isinstance(source, ComicSource) and recipe.text_captions:
        with Display(console, recipe.text_captions, "text encoders") as observe:
            if not pretrain_text(out, source, recipe, machine, minutes=_minutes_to(deadline), observe=observe):
                return False
    cache = pretrain_latents(out, source, recipe, machine, log=stage_log("latents", deadline, console))
    _check_time(deadline)
    if recipe.decoder_images:
        pretrain_decoder(out, source, cache, recipe, machine, log=stage_log("decoder", deadline, console))
        _check_time(deadline)
    log = stage_log("teacher", deadline, console)
    with Display(console, recipe.teacher_images, "teacher") as observe:
        return pretrain_teacher(
            out, source, cache, recipe, machine, minutes=_minutes_to(deadline), observe=observe, log=log
        )


def _minutes_to(deadline: float) -> float | None:
    return None if deadline == math.inf else (deadline - time.monotonic()) / 60


def _check_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise OutOfTime

"""`onestroke curate`: the recipe read, the progress shown, the outcome told."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from onestroke.data.curation.processes import Processes
from onestroke.data.curation.recipe import load_curation
from onestroke.data.curation.run import INDEX, PAGE, Outcome, curate
from onestroke.errors import RecipeError


def run_curate(
    sources: Sequence[str],
    out: Path,
    recipe: Path | None,
    num_workers: int | None,
    *,
    ray: str | None = None,
    console: Console,
) -> None:
    """Curate `sources` into `out`; `num_workers`: None takes one a core; `ray`: a cluster's address, or "local"."""
    if not sources:
        raise RecipeError("no source", where="curate", fix="Give a folder, a .tar or a .parquet file.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_workers = num_workers or cores
    found, stages = nullcontext(Processes(num_workers)), load_curation(recipe)
    if ray:
        from onestroke.data.curation.ray_engine import ray_engine

        found = ray_engine(ray, num_workers=num_workers)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with found as engine, Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=1)

        def show(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=max(total, 1))

        outcome = curate(
            sources, out, recipe=stages, engine=engine, on_progress=show,
            log=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
        )  # fmt: skip
    for line in (told(outcome), f"{out / PAGE}, {out / INDEX}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def told(outcome: Outcome) -> str:
    """The outcome in a line: kept, and dropped by stage."""
    line = f"{outcome.num_kept:,} of {outcome.num_pictures:,} pictures kept"
    dropped = ", ".join(f"{stage} {count:,}" for stage, count in outcome.dropped.items())
    return f"{line}; dropped: {dropped}" if dropped else line

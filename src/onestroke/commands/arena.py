"""`onestroke arena`: people vote blind on the pictures of two models."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

from diffusers import DiffusionPipeline
from rich.console import Console

from onestroke.api import load
from onestroke.arena.order import make_trials
from onestroke.arena.pairs import Contestant, Pair, draw_pairs, stamp_of
from onestroke.arena.votes import VoteLog, read_votes
from onestroke.build import device_of
from onestroke.commands.machine import use_machine
from onestroke.commands.quiet import quiet_libraries
from onestroke.embedded import GUIDANCE, STUDENT, TEACHER, weights_folder
from onestroke.embedded.held_out import comic_prompts
from onestroke.errors import DataError, RecipeError, ResourceError
from onestroke.evaluate.prompts import read_prompts

NUM_PROMPTS = 50  # of the embedded held-out prompts, where no file is given
PACKAGES = ("evalica", "fastapi", "uvicorn")  # of the extra


def run_arena(
    student: str,
    teacher: str,
    out: Path,
    *,
    prompts: Path | None,
    num_prompts: int | None,
    steps: int,
    teacher_steps: int,
    guidance: float | None,
    votes: Path | None,
    voter: str,
    seed: int,
    port: int,
    console: Console,
) -> None:
    """Draw what is missing, serve the pages until Ctrl-C, then print what the votes say."""
    check_packages()
    from onestroke.arena.server import open_socket, serve
    from onestroke.arena.session import Session

    contestants = contestants_of(student, teacher, steps, teacher_steps, guidance)
    texts = prompts_of(prompts, num_prompts, teacher)
    pairs = _drawn(contestants, texts, out / "pictures", seed, console)
    labels = (contestants[0].label, contestants[1].label)
    votes = votes or out / "votes.jsonl"
    with VoteLog(votes) as log, open_socket(port) as listener:
        if log.unfinished:
            _print(console, f"note: the last line of {votes} was cut off; it is in {votes}.bak and counts no more.")
        session = Session(pairs, labels, make_trials(len(pairs), voter=voter, seed=seed), log, voter=voter)
        _print(console, f"{len(pairs)} pairs; votes go to {votes}")
        _print(console, f"open http://127.0.0.1:{listener.getsockname()[1]}/ in a browser; Ctrl-C ends it")
        with contextlib.suppress(KeyboardInterrupt):
            serve(session, listener)
    if read_votes(votes).votes:
        print_results(votes, console)


def print_results(votes: Path, console: Console) -> None:
    """`onestroke arena --results`: what a votes file says, names and all."""
    check_packages()
    from onestroke.arena.ratings import results_of
    from onestroke.arena.summary import lines

    if not votes.exists():
        raise DataError("there is no such votes file", where=str(votes), fix="Give the file that arena wrote.")
    ballot = read_votes(votes)
    if ballot.unfinished:
        _print(console, f"warning: the last line of {votes} was cut off and is left out")
    if not ballot.votes:
        raise DataError("there is no vote in this file", where=str(votes), fix="Vote first.")
    for line in lines(results_of(ballot.votes)):
        _print(console, line)


def check_packages() -> None:
    """Raise ResourceError where the extra is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ResourceError(
            f"{', '.join(missing)} is not installed", where="arena", fix="Run pip install 'onestroke[serve]'."
        )


def contestants_of(
    student: str, teacher: str, steps: int, teacher_steps: int, guidance: float | None
) -> tuple[Contestant, Contestant]:
    """The two ways to draw. A teacher of the user's has no known guidance: RecipeError where none is given."""
    if guidance is None and teacher not in (STUDENT, TEACHER):
        raise RecipeError(
            "the teacher's guidance scale is not known", where="arena", fix="Give it, as in --guidance 5."
        )
    guidance = GUIDANCE if guidance is None else guidance
    return (
        Contestant(student, steps, 0.0, _stamp(student)),
        Contestant(teacher, teacher_steps, guidance, _stamp(teacher)),
    )


def prompts_of(path: Path | None, count: int | None, teacher: str) -> list[str]:
    """The first `count` prompts of the file, all without a count; the embedded held-out ones without a file."""
    if path is not None:
        found = list(read_prompts(path).texts)
        if count is not None and count > len(found):
            raise DataError(
                f"{len(found)} prompts where {count} are asked for", where=str(path), fix="Lower --num-prompts."
            )
        return found[:count]
    if teacher not in (STUDENT, TEACHER):
        raise RecipeError("there are no prompts for this teacher", where="arena", fix="Give --prompts FILE.")
    return list(comic_prompts(count or NUM_PROMPTS).texts)


def _stamp(model: str) -> str:
    path = weights_folder() if model in (STUDENT, TEACHER) else Path(model)
    return stamp_of(path) if path.exists() else ""


def _drawn(
    contestants: tuple[Contestant, Contestant], prompts: list[str], folder: Path, seed: int, console: Console
) -> tuple[Pair, ...]:
    def ready(model: str) -> DiffusionPipeline:
        quiet_libraries()
        use_machine()
        pipeline = load(model)
        pipeline.to(device_of("auto"))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def tell(label: str, done: int, total: int) -> None:
        _print(console, f"drawing with {label}: {done}/{total}")

    return draw_pairs(contestants, prompts, folder, load=ready, first_seed=seed, on_progress=tell)


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)

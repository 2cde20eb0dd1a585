"""A run: a trainer, its data, its folder. Resumes, saves, stops in time, and tells an observer how it goes."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from onestroke.errors import CheckpointError
from onestroke.ownership import sole_owner
from onestroke.train.checkpoint import load_newest, save_checkpoint
from onestroke.train.tracking import Tracker
from onestroke.train.trainer import Progress, Trainer
from onestroke.types import Batch

Observer = Callable[[Progress, float | None], None]  # a step, and the seconds that are left as far as known


def run_training(
    trainer: Trainer,
    batches_from: Callable[[int], Iterator[Batch]],
    out: Path,
    *,
    recipe_text: str,
    minutes: float | None = None,
    checkpoint_minutes: float = 4.0,
    keep_checkpoints: int = 2,
    observe: Observer = lambda progress, left: None,
    on_samples: Callable[[Tracker], None] | None = None,
    sample_images: int = 0,
) -> bool:
    """Train to the end, for `minutes`, or until SIGINT or SIGTERM; returns whether the end was reached.

    Continues from the newest checkpoint in `out`; one of another recipe raises `CheckpointError`. A checkpoint is
    written every `checkpoint_minutes` and at the end, so that a killed run loses that much at most.
    """
    with sole_owner(out):
        _check_recipe(out, recipe_text)
        state = load_newest(out / "checkpoints")
        if state is not None:
            trainer.load_state(state)
        tracker, saved = Tracker(out / "logs"), time.monotonic()
        started, saved_images, sampled = time.monotonic(), trainer.images, trainer.images
        with _stop_signals() as stopped:
            for progress in trainer.run(batches_from):
                now = time.monotonic()
                tracker.log(progress.images, progress.terms)
                left = _seconds_left(trainer, progress, now - started, minutes)
                observe(progress, left)
                if now - saved > 60 * checkpoint_minutes:
                    save_checkpoint(trainer.state(), out / "checkpoints", keep=keep_checkpoints)
                    saved, saved_images = now, trainer.images
                if on_samples and sample_images and progress.images - sampled >= sample_images:
                    on_samples(tracker)
                    sampled = progress.images
                if stopped or (minutes is not None and now - started > 60 * minutes):
                    break
        if trainer.images != saved_images:
            save_checkpoint(trainer.state(), out / "checkpoints", keep=keep_checkpoints)
        tracker.close()
    return trainer.settings.num_images - trainer.images < trainer.settings.batch_size


def _seconds_left(trainer: Trainer, progress: Progress, elapsed: float, minutes: float | None) -> float:
    done = progress.images - trainer.first_images
    remaining = trainer.settings.num_images - progress.images
    by_images = elapsed / max(done, 1) * remaining
    return by_images if minutes is None else max(0.0, min(by_images, 60 * minutes - elapsed))


def _check_recipe(out: Path, recipe_text: str) -> None:
    """Keep the resolved recipe beside its results; refuse to mix two."""
    path = out / "recipe.yaml"
    if path.exists() and path.read_text("utf-8") != recipe_text:
        before, now = path.read_text("utf-8").splitlines(), recipe_text.splitlines()
        changed = next((f"{a.strip()} -> {b.strip()}" for a, b in zip(before, now, strict=False) if a != b), "settings")
        raise CheckpointError(
            f"this folder holds a run of another recipe ({changed})",
            where=str(out),
            fix="Give another --out, or the same recipe to continue.",
        )
    temporary = path.with_suffix(".tmp")
    temporary.write_text(recipe_text, "utf-8")
    temporary.replace(path)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that a step in progress ends and is saved; a second SIGINT stops at once."""
    received: list[int] = []

    def receive(number, frame) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: nobody sends it signals
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

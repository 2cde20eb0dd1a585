"""A run: a trainer, its data, its folder. Resumes, saves, stops in time, and tells an observer how it goes."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from onestroke.errors import CheckpointError, TrainingAlarm
from onestroke.ownership import sole_owner
from onestroke.train.checkpoint import list_checkpoints, load_newest, load_oldest
from onestroke.train.folder import check_pictures, check_recipe, record
from onestroke.train.health import Alarm, Health
from onestroke.train.ranks import any_rank, from_first, num_ranks, rank, wait_for_all
from onestroke.train.tracking import Tracker
from onestroke.train.trainer import Progress, Trainer
from onestroke.train.writer import CheckpointWriter
from onestroke.types import Batch

MOST_TIMES_BACK = 3

Observer = Callable[[Progress, float | None], None]  # a step, and the seconds that are left as far as known


def run_training(
    trainer: Trainer,
    batches_from: Callable[[int], Iterator[Batch]],
    out: Path,
    *,
    recipe_text: str,
    pictures: Mapping[str, int] | None = None,
    minutes: float | None = None,
    checkpoint_minutes: float = 4.0,
    keep_checkpoints: int = 2,
    observe: Observer = lambda progress, left: None,
    on_samples: Callable[[Tracker | None], Mapping[str, tuple[float, float]]] | None = None,
    sample_images: int = 0,
    on_evaluate: Callable[[Tracker | None], None] | None = None,
    evaluate_images: int = 0,
    on_alarm: str = "warn",
) -> bool:
    """Train to the end, for `minutes`, or until SIGINT or SIGTERM; returns whether the end was reached.

    Continues from the newest checkpoint in `out`; one of another recipe, or begun with other `pictures` (what tells
    them from others, by name), raises `CheckpointError`. A checkpoint is written every `checkpoint_minutes`, while
    training goes on, and at the end: a killed run loses that much at most. Of several processes, the first keeps the
    log, observes and watches the clock; a signal to any stops all after the same step.
    `on_samples` is called in every process, with the log in the first alone, and returns what `Health.after_pictures`
    is told there. `on_evaluate` too is called in every process, as often as `evaluate_images` pictures have been seen
    since the run began, and at its end: at the same pictures whether or not the run was stopped.
    `on_alarm`: "warn" logs what goes wrong, "stop" raises `TrainingAlarm` after a checkpoint, "rollback" goes on from
    the oldest checkpoint at half the learning rate of the player at fault, three times at most.
    """
    leads = rank() == 0
    with sole_owner(out) if leads else nullcontext():
        if leads:
            check_recipe(out, recipe_text)
            check_pictures(out, pictures or {})
            record(out, recipe_text, pictures or {})
        wait_for_all()
        state = load_newest(out / "checkpoints", trainer.layout())
        if state is not None:
            _go_on_from(state, trainer, out)
        tracker, saved = Tracker(out / "logs") if leads else None, time.monotonic()
        started, saved_images, sampled = time.monotonic(), trainer.images, trainer.images
        with _stop_signals() as stopped, CheckpointWriter(out / "checkpoints", keep=keep_checkpoints) as writer:
            watch = _Watch(on_alarm, writer)
            steps = trainer.run(batches_from)
            while (progress := next(steps, None)) is not None:
                now = time.monotonic()
                if tracker is not None:
                    tracker.log(progress.images, {**progress.terms, **progress.speed})
                    observe(progress, _seconds_left(trainer, progress, now - started, minutes))
                is_due = leads and now - saved > 60 * checkpoint_minutes
                is_late = leads and minutes is not None and now - started > 60 * minutes
                if on_evaluate and _is_crossed(trainer, evaluate_images):
                    on_evaluate(tracker)  # before the checkpoint, so that a run that goes on from there has done it
                save, stop = any_rank(is_due, is_late or bool(stopped))
                writer.check()
                if save:
                    writer.begin(trainer.state())
                    saved, saved_images = now, trainer.images
                alarms = watch.health.after_step(progress.terms)
                if on_samples and sample_images and progress.images - sampled >= sample_images:
                    alarms += watch.after_pictures(from_first(on_samples(tracker)))
                    sampled = progress.images
                if alarms and watch.goes_back(trainer, alarms):
                    steps.close()
                    steps, sampled, saved_images = trainer.run(batches_from), trainer.images, trainer.images
                if stop:
                    break
            if trainer.images != saved_images:
                writer.write(trainer.state())
        if tracker is not None:
            tracker.close()
    return trainer.settings.num_images - trainer.images < trainer.settings.batch_size


def _is_crossed(trainer: Trainer, every: int) -> bool:
    """Whether the last step reached a multiple of `every` pictures, or the end of the run."""
    settings, images = trainer.settings, trainer.images
    is_last = settings.num_images - images < settings.batch_size
    return is_last or images // every > (images - settings.batch_size) // every


def _go_on_from(state: Mapping, trainer: Trainer, out: Path) -> None:
    """Raises CheckpointError where another version of onestroke named or shaped the networks otherwise."""
    try:
        trainer.load_state(state)
    except (RuntimeError, KeyError, ValueError) as error:  # as modules and optimizers raise for what does not fit
        difference = " ".join(str(error).split())
        raise CheckpointError(
            f"the checkpoint's networks are not this version's ({difference[:160]})",
            where=str(out / "checkpoints"),
            fix="Go on with the onestroke that wrote it, or give --out another folder.",
        ) from error


class _Watch:
    """What a run does about its alarms; the same in every process, which see the same numbers."""

    def __init__(self, on_alarm: str, writer: CheckpointWriter) -> None:
        self.on_alarm, self.writer = on_alarm, writer
        self.health, self.times_back = Health(), 0

    def after_pictures(self, measured: Mapping[str, tuple[float, float]]) -> list[Alarm]:
        return [alarm for which, values in measured.items() for alarm in self.health.after_pictures(which, *values)]

    def goes_back(self, trainer: Trainer, alarms: Sequence[Alarm]) -> bool:
        """Log the alarms; then go on, stop by TrainingAlarm, or put the trainer back, which is True."""
        if rank() == 0:
            for alarm in alarms:
                logging.getLogger(__name__).warning("picture %d: %s", trainer.images, alarm)
        if self.on_alarm == "warn":
            return False
        self.writer.wait()
        paths = from_first(list_checkpoints(self.writer.folder) if rank() == 0 else [])
        if self.on_alarm == "stop" or not paths or self.times_back == MOST_TIMES_BACK:
            self.writer.write(trainer.state())
            raise TrainingAlarm(alarms[0].what, where=f"picture {trainer.images}", fix=alarms[0].knob)
        rates = trainer.rates
        trainer.load_state(load_oldest(self.writer.folder, trainer.layout()))
        trainer.rates = rates
        for player in sorted({alarm.player for alarm in alarms}):
            trainer.rates[player] = trainer.rates.get(player, 1.0) / 2
            if rank() == 0:
                line = "back at picture %d, %s at %g times its learning rate"
                logging.getLogger(__name__).warning(line, trainer.images, player, trainer.rates[player])
        self.health, self.times_back = Health(), self.times_back + 1
        return True


def _seconds_left(trainer: Trainer, progress: Progress, elapsed: float, minutes: float | None) -> float:
    done = progress.images - trainer.first_images
    remaining = trainer.settings.num_images - progress.images
    by_images = elapsed / max(done, 1) * remaining
    return by_images if minutes is None else max(0.0, min(by_images, 60 * minutes - elapsed))


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that a step in progress ends and is saved; a second one stops at once.

    Not under torchrun: the terminal sends Ctrl-C to all processes, and torchrun sends it to them once more.
    """
    received: list[int] = []

    def receive(number, frame) -> None:
        if received and num_ranks() == 1:
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

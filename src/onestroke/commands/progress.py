"""Live progress of a run: a bar and the numbers worth watching; a line every 10 seconds where there is no terminal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from onestroke.distill.add import DISCRIMINATOR, STUDENT
from onestroke.train.trainer import Progress

LINE_SECONDS = 10.0  # between two lines without a terminal
WINDOW = 50  # steps that speed and losses are averaged over


class Display:
    """Shows a run of `total` pictures; entered, it is the run's observer: `display(progress, seconds_left)`.

    On a terminal the numbers are redrawn in place. Elsewhere (a log, a pipe) the first step, one every 10 seconds and
    the last one are printed as lines.
    """

    def __init__(
        self, console: Console, total: int, title: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console, self.total, self.title, self.clock = console, total, title, clock
        self.steps: deque[Progress] = deque(maxlen=WINDOW)
        self.seconds_left: float | None = None
        self._printed: tuple[int, float] | None = None  # the step last printed, and when
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._drawn, transient=True)

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.console.is_terminal:
            self._live.stop()
        if self.steps and (self._printed is None or self._printed[0] != self.steps[-1].step):
            self._print()

    def __call__(self, progress: Progress, seconds_left: float | None) -> None:
        self.steps.append(progress)
        self.seconds_left = seconds_left
        is_due = self._printed is None or self.clock() - self._printed[1] >= LINE_SECONDS
        if not self.console.is_terminal and is_due:
            self._print()

    @property
    def images(self) -> int:
        """Pictures of the run so far, those of earlier parts included; 0 before the first step."""
        return self.steps[-1].images if self.steps else 0

    def speed(self) -> float | None:
        """Pictures a second over the last steps; None before the second one."""
        first, last = self.steps[0], self.steps[-1]
        return (last.images - first.images) / (last.seconds - first.seconds) if last.seconds > first.seconds else None

    def line(self) -> str:
        """All of it in one line of text."""
        return ", ".join([f"{self.title}: {self._position()}", *self._pace()]) + f"; {self._losses()}"

    def _print(self) -> None:
        self._printed = (self.steps[-1].step, self.clock())
        self.console.print(self.line(), markup=False, highlight=False, soft_wrap=True)

    def _drawn(self) -> Group:
        if not self.steps:
            return Group(Text(f"{self.title}: starting"))
        bar = ProgressBar(total=self.total, completed=self.images, width=40)
        return Group(Text(", ".join([f"{self.title}: {self._position()}", *self._pace()])), bar, Text(self._losses()))

    def _position(self) -> str:
        return f"{self.images:,}/{self.total:,} pictures ({100 * self.images / self.total:.0f}%)"

    def _pace(self) -> list[str]:
        speed, left = self.speed(), self.seconds_left
        pace = [] if speed is None else [f"{speed:.1f} pictures/s"]
        return pace if left is None else [*pace, f"{clock_time(left)} left"]

    def _losses(self) -> str:
        keys = self.steps[-1].terms
        have = {key: [step.terms[key] for step in self.steps if key in step.terms] for key in keys}
        return summary({key: sum(values) / len(values) for key, values in have.items()})


def summary(terms: Mapping[str, float]) -> str:
    """The student's loss terms and the logits of real and drawn pictures, averaged over the heads; else every loss."""
    losses = {name: terms.get(f"{STUDENT}/{name}") for name in ("adversarial", "distillation")}
    parts = [f"{name} {value:.3f}" for name, value in losses.items() if value is not None]
    for name, prefix in (("real logits", f"{DISCRIMINATOR}/real_"), ("fake logits", f"{DISCRIMINATOR}/fake_")):
        heads = [value for key, value in terms.items() if key.startswith(prefix) and key[len(prefix) :].isdigit()]
        parts += [f"{name} {sum(heads) / len(heads):+.2f}"] if heads else []
    return ", ".join(parts or [f"{key} {value:.4f}" for key, value in terms.items() if key.endswith("/loss")])


def clock_time(seconds: float) -> str:
    """A duration as minutes and seconds, 8:05, or with hours, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

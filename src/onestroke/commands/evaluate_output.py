"""What `onestroke evaluate` and `demo` show while they measure, and print when they are done."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from datetime import date

import torch
from rich.console import Console

from onestroke.commands.progress import LINE_SECONDS, clock_time
from onestroke.evaluate.report import Report, figure_value, shown_interval


def machine_facts() -> dict[str, str]:
    """Where and when a report was made."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {
        "date": date.today().isoformat(),
        "machine": f"{torch.get_num_threads()} CPU threads, {platform.machine()}{gpu}",
        "software": f"Python {platform.python_version()}, PyTorch {torch.__version__}",
    }


def print_report(report: Report, console: Console) -> None:
    """The figures as plain lines, then what is missing, broken, and what the gate says."""

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    for figure in report.figures:
        seen = ", trained against" if figure.is_trained_against else ""
        features = f", {figure.features}" if figure.features else ""
        say(f"{figure.name} (n = {figure.count}{features}{seen})")
        for reading in figure.readings:
            ends = "" if reading.low is None else f"  [{shown_interval(reading, figure.form)}]"
            marks = "; ".join(f"{t.name}: {'met' if t.met(reading.value) else 'not met'}" for t in reading.targets)
            say(f"  {reading.label:<30} {figure_value(reading.value, figure.form)}{ends}  {marks}".rstrip())
    for row in report.latency:
        parts = ", ".join(f"{name} {1000 * value:.1f}" for name, value in row.parts.items())
        say(f"  {row.label:<30} batch {row.batch_size}: {1000 * row.total:.1f} ms ({parts}); {row.speedup:.1f}x")
    for one in report.missing:
        say(f"not measured: {one.name}: {one.why}. {one.fix}")
    for label, lines in report.failures.items():
        say(f"failed: {label}: {'; '.join(lines)}")
    for flag in report.flags or ():
        say(f"flagged: {flag.label}: {flag.says} ({flag.key} {flag.value:.3g}, 95% {flag.low:.3g} to {flag.high:.3g})")
    for outcome in report.gate:
        say(f"gate {'passed' if outcome.passed else 'FAILED'}: {outcome.line}")


class EvaluationDisplay:
    """Which set is being drawn, how far it is, and the time left: redrawn on a terminal, else a line in ten seconds."""

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.clock = console, clock
        self._printed, self._set = -LINE_SECONDS, ""
        self._status = console.status("reading", spinner="dots") if console.is_terminal else None

    def __enter__(self) -> EvaluationDisplay:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._status:
            self._status.stop()

    def __call__(self, what: str, done: int, total: int, seconds_left: float | None) -> None:
        left = "" if seconds_left is None else f", {clock_time(seconds_left)} left"
        line = f"{what}: {done:,}/{total:,} pictures{left}"
        if self._status:
            self._status.update(line)
        elif self.clock() - self._printed >= LINE_SECONDS or (done == total and what != self._set):
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
            self._printed = self.clock()
            self._set = what if done == total else ""

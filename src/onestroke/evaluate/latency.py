"""How long a picture takes, and which part of drawing takes it: contenders run in turn, medians compare.

On a busy machine speed drifts by the minute; contenders therefore alternate, and each round's ratio is taken within
the round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import ParamSpec, TypeVar

from onestroke.errors import DataError

P = ParamSpec("P")
R = TypeVar("R")
PARTS = ("text", "unet", "vae")


class PartTimer:
    """Adds up the seconds spent in named parts of a drawing.

    `synchronize` (on a GPU `torch.cuda.synchronize`) runs before each look at the clock.
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self.synchronize = synchronize
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        """Seconds of a clock that only rises, all work handed out before being done."""
        self.synchronize()
        return time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside as time of the part `name`; parts do not nest."""
        started = self.now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - started

    def timed(self, name: str, call: Callable[P, R]) -> Callable[P, R]:
        """`call`, its time counted as the part `name`."""

        def counted(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.part(name):
                return call(*args, **kwargs)

        return counted

    def take(self) -> dict[str, float]:
        """The seconds of each part since the last `take`."""
        seconds, self.seconds = self.seconds, {}
        return seconds


@dataclass(frozen=True)
class Contender:
    """One way to draw: `draw(batch_size)` makes that many pictures, end to end, its parts reported to a PartTimer."""

    label: str
    draw: Callable[[int], None]
    steps: int
    guidance: float = 0.0  # 0: one UNet evaluation a step, otherwise two


@dataclass(frozen=True)
class LatencyRow:
    """Medians over the runs, in seconds for the whole batch."""

    label: str
    steps: int
    guidance: float
    batch_size: int
    total: float
    fastest: float
    slowest: float
    parts: Mapping[str, float]  # "text", "unet", "vae" ... and "rest": what no part accounts for
    speedup: float  # median over rounds of (the first contender's time / this one's)
    num_runs: int


def measure_latency(
    contenders: Sequence[Contender],
    timer: PartTimer,
    *,
    batch_sizes: Sequence[int] = (1, 16),
    num_runs: int = 5,
    num_warmups: int = 1,
) -> tuple[LatencyRow, ...]:
    """Time the contenders in turn, `num_runs` rounds at each batch size; the first is what the others compare with.

    Each contender's first `num_warmups` drawings at a batch size are not counted. Rows come by batch size, then in
    the order of the contenders.
    """
    if not contenders or num_runs < 1:
        raise DataError(f"{len(contenders)} models in {num_runs} runs give no time", fix="Give one of each at least.")
    rows: list[LatencyRow] = []
    for batch_size in batch_sizes:
        for contender in contenders:
            for _ in range(num_warmups):
                _run(contender, timer, batch_size)
        rounds = [_round(contenders, timer, batch_size, start) for start in range(num_runs)]
        for i, contender in enumerate(contenders):
            runs, firsts = [r[i] for r in rounds], [r[0] for r in rounds]
            rows.append(_row(contender, batch_size, runs, firsts))
    return tuple(rows)


def _round(contenders: Sequence[Contender], timer: PartTimer, batch_size: int, start: int) -> list[dict[str, float]]:
    """One run of each; rounds begin with another contender, so that none always follows the slowest."""
    order = [(start + i) % len(contenders) for i in range(len(contenders))]
    runs = {i: _run(contenders[i], timer, batch_size) for i in order}
    return [runs[i] for i in range(len(contenders))]


def _run(contender: Contender, timer: PartTimer, batch_size: int) -> dict[str, float]:
    timer.take()
    started = timer.now()
    contender.draw(batch_size)
    total = timer.now() - started
    parts = dict.fromkeys(PARTS, 0.0) | timer.take()
    return {"total": total, **parts, "rest": max(0.0, total - sum(parts.values()))}


def _row(
    contender: Contender, batch_size: int, runs: Sequence[Mapping[str, float]], firsts: Sequence[Mapping[str, float]]
) -> LatencyRow:
    totals = [run["total"] for run in runs]
    names = list(dict.fromkeys(name for run in runs for name in run if name not in ("total", "rest")))
    return LatencyRow(
        contender.label,
        contender.steps,
        contender.guidance,
        batch_size,
        total=median(totals),
        fastest=min(totals),
        slowest=max(totals),
        parts={name: median(run.get(name, 0.0) for run in runs) for name in [*names, "rest"]},
        speedup=median(first["total"] / run["total"] for first, run in zip(firsts, runs, strict=True)),
        num_runs=len(runs),
    )

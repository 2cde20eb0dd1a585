"""How long a picture takes, and which part of drawing takes it: contenders run in turn, medians compare.

On a busy machine speed drifts by the minute; contenders therefore alternate, and each round's ratio is taken within
the round.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import ParamSpec, TypeVar

import torch

from onestroke.errors import DataError

P = ParamSpec("P")
R = TypeVar("R")
PARTS = ("text", "unet", "vae")
CPU = torch.device("cpu")


class PartTimer:
    """Adds up the seconds spent in named parts of a drawing; of threads that draw at the same time, the longest counts.

    `synchronize` (on a GPU `torch.cuda.synchronize`) runs before each look at the clock.
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self.synchronize = synchronize
        self.seconds: dict[str, dict[int, float]] = {}  # of each part, by thread

    def now(self) -> float:
        """Seconds of a clock that only rises, all work handed out before being done."""
        self.synchronize()
        return time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside as time of the part `name`; parts do not nest."""
        started = self.now()
        yield
        mine, thread = self.seconds.setdefault(name, {}), threading.get_ident()
        mine[thread] = mine.get(thread, 0.0) + self.now() - started

    def timed(self, name: str, call: Callable[P, R]) -> Callable[P, R]:
        """`call`, its time counted as the part `name`."""

        def counted(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.part(name):
                return call(*args, **kwargs)

        return counted

    def take(self) -> dict[str, float]:
        """The seconds of each part since the last `take`."""
        seconds, self.seconds = self.seconds, {}
        return {name: max(threads.values()) for name, threads in seconds.items()}


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
    least_speedup: float = 0.0  # over the rounds
    most_speedup: float = 0.0
    memory: int | None = None  # bytes at the highest point of a drawing; of the device, on a CPU of the whole process
    num_cores: int = 1

    @property
    def per_hour(self) -> float:
        """Pictures in an hour of drawing such batches."""
        return 3600 * self.batch_size / self.total

    @property
    def per_core_hour(self) -> float:
        """The same for each CPU core that drew."""
        return self.per_hour / self.num_cores


def measure_latency(
    contenders: Sequence[Contender],
    timer: PartTimer,
    *,
    batch_sizes: Sequence[int] = (1, 16),
    num_runs: int = 5,
    num_warmups: int = 1,
    device: torch.device = CPU,
) -> tuple[LatencyRow, ...]:
    """Time the contenders in turn, `num_runs` rounds at each batch size; the first is what the others compare with.

    Each contender's first `num_warmups` drawings at a batch size are not counted. Rows come by batch size, then in
    the order of the contenders. Memory is that of the last warm-up; None without one.
    """
    if not contenders or num_runs < 1:
        raise DataError(f"{len(contenders)} models in {num_runs} runs give no time", fix="Give one of each at least.")
    rows: list[LatencyRow] = []
    for batch_size in batch_sizes:
        memory = {}
        for i, contender in enumerate(contenders):
            for _ in range(num_warmups):
                memory[i] = peak_memory(lambda c=contender, b=batch_size: _run(c, timer, b), device)
        rounds = [_round(contenders, timer, batch_size, start) for start in range(num_runs)]
        for i, contender in enumerate(contenders):
            runs, firsts = [r[i] for r in rounds], [r[0] for r in rounds]
            rows.append(replace(_row(contender, batch_size, runs, firsts), memory=memory.get(i)))
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
    speedups = [first["total"] / run["total"] for first, run in zip(firsts, runs, strict=True)]
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
        speedup=median(speedups),
        num_runs=len(runs),
        least_speedup=min(speedups),
        most_speedup=max(speedups),
        num_cores=torch.get_num_threads(),
    )


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes in use at the highest point of `call`: of a GPU what PyTorch holds there, on a CPU of the whole process.

    None where the system does not tell (it is asked through Linux's /proc, whose high-water mark can be set back).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        can_tell = True
    except OSError:
        can_tell = False
    call()
    status = Path("/proc/self/status").read_text() if can_tell else ""
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(lines[0].split()[1]) if lines else None

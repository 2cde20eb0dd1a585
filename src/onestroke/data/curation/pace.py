"""How long each part of a curation took, over all the runs that it took, and how long more pictures would take."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from onestroke.data.curation.files import atomic

SHARED = ("measuring", "searching copies", "writing shards")  # parts that any number of machines share
ALONE = ("listing", "index")  # parts that one machine does
PROJECTED = 2_000_000  # pictures
MACHINES = (1, 4, 16)


@dataclass(frozen=True)
class Pace:
    """Seconds of each part, as if one run had done all of it; None where a part was not timed."""

    num_pictures: int
    seconds: Mapping[str, float | None]

    @property
    def pictures_per_second(self) -> float | None:
        values = [self.seconds.get(part) for part in (*SHARED, *ALONE)]
        return None if None in values or sum(values) <= 0 else self.num_pictures / sum(values)

    def projected(self, num_pictures: int, num_machines: int) -> float | None:
        """Seconds that `num_pictures` would take on so many machines like this one.

        The search grows as n log n, all else as n; listing and index stay on one machine.
        """
        if self.pictures_per_second is None:
            return None
        growth = num_pictures / self.num_pictures
        longer = math.log2(max(2, num_pictures)) / math.log2(max(2, self.num_pictures))
        shared = sum(self.seconds[part] * (longer if part == "searching copies" else 1) for part in SHARED)
        return growth * (shared / num_machines + sum(self.seconds[part] for part in ALONE))


class Stopwatch:
    """Adds up what the runs of a curation took in the file `path`, a part at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: dict[str, list[float]] = json.loads(path.read_text("utf-8")) if path.exists() else {}

    @contextmanager
    def timed(self, part: str, done: int, total: int) -> Iterator[None]:
        """The time of the block, in which `done` of the `total` pieces of a part are done."""
        started = time.monotonic()
        yield
        if done:
            before = self.parts.get(part, [0, 0.0])
            self.parts[part] = [before[0] + done, before[1] + time.monotonic() - started, total]
            with atomic(self.path) as temporary:
                temporary.write_text(json.dumps(self.parts), "utf-8")

    def pace(self, num_pictures: int) -> Pace:
        seconds = {part: spent * total / done for part, (done, spent, total) in self.parts.items()}
        return Pace(num_pictures, {part: seconds.get(part) for part in (*SHARED, *ALONE)})


def projection(pace: Pace) -> list[tuple[int, str]]:
    """Machines, and the time that two million pictures would take on them."""
    times = [(count, pace.projected(PROJECTED, count)) for count in MACHINES]
    return [(count, duration(seconds)) for count, seconds in times if seconds is not None]


def duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"

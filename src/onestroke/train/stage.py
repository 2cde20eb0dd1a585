"""What the trainings before and after ADD have in common: they say how far they are, in lines."""

from __future__ import annotations

import time
from collections.abc import Callable

from onestroke.train.trainer import Progress

TOLD_SECONDS = 10.0  # between two lines


class Teller:
    """Observes a run, and says how far it is every ten seconds."""

    def __init__(self, what: str, term: str, images: int, tell: Callable[[str], None]) -> None:
        self.what, self.term, self.images = what, f"student/{term}", images
        self.tell, self.told = tell, time.monotonic()
        self.first: Progress | None = None  # since this start of the run

    def __call__(self, progress: Progress, left: float | None) -> None:
        first = self.first = self.first or progress
        if time.monotonic() - self.told > TOLD_SECONDS:
            self.told = time.monotonic()
            seconds = max(progress.seconds - first.seconds, 1e-6)
            rate, loss = (progress.images - first.images) / seconds, progress.terms[self.term]
            self.tell(f"{self.what}: {progress.images:,}/{self.images:,} pictures, {rate:.1f} a second; {loss:.4f}")

"""Where a run's numbers go: TensorBoard, and a plain JSON-lines file that the report reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter


class Tracker:
    """Averages a step's numbers over `every` steps and writes them under `folder`."""

    def __init__(self, folder: Path, *, every: int = 10) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.writer = SummaryWriter(folder / "tensorboard")
        self.path, self.every = folder / "metrics.jsonl", every
        self._sums: dict[str, list[float]] = {}
        self._steps = 0

    def log(self, images: int, terms: Mapping[str, float]) -> None:
        """Add one step's numbers."""
        for name, value in terms.items():
            self._sums.setdefault(name, []).append(value)
        self._steps += 1
        if self._steps >= self.every:
            self._flush(images)

    def _flush(self, images: int) -> None:
        means = {name: float(np.mean(values)) for name, values in self._sums.items()}
        for name, value in means.items():
            self.writer.add_scalar(name, value, images)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"images": images, **means}) + "\n")
        self._sums, self._steps = {}, 0

    def scalars(self, values: Mapping[str, float], images: int) -> None:
        """Show numbers that a step does not give."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, images)

    def picture(self, name: str, image: np.ndarray, images: int) -> None:
        """Show an h w 3 uint8 picture."""
        self.writer.add_image(name, image, images, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The numbers of a run in order, those of a part that was run twice after a stop only once."""
    path = folder / "metrics.jsonl"
    rows: dict[int, dict[str, float]] = {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the last line of a killed run
            continue
        rows[row["images"]] = row
    return [rows[images] for images in sorted(rows)]

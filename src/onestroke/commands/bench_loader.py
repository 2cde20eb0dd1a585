"""`onestroke bench loader`: how many pictures a second the trainer's loader reads on one core."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from onestroke.commands.quiet import quiet_libraries
from onestroke.data.comicset.dataset import write_comicset
from onestroke.data.loader import batches
from onestroke.data.opening import open_pictures
from onestroke.data.source import Broken, Source

OWN_PICTURES = 500  # drawn and read where no data is given
BATCH_SIZE = 16


@dataclass(frozen=True)
class LoaderSpeed:
    num_images: int
    seconds: float  # by the clock
    cpu_seconds: float  # of this process, which reads, decodes, cuts and stacks in one thread

    def line(self) -> str:
        by_clock, by_core = self.num_images / self.seconds, self.num_images / max(self.cpu_seconds, 1e-9)
        return (
            f"{self.num_images:,} pictures: {by_clock:,.0f} a second by the clock, {by_core:,.0f} a second of one core"
        )


def run_loader(data: str | None, size: int, source_size: int, num_images: int, console: Console) -> None:
    """Time the loader on `data`, or on shards of comic pictures of `source_size` pixels a side; print the speed."""
    quiet_libraries()

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            shards = Path(folder, "shards")
            write_comicset(shards, count=OWN_PICTURES, size=source_size, layout="webdataset", shard_size=100)
            tell(f"{OWN_PICTURES} PNG pictures of {source_size} px a side in WebDataset shards")
        source = open_pictures(data or str(shards), log=tell)
        tell(f"at {size} px: {measure_loader(source, size=size, num_images=num_images).line()}")


def measure_loader(source: Source, *, size: int, num_images: int) -> LoaderSpeed:
    """Read so many pictures in this process, in one thread, as a worker does; the first 16 do not count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        broken = Broken(len(source), 1.0)
        last_slot, how = num_images + BATCH_SIZE, {"crop": "random", "random_flip": True, "broken": broken}
        reading = batches(
            source, batch_size=BATCH_SIZE, size=(size, size), first_slot=0, last_slot=last_slot, seed=0, **how
        )
        next(reading)
        clock, core = time.perf_counter(), time.process_time()
        count = sum(len(batch) for batch in reading)
        return LoaderSpeed(count, time.perf_counter() - clock, time.process_time() - core)
    finally:
        torch.set_num_threads(threads)

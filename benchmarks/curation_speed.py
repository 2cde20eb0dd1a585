"""How fast the model-free stages of `onestroke curate` are, what memory they hold, and how the search for copies grows.

    python benchmarks/curation_speed.py --count 2000 [--size 512] [--workers 1] [--search 10000,100000]

Draws a quarter of COUNT comic pictures, each in four colourings, saves them as JPEG, PNG and WebP in turn, curates
them with the default recipe and prints pictures a second, by the clock and by the CPU (which tells a busy machine from
a slow program), the time of each part, the memory held at the most, and the projection for two million pictures. The
search is then run alone on thumbnails of smooth random pictures, of which every tenth is a copy of another.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from onestroke.data.comicset.dataset import ComicSource
from onestroke.data.curation.duplicates import near_pairs
from onestroke.data.curation.near import SIDE
from onestroke.data.curation.pace import MACHINES, PROJECTED, Pace, duration
from onestroke.data.curation.processes import Processes
from onestroke.data.curation.recipe import CurationRecipe
from onestroke.data.curation.run import curate

FORMATS = (("jpg", {"quality": 90}), ("png", {}), ("webp", {"quality": 85}))
COLOURINGS = (lambda x: x, lambda x: x[..., [1, 2, 0]], lambda x: 255 - x, lambda x: 255 - x[..., [2, 0, 1]])
AT_ONCE = 100  # pictures that a drawing process draws before it is given more
PAUSE = 0.5  # seconds between two looks at the memory


def draw(folder: Path, size: int, count: int, first: int) -> None:
    """Pictures `first` to `first + AT_ONCE`, of `count`, with captions beside them; nothing where they are already."""
    source = ComicSource(count, size=size, seed=5)
    below = folder / f"{first:07d}"
    if below.exists():
        return
    part = folder / f"{first:07d}.part"
    part.mkdir(exist_ok=True)
    for number in range(first, min(first + AT_ONCE, count)):
        kind, (suffix, options) = number % len(COLOURINGS), FORMATS[number % len(FORMATS)]
        if kind == 0 or number == first:
            picture = source.read(number - kind)
        Image.fromarray(COLOURINGS[kind](picture.image)).save(part / f"{number:07d}.{suffix}", **options)
        (part / f"{number:07d}.txt").write_text(picture.caption, "utf-8")
    part.rename(below)


def processes(first: int) -> Iterator[int]:
    """A process and all below it."""
    yield first
    try:
        below = Path(f"/proc/{first}/task/{first}/children").read_text().split()
    except OSError:  # it has ended
        return
    for process in map(int, below):
        yield from processes(process)


def memory(process: int) -> int:
    """Bytes that a process holds; what it shares with others is divided among them. 0 where it has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def cpu_seconds(process: int) -> float:
    """Of a process so far, without those below it. 0 where it has ended."""
    try:
        numbers = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")


def measured(folder: Path, out: Path, num_workers: int) -> tuple[float, float, int]:
    """Curate in a process of its own: seconds by the clock, by the CPU, and bytes held at the most."""
    command = [sys.executable, __file__, "--curate", str(folder), str(out), "--workers", str(num_workers)]
    started, spent, most = time.monotonic(), {}, 0
    process = subprocess.Popen(command)
    while process.poll() is None:
        alive = list(processes(process.pid))
        most = max(most, sum(map(memory, alive)))
        spent |= {each: seconds for each in alive if (seconds := cpu_seconds(each))}
        time.sleep(PAUSE)
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.monotonic() - started, sum(spent.values()), most


def curate_and_tell(folder: Path, out: Path, num_workers: int) -> None:
    """Curate `folder`, and print how long each part took; by the CPU as well where this process does it all."""
    spent: dict[str, np.ndarray] = {}
    last = ["listing", _now()]

    def part(what: str, done: int, total: int) -> None:
        now = _now()
        spent[last[0]] = spent.get(last[0], 0) + now - last[1]
        last[:] = [what, now]

    outcome = curate([folder], out, engine=Processes(num_workers), on_progress=part)
    part("", 0, 1)
    spent["index"] = spent.pop("writing the page")
    print(f"{outcome.num_kept:,} of {outcome.num_pictures:,} pictures kept")
    for number, name in enumerate(("clock", "CPU")[: 2 if num_workers == 1 else 1]):
        pace = Pace(outcome.num_pictures, {part: float(value[number]) for part, value in spent.items()})
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in pace.seconds.items())
        print(f"by the {name}: {pace.pictures_per_second:.0f} pictures/s, {num_workers} workers: {parts}")
        times = ", ".join(f"{count}: {duration(pace.projected(PROJECTED, count))}" for count in MACHINES)
        print(f"  {PROJECTED:,} pictures by number of such machines: {times}")


def _now() -> np.ndarray:
    return np.array([time.monotonic(), time.process_time()])


def synthetic(count: int) -> np.ndarray:
    """Thumbnails of smooth random pictures; every tenth is the mirror image of the one before, with a little noise."""
    parts = [_fields(first, min(5000, count - first)) for first in range(0, count, 5000)]
    return np.concatenate(parts)


def _fields(seed: int, count: int) -> np.ndarray:
    rng = np.random.default_rng((1, seed))
    fields = ndimage.gaussian_filter(rng.normal(size=(count, SIDE, SIDE, 3)).astype(np.float32), (0, 3, 3, 0))
    fields *= 50 / fields.std(axis=(1, 2, 3), keepdims=True)
    fields[9::10] = fields[8::10][: len(fields[9::10]), :, ::-1] + rng.normal(0, 2, fields[9::10].shape)
    return np.clip(128 + fields, 0, 255).astype(np.uint8)


def search_times(counts: list[int]) -> Iterator[tuple[int, float, int]]:
    """Pictures, CPU seconds of the search, pairs found."""
    for count in counts:
        thumbs = synthetic(count)
        started = time.process_time()
        pairs, _ = near_pairs(thumbs, np.arange(count), CurationRecipe().near.at_most)
        yield count, time.process_time() - started, len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="pictures")
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--workers", type=int, default=1, help="processes; name as many as there are cores to use")
    parser.add_argument("--search", default="10000,100000", help="numbers of pictures to search copies among")
    parser.add_argument("--pictures", type=Path, help="a folder of pictures to curate instead of drawn ones")
    parser.add_argument("--curate", nargs=2, type=Path, help=argparse.SUPPRESS)  # what the measured process does
    options = parser.parse_args()
    if options.curate:
        return curate_and_tell(*options.curate, options.workers)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.pictures or Path(temporary, "pictures")
        if not options.pictures:
            folder.mkdir()
            cores = len(os.sched_getaffinity(0))
            with ProcessPoolExecutor(cores) as pool:
                list(pool.map(partial(draw, folder, options.size, options.count), range(0, options.count, AT_ONCE)))
            print(f"{options.count:,} pictures of {options.size} x {options.size} pixels drawn", flush=True)
        clock, cpu, most = measured(folder, Path(temporary, "out"), options.workers)
    print(f"{clock:.1f} s by the clock, {cpu:.1f} s of CPU, imports included; {most / 2**30:.2f} GiB held at the most")
    before = None
    for count, seconds, found in search_times([int(word) for word in options.search.split(",") if word]):
        growth = f", {seconds / before:.1f} times the one before" if before else ""
        print(f"search among {count:,}: {seconds:.1f} s of CPU, {found:,} pairs{growth}", flush=True)
        before = seconds


if __name__ == "__main__":
    main()

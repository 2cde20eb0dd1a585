"""A curation from end to end. Two passes over shards with the search for copies between them; each part is a file that
appears whole, and a run does those that are missing: however often it is stopped, the shards have the same bytes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from onestroke.data.curation.duplicates import find_copies, gather
from onestroke.data.curation.examine import examine_shard, stages_of
from onestroke.data.curation.files import atomic, remove_leftovers
from onestroke.data.curation.finish import Pick, finish_shard, networks
from onestroke.data.curation.index import Tally, write_index
from onestroke.data.curation.listing import read_entries, write_listing
from onestroke.data.curation.page import write_page
from onestroke.data.curation.recipe import STAGES, CurationRecipe
from onestroke.errors import DataError, ResourceError
from onestroke.ownership import sole_owner

MARKER, INDEX, PAGE, WORK = "curation.json", "index.parquet", "curation.html", ".curation"
Report = Callable[[str, int, int], None]  # what is done, how much of it, of how much


@dataclass(frozen=True)
class Outcome:
    """What a curation came to."""

    num_pictures: int
    num_kept: int
    dropped: dict[str, int]  # by stage, in order


def curate(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    recipe: CurationRecipe | None = None,
    num_workers: int = 1,
    log: Callable[[str], None] = print,
    on_progress: Report = lambda what, done, total: None,
) -> Outcome:
    """Curate the pictures of `sources` into WebDataset shards, an index and a page in the folder `out`.

    The same sources and recipe go on where an earlier run stopped, or return at once when it was finished. Raises
    DataError for an `out` that holds something else or that another run writes to, and for sources that cannot be read;
    ResourceError where the disk or the memory is full.
    """
    out, recipe = Path(out).resolve(), recipe or CurationRecipe()
    places = [str(Path(source).resolve()) for source in sources]
    _refuse_overlap(out, places)
    _refuse_foreign(out)
    networks(recipe)  # what cannot be loaded is told before anything is read
    with sole_owner(out):
        order = {"written by": "onestroke curate", "sources": places, "recipe": recipe.model_dump(mode="json")}
        finished = _claim(out, order)
        work = out / WORK
        if finished is not None:
            shutil.rmtree(work, ignore_errors=True)  # where the run was killed between its last two breaths
            return Outcome(**finished)
        work.mkdir(exist_ok=True)
        for folder in (out, work):
            remove_leftovers(folder)
        started = time.monotonic()
        job = _Job(work, out, recipe, num_workers, on_progress)
        num_shards, num_new = job.measure(places, log)
        num_finished = job.write(job.pick(num_shards))
        on_progress("writing the page", 0, 1)
        tally = write_index(work, out / INDEX, recipe=recipe, num_shards=num_shards, num_finished=num_finished)
        outcome = _outcome(tally)
        speed = num_new / (time.monotonic() - started) if num_new else None
        write_page(out / PAGE, tally, work, recipe=recipe, sources=places, pictures_per_second=speed,
                   num_workers=num_workers)  # fmt: skip
        _mark(out, {**order, "finished": vars(outcome)})
        shutil.rmtree(work)
    return outcome


def _outcome(tally: Tally) -> Outcome:
    dropped = {stage: tally.dropped[stage] for stage in STAGES if tally.dropped[stage]}
    return Outcome(tally.dropped.total(), tally.dropped[None], dropped)


def _refuse_overlap(out: Path, sources: Sequence[str]) -> None:
    for source in map(Path, sources):
        if out == source or out in source.parents or source in out.parents:
            fix = "Write to a folder outside of the sources"
            raise DataError(f"the output folder and the source {source} lie in one another", where=str(out), fix=fix)


def _refuse_foreign(out: Path) -> None:
    """DataError where the folder holds files and no marker of ours."""
    if not out.exists() or (out / MARKER).exists():
        return
    if not out.is_dir():
        raise DataError("not a folder", where=str(out), fix="Give a folder as --out")
    ours = {path.name for path in out.glob(f".{MARKER}.*.tmp")}  # of a run killed at its first file
    held = sorted({path.name for path in out.iterdir()} - ours - {".lock"})
    if held:
        fix = "Give an empty or a new folder as --out"
        raise DataError(f"holds something else ({held[0]})", where=str(out), fix=fix)


def _claim(out: Path, order: dict) -> dict | None:
    """Mark the folder as that of this order; the outcome if it is finished. DataError where another order's is."""
    marker = out / MARKER
    if not marker.exists():
        _mark(out, order)
        return None
    try:
        page = json.loads(marker.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError("not written by onestroke curate", where=str(marker), fix="Give another --out") from error
    for name in order:
        if page.get(name) != order[name]:
            fix = "Give another --out, or the same sources and recipe to go on"
            raise DataError(f"holds a curation of other {name}", where=str(out), fix=fix)
    return page.get("finished")


def _mark(out: Path, page: dict) -> None:
    with atomic(out / MARKER) as temporary:
        temporary.write_text(json.dumps(page, indent=2, ensure_ascii=False) + "\n", "utf-8")


@dataclass(frozen=True)
class _Job:
    """The parts of a run; each does what is missing of it."""

    work: Path
    out: Path
    recipe: CurationRecipe
    num_workers: int
    report: Report

    def measure(self, sources: Sequence[str], log: Callable[[str], None]) -> tuple[int, int]:
        """The first pass; returns the number of shards of the listing and of pictures that were measured now."""
        listing, size = self.work / "listing.parquet", self.recipe.output.shard_size
        if not listing.exists():
            self.report("listing", 0, 1)
            write_listing(sources, listing, shard_size=size, log=log)
        page = parquet.ParquetFile(listing).metadata
        calls = [
            (listing, shard, self._measured(shard), size, self.recipe)
            for shard in range(page.num_row_groups)
            if not self._measured(shard).exists()
        ]
        self._each(_examine, calls, "measuring", page.num_row_groups)
        return page.num_row_groups, sum(page.row_group(call[1]).num_rows for call in calls)

    def pick(self, num_shards: int) -> int:
        """The search for copies; returns how many pictures go on."""
        picked = self.work / "picked.parquet"
        if not picked.exists():
            survivors = gather([self._measured(shard) for shard in range(num_shards)], self.work / "thumbs.u8")
            compare = stages_of(self.recipe).functions.get("near")
            progress = partial(self.report, "searching copies")
            copies = find_copies(survivors, self.recipe, compare=compare, on_progress=progress)
            place = survivors.place
            rows = [(int(place[row]), "exact", int(place[of]), None) for row, of in copies.exact.items()]
            rows += [(int(place[row]), "near", int(place[of]), apart) for row, (of, apart) in copies.near.items()]
            _write_rows(self.work / "copies.parquet", sorted(rows), _COPIES)
            calls = [(int(place[i]), int(place[j]), apart) for i, j, apart in copies.close_calls]
            _write_rows(self.work / "close.parquet", calls, _CLOSE)
            left = np.delete(place, [*copies.exact, *copies.near])
            _write_rows(picked, [(int(value),) for value in left], _PICKED)
            (self.work / "thumbs.u8").unlink()
        return parquet.ParquetFile(picked).metadata.num_rows

    def write(self, num_picked: int) -> int:
        """The second pass; returns how many slices there are."""
        num_slices = -(-num_picked // self.recipe.output.shard_size)
        calls = [
            (self.work, self.out, shard, self.recipe)
            for shard in range(num_slices)
            if not (self.work / f"finished-{shard:05d}.parquet").exists()
        ]
        self._each(_finish, calls, "writing shards", num_slices)
        return num_slices

    def _measured(self, shard: int) -> Path:
        return self.work / f"measured-{shard:05d}.parquet"

    def _each(self, function: Callable, calls: list[tuple], what: str, total: int) -> None:
        done = total - len(calls)
        self.report(what, done, total)
        for _ in _done(function, calls, self.num_workers):
            done += 1
            self.report(what, done, total)


_COPIES = pa.schema([("place", pa.int64()), ("stage", pa.string()), ("of", pa.int64()), ("apart", pa.float32())])
_CLOSE = pa.schema([("one", pa.int64()), ("other", pa.int64()), ("apart", pa.float32())])
_PICKED = pa.schema([("place", pa.int64())])


def _write_rows(path: Path, rows: Sequence[tuple], schema: pa.Schema) -> None:
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    with atomic(path) as temporary:
        parquet.write_table(pa.Table.from_arrays(arrays, schema=schema), temporary)


def _examine(listing: Path, shard: int, out: Path, shard_size: int, recipe: CurationRecipe) -> None:
    examine_shard(listing, shard, out, shard_size=shard_size, recipe=recipe)


def _finish(work: Path, out: Path, number: int, recipe: CurationRecipe) -> None:
    """Slice `number` of the pictures that were picked, as a shard."""
    size = recipe.output.shard_size
    chosen = parquet.read_table(work / "picked.parquet")["place"].slice(number * size, size).to_pylist()
    picks = []
    for shard in range(chosen[0] // size, chosen[-1] // size + 1):
        columns = ["place", "caption", "kind", "repairs", "width", "height", "sha256"]
        rows = parquet.read_table(work / f"measured-{shard:05d}.parquet", columns=columns).to_pylist()
        entries = read_entries(work / "listing.parquet", shard)
        wanted = set(chosen)
        picks += [Pick(entry, row) for entry, row in zip(entries, rows, strict=True) if row["place"] in wanted]
    finish_shard(picks, out / f"curated-{number:05d}.tar", work / f"finished-{number:05d}.parquet", recipe=recipe)


# Processes


def _done(function: Callable, calls: list[tuple], num_workers: int) -> Iterator[None]:
    """Run all calls, in this process or in several; yields as each is done."""
    if num_workers <= 1 or len(calls) <= 1:
        for call in calls:
            yield function(*call)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(min(num_workers, len(calls)), context, _start_worker)
    waiting, left = set(), iter(calls)
    try:
        for call in left:
            waiting.add(pool.submit(function, *call))
            if len(waiting) >= 2 * num_workers:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        while waiting:
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)
    except BrokenProcessPool as error:
        fix = "Run it again: it goes on where it stopped; give fewer --workers if memory ran out"
        raise ResourceError("a worker was killed", where="curate", fix=fix) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Ctrl-C is the parent's to handle, and a worker whose parent was killed goes as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

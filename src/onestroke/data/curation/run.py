"""A curation from end to end. Two passes over shards with the search for copies between them; each part is a file that
appears whole, and a run does those that are missing: however often it is stopped, the shards have the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from onestroke.data.curation.duplicates import Pairs, Survivors, Thumbs, find_copies, gather, merged, search_part
from onestroke.data.curation.examine import examine_shard, stages_of
from onestroke.data.curation.files import atomic, remove_leftovers
from onestroke.data.curation.finish import Pick, finish_shard, networks
from onestroke.data.curation.index import Tally, write_index
from onestroke.data.curation.listing import read_entries, write_listing
from onestroke.data.curation.near import Index, whole_words
from onestroke.data.curation.pace import Stopwatch
from onestroke.data.curation.page import write_page
from onestroke.data.curation.places import is_address, normal
from onestroke.data.curation.processes import Engine, Processes
from onestroke.data.curation.recipe import STAGES, CurationRecipe
from onestroke.data.curation.sets import is_set
from onestroke.errors import DataError
from onestroke.ownership import sole_owner

MARKER, INDEX, PAGE, WORK = "curation.json", "index.parquet", "curation.html", ".curation"
SEARCHED = 8192  # pictures of one part of the search for copies
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
    engine: Engine = Processes(1),
    log: Callable[[str], None] = print,
    on_progress: Report = lambda what, done, total: None,
) -> Outcome:
    """Curate the pictures of `sources` into WebDataset shards, an index and a page in the folder `out`.

    `engine` does the work, by default this process. The same sources and recipe go on where
    an earlier run stopped, or return at once when it was finished. Raises DataError for an `out` that holds something
    else or that another run writes to, and for sources that cannot be read; ResourceError where the disk or the memory
    is full.
    """
    out, recipe = Path(out).resolve(), recipe or CurationRecipe()
    places = [normal(source) for source in sources]
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
        watch = Stopwatch(work / "pace.json")
        job = _Job(work, out, recipe, engine, watch, on_progress)
        num_shards = job.measure(places, log)
        num_finished = job.write(job.pick(num_shards))
        on_progress("writing the page", 0, 1)
        with watch.timed("index", 1, 1):
            tally = write_index(work, out / INDEX, recipe=recipe, num_shards=num_shards, num_finished=num_finished)
        outcome = _outcome(tally)
        write_page(out / PAGE, tally, work, recipe=recipe, sources=places, pace=watch.pace(outcome.num_pictures),
                   num_workers=engine.num_workers)  # fmt: skip
        _mark(out, {**order, "finished": vars(outcome)})
        shutil.rmtree(work)
    return outcome


def _outcome(tally: Tally) -> Outcome:
    dropped = {stage: tally.dropped[stage] for stage in STAGES if tally.dropped[stage]}
    return Outcome(tally.dropped.total(), tally.dropped[None], dropped)


def _refuse_overlap(out: Path, sources: Sequence[str]) -> None:
    for source in (Path(source) for source in sources if not is_address(source) and not is_set(source)):
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
    engine: Engine
    watch: Stopwatch
    report: Report

    def measure(self, sources: Sequence[str], log: Callable[[str], None]) -> int:
        """The first pass; returns the number of shards of the listing."""
        listing, size = self.work / "listing.parquet", self.recipe.output.shard_size
        if not listing.exists():
            self.report("listing", 0, 1)
            with self.watch.timed("listing", 1, 1):
                write_listing(sources, listing, shard_size=size, log=log)
        num_shards = parquet.ParquetFile(listing).metadata.num_row_groups
        calls = [
            (listing, shard, self._measured(shard), size, self.recipe)
            for shard in range(num_shards)
            if not self._measured(shard).exists()
        ]
        self._each(_examine, calls, "measuring", num_shards)
        return num_shards

    def pick(self, num_shards: int) -> int:
        """The search for copies; returns how many pictures go on."""
        picked = self.work / "picked.parquet"
        if not picked.exists():
            survivors = gather([self._measured(shard) for shard in range(num_shards)], self.work / "thumbs.u8")
            copies = find_copies(survivors, self.recipe, search=partial(self._search, survivors))
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

    def _search(self, survivors: Survivors, rows: np.ndarray) -> Pairs:
        """The near pairs of `rows`, in parts that any worker can do."""
        for name, values in (("rows", rows), ("words", whole_words(Thumbs(survivors.thumbs.path, rows)))):
            with atomic(self.work / f"{name}.npy") as temporary, open(temporary, "wb") as file:
                np.save(file, values)
        parts = [self.work / f"near-{part:05d}.parquet" for part in range(-(-len(rows) // SEARCHED))]
        calls = [(self.work, part, self.recipe) for part, path in enumerate(parts) if not path.exists()]
        self._each(_search, calls, "searching copies", len(parts))
        found = []
        for path in parts:
            pairs = parquet.read_table(path)
            both = np.stack([pairs["one"].to_numpy(), pairs["other"].to_numpy()], axis=1)
            found.append((rows[both], pairs["apart"].to_numpy()))
        return merged(found)

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
        with self.watch.timed(what, len(calls), total):
            for _ in self.engine(function, calls):
                done += 1
                self.report(what, done, total)


_COPIES = pa.schema([("place", pa.int64()), ("stage", pa.string()), ("of", pa.int64()), ("apart", pa.float32())])
_CLOSE = pa.schema([("one", pa.int64()), ("other", pa.int64()), ("apart", pa.float64())])
_PICKED = pa.schema([("place", pa.int64())])


def _write_rows(path: Path, rows: Sequence[tuple], schema: pa.Schema) -> None:
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    with atomic(path) as temporary:
        parquet.write_table(pa.Table.from_arrays(arrays, schema=schema), temporary)


def _examine(listing: Path, shard: int, out: Path, shard_size: int, recipe: CurationRecipe) -> None:
    examine_shard(listing, shard, out, shard_size=shard_size, recipe=recipe)


def _search(work: Path, part: int, recipe: CurationRecipe) -> None:
    """The near pairs that the pictures of one part find, as rows of the search."""
    thumbs, index = _searched(work, (work / "words.npy").stat().st_mtime_ns)
    start, stop = part * SEARCHED, min(len(thumbs), (part + 1) * SEARCHED)
    compare = stages_of(recipe).functions.get("near")
    pairs, apart = search_part(thumbs, index, recipe.near.at_most, start=start, stop=stop, compare=compare)
    rows = [(i, j, value) for (i, j), value in zip(pairs.tolist(), apart.tolist(), strict=True)]
    _write_rows(work / f"near-{part:05d}.parquet", rows, _CLOSE)


@lru_cache(maxsize=1)
def _searched(work: Path, written: int) -> tuple[Thumbs, Index | None]:
    """What all parts of a search share, once a process and a search; `written` is when."""
    words = np.load(work / "words.npy")
    return Thumbs(work / "thumbs.u8", np.load(work / "rows.npy")), Index(words) if len(words) > 1 else None


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

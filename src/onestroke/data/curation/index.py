"""The index of a finished curation, a row a picture whether kept or dropped, and what the page says about them."""

from __future__ import annotations

import heapq
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from onestroke.data.curation.files import atomic
from onestroke.data.curation.listing import Entry, read_entries
from onestroke.data.curation.recipe import MEASURED, SCORED, CurationRecipe

NUM_EXAMPLES = 7  # pictures shown of a stage
NUM_NEAREST = 5  # pictures shown on either side of a threshold
VALUES = ("size", "aspect", *[name for name in MEASURED if name not in ("size", "aspect")], *SCORED, "caption length")
_SCHEMA = pa.schema(
    [("place", pa.int64()), ("source", pa.string()), ("file", pa.string()), ("member", pa.string()),
     ("dropped", pa.string()), ("reason", pa.string()), ("copy_of", pa.int64()), ("shard", pa.string()),
     ("key", pa.string()), ("kind", pa.string()), ("repairs", pa.string()), ("width", pa.int32()),
     ("height", pa.int32()), *((name, pa.float32()) for name in (*MEASURED, *SCORED)), ("caption", pa.large_string()),
     ("found_chars", pa.int32()), ("sha256", pa.string())]
)  # fmt: skip


@dataclass
class Tally:
    """What was counted over all pictures. Values are float32 arrays, so that two million pictures fit."""

    dropped: Counter = field(default_factory=Counter)  # by stage; None: kept
    reasons: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))  # of stages that have kinds
    repairs: Counter = field(default_factory=Counter)
    values: dict[tuple[str, bool], array] = field(default_factory=lambda: defaultdict(lambda: array("f")))
    examples: dict[str | None, list] = field(default_factory=lambda: defaultdict(list))  # heaps
    nearest: dict[tuple[str, bool], list] = field(default_factory=lambda: defaultdict(list))  # heaps

    def add(self, row: Mapping, entry: Entry, recipe: CurationRecipe) -> None:
        stage = row["dropped"]
        self.dropped[stage] += 1
        if stage in ("read", "decode", "captions", "recaption"):
            self.reasons[stage][row["reason"] if len(self.reasons[stage]) < 200 else "other"] += 1
        self.repairs.update(what for what in (row["repairs"] or "").split(", ") if what)
        order = int((row["sha256"] or "0")[:12], 16)  # as good as chance, and the same at every run
        self._keep(self.examples[stage], NUM_EXAMPLES, order, (row["place"], row["reason"] or row["caption"] or ""))
        for name in (*MEASURED, *SCORED):
            if row[name] is not None:
                self.values[name, stage is None].append(row[name])
                self._judge(name, row, recipe)
        if row["caption"]:
            self.values["caption length", stage is None].append(len(row["caption"]))

    def _judge(self, name: str, row: Mapping, recipe: CurationRecipe) -> None:
        """The pictures nearest to a threshold, on either side of it."""
        limit = getattr(recipe, name)
        for bound in (limit.at_least, limit.at_most):
            if bound is not None and (row["dropped"] in (None, name)):
                heap = self.nearest[name, limit.keeps(row[name])]
                self._keep(heap, NUM_NEAREST, abs(row[name] - bound), (row["place"], f"{row[name]:.3g}"))

    @staticmethod
    def _keep(heap: list, most: int, order: float, what: tuple) -> None:
        """The `most` entries of lowest order."""
        item = (-order, -what[0], what)
        (heapq.heappush if len(heap) < most else heapq.heappushpop)(heap, item)


def listed(heap: list) -> list[tuple[int, str]]:
    """Place and text of what a heap of `Tally` holds, lowest order first."""
    return [what for _, _, what in sorted(heap, reverse=True)]


def write_index(work: Path, path: Path, *, recipe: CurationRecipe, num_shards: int, num_finished: int) -> Tally:
    """Write the index, reading a shard at a time."""
    tally, late = Tally(), _late_rows(work, num_finished)
    copies = parquet.read_table(work / "copies.parquet")
    rows = zip(*(copies[name].to_pylist() for name in ("place", "stage", "of", "apart")), strict=True)
    copy_of = {place: (stage, of, apart) for place, stage, of, apart in rows}
    current = next(late, None)
    with atomic(path) as temporary, parquet.ParquetWriter(temporary, _SCHEMA, compression="zstd") as writer:
        for shard in range(num_shards):
            written = []
            for row, entry in _early_rows(work, shard):
                if row["place"] in copy_of:
                    row |= _as_copy(*copy_of[row["place"]])
                elif current is not None and current["place"] == row["place"]:
                    row |= current
                    current = next(late, None)
                row["sha256"] = row["sha256"].hex() if row["sha256"] else None
                row = {**dict.fromkeys(_SCHEMA.names), **row}
                written.append(row)
                tally.add(row, entry, recipe)
            writer.write_table(pa.Table.from_pylist(written, _SCHEMA))
    return tally


def _as_copy(stage: str, of: int, apart: float | None) -> dict:
    what = "copy" if apart is None else f"differs by {apart:.1f}"
    return {"dropped": stage, "copy_of": of, "reason": f"{what} of picture {of}" if apart is None else what}


def _early_rows(work: Path, shard: int) -> Iterator[tuple[dict, Entry]]:
    path = work / f"measured-{shard:05d}.parquet"
    columns = [name for name in parquet.read_schema(path).names if name not in ("thumb", "pixels")]
    rows = parquet.read_table(path, columns=columns).to_pylist()
    for row, entry in zip(rows, read_entries(work / "listing.parquet", shard), strict=True):
        yield {**row, "source": entry.source, "file": entry.file, "member": entry.member}, entry


def _late_rows(work: Path, num_finished: int) -> Iterator[dict]:
    """What became of each picture of the second pass, in order of place."""
    for shard in range(num_finished):
        for row in parquet.read_table(work / f"finished-{shard:05d}.parquet").to_pylist():
            yield {**row, "shard": f"curated-{shard:05d}.tar" if row["key"] else None}

"""The second pass, over a slice of what is no copy: scores, new captions, and one WebDataset shard."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from onestroke.data.curation.decoding import SUFFIXES, encode
from onestroke.data.curation.examine import Stages, stages_of
from onestroke.data.curation.files import atomic
from onestroke.data.curation.listing import Entry, Unreadable, read_bytes
from onestroke.data.curation.recaption import load_captioner
from onestroke.data.curation.recipe import SCORED, CurationRecipe
from onestroke.data.curation.scoring import load_scorer

SCHEMA = pa.schema(
    [("place", pa.int64()), ("dropped", pa.string()), ("reason", pa.string()), ("key", pa.string()),
     ("caption", pa.large_string()), *((stage, pa.float32()) for stage in SCORED)]
)  # fmt: skip


class Pick(NamedTuple):
    """A picture of the slice: where it lies, and its row of the first pass."""

    entry: Entry
    row: Mapping


class _Sample(NamedTuple):
    key: str
    suffix: str
    content: bytes
    page: dict


def finish_shard(picks: list[Pick], shard: Path, record: Path, *, recipe: CurationRecipe) -> None:
    """Write the pictures of `picks` that pass the last stages to the tar `shard`, then what became of each to `record`.

    A slice of which nothing is left makes no tar. `record` comes last: where it is, the shard is done.
    """
    rows: list[dict] = []
    samples = _samples(picks, rows, stages_of(recipe), *networks(recipe))
    first = next(samples, None)
    if first is not None:
        with atomic(shard) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in chain([first], samples):
                _add(tar, sample)
    with atomic(record) as temporary:
        parquet.write_table(pa.Table.from_pylist(rows, SCHEMA), temporary, compression="zstd")


@lru_cache(maxsize=1)
def networks(recipe: CurationRecipe) -> tuple[dict[str, Callable], Callable | None]:
    """Scorers by stage and the captioner, those that are enabled. Raises ModelError where one cannot be loaded."""
    stages, scorers = stages_of(recipe), {}
    for name in SCORED:
        stage = getattr(recipe, name)
        if stage.enabled:
            scorers[name] = stages.functions.get(name) or load_scorer(stage, name=name)
    captioner = None
    if recipe.recaption.enabled:
        captioner = stages.functions.get("recaption") or load_captioner(recipe.recaption)
    return scorers, captioner


def _samples(picks: list[Pick], rows: list[dict], stages: Stages, scorers, captioner) -> Iterator[_Sample]:
    """The samples to write; appends to `rows` what became of every picture."""
    for entry, seen in picks:
        row = {"place": seen["place"], "caption": seen["caption"]}
        rows.append(row)
        try:
            content = read_bytes(entry)
        except Unreadable as error:
            row |= {"dropped": "read", "reason": str(error)}
            continue
        if hashlib.sha256(content).digest() != seen["sha256"]:
            row |= {"dropped": "read", "reason": "changed while it was curated"}
            continue
        suffix, written, image = _file(content, seen, stages, need_image=bool(scorers or captioner))
        verdict = _last_stages(row, image, stages, scorers, captioner)
        if verdict is not None:
            row |= {"dropped": verdict[0], "reason": verdict[1]}
            continue
        row["key"] = f"{seen['place']:09d}"
        scores = {name: round(float(row[name]), 6) for name in scorers}
        page = {"text": row["caption"], "source": entry.name, "width": seen["width"], "height": seen["height"],
                "sha256": seen["sha256"].hex(), "repairs": seen["repairs"] or "", **scores}  # fmt: skip
        yield _Sample(row["key"], suffix, written, page)


def _file(content: bytes, seen: Mapping, stages: Stages, *, need_image: bool):
    """Suffix and bytes of the picture to write, and its pixels where somebody has to look at it."""
    output = stages.recipe.output
    mended = [what for what in (seen["repairs"] or "").split(", ") if what not in ("", "name")]
    is_sound = seen["kind"] in SUFFIXES and all(what.startswith("caption: ") for what in mended)
    wanted = output.format.upper()
    keeps = is_sound and wanted in ("KEEP", seen["kind"])
    image = None if keeps and not need_image else stages.decode(content).image
    if keeps:
        return SUFFIXES[seen["kind"]], content, image
    kind = "PNG" if wanted == "KEEP" else wanted
    return SUFFIXES[kind], encode(image, kind, quality=output.quality), image


def _last_stages(row: dict, image: np.ndarray | None, stages: Stages, scorers, captioner) -> tuple[str, str] | None:
    """Scores and a new caption into `row`; the stage that does not keep the picture, and why."""
    for name, score in scorers.items():
        row[name] = float(score(image))
        stage = getattr(stages.recipe, name)
        if not stage.keeps(row[name]):
            return name, f"{row[name]:.3g}, not {stage.bounds}"
    if captioner and (stages.recipe.recaption.when == "always" or not row["caption"]):
        cleaned = stages.clean(captioner(image, row["caption"]))
        if cleaned.dropped:
            return "recaption", cleaned.dropped
        row["caption"] = cleaned.text
    return None


def _add(tar: tarfile.TarFile, sample: _Sample) -> None:
    page = json.dumps(sample.page, ensure_ascii=False).encode()
    for suffix, content in ((sample.suffix, sample.content), (".txt", sample.page["text"].encode()), (".json", page)):
        member = tarfile.TarInfo(sample.key + suffix)  # no owner, no time: the same bytes at every run
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))

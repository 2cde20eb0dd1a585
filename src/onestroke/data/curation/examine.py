"""The first pass over a shard of the listing: read, decode, measure, clean the caption, hash. One row a picture."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import xxhash
from PIL import Image

from onestroke.data.curation.captions import Cleaned, clean_caption
from onestroke.data.curation.decoding import Decoded, Undecodable, decode, wrong_suffix
from onestroke.data.curation.files import atomic
from onestroke.data.curation.listing import Entry, Unreadable, read_bytes, read_entries
from onestroke.data.curation.measures import ENOUGH, MEASURES, Views
from onestroke.data.curation.near import thumbnail
from onestroke.data.curation.recipe import MEASURED, CurationRecipe, function_of

SCHEMA = pa.schema(
    [("place", pa.int64()), ("dropped", pa.string()), ("reason", pa.string()), ("kind", pa.string()),
     ("repairs", pa.string()), ("width", pa.int32()), ("height", pa.int32()),
     *((stage, pa.float32()) for stage in MEASURED), ("caption", pa.large_string()), ("found_chars", pa.int32()),
     ("sha256", pa.binary(32)), ("pixels", pa.binary(16)), ("thumb", pa.binary(3072))]
)  # fmt: skip


@dataclass(frozen=True)
class Stages:
    """The recipe with the user's functions found."""

    recipe: CurationRecipe
    functions: Mapping[str, Callable]  # by stage; those that replace ours

    def decode(self, content: bytes, *, enough: int | None = None) -> Decoded:
        """The picture; a reduced one of `enough` pixels will do. Raises Undecodable."""
        stage = self.recipe.decode
        if "decode" not in self.functions:
            return decode(content, max_pixels=stage.max_pixels, animated=stage.animated, enough=enough)
        try:
            picture = Image.fromarray(np.asarray(self.functions["decode"](content), np.uint8))
        except ValueError as error:
            raise Undecodable(str(error)) from error
        return Decoded(picture, "", ("decode.function",), picture.size)

    @property
    def enough(self) -> int | None:
        """Pixels of the longer side that the first pass has to see; None: all, as a function of the user's looks."""
        return None if self.functions.keys() & {*MEASURED, "exact"} else ENOUGH

    def measure(self, stage: str, views: Views) -> float:
        score = self.functions[stage](views.image) if stage in self.functions else MEASURES[stage](views)
        return round(float(score), 6)

    def clean(self, caption: str | None) -> Cleaned:
        stage = self.recipe.captions
        if not stage.enabled:
            return Cleaned(" ".join((caption or "").split()))
        if "captions" not in self.functions:
            return clean_caption(caption, stage)
        text = self.functions["captions"](caption)
        return Cleaned(text, (), "" if text else "captions.function left nothing")

    @property
    def waits_for_caption(self) -> bool:
        """Whether a picture without a usable caption will get one later."""
        return self.recipe.recaption.enabled


@lru_cache(maxsize=1)
def stages_of(recipe: CurationRecipe) -> Stages:
    """Raises RecipeError for a function that cannot be imported."""
    named = {name: getattr(recipe, name).function for name in type(recipe).model_fields if name != "output"}
    return Stages(recipe, {name: function_of(value, stage=name) for name, value in named.items() if value})


def examine_shard(listing: Path, shard: int, out: Path, *, shard_size: int, recipe: CurationRecipe) -> None:
    """Write the rows of one shard of the listing to `out`."""
    stages = stages_of(recipe)
    first = shard * shard_size
    rows = [
        {"place": first + number, **examine(entry, stages)} for number, entry in enumerate(read_entries(listing, shard))
    ]
    with atomic(out) as temporary:
        parquet.write_table(pa.Table.from_pylist(rows, SCHEMA), temporary, compression="zstd")


def examine(entry: Entry, stages: Stages) -> dict:
    """What is known of one picture before it is compared with others; `dropped` is the first stage it fails."""
    try:
        content = read_bytes(entry)
    except Unreadable as error:
        return {"dropped": "read", "reason": str(error)}
    row = {"sha256": hashlib.sha256(content).digest()}
    try:
        found = stages.decode(content, enough=stages.enough)
    except Undecodable as error:
        return {**row, "dropped": "decode", "reason": str(error)}
    width, height = found.size
    repairs = list(found.repairs)
    if wrong_suffix(entry.member or entry.file, found.kind) and entry.kind != "row" and found.kind:
        repairs.append("name")
    caption = stages.clean(entry.caption)
    row |= {"kind": found.kind, "width": width, "height": height}
    row |= {"caption": caption.text, "found_chars": len(entry.caption or "")}
    row["repairs"] = ", ".join([*repairs, *(f"caption: {what}" for what in caption.repairs)])
    views = Views(found.picture, found.size)
    verdict = _verdict(row, views, stages)
    if verdict is None and caption.dropped and not stages.waits_for_caption:
        verdict = "captions", caption.dropped
    if caption.dropped:
        row["caption"] = ""
    if verdict is not None:
        return {**row, "dropped": verdict[0], "reason": verdict[1]}
    same = stages.functions.get("exact")
    row["pixels"] = xxhash.xxh3_128_digest(same(found.image)) if same else _pixel_digest(found)
    row["thumb"] = thumbnail(views.coarse).tobytes()
    return row


def _verdict(row: dict, views: Views, stages: Stages) -> tuple[str, str] | None:
    """Measures into `row`; the first stage that does not keep the picture, and why. Later ones are measured as well."""
    verdict = None
    for name in MEASURED:
        stage = getattr(stages.recipe, name)
        if not stage.enabled:
            continue
        row[name] = stages.measure(name, views)
        if verdict is None and not stage.keeps(row[name]):
            verdict = name, f"{row[name]:.3g}, not {stage.bounds}"
    return verdict


def _pixel_digest(found: Decoded) -> bytes:
    digest = xxhash.xxh3_128(repr((found.size, found.picture.size)).encode())
    digest.update(found.image)
    return digest.digest()

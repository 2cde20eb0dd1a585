"""The page of a curation: what was kept and dropped at each stage, with pictures; distributions; close calls."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import yaml
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from PIL import Image

from onestroke.data.curation.decoding import Undecodable, decode
from onestroke.data.curation.files import atomic
from onestroke.data.curation.index import Tally, listed
from onestroke.data.curation.listing import Entry, Unreadable, read_bytes, read_entries
from onestroke.data.curation.pace import Pace, duration, projection
from onestroke.data.curation.recipe import MEASURED, SCORED, STAGES, CurationRecipe
from onestroke.errors import DataError

TITLES = {
    "read": "Read", "decode": "Decode and repair", "size": "Size", "aspect": "Aspect", "blur": "Blur",
    "flat": "Flatness", "borders": "Borders", "text": "Text-heavy pages", "greyscale": "Greyscale scans",
    "captions": "Captions", "exact": "Exact copies", "near": "Near copies", "safety": "Safety",
    "aesthetic": "Aesthetics", "recaption": "New captions",
}  # fmt: skip
UNITS = {
    "size": "shorter side, pixels", "aspect": "longer side by shorter", "blur": "sharpness of edges",
    "flat": "share with nothing to see", "borders": "share of frame or bars", "text": "share under lines of text",
    "greyscale": "colour beyond a tint, levels", "safety": "score", "aesthetic": "score",
    "caption length": "characters",
}  # fmt: skip
_SIDE = 112  # pixels of an example
_BINS = 40


@dataclass(frozen=True)
class Shown:
    """A picture with a line below it; without a picture, the line says why. `beside`: the copy that was kept."""

    picture: str | None
    text: str
    beside: str | None = None


@dataclass(frozen=True)
class Row:
    """One stage of the funnel."""

    title: str
    dropped: int
    kept: int
    share: float  # of all pictures that are left after it
    reasons: tuple[tuple[str, int], ...]
    examples: tuple[Shown, ...]


@dataclass(frozen=True)
class Distribution:
    title: str
    unit: str
    chart: Markup
    limit: str
    below: tuple[Shown, ...] = ()  # dropped, nearest to the threshold
    above: tuple[Shown, ...] = ()  # kept


def write_page(
    path: Path,
    tally: Tally,
    work: Path,
    *,
    recipe: CurationRecipe,
    sources: Sequence[str],
    pace: Pace,
    num_workers: int,
) -> None:
    """Write the page, which loads nothing from outside; its examples are read from the sources once more."""
    gallery = _Gallery(work, recipe)
    total, kept = tally.dropped.total(), tally.dropped[None]
    page = _template().render(
        sources=sources,
        total=total,
        kept=kept,
        rows=_funnel(tally, gallery, total),
        kept_examples=gallery.shown(listed(tally.examples[None])),
        repairs=tally.repairs.most_common(),
        distributions=[_distribution(name, tally, gallery, recipe) for name in UNITS if _has(tally, name)],
        close=gallery.close_calls(),
        near_limit=recipe.near.at_most,
        speed=pace.pictures_per_second,
        parts=[(part, duration(seconds)) for part, seconds in pace.seconds.items() if seconds is not None],
        num_workers=num_workers,
        projection=projection(pace),
        recipe=yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False),
    )
    with atomic(path) as temporary:
        temporary.write_text(page, "utf-8")


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(files("onestroke.data.curation").joinpath("curation.html").read_text("utf-8"))


def _funnel(tally: Tally, gallery: _Gallery, total: int) -> list[Row]:
    rows, left = [], total
    for stage in STAGES:
        dropped = tally.dropped[stage]
        left -= dropped
        if dropped or stage in ("decode", "size", "exact", "near", "captions"):
            reasons = tuple(tally.reasons[stage].most_common(6)) if stage in tally.reasons else ()
            examples = gallery.shown(listed(tally.examples[stage]), stage=stage)
            rows.append(Row(TITLES[stage], dropped, left, left / max(total, 1), reasons, examples))
    return rows


# Pictures


class _Gallery:
    """Examples by place, read and shrunk."""

    def __init__(self, work: Path, recipe: CurationRecipe) -> None:
        self.work, self.recipe = work, recipe
        copies = parquet.read_table(work / "copies.parquet")
        self.kept_of = dict(zip(copies["place"].to_pylist(), copies["of"].to_pylist(), strict=True))

    def shown(self, items: Iterable[tuple[int, str]], stage: str | None = None) -> tuple[Shown, ...]:
        beside = self.kept_of if stage in ("exact", "near") else {}
        return tuple(
            Shown(self._picture(place), text, self._picture(beside[place]) if place in beside else None)
            for place, text in items
        )

    def close_calls(self) -> tuple[tuple[Shown, ...], tuple[Shown, ...]]:
        """Pairs on either side of the threshold for near copies, nearest first."""
        table = parquet.read_table(self.work / "close.parquet")
        rows = list(zip(*(table[name].to_pylist() for name in ("one", "other", "apart")), strict=True))
        sides = (
            [row for row in rows if (row[2] <= self.recipe.near.at_most) == inside][:5] for inside in (True, False)
        )
        return tuple(tuple(Shown(self._picture(i), f"{x:.1f}", self._picture(j)) for i, j, x in side) for side in sides)

    def _picture(self, place: int) -> str | None:
        try:
            entry = self._entry(place)
            image = decode(read_bytes(entry), max_pixels=self.recipe.decode.max_pixels).image
        except (Undecodable, Unreadable, DataError):  # it may have gone since: the page is not worth a failed run
            return None
        picture = Image.fromarray(image)
        picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        page = io.BytesIO()
        picture.save(page, "WEBP", quality=80)
        return "data:image/webp;base64," + base64.b64encode(page.getvalue()).decode("ascii")

    def _entry(self, place: int) -> Entry:
        shard, row = divmod(place, self.recipe.output.shard_size)
        return read_entries(self.work / "listing.parquet", shard)[row]


# Distributions


def _has(tally: Tally, name: str) -> bool:
    return bool(tally.values.get((name, True)) or tally.values.get((name, False)))


def _distribution(name: str, tally: Tally, gallery: _Gallery, recipe: CurationRecipe) -> Distribution:
    kept, dropped = (np.array(tally.values[name, side], np.float64) for side in (True, False))
    is_stage = name in (*MEASURED, *SCORED)
    limit = getattr(recipe, name) if is_stage else None
    bounds = [bound for bound in (limit.at_least, limit.at_most) if bound is not None] if limit else []
    sides = [gallery.shown(listed(tally.nearest[name, side])) for side in (False, True)] if is_stage else [(), ()]
    title = TITLES.get(name, "Caption length")
    return Distribution(title, UNITS[name], histogram(kept, dropped, bounds), limit.bounds if limit else "", *sides)


def histogram(kept: np.ndarray, dropped: np.ndarray, bounds: Sequence[float]) -> Markup:
    """Kept and dropped pictures by value, stacked, as an SVG element; a line at each threshold.

    Values beyond the middle 99% are counted in the outermost bars.
    """
    values = np.concatenate([kept, dropped])
    low, high = np.quantile(values, [0.005, 0.995])
    low, high = min(low, *bounds, values.max()), max(high, *bounds, values.min())
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    counts = [np.histogram(np.clip(part, low, high), _BINS, (low, high))[0] for part in (kept, dropped)]
    most, width, height = max(1, int((counts[0] + counts[1]).max())), 440, 120
    parts = []
    for number, (good, bad) in enumerate(zip(*counts, strict=True)):
        x, step, base = number * width / _BINS, width / _BINS - 1, float(height)
        for kind, count in (("kept", good), ("dropped", bad)):
            tall = height * count / most
            base -= tall
            if count:
                place = f"x='{x:.1f}' y='{base:.1f}' width='{step:.1f}' height='{tall:.1f}'"
                parts.append(f"<rect class='{kind}' {place}/>")
    for bound in bounds:
        x = width * (bound - low) / (high - low)
        parts.append(f"<line class='limit' x1='{x:.1f}' x2='{x:.1f}' y1='-6' y2='{height}'/>")
    for value, x, anchor in ((low, 0, "start"), ((low + high) / 2, width / 2, "middle"), (high, width, "end")):
        parts.append(f"<text x='{x:.0f}' y='{height + 16}' text-anchor='{anchor}'>{value:.4g}</text>")
    head = f"<svg viewBox='-4 -10 {width + 8} {height + 32}' role='img' aria-label='histogram, at most {most} a bar'>"
    axis = f"<line class='axis' x1='0' x2='{width}' y1='{height}' y2='{height}'/>"
    return Markup(head + axis + "".join(parts) + "</svg>")

"""What is in a set of captioned pictures, and what a trainer sees of it after crops: numbers and a contact sheet."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from onestroke.data.buckets import Buckets
from onestroke.data.framing import Crop, cut, place
from onestroke.data.source import BrokenPicture, Source
from onestroke.errors import DataError

_PAPER, _INK, _FAINT = "#fbfaf6", "#1c1b1f", "#6f6b74"
_GAP, _LINES = 10, 2  # pixels between pictures; lines of caption below each
_SMALL_WORDS = {"a", "an", "the", "and", "or", "of", "in", "on", "at", "with", "to", "for", "by", "is", "are"}


@dataclass(frozen=True)
class Seen:
    """One picture as the trainer sees it."""

    index: int
    image: UInt8[np.ndarray, "h w 3"]
    caption: str
    size: tuple[int, int]  # height, width before, pixels
    scale: float  # above 1: enlarged
    lost: float  # share of the picture that the crop leaves out


@dataclass(frozen=True)
class Inspection:
    """`seen`: a sample of the pictures; everything else but `num_pictures` is of that sample."""

    num_pictures: int
    seen: tuple[Seen, ...]
    broken: tuple[str, ...]  # path and reason
    size: tuple[int, int]  # height, width the trainer asks for, without buckets
    buckets: Buckets | None = None


def inspect(
    source: Source,
    *,
    size: int,
    crop: Crop = "center",
    sample: int = 1000,
    seed: int = 0,
    buckets: Buckets | None = None,
) -> Inspection:
    """Read up to `sample` pictures, spread evenly over the set, and cut them to `size` pixels a side, or as `buckets`
    say.

    Raises DataError where none can be read.
    """
    count = min(sample, len(source))
    seen, broken = [], []
    sizes = {} if buckets is None else buckets.size_by_picture()
    for index in sorted({number * len(source) // count for number in range(count)}):
        try:
            picture = source.read(index)
        except BrokenPicture as error:
            broken.append(str(error))
            continue
        shape = picture.image.shape[:2]
        rng = np.random.default_rng((seed, index))
        wanted = sizes.get(index, (size, size))
        placement = place(shape, wanted, rng, crop=crop, random_flip=False)
        scale = placement.height / shape[0]
        lost = 1 - wanted[0] * wanted[1] / (placement.height * placement.width)
        seen.append(Seen(index, cut(picture.image, wanted, placement), picture.caption, shape, scale, lost))
    if not seen:
        raise DataError(f"none of {count} pictures can be read: {', '.join(broken[:3])}", fix="Mend the files.")
    return Inspection(len(source), tuple(seen), tuple(broken), (size, size), buckets)


def described(found: Inspection) -> list[str]:
    """The numbers, a line each."""
    seen, size = found.seen, found.size[0]
    lines = [f"{found.num_pictures:,} captioned pictures; {len(seen) + len(found.broken):,} of them looked at"]
    if found.broken:
        lines.append(f"broken: {len(found.broken):,}, e.g. {', '.join(found.broken[:3])}")
    lines.append("shorter side, pixels: " + _spread([min(one.size) for one in seen]))
    lines.append("longer side by shorter: " + _spread([max(one.size) / min(one.size) for one in seen]))
    lines.append("caption, words: " + _spread([len(one.caption.split()) for one in seen]))
    enlarged = sum(one.scale > 1 for one in seen) / len(seen)
    at = f"at {size} x {size}" if found.buckets is None else f"in {len(found.buckets)} buckets"
    lines.append(f"{at}: {100 * enlarged:.0f}% are enlarged; the crop leaves out "
                 f"{100 * np.mean([one.lost for one in seen]):.0f}% of a picture on average, "
                 f"{100 * max(one.lost for one in seen):.0f}% at most")  # fmt: skip
    lines += [] if found.buckets is None else _shares(found.buckets)
    repeated = len(seen) - len({one.caption for one in seen})
    lines.append(f"captions that another picture has too: {repeated:,}")
    lines.append("words most often: " + ", ".join(f"{word} {count:,}" for word, count in _words(seen)))
    return lines


def _shares(buckets: Buckets) -> list[str]:
    """What goes into each bucket, a line each, and what goes into none."""
    lines = []
    for (height, width), members in zip(buckets.sizes, buckets.members, strict=True):
        share = 100 * len(members) / buckets.num_pictures
        lines.append(f"  {width} x {height}: {len(members):,} pictures ({share:.1f}%)")
    if len(buckets.unreadable):
        lines.append(f"  in none, for they cannot be read: {len(buckets.unreadable):,}")
    return lines


def _spread(values: Sequence[float]) -> str:
    low, first, middle, last, high = np.quantile(values, [0, 0.1, 0.5, 0.9, 1])
    return f"{middle:.4g} (middle 80%: {first:.4g} to {last:.4g}; all: {low:.4g} to {high:.4g})"


def _words(seen: Sequence[Seen]) -> list[tuple[str, int]]:
    words = Counter(word.strip(".,;:!?\"'()").lower() for one in seen for word in one.caption.split())
    return [(word, count) for word, count in words.most_common(60) if word and word not in _SMALL_WORDS][:12]


def contact_sheet(found: Inspection, *, columns: int = 8, rows: int = 6, cell: int = 144) -> Image.Image:
    """Up to columns x rows of the pictures as the trainer sees them, each with its caption and what became of it."""
    count = min(columns * rows, len(found.seen))
    shown = [found.seen[number * len(found.seen) // count] for number in range(count)]
    columns = min(columns, count)
    caption, note = ImageFont.load_default(12), ImageFont.load_default(11)
    step = cell + _GAP, cell + _GAP + 15 * (_LINES + 1)
    sheet = Image.new("RGB", (columns * step[0] + _GAP, -(-count // columns) * step[1] + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, one in enumerate(shown):
        x, y = (_GAP + step[0] * (number % columns), _GAP + step[1] * (number // columns))
        shown = _fitted(one.image, cell)
        sheet.paste(shown, (x + (cell - shown.width) // 2, y + (cell - shown.height) // 2))
        lines = textwrap.wrap(one.caption, max(8, cell // 7), max_lines=_LINES, placeholder=" ...")
        for row, line in enumerate(lines):
            draw.text((x, y + cell + 2 + 15 * row), line, _INK, caption)
        what = f"{one.size[1]} x {one.size[0]}, " + (f"enlarged {one.scale:.1f}x" if one.scale > 1 else "reduced")
        if found.buckets is not None:
            what = f"{one.size[1]} x {one.size[0]} to {one.image.shape[1]} x {one.image.shape[0]}"
        draw.text((x, y + cell + 3 + 15 * _LINES), what, _FAINT, note)
    return sheet


def _fitted(image: UInt8[np.ndarray, "h w 3"], cell: int) -> Image.Image:
    """The whole picture, its longer side `cell` pixels."""
    scale = cell / max(image.shape[:2])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)

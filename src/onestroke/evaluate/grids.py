"""Pictures side by side: rows of one prompt and one seed, columns of models and numbers of steps."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps

from onestroke.errors import DataError

Picture = UInt8[np.ndarray, "h w 3"]

PAPER, INK, MUTED, RULE, ACCENT = "#fbfaf6", "#1c1b1f", "#6d6a72", "#d8d4ca", "#c8371f"


@dataclass(frozen=True)
class Column:
    """What a column of pictures was drawn with; neighbours of one `group` share a heading ("teacher")."""

    label: str
    group: str = ""


@dataclass(frozen=True)
class GridRow:
    """One prompt's pictures, one for each column."""

    label: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Grid:
    """Rows of pictures; the last group of columns is the one shown off. Raises DataError where a row has gaps."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[GridRow, ...]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.pictures) != len(self.columns):
                raise DataError(f"{len(row.pictures)} pictures for {len(self.columns)} columns", where=row.label)

    @property
    def groups(self) -> tuple[tuple[str, int], ...]:
        """Name and number of columns of each run of columns of one group."""
        runs: list[tuple[str, int]] = []
        for column in self.columns:
            if runs and runs[-1][0] == column.group:
                runs[-1] = (column.group, runs[-1][1] + 1)
            else:
                runs.append((column.group, 1))
        return tuple(runs)


@dataclass(frozen=True)
class Tile:
    """A picture, the number that brought it here, and another model's picture to the same prompt."""

    prompt: str
    value: str
    picture: Picture
    beside: Picture


@dataclass(frozen=True)
class Gallery:
    """Pictures chosen by one measure, the most telling first."""

    title: str
    caption: str
    tiles: tuple[Tile, ...]


def data_uri(picture: Picture, *, longest: int = 384) -> str:
    """The picture as lossless WebP inside a `data:` address, scaled down to `longest` pixels where it is larger.

    Lossless, because a lossy file would hide or add the very artefacts that the picture is there to show.
    """
    image = Image.fromarray(picture)
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=True, quality=70, exact=True)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def grid_image(grid: Grid, *, cell: int = 128, scale: int = 1, font: Path | None = None) -> Image.Image:
    """The grid as one picture: group headings, column labels, and each row under its prompt.

    `cell`: side of a picture in pixels, its own side for sharp pixels; one that is not square is padded. `scale`
    multiplies everything but keeps the proportions (2 for high-density screens). `font`: a TrueType file, for prompts
    in other than Latin letters.
    """
    unit = cell * scale / 128
    gap, group_gap, margin = round(6 * unit), round(22 * unit), round(24 * unit)
    lefts = _lefts(grid, cell * scale, gap, group_gap, margin)
    width = lefts[-1] + cell * scale + margin
    small, medium = _font(font, 13.5 * unit), _font(font, 15 * unit)
    prompts = [_wrapped(row.label, medium, width - 2 * margin) for row in grid.rows]
    line, head = round(20 * unit), round((62 if any(name for name, _ in grid.groups) else 36) * unit)
    heights = [len(lines) * line + round(6 * unit) + cell * scale + round(18 * unit) for lines in prompts]
    image = Image.new("RGB", (width, margin + head + sum(heights) + margin - round(18 * unit)), PAPER)
    draw = ImageDraw.Draw(image)
    _draw_groups(draw, grid, lefts, side=cell * scale, top=margin, unit=unit, font=medium)
    for left, column in zip(lefts, grid.columns, strict=True):
        draw.text((left, margin + head - round(20 * unit)), column.label, MUTED, small, anchor="ls")
    top = margin + head
    for row, lines, height in zip(grid.rows, prompts, heights, strict=True):
        for i, text in enumerate(lines):
            draw.text((margin, top + i * line), text, INK, medium)
        for left, picture in zip(lefts, row.pictures, strict=True):
            at = (left, top + len(lines) * line + round(6 * unit))
            image.paste(ImageOps.pad(Image.fromarray(picture), (cell * scale, cell * scale), color=PAPER), at)
        top += height
    return image


def _lefts(grid: Grid, side: int, gap: int, group_gap: int, margin: int) -> list[int]:
    lefts, left = [], margin
    for i, column in enumerate(grid.columns):
        if i:
            left += side + (gap if column.group == grid.columns[i - 1].group else group_gap)
        lefts.append(left)
    return lefts


def _draw_groups(draw, grid: Grid, lefts: Sequence[int], *, side: int, top: int, unit: float, font) -> None:
    """Group headings, each over a rule as wide as its group; the last of several in the accent colour."""
    first = 0
    for number, (name, count) in enumerate(grid.groups, start=1):
        left, right = lefts[first], lefts[first + count - 1] + side
        if name:
            color = ACCENT if number == len(grid.groups) > 1 else INK
            draw.text((left, top - round(4 * unit)), name, color, font)
            rule = top + round(18 * unit)
            draw.rectangle((left, rule, right - 1, rule + round(2 * unit)), color)
        first += count


def _font(path: Path | None, size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


def _wrapped(text: str, font, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines

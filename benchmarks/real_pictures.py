"""A folder of some 20,000 real pictures of mixed styles and sizes with tag captions, and what `curate` makes of it.

    python benchmarks/real_pictures.py --out FOLDER [--count 20500] [--emoji FOLDER] [--workers 2]

The pictures are openly licensed art of packages: every emoji of three sets (from npm, one file of vector pictures each)
and characters of DiceBear's figurative styles (dicebear-styles, a dependency of onestroke). Sources, authors and
licences are written to FOLDER/LICENCES.md. `--emoji` names the folder where `npm install @iconify-json/noto` and so on
has put the sets; without it, npm is asked for them. FOLDER/pictures is the heap, FOLDER/curated the set, and the funnel
of the stages is printed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import resvg
from dicebear import Avatar
from dicebear import Style as AvatarStyle
from PIL import Image

from onestroke.commands.curate import told
from onestroke.data.curation.processes import Processes
from onestroke.data.curation.recipe import CurationRecipe
from onestroke.data.curation.run import PAGE, curate
from onestroke.errors import DataError

EMOJI = ("noto", "twemoji", "fluent-emoji-flat")  # Apache-2.0, CC-BY-4.0, MIT: as each package's info.json says
STYLES = (
    "adventurer", "big-ears", "big-smile", "critters", "croodles", "dylan", "fun-emoji", "landscape", "lorelei",
    "micah", "miniavs", "notionists", "open-peeps", "personas", "pixel-art", "pixelbot", "planets", "sprouts",
    "toon-head", "voxel-art",
)  # fmt: skip
OPEN = ("CC0 1.0", "CC BY 4.0", "MIT", "Apache-2.0", "CC-BY-4.0")
SIDES = (96, 128, 160, 192, 256, 384)  # pixels of the shorter side
SHAPES = ((1, 1), (1, 1), (4, 3), (3, 4), (3, 2))  # width to height
FORMATS = (("png", {}), ("jpg", {"quality": 88}), ("webp", {"quality": 85}))
PAPERS = ("#ffffff", "#f4ecd8", "#dff1ff", "#ffe3ec", "#e6f5df", "#2b2d42")
COLORS = {
    "black": (0, 0, 0), "white": (255, 255, 255), "grey": (128, 128, 128), "red": (220, 40, 40), "brown": (120, 70, 35),
    "orange": (250, 140, 40), "yellow": (250, 220, 70), "green": (70, 170, 80), "blue": (60, 110, 220),
    "purple": (140, 80, 190), "pink": (250, 150, 190), "beige": (240, 205, 170), "teal": (60, 160, 160),
}  # fmt: skip
RECIPE = {"size": {"at_least": 96}, "greyscale": {"enabled": False}}
AT_ONCE = 250  # pictures that a process draws before it is given more


class Wanted(NamedTuple):
    """One picture to draw: of an emoji set, with its name; of a DiceBear style, with its seed."""

    set: str
    name: str


def wanted(count: int, emoji: Path) -> list[Wanted]:
    """Every emoji of the sets, then characters of all styles in turn, `count` in all."""
    found = [Wanted(name, icon) for name in EMOJI for icon in sorted(_emoji(emoji, name)["icons"])][:count]
    return found + [Wanted(STYLES[n % len(STYLES)], f"seed-{n}") for n in range(count - len(found))]


@cache
def _emoji(folder: Path, name: str) -> dict:
    """Pictures by name, their size, and the category of each name."""
    page = json.loads((folder / "@iconify-json" / name / "icons.json").read_text("utf-8"))
    categories = json.loads((folder / "@iconify-json" / name / "metadata.json").read_text("utf-8"))["categories"]
    page["category"] = {icon: category for category, icons in categories.items() for icon in icons}
    return page


@cache
def _style(name: str) -> AvatarStyle:
    return AvatarStyle(json.loads(files("dicebear_styles").joinpath(f"{name}.json").read_text("utf-8")))


def draw(picture: Wanted, side: int, emoji: Path) -> tuple[Image.Image, str]:
    """The picture on nothing, RGBA, and its tags."""
    if picture.set in EMOJI:
        page = _emoji(emoji, picture.set)
        icon = page["icons"][picture.name]
        width, height = (icon.get(name, page[name]) for name in ("width", "height"))
        names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        svg = (f'<svg {names} width="{side}" height="{side}" '
               f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>')  # fmt: skip
        category = page["category"].get(picture.name, "other").lower().replace(" & ", "_and_").replace(" ", "_")
        tags = [
            "emoji",
            f"{picture.set.replace('-', '_')}_style",
            picture.name.replace("-", "_"),
            category,
            "no_humans",
        ]
    else:
        page = Avatar(_style(picture.set), {"seed": picture.name, "size": side}).to_json()
        svg, tags = page["svg"], ["solo", f"{picture.set.replace('-', '_')}_style", *_tags(page["options"])]
    png = resvg.render(resvg.usvg.Tree.from_str(svg, _options()), (1, 0, 0, 0, 1, 0))
    return Image.open(io.BytesIO(png)).convert("RGBA"), ", ".join(tags)


@cache
def _options():
    return resvg.usvg.Options.default()


def _tags(options: dict) -> Iterator[str]:
    """`mouthVariant: bigSmile` as big_smile_mouth; `hairColor` by its nearest name as brown_hair."""
    for name, value in options.items():
        if name.endswith("Variant") and value and not re.fullmatch(r"none|default|standard|variant\w+", str(value)):
            yield _words(f"{value}_{name.removesuffix('Variant')}")
        elif name.endswith("Color") and value:
            rgb = [int(value[0].lstrip("#")[at : at + 2], 16) for at in (0, 2, 4)]
            nearest = min(COLORS, key=lambda color: sum((a - b) ** 2 for a, b in zip(COLORS[color], rgb, strict=True)))
            yield _words(f"{nearest}_{name.removesuffix('Color')}")


def _words(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z0-9])", "_", name).lower()


def write(folder: Path, emoji: Path, chunk: tuple[int, list[Wanted]]) -> None:
    """Draw a chunk of the pictures into a folder of their own: captions in text files or in metadata.jsonl."""
    first, pictures = chunk
    below = folder / f"{first:06d}"
    below.mkdir(parents=True)
    lines = []
    for number, picture in enumerate(pictures, first):
        rng = np.random.default_rng(zlib.crc32(repr(picture).encode()))
        side, (across, down) = int(rng.choice(SIDES)), SHAPES[rng.integers(len(SHAPES))]
        drawn, tags = draw(picture, side, emoji)
        size = tuple(max(side, round(side * part / min(across, down))) for part in (across, down))
        image = Image.new("RGB", size, str(rng.choice(PAPERS)))
        place = tuple(int(rng.integers(0, room - side + 1)) for room in size)
        image.paste(drawn, place, drawn)
        suffix, options = FORMATS[rng.integers(len(FORMATS))]
        name = f"{number:06d}-{picture.set}.{suffix}"
        image.save(below / name, **options)
        if picture.set in EMOJI:
            lines.append(json.dumps({"file_name": name, "text": tags}) + "\n")
        else:
            (below / name).with_suffix(".txt").write_text(tags, "utf-8")
    if lines:
        (below / "metadata.jsonl").write_text("".join(lines), "utf-8")


def licences(emoji: Path) -> str:
    """Author and licence of every set, as a page. Raises DataError for one that is not open."""
    rows = []
    for name in EMOJI:
        page = json.loads((emoji / "@iconify-json" / name / "info.json").read_text("utf-8"))
        rows.append((f"{page['name']} (npm: @iconify-json/{name})", page["author"]["name"], page["license"]["spdx"]))
    for name in STYLES:
        meta = json.loads(files("dicebear_styles").joinpath(f"{name}.json").read_text("utf-8"))["meta"]
        rows.append((f"{meta['source']['name']} (PyPI: dicebear-styles, {name})", meta["creator"]["name"],
                     meta["license"]["name"]))  # fmt: skip
    for source, _, licence in rows:
        if licence not in OPEN:
            raise DataError(f"licence {licence!r} is none of {', '.join(OPEN)}", where=source, fix="Leave the set out")
    lines = [f"| {source} | {author} | {licence} |" for source, author, licence in rows]
    return "\n".join(["| pictures | author | licence |", "|---|---|---|", *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=20_500, help="pictures")
    parser.add_argument("--emoji", type=Path, help="a node_modules folder with the emoji sets")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    emoji = options.emoji or options.out / "node_modules"
    if not options.emoji and not emoji.exists():
        packages = [f"@iconify-json/{name}" for name in EMOJI]
        subprocess.run(["npm", "install", "--silent", "--prefix", options.out, *packages], check=True)
    (options.out / "LICENCES.md").write_text(licences(emoji), "utf-8")
    pictures = options.out / "pictures"
    if not pictures.exists():
        unfinished = options.out / "pictures.part"
        subprocess.run(["rm", "-rf", unfinished], check=True)
        every = wanted(options.count, emoji)
        chunks = [(first, every[first : first + AT_ONCE]) for first in range(0, len(every), AT_ONCE)]
        with ProcessPoolExecutor(options.workers) as pool:
            list(pool.map(partial(write, unfinished, emoji), chunks))
        unfinished.rename(pictures)
    started = time.monotonic()
    outcome = curate([pictures], options.out / "curated", recipe=_recipe(), engine=Processes(options.workers))
    print(f"{told(outcome)}; {time.monotonic() - started:.0f} s; {options.out / 'curated' / PAGE}")


def _recipe() -> CurationRecipe:
    base = CurationRecipe().model_dump()
    return CurationRecipe.model_validate(base | {name: base[name] | section for name, section in RECIPE.items()})


if __name__ == "__main__":
    main()

"""The embedded comic pictures as a Source for training, and as files for everybody else."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from PIL import Image

from onestroke.data.comicset.captions import Caption, make_caption
from onestroke.data.comicset.character import SPLITS, Character, draw_character, generator
from onestroke.data.comicset.render import render
from onestroke.data.comicset.vocabulary import STYLE_NAMES, load_style
from onestroke.data.source import Picture
from onestroke.errors import DataError, RecipeError, ResourceError

Layout = Literal["imagefolder", "webdataset"]
_ORDER = "comicset.json"  # what the folder holds: tells a folder that write_comicset wrote, and how far it may go on
_LICENCES = {
    "CC0 1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "CC BY 4.0": "https://creativecommons.org/licenses/by/4.0/",
}


@dataclass(frozen=True)
class ComicSource:
    """The first `num_pictures` of a split (there is no last one), drawn on reading; a Source.

    Training reads by slot: the first epoch and every later one word the caption of a picture anew.
    """

    num_pictures: int
    split: str = "train"  # train | validation | held-out
    size: int = 128  # pixels a side, 1 to 4096
    seed: int = 0

    def __len__(self) -> int:
        return self.num_pictures

    def character(self, index: int) -> Character:
        return draw_character(index, split=self.split, seed=self.seed)

    def caption(self, index: int, *, slot: int | None = None) -> str:
        return self.described(index, slot=slot).text

    def described(self, index: int, *, slot: int | None = None) -> Caption:
        """The caption of picture `index` and what it names, not drawing it: its own, or the one that `slot` reads."""
        return self._worded(self.character(index), index, slot)

    def size_of(self, index: int) -> tuple[int, int]:
        return self.size, self.size

    def read(self, index: int, *, slot: int | None = None) -> Picture:
        character = self.character(index)
        return Picture(render(character, size=self.size), self._worded(character, index, slot).text)

    def _worded(self, character: Character, index: int, slot: int | None) -> Caption:
        stream = 1 if slot is None else 2 + slot
        return make_caption(character, generator(self.seed, self.split, index, stream))


@dataclass(frozen=True)
class _Order:
    """What to write; kept in the folder, so that only the same order goes on with it."""

    count: int
    split: str
    size: int
    seed: int
    layout: str
    shard_size: int

    def page(self) -> str:
        return json.dumps({"written by": "onestroke comicset", **asdict(self)}, indent=2) + "\n"


def write_comicset(
    out: str | Path,
    *,
    count: int,
    split: str = "train",
    size: int = 128,
    seed: int = 0,
    layout: Layout = "imagefolder",
    shard_size: int = 1000,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the first `count` pictures of `split`, with captions and credits, as the folder `out`.

    `imagefolder`: PNG files and a metadata.jsonl with file_name, text, style, attributes (all that can be seen) and
    named (what the text names). `webdataset`: tars of `shard_size` samples of png, txt and json. `on_progress` is told
    the pictures done and `count`. Everything is written beside `out` and renamed at the end; an interrupted run goes on
    where it stopped and ends in the same bytes. Raises DataError where `out` holds something else.
    """
    order = _Order(count, split, size, seed, layout, shard_size)
    _check(order)
    out = Path(out).resolve()
    work = out.with_name(f".{out.name}.partial")
    source = ComicSource(count, split, size, seed)
    with _room_on_disk(out):
        if _is_written(out, order):
            return out
        work.mkdir(parents=True, exist_ok=True)
        _is_written(work, order)
        _write_whole(work / _ORDER, order.page().encode())
        _write_whole(work / "CREDITS.md", credits_page().encode())
        write = _write_shards if layout == "webdataset" else _write_images
        for done in write(work, source, order):
            if on_progress:
                on_progress(done, count)
        os.replace(work, out)
    return out


def _check(order: _Order) -> None:
    choices = {"split": (order.split, SPLITS), "layout": (order.layout, get_args(Layout))}
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise RecipeError(f"no {name} {value!r}", where="comicset", fix=f"Choose one of {', '.join(allowed)}")
    limits = {"count": (order.count, None), "shard_size": (order.shard_size, None), "size": (order.size, 4096)}
    for name, (value, most) in limits.items():
        if value < 1 or (most and value > most):
            fix = f"Give {name} from 1 to {most}" if most else f"Give {name} 1 or more"
            raise RecipeError(f"{name} is {value}", where="comicset", fix=fix)
    if order.seed < 0:
        raise RecipeError(f"seed is {order.seed}", where="comicset", fix="Give seed 0 or more")


def _is_written(folder: Path, order: _Order) -> bool:
    """Whether `folder` holds the page of this very order; DataError if it holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    page = folder / _ORDER
    if page.is_file() and page.read_text("utf-8") == order.page():
        return True
    if not page.is_file():
        raise DataError("not empty, and not written by comicset", where=str(folder), fix="Choose another folder")
    fix = f"Choose another folder, delete this one, or repeat the order in its {_ORDER}"
    raise DataError("holds other comic pictures", where=str(folder), fix=fix)


def _write_images(work: Path, source: ComicSource, order: _Order) -> Iterator[int]:
    rows = []
    for index in range(order.count):
        name = f"{index:07d}.png"
        row, png = _row(source, index), work / name
        if not png.exists():
            _write_whole(png, _png(source, index))
        rows.append(json.dumps({"file_name": name, **row}, ensure_ascii=False))
        yield index + 1
    _write_whole(work / "metadata.jsonl", ("\n".join(rows) + "\n").encode())


def _write_shards(work: Path, source: ComicSource, order: _Order) -> Iterator[int]:
    for first in range(0, order.count, order.shard_size):
        shard = work / f"{order.split}-{first // order.shard_size:05d}.tar"
        last = min(first + order.shard_size, order.count)
        if not shard.exists():
            temporary = shard.with_suffix(".tmp")
            with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
                for index in range(first, last):
                    _add_sample(tar, source, index)
                    yield index + 1
            os.replace(temporary, shard)
        yield last


def _add_sample(tar: tarfile.TarFile, source: ComicSource, index: int) -> None:
    row = _row(source, index)
    page = json.dumps(row, ensure_ascii=False)
    for kind, content in (("png", _png(source, index)), ("txt", row["text"].encode()), ("json", page.encode())):
        member = tarfile.TarInfo(f"{index:07d}.{kind}")  # no owner, no time: the same bytes at every run
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def _row(source: ComicSource, index: int) -> Mapping:
    character, caption = source.character(index), source.described(index)
    named = dict(caption.named)
    return {"text": caption.text, "style": character.style, "attributes": dict(character.values), "named": named}


def _png(source: ComicSource, index: int) -> bytes:
    page = io.BytesIO()
    Image.fromarray(render(source.character(index), size=source.size)).save(page, "PNG")
    return page.getvalue()


def credits_page() -> str:
    """Who drew the parts of the pictures, and under which licence, as Markdown."""
    lines = [
        "# Credits",
        "",
        "These pictures combine parts drawn by the artists below, published as DiceBear styles. onestroke chose the",
        "parts at random, recoloured, scaled, moved and mirrored them, and wrote the captions.",
        "",
        "| style | work | artist | licence |",
        "|---|---|---|---|",
    ]
    for style in map(load_style, STYLE_NAMES):
        credit = style.credit
        licence = f"[{credit['licence']}]({_LICENCES[credit['licence']]})"
        lines.append(f"| {style.name} | [{credit['source']}]({credit['url']}) | {credit['artist']} | {licence} |")
    return "\n".join(lines) + "\n"


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


@contextmanager
def _room_on_disk(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "Make room and run it again: it goes on where it stopped"
            raise ResourceError("no room left on the disk", where=str(out), fix=fix) from error
        raise DataError(f"cannot be written ({error.strerror})", where=str(out), fix="Choose another folder") from error

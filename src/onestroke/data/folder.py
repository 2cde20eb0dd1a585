"""The user's own pictures: an image folder as `datasets` and kohya's scripts have it, or WebDataset tar shards."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8
from PIL import Image, ImageOps

from onestroke.data.source import BrokenPicture, Picture
from onestroke.data.tables import rows_of, text_of
from onestroke.errors import DataError

IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CAPTION_TYPES = (".txt", ".caption")
CAPTION_COLUMNS = ("text", "caption", "prompt")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_HOW_TO_CAPTION = (
    'Put a metadata.jsonl with lines like {"file_name": "a.png", "text": "what it shows"} into the folder, '
    "or a text file of the same name beside each picture (a.png, a.txt)"
)


class _Entry(NamedTuple):
    """One captioned picture: a file below the root, or the `length` bytes from `offset` on of a tar below it."""

    file: str
    caption: str
    member: str = ""
    offset: int = 0
    length: int = -1  # -1: the whole file


@dataclass(frozen=True)
class FolderSource:
    """The pictures of a folder that have a caption, in natural order of their names."""

    root: Path
    entries: pa.Table = field(repr=False)  # a column per field of _Entry; Arrow, so that workers share it
    left_out: Mapping[str, int]  # why -> how many pictures

    def __len__(self) -> int:
        return self.entries.num_rows

    def caption(self, index: int, *, slot: int | None = None) -> str:
        return self.entries["caption"][index].as_py()

    def read(self, index: int, *, slot: int | None = None) -> Picture:
        entry = _Entry(**{name: self.entries[name][index].as_py() for name in _Entry._fields})
        name = f"{entry.file}/{entry.member}" if entry.member else entry.file
        try:
            with open(self.root / entry.file, "rb") as file:
                file.seek(entry.offset)
                content = file.read(entry.length)
        except OSError as error:
            raise BrokenPicture(name, error.strerror or "cannot be read") from error
        return Picture(decode(content, name=name), entry.caption)


def open_folder(path: str | Path, *, log: Callable[[str], None] = print) -> FolderSource:
    """The captioned pictures below `path`.

    An image folder has its captions in metadata.jsonl, .csv or .parquet (columns `file_name` and `text`, `caption` or
    `prompt`) or in a .txt or .caption file beside each picture; metadata goes first. A WebDataset folder has tars whose
    samples hold a picture and a .txt, .caption or .json ("text", "caption" or "prompt"). Pictures without a caption or
    with an empty one are left out, counted and told to `log`. Pictures are not opened: what is broken shows on reading.
    """
    root = Path(path)
    if not root.exists():
        raise DataError("no such folder", where=str(path), fix="Give the folder that holds the pictures")
    if not root.is_dir():
        raise DataError("not a folder", where=str(path), fix="Give the folder that holds the pictures or the tars")
    names = sorted(_files_below(root), key=natural_key)
    images = [name for name in names if name.lower().endswith(IMAGE_TYPES)]
    tars = [name for name in names if name.lower().endswith(".tar")]
    if images and tars:
        raise DataError(
            f"both pictures ({images[0]}) and tars ({tars[0]}) in one folder", where=str(path),
            fix="Keep one kind: move the tars or the pictures to a folder of their own",
        )  # fmt: skip
    found = _indexed(root, tars) if tars else _captioned(root, names, images)
    return _source(root, found, log)


def _source(root: Path, found: Iterable[tuple[_Entry, str | None]], log: Callable[[str], None]) -> FolderSource:
    """The source of what was `found`: entries, and the caption of each, None where there is none."""
    entries: list[_Entry] = []
    left_out = {"no caption": 0, "an empty caption": 0}
    for entry, caption in found:
        caption = None if caption is None else " ".join(caption.split())
        if caption:
            entries.append(entry._replace(caption=caption))
        else:
            left_out["no caption" if caption is None else "an empty caption"] += 1
    left_out = {why: count for why, count in left_out.items() if count}
    total = len(entries) + sum(left_out.values())
    if not total:
        raise DataError("no pictures", where=str(root), fix=f"It takes {', '.join(IMAGE_TYPES)} files, or .tar shards")
    if not entries:
        what = " and ".join(f"{count} with {why}" for why, count in left_out.items())
        raise DataError(f"no captioned pictures ({what})", where=str(root), fix=_HOW_TO_CAPTION)
    for why, count in left_out.items():
        log(f"{root}: left out {count} of {total} pictures with {why}")
    types = (pa.large_string(), pa.large_string(), pa.large_string(), pa.int64(), pa.int64())
    columns = zip(_Entry._fields, zip(*entries, strict=True), types, strict=True)
    return FolderSource(root, pa.table({name: pa.array(rows, kind) for name, rows, kind in columns}), left_out)


def _files_below(root: Path) -> Iterator[str]:
    """Names relative to `root` of all files, hidden ones apart; follows links, each folder once."""
    visited: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in visited else sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
        if real not in visited:
            yield from (os.path.relpath(os.path.join(folder, file), root) for file in files if not file.startswith("."))
        visited.add(real)


def natural_key(name: str) -> tuple:
    """Sort key that puts page2 before page10."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


# Image folders


def _captioned(root: Path, names: list[str], images: list[str]) -> Iterator[tuple[_Entry, str | None]]:
    """Every picture of an image folder with its caption; what metadata names is taken to be there."""
    pages = [name for name in names if os.path.basename(name) in METADATA]
    folders = [os.path.dirname(page) for page in pages]
    if len(set(folders)) < len(folders):
        raise DataError(f"several metadata files in one folder: {', '.join(pages)}", where=str(root), fix="Keep one")
    captions: dict[str, str | None] = {}
    for page in pages:
        for file, caption in metadata_rows(root, page):
            captions[os.path.normpath(os.path.join(os.path.dirname(page), file))] = caption
    beside = {os.path.splitext(name)[0]: name for name in reversed(names) if name.lower().endswith(CAPTION_TYPES)}
    for image in sorted({*images, *captions}, key=natural_key):
        caption = captions.get(image)
        page = beside.get(os.path.splitext(image)[0])
        yield _Entry(image, ""), text_of(root / page) if caption is None and page else caption


def metadata_rows(root: Path, page: str) -> Iterator[tuple[str, str | None]]:
    """File name and caption of each row of a metadata file."""
    path = root / page
    rows = rows_of(path, ("file_name", *CAPTION_COLUMNS))
    columns = {name for row in rows for name in row}
    column = next((name for name in CAPTION_COLUMNS if name in columns), None)
    if rows and ("file_name" not in columns or column is None):
        have = ", ".join(sorted(map(str, columns))) or "none"
        need = f"It needs file_name and {' or '.join(CAPTION_COLUMNS)}"
        raise DataError(f"columns {have}", where=str(path), fix=need)
    for number, row in enumerate(rows, start=1):
        file, caption = row.get("file_name"), row.get(column)
        if not isinstance(file, str) or not isinstance(caption, str | None):
            raise DataError(f"row {number}: {column} or file_name is not text", where=str(path), fix="Correct that row")
        yield file, caption


# Tar shards


def _indexed(root: Path, tars: list[str]) -> Iterator[tuple[_Entry, str | None]]:
    """Every picture of the tars with its caption. Reads headers and captions, and where each picture's bytes lie."""
    for name in tars:
        try:
            with tarfile.open(root / name, "r:") as tar:
                yield from _samples(name, tar)
            _check_end(root / name, tar.offset)
        except (tarfile.TarError, EOFError, OSError) as error:
            fix = "Make or copy the shard again, uncompressed"
            raise DataError(f"cannot be read as a tar ({error})", where=str(root / name), fix=fix) from error


def _check_end(path: Path, offset: int) -> None:
    """tarfile takes a damaged or cut header for the end; a whole tar ends in zeros."""
    with open(path, "rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"cut short or damaged at byte {offset}")


def _samples(name: str, tar: tarfile.TarFile) -> Iterator[tuple[_Entry, str | None]]:
    """The samples of one tar: members of one name up to the first dot, in order of first appearance."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in tar:
        folder, base = os.path.split(member.name)
        key, dot, kind = base.partition(".")
        if member.isfile() and key and dot:
            samples.setdefault(os.path.join(folder, key), {})["." + kind.lower()] = member
    for kinds in samples.values():
        member = next((kinds[kind] for kind in IMAGE_TYPES if kind in kinds), None)
        if member is not None:
            entry = _Entry(name, "", member.name, member.offset_data, member.size)
            yield entry, _sample_caption(name, tar, kinds)


def _sample_caption(name: str, tar: tarfile.TarFile, kinds: Mapping[str, tarfile.TarInfo]) -> str | None:
    for kind in (*CAPTION_TYPES, ".json"):
        if kind not in kinds:
            continue
        where = f"{name}/{kinds[kind].name}"
        try:
            content = tar.extractfile(kinds[kind])
            assert content is not None  # None for what is not a file, and only files are members of samples
            text = content.read().decode("utf-8-sig")
            page = json.loads(text) if kind == ".json" else {"text": text}
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(f"not UTF-8 {'JSON' if kind == '.json' else 'text'}", where=where, fix="Mend it") from error
        caption = next((page[c] for c in CAPTION_COLUMNS if c in page), None) if isinstance(page, dict) else None
        if not isinstance(caption, str | None):
            raise DataError("the caption is not text", where=where, fix="Mend it")
        return caption
    return None


# Decoding


def decode(content: bytes, *, name: str) -> UInt8[np.ndarray, "h w 3"]:
    """Any picture as upright 8-bit RGB: the first frame, what is transparent on white.

    Raises BrokenPicture, with `name` as its path, for what PIL cannot decode or takes for a decompression bomb. Colour
    profiles are not applied.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning)  # odd metadata of a picture that is fine
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                return np.array(as_rgb(ImageOps.exif_transpose(image)))
    except Exception as error:  # PIL's decoders raise anything at all on damaged bytes
        if isinstance(error, Image.UnidentifiedImageError):
            raise BrokenPicture(name, "not a picture" if content else "empty file") from error
        raise BrokenPicture(name, " ".join(str(error).split()) or type(error).__name__) from error


def as_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode.startswith("I"):  # 16 bits a pixel, which PIL's own conversion clips at 255
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("more than 16 bits a pixel")
        return Image.fromarray(((levels.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    return image.convert("RGB")

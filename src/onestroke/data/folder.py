"""The user's own pictures: an image folder as `datasets` and kohya's scripts have it, or WebDataset tar shards.

Either lies on this machine or at any address of fsspec's. Tars are indexed first: one pass over headers and captions
finds where each picture's bytes lie, so that any picture can be read by itself; the index is kept (`Address.memory`).
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps

from onestroke.data.address import Address
from onestroke.data.entries import Entry
from onestroke.data.source import BrokenPicture, Picture
from onestroke.data.tables import rows_of, text_in
from onestroke.data.tars import CAPTION_COLUMNS, CAPTION_TYPES, IMAGE_TYPES, indexed
from onestroke.errors import DataError

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
HOW_TO_CAPTION = (
    'Put a metadata.jsonl with lines like {"file_name": "a.png", "text": "what it shows"} into the folder, '
    "or a text file of the same name beside each picture (a.png, a.txt)"
)


@dataclass(frozen=True)
class FolderSource:
    """The pictures of a folder that have a caption, in natural order of their names."""

    address: Address
    entries: pa.Table = field(repr=False)  # a column per field of Entry; Arrow, so that workers share it
    left_out: Mapping[str, int]  # why -> how many pictures

    def __len__(self) -> int:
        return self.entries.num_rows

    def caption(self, index: int, *, slot: int | None = None) -> str:
        return self.entries["caption"][index].as_py()

    def entry(self, index: int) -> Entry:
        return Entry(*(self.entries[name][index].as_py() for name in Entry._fields))

    def content(self, index: int, length: int | None = None) -> bytes:
        """The bytes of picture `index`, or its first `length`; raises BrokenPicture where they cannot be read."""
        entry = self.entry(index)
        wanted = entry.length if length is None else length if entry.length < 0 else min(length, entry.length)
        try:
            return self.address.read(entry.file, entry.offset, wanted)
        except OSError as error:
            raise BrokenPicture(entry.name, error.strerror or str(error) or "cannot be read") from error

    def read(self, index: int, *, slot: int | None = None) -> Picture:
        return Picture(decode(self.content(index), name=self.entry(index).name), self.caption(index))

    def size_of(self, index: int) -> tuple[int, int]:
        return size_in(lambda length: self.content(index, length), name=self.entry(index).name)

    def keys(self) -> pa.Table:
        """Where each picture lies, and a stamp that changes with what is there."""
        return self.entries.select(["file", "offset", "stamp"])

    def memory(self) -> Path:
        """A folder for what is found out about these pictures."""
        return self.address.memory()


def open_folder(
    path: str | Path, *, log: Callable[[str], None] = print, files: Mapping[str, str] | None = None
) -> FolderSource:
    """The captioned pictures below `path`, a folder or an address of one; `files`: what lies there, if it is known.

    An image folder has its captions in metadata.jsonl, .csv or .parquet (columns `file_name` and `text`, `caption` or
    `prompt`) or in a .txt or .caption file beside each picture; metadata goes first. A WebDataset folder has tars whose
    samples hold a picture and a .txt, .caption or .json ("text", "caption" or "prompt"). Pictures without a caption or
    with an empty one are left out, counted and told to `log`. Pictures are not opened: what is broken shows on reading.
    """
    address = Address(str(path))
    files = address.files() if files is None else files
    names = sorted(files, key=natural_key)
    images = [name for name in names if name.lower().endswith(IMAGE_TYPES)]
    tars = [name for name in names if name.lower().endswith(".tar")]
    if images and tars:
        raise DataError(
            f"both pictures ({images[0]}) and tars ({tars[0]}) in one folder", where=str(path),
            fix="Keep one kind: move the tars or the pictures to a folder of their own",
        )  # fmt: skip
    if tars:
        return open_tars(address, {name: files[name] for name in tars}, log=log)
    return _source(address, _captioned(address, files, images), log)


def open_tars(address: Address, tars: Mapping[str, str], *, log: Callable[[str], None] = print) -> FolderSource:
    """The captioned pictures of the tars of these names and stamps."""
    return _source(address, indexed(address, tars), log)


def _source(address: Address, found: Iterable[tuple[Entry, str | None]], log: Callable[[str], None]) -> FolderSource:
    """The source of what was `found`: entries, and the caption of each, None where there is none."""
    entries: list[Entry] = []
    left_out = {"no caption": 0, "an empty caption": 0}
    for entry, caption in found:
        caption = None if caption is None else " ".join(caption.split())
        if caption:
            entries.append(entry._replace(caption=caption))
        else:
            left_out["no caption" if caption is None else "an empty caption"] += 1
    left_out = {why: count for why, count in left_out.items() if count}
    total, where = len(entries) + sum(left_out.values()), str(address)
    if not total:
        raise DataError("no pictures", where=where, fix=f"It takes {', '.join(IMAGE_TYPES)} files, or .tar shards")
    if not entries:
        what = " and ".join(f"{count} with {why}" for why, count in left_out.items())
        raise DataError(f"no captioned pictures ({what})", where=where, fix=HOW_TO_CAPTION)
    for why, count in left_out.items():
        log(f"{where}: left out {count} of {total} pictures with {why}")
    return FolderSource(address, Entry.table(entries), left_out)


def natural_key(name: str) -> tuple:
    """Sort key that puts page2 before page10."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


# Image folders


def _captioned(address: Address, files: Mapping[str, str], images: list[str]) -> Iterator[tuple[Entry, str | None]]:
    """Every picture of an image folder with its caption; what metadata names is taken to be there."""
    pages = sorted(name for name in files if os.path.basename(name) in METADATA)
    folders = [os.path.dirname(page) for page in pages]
    if len(set(folders)) < len(folders):
        what = f"several metadata files in one folder: {', '.join(pages)}"
        raise DataError(what, where=str(address), fix="Keep one")
    captions: dict[str, str | None] = {}
    for page in pages:
        with address.local_copy(page) as copy:
            for file, caption in metadata_rows(copy.parent, copy.name):
                captions[os.path.normpath(os.path.join(os.path.dirname(page), file))] = caption
    captioned = sorted((name for name in files if name.lower().endswith(CAPTION_TYPES)), key=natural_key, reverse=True)
    beside = {os.path.splitext(name)[0]: name for name in captioned}
    shown = sorted({*images, *captions}, key=natural_key)
    stems = {image: os.path.splitext(image)[0] for image in shown if captions.get(image) is None}
    wanted = [beside[stem] for stem in dict.fromkeys(stems.values()) if stem in beside]
    texts = {page: text_in(text, where=f"{address}/{page}") for page, text in _contents(address, wanted)}
    for image in shown:
        page = beside.get(stems[image]) if image in stems else None
        yield Entry(image, "", stamp=files.get(image, "")), texts[page] if page else captions.get(image)


def _contents(address: Address, names: list[str]) -> Iterator[tuple[str, bytes]]:
    try:
        yield from zip(names, address.read_many(names), strict=True)
    except OSError as error:
        what = f"a caption cannot be read ({error.strerror or error})"
        raise DataError(what, where=str(address), fix="Check the files' rights") from error


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


_HEAD = 1 << 16  # bytes that nearly always hold a picture's width and height


def size_in(content: Callable[[int | None], bytes], *, name: str) -> tuple[int, int]:
    """Height and width of a picture as `decode` gives it; `content(length)`: its first bytes, or all for None.

    Raises BrokenPicture for what is no picture.
    """
    for length in (_HEAD, None):
        page = content(length)
        try:
            with Image.open(io.BytesIO(page)) as image:
                width, height = image.size
                # asked of a PNG without it in front, Pillow would decode the picture to look behind it
                turned = image.format != "PNG" or "exif" in image.info
                orientation = image.getexif().get(ExifTags.Base.Orientation) if turned else None
                return (width, height) if orientation in _SIDEWAYS else (height, width)
        except Exception as error:
            if length is None or len(page) < length:
                reason = "not a picture" if page else "empty file"
                raise BrokenPicture(name, reason) from error
    raise AssertionError("the loop returns or raises")


_SIDEWAYS = (5, 6, 7, 8)  # Exif orientations that turn a picture by a quarter


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

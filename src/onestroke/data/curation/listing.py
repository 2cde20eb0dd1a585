"""What a curation starts from: every picture of its sources, where its bytes lie, and its caption as found."""

from __future__ import annotations

import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as parquet

from onestroke.data.curation.files import atomic
from onestroke.data.curation.places import (
    exists,
    folders,
    is_address,
    is_folder,
    joined,
    length_of,
    open_place,
    read_place,
)  # fmt: skip
from onestroke.data.curation.sets import SET, TAG_COLUMNS, captions_of, is_set, picture_of
from onestroke.data.folder import CAPTION_COLUMNS, CAPTION_TYPES, IMAGE_TYPES, METADATA, metadata_rows, natural_key
from onestroke.errors import DataError

PICTURE_TYPES = (*IMAGE_TYPES, ".jfif", ".jpe", ".avif")
_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "img", "content")


class Unreadable(Exception):
    """A picture whose bytes cannot be had; the message is the reason."""


class Entry(NamedTuple):
    """One picture: a file, bytes of a tar, or a row of a Parquet file."""

    source: str  # as the user gave it
    file: str  # below the source; "" where the source is the file
    kind: str  # file | tar | row | set
    member: str = ""  # of a tar
    offset: int = 0  # bytes; of a row its row group
    length: int = -1  # bytes; of a row its place in the row group, or in the set
    caption: str | None = None

    @property
    def place(self) -> str:
        return joined(self.source, self.file)

    @property
    def name(self) -> str:
        """What a person looks for."""
        inside = self.member or (f"row {self.offset}.{self.length}" if self.kind in ("row", "set") else "")
        return "/".join(part for part in (self.file or self.source.rstrip("/").rpartition("/")[2], inside) if part)


_SCHEMA = pa.schema(
    [("source", pa.string()), ("file", pa.string()), ("kind", pa.string()), ("member", pa.string()),
     ("offset", pa.int64()), ("length", pa.int64()), ("caption", pa.large_string())]
)  # fmt: skip


def write_listing(
    sources: Sequence[str], path: Path, *, shard_size: int, log: Callable[[str], None] = print
) -> tuple[int, int]:
    """List the pictures of all sources, in natural order, a row group a shard; returns how many pictures and shards.

    Raises DataError for a source that is not there or of no kind we read, and where there is no picture at all. A tar
    that is cut short is taken as far as it goes, and told to `log`.
    """
    count = 0
    with atomic(path) as temporary, parquet.ParquetWriter(temporary, _SCHEMA, compression="zstd") as writer:
        entries = (entry for source in sources for entry in list_source(source, log))
        while rows := list(islice(entries, shard_size)):
            columns = zip(zip(*rows, strict=True), _SCHEMA, strict=True)
            arrays = [pa.array(column, field.type) for column, field in columns]
            writer.write_table(pa.Table.from_arrays(arrays, schema=_SCHEMA), row_group_size=shard_size)
            count += len(rows)
    if not count:
        fix = f"It takes {', '.join(PICTURE_TYPES)} files, .tar shards and Parquet files with pictures"
        raise DataError("no pictures", where=", ".join(sources), fix=fix)
    return count, -(-count // shard_size)


def list_source(source: str, log: Callable[[str], None]) -> Iterator[Entry]:
    """The pictures of one source: a folder with pictures, tars and Parquet files below it, one such file, or a set."""
    kind = os.path.splitext(source)[1].lower()
    if is_set(source):
        for row, caption in enumerate(captions_of(source)):
            yield Entry(source, "", "set", "", 0, row, _named_caption({"text": caption}))
    elif is_folder(source):
        yield from _folder(source, log)
    elif not exists(source):
        fix = f"Give a folder, a .tar or a .parquet file, their address, or {SET}NAME of a set of the datasets library"
        raise DataError("there is no such source", where=source, fix=fix)
    elif kind == ".tar":
        yield from _tar(source, "", log)
    elif kind == ".parquet":
        yield from _rows(source, "")
    else:
        raise DataError("neither a folder, a tar nor a Parquet file", where=source, fix="Give the folder it lies in")


def _folder(source: str, log: Callable[[str], None]) -> Iterator[Entry]:
    captions: dict[str, str | None] = {}  # of metadata, until the picture comes
    for folder, names in folders(source):
        pages = [name for name in names if name in METADATA and _is_page(joined(source, os.path.join(folder, name)))]
        for page in pages:
            for file, caption in _metadata(source, os.path.join(folder, page)):
                captions[os.path.normpath(os.path.join(folder, file))] = caption
        beside = {name for name in names if name.lower().endswith((*CAPTION_TYPES, ".json"))}
        for name in names:
            file, kind = os.path.join(folder, name), os.path.splitext(name)[1].lower()
            if kind in PICTURE_TYPES:
                caption = captions.pop(file, None)
                yield Entry(source, file, "file", caption=_beside(source, file, beside) if caption is None else caption)
            elif kind == ".tar":
                yield from _tar(source, file, log)
            elif kind == ".parquet" and name not in pages:
                yield from _rows(source, file)
    for file in sorted(captions, key=natural_key):  # named in metadata, of another type or not there
        yield Entry(source, file, "file", caption=captions[file])


def _metadata(source: str, page: str) -> Iterator[tuple[str, str | None]]:
    if not is_address(source):
        yield from metadata_rows(Path(source), page)
        return
    with tempfile.TemporaryDirectory() as folder:
        name = os.path.basename(page)
        Path(folder, name).write_bytes(read_place(joined(source, page)))
        yield from metadata_rows(Path(folder), name)


def _is_page(place: str) -> bool:
    """A metadata.parquet may hold pictures in place of file names."""
    return not place.endswith(".parquet") or "file_name" in _schema(place).names


def _beside(source: str, file: str, pages: set[str]) -> str | None:
    stem = os.path.splitext(os.path.basename(file))[0]
    for kind in (*CAPTION_TYPES, ".json"):
        if stem + kind in pages:
            try:
                content = read_place(joined(source, os.path.join(os.path.dirname(file), stem + kind)))
            except OSError:
                continue
            caption = _caption_in(content, kind)
            if caption is not None:
                return caption
    return None


def _caption_in(content: bytes, kind: str) -> str | None:
    """The caption of a .txt, .caption or .json page; None where there is none to be read."""
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        return _named_caption(json.loads(text)) if kind == ".json" else text
    except (UnicodeDecodeError, json.JSONDecodeError):
        return None


def _named_caption(page: object) -> str | None:
    found = [page[name] for name in (*CAPTION_COLUMNS, *TAG_COLUMNS) if name in page] if isinstance(page, dict) else []
    for value in found:
        if isinstance(value, list) and all(isinstance(tag, str) for tag in value):
            return ", ".join(value)
        if isinstance(value, str):
            return value
    return None


def _tar(source: str, file: str, log: Callable[[str], None]) -> Iterator[Entry]:
    """Samples of a tar: members of one name up to the first dot, in order of first appearance."""
    place = joined(source, file)
    samples: dict[str, dict[str, tuple[str, int, int]]] = {}
    pages: dict[str, str] = {}
    try:
        with open_place(place) as opened, tarfile.open(fileobj=opened, mode="r:") as tar:
            for member in tar:
                folder, base = os.path.split(member.name)
                key, dot, kind = base.partition(".")
                if not (member.isfile() and key and dot):
                    continue
                key, kind = os.path.join(folder, key), "." + kind.lower()
                samples.setdefault(key, {})[kind] = (member.name, member.offset_data, member.size)
                if kind in (*CAPTION_TYPES, ".json"):
                    content = tar.extractfile(member)
                    caption = _caption_in(content.read(), kind) if content else None
                    if caption is not None and (kind != ".json" or key not in pages):
                        pages[key] = caption
            end = tar.offset
        if length_of(place) < end + tarfile.BLOCKSIZE:
            log(f"{place}: cut short; its {len(samples)} samples are taken")
    except (tarfile.TarError, EOFError, OSError) as error:
        log(f"{place}: damaged ({error}); the {len(samples)} samples before that are taken")
    for key, kinds in samples.items():
        found = next((kinds[kind] for kind in PICTURE_TYPES if kind in kinds), None)
        if found is not None:
            yield Entry(source, file, "tar", *found, pages.get(key))


# Parquet


def _schema(place: str) -> pa.Schema:
    try:
        with open_place(place) as file:
            return parquet.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError("cannot be read as Parquet", where=place, fix="Write the file again") from error


def _image_column(schema: pa.Schema) -> str | None:
    """The column of picture bytes: binary, or a struct with `bytes` as the datasets library writes it."""
    for name in _IMAGE_COLUMNS:
        if name in schema.names:
            kind = schema.field(name).type
            is_struct = pa.types.is_struct(kind) and any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
            if is_struct or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
                return name
    return None


def _rows(source: str, file: str) -> Iterator[Entry]:
    """Rows of a Parquet file with pictures; a file without is no source and yields nothing below a folder."""
    place = joined(source, file)
    schema = _schema(place)
    if _image_column(schema) is None:
        if file:
            return
        fix = f"It needs one of {', '.join(_IMAGE_COLUMNS)}"
        raise DataError(f"no column of picture bytes among {', '.join(schema.names)}", where=source, fix=fix)
    captions = next((name for name in (*CAPTION_COLUMNS, *TAG_COLUMNS) if name in schema.names), None)
    with open_place(place) as opened:
        page = parquet.ParquetFile(opened)
        for group in range(page.num_row_groups):
            if captions:
                values = page.read_row_group(group, columns=[captions])[captions].to_pylist()
            else:
                values = [None] * page.metadata.row_group(group).num_rows
            for row, value in enumerate(values):
                yield Entry(source, file, "row", "", group, row, _named_caption({"text": value}))


# Reading


def read_entries(listing: Path, shard: int) -> list[Entry]:
    """The entries of one shard of the listing."""
    table = parquet.ParquetFile(listing).read_row_group(shard)
    return [Entry(*row) for row in zip(*(table[name].to_pylist() for name in _SCHEMA.names), strict=True)]


def read_bytes(entry: Entry) -> bytes:
    """The picture's file; raises Unreadable, or DataError where the whole source, tar or Parquet file is gone."""
    try:
        if entry.kind == "row":
            return _cell(entry.place, entry.offset, entry.length)
        if entry.kind == "set":
            return _content(picture_of(entry.source, entry.length))
        return read_place(entry.place, entry.offset, entry.length)
    except (OSError, pa.ArrowException) as error:
        gone = entry.source if entry.kind == "file" else entry.place
        if entry.kind != "set" and not (is_folder(gone) or exists(gone)):
            fix = "Bring it back and run again: it goes on where it stopped"
            raise DataError("the source has vanished while it was read", where=gone, fix=fix) from error
        raise Unreadable(getattr(error, "strerror", None) or "cannot be read") from error


def _cell(place: str, group: int, row: int) -> bytes:
    return _content(_group(place, group)[row].as_py())


def _content(value: object) -> bytes:
    """Bytes, or a struct as the datasets library has it: bytes, or the path of a file."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or (read_place(value["path"]) if value.get("path") else None)
    if value is None:
        raise Unreadable("no picture in this row")
    return value


@lru_cache(maxsize=1)
def _group(place: str, group: int) -> pa.ChunkedArray:
    with open_place(place) as file:
        page = parquet.ParquetFile(file)
        return page.read_row_group(group, columns=[_image_column(page.schema_arrow)]).column(0)

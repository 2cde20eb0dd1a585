"""WebDataset tars: an index of their pictures and captions, made once for each tar."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from onestroke.data.address import Address
from onestroke.data.entries import Entry
from onestroke.errors import DataError

IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CAPTION_TYPES = (".txt", ".caption")
CAPTION_COLUMNS = ("text", "caption", "prompt")
_VERSION = b"1"  # of the index
_STAMP = b"onestroke"


def indexed(address: Address, tars: Mapping[str, str]) -> Iterator[tuple[Entry, str | None]]:
    """Every picture of the tars (name -> stamp) with its caption, None where it has none. Raises DataError."""
    memory = address.memory() / "tars"
    for name, stamp in tars.items():
        path = memory / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.parquet"
        table = _remembered(path, stamp)
        if table is None:
            table = Entry.table([entry._replace(caption=caption) for entry, caption in _read(address, name, stamp)])
            _remember(path, table, stamp)
        for row in zip(*(table[field].to_pylist() for field in Entry._fields), strict=True):
            entry = Entry(*row)
            yield entry, entry.caption


def _remembered(path: Path, stamp: str) -> pa.Table | None:
    """The index of a tar that has not changed since."""
    try:
        schema = parquet.read_schema(path)
        return parquet.read_table(path) if (schema.metadata or {}).get(_STAMP) == _VERSION + stamp.encode() else None
    except (OSError, pa.ArrowException):  # not there yet, or half of it: a copy that was cut short
        return None


def _remember(path: Path, table: pa.Table, stamp: str) -> None:
    """Keep an index; where nothing can be written, the next run makes it again."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table.replace_schema_metadata({_STAMP: _VERSION + stamp.encode()}), temporary)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)


def _read(address: Address, name: str, stamp: str) -> list[tuple[Entry, str | None]]:
    """The pictures of one tar, by a pass over its headers and captions."""
    try:
        with address.open(name) as file:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                found = list(_samples(name, stamp, tar))
                end = tar.offset
            # tarfile takes a damaged or cut header for the end; a whole tar ends in zeros
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"cut short or damaged at byte {end}")
            return found
    except (tarfile.TarError, EOFError, OSError) as error:
        fix = "Make or copy the shard again, uncompressed"
        raise DataError(f"cannot be read as a tar ({error})", where=f"{address}/{name}", fix=fix) from error


def _samples(name: str, stamp: str, tar: tarfile.TarFile) -> Iterator[tuple[Entry, str | None]]:
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
            entry = Entry(name, "", member.name, member.offset_data, member.size, stamp)
            yield entry, _caption(name, tar, kinds)


def _caption(name: str, tar: tarfile.TarFile, kinds: Mapping[str, tarfile.TarInfo]) -> str | None:
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

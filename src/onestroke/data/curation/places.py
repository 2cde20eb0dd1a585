"""Where sources lie: files of this machine, or any address that fsspec opens, such as s3://BUCKET/FOLDER."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from onestroke.data.curation.sets import is_set
from onestroke.data.folder import natural_key
from onestroke.errors import DataError


def is_address(source: str) -> bool:
    return "://" in source


def normal(source: str | Path) -> str:
    """The source as it is kept: an address or a set as it is, anything else as an absolute path."""
    return str(source) if is_address(str(source)) or is_set(str(source)) else str(Path(source).resolve())


@lru_cache(maxsize=64)
def _opened(source: str):
    """The file system of an address and the path on it. DataError where none is known or its package is missing."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(source)
    except (ImportError, ValueError) as error:
        fix = "Install the package that fsspec names, or give an address that `fsspec.available_protocols()` lists"
        raise DataError(f"cannot be opened ({error})", where=source, fix=fix) from error


def joined(source: str, file: str) -> str:
    """A file below a source, or the source itself for ""."""
    return source if not file else f"{source.rstrip('/')}/{file}" if is_address(source) else os.path.join(source, file)


def open_place(place: str) -> BinaryIO:
    """Open for reading in bytes, anywhere in the file. Raises OSError."""
    if not is_address(place):
        return open(place, "rb")
    system, path = _opened_file(place)
    return system.open(path, "rb")


def read_place(place: str, offset: int = 0, length: int = -1) -> bytes:
    """`length` bytes from `offset` on; -1: to the end. Raises OSError."""
    if not is_address(place):
        with open(place, "rb") as file:
            file.seek(offset)
            return file.read(length)
    system, path = _opened_file(place)
    return system.cat_file(path, start=offset, end=None if length < 0 else offset + length)


def _opened_file(place: str):
    """As `_opened`, by the folder, so that as many files as there are take one entry of the memory."""
    folder, slash, name = place.rpartition("/")
    if folder.endswith(":/"):
        return _opened(place)
    system, path = _opened(folder)
    return system, f"{path}{slash}{name}"


def exists(place: str) -> bool:
    if not is_address(place):
        return os.path.exists(place)
    system, path = _opened_file(place)
    return system.exists(path)


def is_folder(place: str) -> bool:
    if not is_address(place):
        return os.path.isdir(place)
    system, path = _opened(place)
    return system.isdir(path)


def length_of(place: str) -> int:
    """Bytes."""
    if not is_address(place):
        return os.stat(place).st_size
    system, path = _opened_file(place)
    return system.size(path)


def folders(source: str) -> Iterator[tuple[str, list[str]]]:
    """Each folder below `source`, relative to it, with its files, both in natural order.

    Each once, links followed; hidden ones and what macOS leaves in archives apart.
    """
    visited: set[str] = set()
    for folder, below, files in _walk(source):
        real = folder if is_address(source) else os.path.realpath(os.path.join(source, folder))
        seen = real in visited
        visited.add(real)
        below[:] = [] if seen else sorted((f for f in below if not f.startswith((".", "__MACOSX"))), key=natural_key)
        if not seen:
            yield folder, sorted((name for name in files if not name.startswith(".")), key=natural_key)


def _walk(source: str) -> Iterator[tuple[str, list[str], list[str]]]:
    if is_address(source):
        system, root = _opened(source)
        for folder, below, files in system.walk(root):
            yield folder.strip("/").removeprefix(root.strip("/")).strip("/"), below, files
    else:
        for folder, below, files in os.walk(source, followlinks=True):
            relative = os.path.relpath(folder, source)
            yield "" if relative == "." else relative, below, files

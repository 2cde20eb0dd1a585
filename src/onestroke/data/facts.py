"""What is found out about a set's pictures once and kept beside them: their sizes, and a digest of their bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from jaxtyping import Int

from onestroke.data.buckets import Buckets, Size
from onestroke.data.source import BrokenPicture, Source, StoredSource

UNKNOWN, BROKEN = 0, 1  # in place of a digest: of bytes not read yet, and of what no decoder took
_KEYS = ("file", "offset", "stamp")
_THREADS = 16  # readers: a remote file takes its time
_CHUNK = 4096  # pictures

Find = Callable[[int], Sequence[int]]  # picture index -> what is found out about it


def measured_sizes(source: Source) -> Int[np.ndarray, "n 2"]:
    """Height and width of each picture in pixels, from its first bytes; zeros where they cannot be read."""

    def size(index: int) -> tuple[int, int]:
        try:
            return source.size_of(index)
        except BrokenPicture:
            return 0, 0

    if not isinstance(source, StoredSource):
        return _found(size, range(len(source)), 2)
    return _facts(source, "sizes", ("height", "width"), size)


def content_digests(source: StoredSource, *, read: bool = True) -> Int[np.ndarray, " n"]:
    """A digest of each picture's bytes, or UNKNOWN or BROKEN; `read`: of all, not just of those known from before."""

    def digest(index: int) -> tuple[int]:
        try:
            return (digest_of(source.content(index)),)
        except BrokenPicture:
            return (BROKEN,)

    return _facts(source, "contents", ("digest",), digest if read else None)[:, 0]


def mark_broken(source: StoredSource, indices: Sequence[int]) -> None:
    """Remember that no decoder takes these pictures; until their files change."""
    digests = content_digests(source)
    digests[list(indices)] = BROKEN
    _remember(source.memory() / "contents.parquet", source.keys(), ("digest",), digests[:, None])


def identity_of(source: StoredSource, size: Size | Buckets) -> dict[str, int]:
    """What decides which picture a slot shows, by name: equal for two sets that a run cannot tell apart by their order.

    Pictures may have been edited or their captions corrected; none is read.
    """
    keys = source.keys()
    names = "\n".join(f"{file} {offset}" for file, offset, _ in _rows(keys))
    found = {"number of pictures": keys.num_rows, "file names": digest_of(names.encode())}
    if isinstance(size, Buckets):
        found["sizes"] = digest_of(repr(size.sizes).encode(), *(members.tobytes() for members in size.members))
    return found


def digest_of(*parts: bytes) -> int:
    """Eight bytes as a signed number, neither UNKNOWN nor BROKEN."""
    page = hashlib.blake2b(digest_size=8)
    for part in parts:
        page.update(part)
    number = int.from_bytes(page.digest(), "little", signed=True)
    return number if number not in (UNKNOWN, BROKEN) else 2


def _facts(source: StoredSource, name: str, columns: tuple[str, ...], find: Find | None) -> Int[np.ndarray, "n k"]:
    """The facts of that name; what is new or has changed is found out by `find`, or left 0 where there is none."""
    path = source.memory() / f"{name}.parquet"
    keys = source.keys().select(_KEYS).combine_chunks()
    known = _remembered(path, columns)
    if known is not None and known.select(_KEYS).combine_chunks().equals(keys):
        return _columns(known, columns)
    facts = np.zeros((len(source), len(columns)), np.int64)
    missing = np.ones(len(source), bool)
    if known is not None:
        before = dict(zip(_rows(known), _columns(known, columns), strict=True))
        for index, row in enumerate(_rows(keys)):
            if row in before:
                facts[index], missing[index] = before[row], False
    if find is None:
        return facts
    new = np.flatnonzero(missing)
    facts[new] = _found(find, new.tolist(), len(columns))
    _remember(path, keys, columns, facts)
    return facts


def _found(find: Find, indices: Sequence[int], width: int) -> Int[np.ndarray, "n k"]:
    facts = np.zeros((len(indices), width), np.int64)
    with ThreadPoolExecutor(_THREADS) as pool:
        for first in range(0, len(indices), _CHUNK):  # a pool remembers all that it was asked for
            some = indices[first : first + _CHUNK]
            facts[first : first + len(some)] = list(pool.map(find, some))
    return facts


def _rows(table: pa.Table) -> Iterator[tuple]:
    return zip(*(table[name].to_pylist() for name in _KEYS), strict=True)


def _columns(table: pa.Table, columns: tuple[str, ...]) -> Int[np.ndarray, "n k"]:
    return np.stack([table[name].to_numpy() for name in columns], axis=1)


def _remembered(path: Path, columns: tuple[str, ...]) -> pa.Table | None:
    try:
        return parquet.read_table(path, columns=[*_KEYS, *columns])
    except (OSError, pa.ArrowException, ValueError):  # not there yet, or of another version
        return None


def _remember(path: Path, keys: pa.Table, columns: tuple[str, ...], facts: Int[np.ndarray, "n k"]) -> None:
    table = keys.select(_KEYS)
    for place, name in enumerate(columns):
        table = table.append_column(name, pa.array(facts[:, place]))
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, temporary)
        os.replace(temporary, path)
    except OSError:  # a disk that cannot be written to: found out again next time
        temporary.unlink(missing_ok=True)

"""Where files lie: a folder of this machine, or one on any filesystem that fsspec knows, as in "s3://bucket/set"."""

from __future__ import annotations

import hashlib
import os
import posixpath
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import fsspec

from onestroke.errors import DataError

_AT_ONCE = 256  # small remote files asked for together
_STAMPS = ("size", "ETag", "etag", "md5", "mtime", "LastModified", "last_modified", "updated", "created")


@dataclass(frozen=True)
class Address:
    """A folder. Names of files are relative to it, with "/" between their parts. Workers may hold copies."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def is_local(self) -> bool:
        return not is_remote(self.url)

    def files(self) -> dict[str, str]:
        """All files below, hidden ones apart, and a stamp of each that changes with its content (size and time).

        Follows links, each folder once. Raises DataError where there is no such folder.
        """
        return dict(self._local_files()) if self.is_local else self._remote_files()

    def read(self, name: str, offset: int = 0, length: int = -1) -> bytes:
        """A file, or `length` bytes of it from `offset` on (-1: to its end). Raises OSError."""
        if self.is_local:
            with open(os.path.join(self.url, name), "rb") as file:
                file.seek(offset)
                return file.read(length)
        filesystem, root = _filesystem(self.url, os.getpid())
        with _as_os_error():
            end = None if length < 0 else offset + length
            return filesystem.cat_file(posixpath.join(root, name), start=offset or None, end=end)

    def read_many(self, names: Sequence[str]) -> Iterator[bytes]:
        """Small files, in the order of `names`. Raises OSError."""
        if self.is_local:
            yield from (self.read(name) for name in names)
            return
        filesystem, root = _filesystem(self.url, os.getpid())
        for first in range(0, len(names), _AT_ONCE):
            paths = [posixpath.join(root, name) for name in names[first : first + _AT_ONCE]]
            with _as_os_error():
                found = filesystem.cat(paths)
                contents = list(found.values()) if isinstance(found, dict) else [found]
            yield from contents

    def open(self, name: str) -> BinaryIO:
        """A file that can be sought in. Raises OSError."""
        if self.is_local:
            return open(os.path.join(self.url, name), "rb")
        filesystem, root = _filesystem(self.url, os.getpid())
        with _as_os_error():
            return filesystem.open(posixpath.join(root, name), "rb")

    @contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """A file as a path of this machine; DataErrors about it name where it really lies."""
        if self.is_local:
            yield Path(self.url, name)
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, posixpath.basename(name))
            path.write_bytes(self.read(name))
            try:
                yield path
            except DataError as error:
                raise DataError(error.what, where=f"{self}/{name}", fix=error.fix) from error

    def memory(self) -> Path:
        """A folder for what is found out about these files: `.onestroke` beside them, or in the user's cache."""
        if self.is_local and os.access(self.url, os.W_OK):
            return Path(self.url, ".onestroke")
        return cache_folder(os.path.realpath(self.url) if self.is_local else self.url)

    def _local_files(self) -> Iterator[tuple[str, str]]:
        if not os.path.exists(self.url):
            raise DataError("no such folder", where=self.url, fix="Give the folder that holds the pictures")
        if not os.path.isdir(self.url):
            fix = "Give the folder that holds the pictures or the tars"
            raise DataError("not a folder", where=self.url, fix=fix)
        visited: set[str] = set()
        for folder, folders, files in os.walk(self.url, followlinks=True):
            real = os.path.realpath(folder)
            folders[:] = [] if real in visited else sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
            for file in files if real not in visited else ():
                if not file.startswith("."):
                    path = os.path.join(folder, file)
                    yield os.path.relpath(path, self.url), _local_stamp(path)
            visited.add(real)

    def _remote_files(self) -> dict[str, str]:
        filesystem, root = _filesystem(self.url, os.getpid())
        try:
            with _as_os_error():
                found = filesystem.find(root, detail=True) if filesystem.isdir(root) else None
        except OSError as error:
            raise DataError(f"cannot be listed ({error})", where=self.url, fix="Check address and rights") from error
        if found is None:
            raise DataError("no such folder", where=self.url, fix="Give the folder that holds the pictures")
        names = {posixpath.relpath(path, root): info for path, info in found.items()}
        shown = {name: info for name, info in names.items() if not name.startswith(".") and "/." not in name}
        return {name: " ".join(str(info[key]) for key in _STAMPS if key in info) for name, info in shown.items()}


def cache_folder(name: str) -> Path:
    """The folder in the user's cache for what is found out about `name`."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "onestroke" / hashlib.sha256(name.encode()).hexdigest()[:16]


def is_remote(url: str) -> bool:
    return "://" in url or "::" in url


def _local_stamp(path: str) -> str:
    try:
        stat = os.stat(path)
    except OSError:  # a link to nothing
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns}"


@lru_cache(maxsize=16)
def _filesystem(url: str, process: int) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of this process (a fork must not share its parent's connections) and the root on it."""
    try:
        filesystem, root = fsspec.url_to_fs(url)
    except (ValueError, ImportError) as error:
        line = " ".join(str(error).split())
        fix = "Install the filesystem's package, e.g. s3fs, gcsfs, adlfs or aiohttp"
        raise DataError(f"no filesystem for this address ({line})", where=url, fix=fix) from error
    return filesystem, root.rstrip("/") or "/"


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Filesystems raise errors of their own clients, which are no OSErrors."""
    try:
        yield
    except (OSError, DataError):
        raise
    except Exception as error:
        raise OSError(" ".join(str(error).split()) or type(error).__name__) from error

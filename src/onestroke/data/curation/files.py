"""Files that appear whole or not at all, and one owner a folder."""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onestroke.errors import ResourceError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A file to write, beside `path` and hidden; it takes that name once it has reached the disk.

    Whatever goes wrong, `path` stays as it was. Raises ResourceError where the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "Make room and run it again: it goes on where it stopped"
            raise ResourceError("no room left on the disk", where=str(path), fix=fix) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """What a killed run left half-written."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)

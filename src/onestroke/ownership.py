"""One run in a folder at a time."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onestroke.errors import CheckpointError


@contextmanager
def sole_owner(folder: Path) -> Iterator[None]:
    """Make `folder`, and refuse a second run in it at the same time by CheckpointError."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                "another run is writing to this folder", where=str(folder), fix="Wait for it, or give another --out."
            ) from error
        yield

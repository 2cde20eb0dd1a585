"""One run in a folder at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from onestroke.errors import CheckpointError

_held: set[TextIO] = set()


def _let_go() -> None:
    for file in _held:
        file.close()
    _held.clear()


# A data loader's workers are forked with the lock in hand, and outlive a killed run by some seconds.
os.register_at_fork(after_in_child=_let_go)


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
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)

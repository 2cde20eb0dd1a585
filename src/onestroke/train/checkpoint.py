"""Checkpoints of a run: one file each, written whole or not at all, loaded without unpickling code."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from onestroke.errors import CheckpointError, ResourceError


def save_checkpoint(state: dict, folder: Path, *, keep: int = 2) -> Path:
    """Write `state` as `folder/images-<n>.pt`, then delete all but the newest `keep`.

    The file appears by a rename after it has reached the disk: whatever happens, the older ones stay whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"images-{state['images']:012d}.pt"
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns some failed writes into RuntimeError
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ResourceError(
            f"the checkpoint could not be written ({reason})",
            where=str(path),
            fix="Free disk space; the last checkpoint is whole, and the run continues from it.",
        ) from error
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("images-*.pt"))


def load_newest(folder: Path) -> dict | None:
    """The newest checkpoint's state, or None where there is none; files that a crash left half-written are removed."""
    for leftover in folder.glob("*.tmp"):
        leftover.unlink()
    paths = list_checkpoints(folder)
    if not paths:
        return None
    try:
        return torch.load(paths[-1], weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises several kinds for a damaged file
        raise CheckpointError(
            f"the checkpoint cannot be read ({type(error).__name__})",
            where=str(paths[-1]),
            fix="Delete this file: the run continues from the one before.",
        ) from error

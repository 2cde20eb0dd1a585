"""Checkpoints of a run: written whole or not at all, loaded without unpickling code, on any number of processes.

One file where a process holds all weights (one process, or data parallel, where the first one writes). Where they are
sharded, a folder: each process writes its part as safetensors, through PyTorch's distributed checkpoint.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from onestroke.errors import CheckpointError, ResourceError
from onestroke.train.ranks import from_first, is_lost_contact, rank
from onestroke.train.sharded_checkpoint import Layout, is_sharded, laid_out, read_shards, write_shards


def save_checkpoint(state: Mapping, folder: Path, *, keep: int = 2, group: dist.ProcessGroup | None = None) -> Path:
    """Write `state` as `folder/images-<n>.pt`, or as a folder `images-<n>`, then delete all but the newest `keep`.

    It appears by a rename after it has reached the disk: whatever happens, the older ones stay whole. Every process has
    to call this for a sharded state, else the first alone; it returns there when all is done, and may elsewhere before.
    `group`: what the processes speak through, where another thread uses the default one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"images-{state['images']:012d}"
    in_parts = is_sharded(state)
    path = path if in_parts else path.with_suffix(".pt")
    if in_parts and path.exists():  # of this very step
        return path
    temporary = path.with_suffix(".tmp")
    try:
        if in_parts:
            write_shards(state, temporary, group=group)
        elif rank() == 0:
            with temporary.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        if rank() == 0:
            os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns some failed writes into RuntimeError
        if is_lost_contact(error):
            raise
        if rank() == 0:
            _remove(temporary)
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ResourceError(
            f"the checkpoint could not be written ({reason})",
            where=str(path),
            fix="Free disk space; the last checkpoint is whole, and the run continues from it.",
        ) from error
    if rank() == 0:
        for old in list_checkpoints(folder)[:-keep]:
            _remove_checkpoint(old)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((path for path in folder.glob("images-*") if path.suffix in ("", ".pt")), key=lambda path: path.stem)


def load_oldest(folder: Path, layout: Layout | None = None) -> dict | None:
    """As `load_newest`, after deleting all checkpoints but the oldest."""
    if rank() == 0:
        for path in list_checkpoints(folder)[1:]:
            _remove_checkpoint(path)
    return load_newest(folder, layout)


def load_newest(folder: Path, layout: Layout | None = None) -> dict | None:
    """The newest checkpoint's state, or None where there is none; what a crash left half-written is removed.

    `layout` says what is sharded here, whatever it was when it was written. Every process has to call this.
    """
    if rank() == 0:
        for leftover in folder.glob("*.tmp"):
            _remove(leftover)
    paths = from_first(list_checkpoints(folder) if rank() == 0 else [])
    if not paths:
        return None
    try:
        if paths[-1].is_dir():
            return read_shards(paths[-1], layout or {})
        state = torch.load(paths[-1], weights_only=True, map_location="cpu", mmap=bool(layout))
        return laid_out(state, layout) if layout else state
    except Exception as error:  # torch and safetensors raise several kinds for a damaged file
        raise CheckpointError(
            f"the checkpoint cannot be read ({type(error).__name__})",
            where=str(paths[-1]),
            fix=f"Delete this {'folder' if paths[-1].is_dir() else 'file'}: the run continues from the one before.",
        ) from error


def _remove_checkpoint(path: Path) -> None:
    leaving = path.with_suffix(".tmp")  # first, so that none is ever half there
    os.replace(path, leaving)
    _remove(leaving)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

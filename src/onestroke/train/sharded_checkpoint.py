"""A run's state as a folder that all processes write together, and that any number of them reads again.

The tensors are safetensors files, a part of each sharded tensor in every process's file, through PyTorch's distributed
checkpoint; what is no tensor is JSON beside them. Nothing in it is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from onestroke.train.ranks import rank, wait_for_all
from onestroke.train.sharding import like

NOTES = "state.json"  # what is no tensor, and the tensors' shapes
Layout = Mapping[str, Tensor]  # by path in the state, as `flattened` has them: a tensor laid out as it has to be


def write_shards(state: Mapping, folder: Path, *, group: dist.ProcessGroup | None = None) -> None:
    """Write `state` to `folder`, which is emptied before. Every process has to call this. Raises OSError.

    `group`: what the processes speak through, where another thread uses the default one.
    """
    if rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    wait_for_all(group)
    flat = flattened(state)
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    try:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as error:  # no subclass of Exception; the same in every process
        raise next(iter(error.failures.values()))[0] from None
    if rank() != 0:
        return
    values = {name: value for name, value in flat.items() if name not in tensors}
    shapes = {name: list(value.shape) for name, value in tensors.items()}
    with (folder / NOTES).open("w", encoding="utf-8") as file:
        json.dump({"values": values, "shapes": shapes}, file)
        file.flush()
        os.fsync(file.fileno())


def read_shards(folder: Path, layout: Layout) -> dict:
    """The state in `folder`, each tensor laid out as `layout` says, whole where it says nothing."""
    notes = json.loads((folder / NOTES).read_text("utf-8"))
    reader = HuggingFaceStorageReader(str(folder))
    found = reader.read_metadata().state_dict_metadata
    if {name: list(meta.size) for name, meta in found.items()} != notes["shapes"]:
        raise ValueError("a part of the checkpoint is missing")
    tensors = {}
    for name, meta in found.items():
        placed = place_of(name, meta.size, layout)
        dtype = meta.properties.dtype
        tensors[name] = torch.empty(meta.size, dtype=dtype) if placed is None else torch.empty_like(placed, dtype=dtype)
    dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    return unflattened(tensors | notes["values"])


def laid_out(state: Mapping, layout: Layout) -> dict:
    """A state of whole tensors, those sharded that `layout` has sharded."""
    flat = flattened(state)
    for name, value in flat.items():
        placed = place_of(name, value.shape, layout) if isinstance(value, Tensor) else None
        if placed is not None:
            flat[name] = like(value, placed)
    return unflattened(flat)


def place_of(name: str, shape: torch.Size, layout: Layout) -> DTensor | None:
    """The sharded tensor that the one at `name` has to be laid out like, if it has: its own, or its parameter's."""
    for key in (name, name.rpartition("/")[0]):
        placed = layout.get(key)
        if isinstance(placed, DTensor) and placed.shape == shape:
            return placed
    return None


def is_sharded(state: Mapping) -> bool:
    """Whether any tensor in a state lies in several processes."""
    return any(isinstance(value, DTensor) for value in flattened(state).values())


def flattened(tree: Mapping, prefix: str = "") -> dict:
    """Nested mappings as one, "/" between the keys; lists stay as they are."""
    flat = {}
    for key, value in tree.items():
        is_branch = isinstance(value, Mapping) and value
        flat |= flattened(value, f"{prefix}{key}/") if is_branch else {f"{prefix}{key}": value}
    return flat


def unflattened(flat: Mapping) -> dict:
    """The nested mappings again; optimizers number their parameters by integers."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, last = (int(key) if path.startswith("optimizers/") and key.isdigit() else key
                          for key in path.split("/"))  # fmt: skip
        branch = tree
        for key in parents:
            branch = branch.setdefault(key, {})
        branch[last] = value
    return tree

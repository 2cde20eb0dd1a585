"""Encodings kept on the disk by key, so that frozen networks see each picture and caption once.

A shard is one safetensors file, written whole or not at all. A key is made of a picture's bytes and of how it is cut,
or of a caption: an edited picture has another one, and a renamed picture the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from onestroke.data.buckets import Size
from onestroke.data.facts import digest_of
from onestroke.data.framing import Placement
from onestroke.errors import DataError
from onestroke.tensor_files import write_tensors

_OPEN_SHARDS = 64  # files kept open at once


class Encodings:
    """Rows by key in the shards of a folder, which need not be there yet. Workers may hold copies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards = sorted(folder.glob("part-*.safetensors"))
        self._open: dict[int, safe_open] = {}
        keys = [self._shard(number).get_tensor("keys").numpy() for number in range(len(self.shards))]
        self._open.clear()
        joined = np.concatenate([np.empty(0, np.int64), *keys])
        rows = np.concatenate([np.empty(0, np.int64), *(np.arange(len(part)) for part in keys)])
        shards = np.repeat(np.arange(len(keys)), [len(part) for part in keys])
        order = np.argsort(joined, kind="stable")
        self._keys, self._rows, self._shards = joined[order], rows[order], shards[order]

    def __len__(self) -> int:
        return len(self._keys)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}

    def has(self, keys: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Which of the keys have a row."""
        if not len(self):
            return np.zeros(len(keys), bool)
        places = np.searchsorted(self._keys, keys).clip(max=len(self) - 1)
        return self._keys[places] == keys

    def get(self, key: int) -> np.ndarray | None:
        """The row of a key, as it was stored; None where there is none."""
        place = int(np.searchsorted(self._keys, key))
        if place == len(self._keys) or self._keys[place] != key:
            return None
        rows = self._shard(int(self._shards[place])).get_slice("rows")
        return rows[int(self._rows[place])].numpy()

    def add(self, keys: Sequence[int], rows: Float[Tensor, "n ..."]) -> None:
        """Write a shard. This object goes on with what it found on opening. Raises ResourceError on a full disk."""
        number = 1 + max((int(path.stem[-6:]) for path in self.folder.glob("part-*.safetensors")), default=-1)
        path = self.folder / f"part-{number:06d}.safetensors"
        write_tensors(path, {"keys": torch.tensor(keys), "rows": rows}, what="an encoding")

    def _shard(self, number: int) -> safe_open:
        if number not in self._open:
            while len(self._open) >= _OPEN_SHARDS:
                self._open.pop(next(iter(self._open)))
            path = self.shards[number]
            try:
                self._open[number] = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                fix = "Delete this file, and run `onestroke encode` again."
                raise DataError("this encoding cannot be read", where=str(path), fix=fix) from error
        return self._open[number]


@dataclass(frozen=True)
class Encoded:
    """What is known of a source's pictures before they are read."""

    digests: Int[np.ndarray, " n"] = field(repr=False)  # of each picture's bytes, or UNKNOWN or BROKEN
    sizes: Int[np.ndarray, "n 2"] = field(repr=False)
    latents: Encodings  # by picture_key
    image_embeddings: Encodings | None  # by picture_key
    text_embeddings: Encodings | None  # by text_key
    needs_images: bool  # whether training looks at the pictures besides


def picture_key(digest: int, size: Size, placement: Placement) -> int:
    """The key of a picture of these bytes, cut like this to `size`."""
    return digest_of(np.array([digest, *size, *placement], np.int64).tobytes())


def text_key(caption: str) -> int:
    return digest_of(caption.encode())

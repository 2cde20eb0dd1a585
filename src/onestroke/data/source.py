"""The Source seam: captioned pictures by index, and the count of those that turn out broken."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8

from onestroke.data.buckets import Size
from onestroke.errors import DataError

_JUDGED_FROM = 20  # pictures read before the share of broken ones says anything


class BrokenPicture(Exception):
    """A picture that cannot be decoded: `path`, and the `reason`. Caught by `batches`, which shows a spare instead."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path} ({self.reason})"


@dataclass(frozen=True)
class Picture:
    image: UInt8[np.ndarray, "h w 3"]  # RGB, upright, any size
    caption: str


class Source(Protocol):
    """Captioned pictures by index. Workers hold a copy: reading changes nothing, and open files are not kept."""

    def __len__(self) -> int: ...

    def caption(self, index: int, *, slot: int | None = None) -> str:
        """The caption that `read` gives with the same `index` and `slot`, without reading the picture."""
        ...

    def size_of(self, index: int) -> Size:
        """Height and width of picture `index`, without decoding it; raises BrokenPicture where they cannot be had."""
        ...

    def read(self, index: int, *, slot: int | None = None) -> Picture:
        """Picture `index`; raises BrokenPicture if it cannot be decoded.

        A source with several captions for a picture chooses by `slot`, so that a new epoch brings a new one; with
        None it gives the picture's own caption, the same at every call.
        """
        ...


@runtime_checkable
class StoredSource(Source, Protocol):
    """Pictures that are stored somewhere, so that what is found out about them can be kept."""

    def content(self, index: int, length: int | None = None) -> bytes:
        """The bytes of picture `index`, or its first `length`; raises BrokenPicture where they cannot be read."""
        ...

    def keys(self) -> pa.Table:
        """A row a picture: `file`, `offset` and `stamp`, another one when what is there has changed."""
        ...

    def memory(self) -> Path:
        """A folder for what is found out; it may not be there yet, or not be writable."""
        ...


@dataclass
class Broken:
    """Which pictures turned out broken so far, and whether they are too many. Counts pictures, not readings."""

    num_pictures: int
    max_share: float = 0.05
    reasons: dict[int, str] = field(default_factory=dict)  # index -> path and reason
    num_seen: int = 0
    _seen: bytearray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._seen = bytearray(self.num_pictures)

    def __len__(self) -> int:
        return len(self.reasons)

    def __str__(self) -> str:
        share = 100 * len(self) / max(self.num_seen, 1)
        line = f"{len(self)} of {self.num_seen} pictures read are broken ({share:.1f}%)"
        return ": ".join([line, *([", ".join(list(self.reasons.values())[:3])] if self.reasons else [])])

    def record(self, index: int, reason: str | None) -> None:
        """Picture `index` was read; `reason` says why it could not be, None if it could."""
        self.num_seen += not self._seen[index]
        self._seen[index] = 1
        if reason is not None:
            self.reasons[index] = reason

    def too_many(self) -> bool:
        """Whether more than `max_share` are broken.

        Judged from 20 pictures on, with three standard errors of grace until all have been read, so that an unlucky
        start does not stop a set with few broken pictures.
        """
        if self.num_seen < min(_JUDGED_FROM, self.num_pictures):
            return False
        grace = 3 * math.sqrt(self.max_share * (1 - self.max_share) * self.num_seen)
        return len(self) > self.max_share * self.num_seen + (grace if self.num_seen < self.num_pictures else 0)

    def error(self) -> DataError:
        return DataError(str(self), fix="Mend or remove these files, or allow a greater share of broken pictures")

"""One captioned picture of a set: where its bytes lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa


class Entry(NamedTuple):
    """A file below an address, or the `length` bytes from `offset` on of a tar below it."""

    file: str
    caption: str
    member: str = ""
    offset: int = 0
    length: int = -1  # -1: the whole file
    stamp: str = ""  # of the file; another one when its content has changed

    @property
    def name(self) -> str:
        """What a person looks for."""
        return f"{self.file}/{self.member}" if self.member else self.file

    @staticmethod
    def table(entries: Sequence[Entry]) -> pa.Table:
        """A column per field."""
        columns = zip(*entries, strict=True) if entries else [()] * len(Entry._fields)
        types = (pa.large_string(), pa.large_string(), pa.large_string(), pa.int64(), pa.int64(), pa.large_string())
        named = zip(Entry._fields, columns, types, strict=True)
        return pa.table({name: pa.array(rows, kind) for name, rows, kind in named})

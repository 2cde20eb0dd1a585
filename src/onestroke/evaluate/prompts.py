"""What models are asked to draw: prompts, and the columns that they are grouped by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onestroke.data.tables import TABLE_TYPES, rows_of, text_of
from onestroke.errors import DataError

PROMPT_COLUMNS = ("prompt", "text", "caption")
MAX_VALUES = 12  # a column of more values is no grouping, unless it is asked for


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order they are drawn.

    `columns`: column -> one value a prompt. `named`: what each prompt names, attribute -> value, where that is known.
    """

    texts: tuple[str, ...]
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    named: tuple[Mapping[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: Sequence[int]) -> PromptSet:
        """The prompts of some rows, in their order."""
        columns = {name: tuple(values[i] for i in rows) for name, values in self.columns.items()}
        named = tuple(self.named[i] for i in rows) if self.named else ()
        return PromptSet(tuple(self.texts[i] for i in rows), columns, named)

    def groupings(self, wanted: Sequence[str] | None = None) -> dict[str, tuple[str, ...]]:
        """The columns to group by: the `wanted` ones, or all with 2 to `MAX_VALUES` values. Raises DataError."""
        if wanted is None:
            return {n: values for n, values in self.columns.items() if 2 <= len(set(values)) <= MAX_VALUES}
        unknown = [name for name in wanted if name not in self.columns]
        if unknown:
            known = ", ".join(self.columns) or "none"
            raise DataError(f"the prompts have no column {unknown[0]!r}", fix=f"Columns there are: {known}.")
        return {name: self.columns[name] for name in wanted}


def read_prompts(path: Path) -> PromptSet:
    """The prompts of a file: .txt (one a line), .jsonl, .csv or .parquet (a column `prompt`, `text` or `caption`).

    Every other column can be grouped by. Raises DataError for what is empty, not UTF-8 or has no such column.
    """
    kinds = (".txt", *TABLE_TYPES)
    if path.suffix.lower() not in kinds:
        raise DataError("no prompts are read from such a file", where=str(path), fix=f"Give {', '.join(kinds)}.")
    rows = _lines(path) if path.suffix.lower() == ".txt" else rows_of(path)
    rows = [row for row in rows if any(str(value or "").strip() for value in row.values())]
    if not rows:
        raise DataError("the file has no prompts", where=str(path), fix="Write one prompt a line.")
    column = next((name for name in PROMPT_COLUMNS if name in rows[0]), None)
    if column is None:
        have = ", ".join(map(str, rows[0]))
        raise DataError(f"columns {have}", where=str(path), fix=f"It needs one of {', '.join(PROMPT_COLUMNS)}.")
    texts = [_text(row.get(column), number, path) for number, row in enumerate(rows, start=1)]
    names = dict.fromkeys(name for row in rows for name in row if name != column and name is not None)
    columns = {name: tuple(_shown(row.get(name)) for row in rows) for name in names}
    return PromptSet(tuple(texts), columns)


def shuffled(prompts: PromptSet, *, seed: int = 0) -> PromptSet:
    """The prompts in an order that depends on their number alone: the first ones of a sorted file are no sample."""
    return prompts[np.random.default_rng(seed).permutation(len(prompts)).tolist()]


def _text(value: Any, number: int, path: Path) -> str:
    text = " ".join(value.split()) if isinstance(value, str) else ""
    if not text:
        raise DataError(f"prompt {number} is empty or not text", where=str(path), fix="Correct that line.")
    return text


def _shown(value: Any) -> str:
    return "none" if value is None or value == "" else str(value)


def _lines(path: Path) -> list[dict]:
    return [{"prompt": line} for line in text_of(path).split("\n") if line.strip()]

"""Sets of the `datasets` library as sources: datasets:NAME or datasets:NAME:SPLIT; NAME is of the hub, or a folder."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from onestroke.data.folder import CAPTION_COLUMNS
from onestroke.errors import DataError

SET = "datasets:"
TAG_COLUMNS = ("tag_string", "tags")


def is_set(source: str) -> bool:
    return source.startswith(SET)


@lru_cache(maxsize=4)
def _loaded(source: str):
    """The set, with pictures left as bytes, and the name of the picture column. Raises DataError."""
    import datasets

    name, colon, split = source.removeprefix(SET).rpartition(":")
    name, split = (name, split) if colon else (split, "train")
    try:
        found = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library, the hub and its formats each raise their own kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        fix = f"Give {SET}NAME:SPLIT of a set that `datasets.load_dataset` can load here"
        raise DataError(f"cannot be loaded ({reason})", where=source, fix=fix) from error
    column = next((name for name, kind in found.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise DataError(
            f"no column of pictures among {', '.join(found.features)}", where=source, fix="Give another set"
        )
    return found.cast_column(column, datasets.Image(decode=False)), column


def captions_of(source: str) -> Iterator[object]:
    """The caption of each row as it is found: text, a list of tags, or None."""
    found, _ = _loaded(source)
    column = next((name for name in (*CAPTION_COLUMNS, *TAG_COLUMNS) if name in found.features), None)
    for start in range(0, len(found), 10_000):
        stop = min(len(found), start + 10_000)
        yield from found.select_columns([column])[start:stop][column] if column else [None] * (stop - start)


def picture_of(source: str, row: int) -> dict:
    """Bytes and path of the picture in a row."""
    found, column = _loaded(source)
    return found.select_columns([column])[row][column]

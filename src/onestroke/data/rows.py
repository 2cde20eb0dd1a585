"""Pictures in rows: Parquet files, and data sets of the `datasets` library by name, memory-mapped as Arrow."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl

import datasets
import fsspec
import numpy as np
import pyarrow as pa
from jaxtyping import Int

from onestroke.data.address import Address, cache_folder
from onestroke.data.folder import HOW_TO_CAPTION, decode, size_in
from onestroke.data.source import BrokenPicture, Picture
from onestroke.data.tars import CAPTION_COLUMNS
from onestroke.errors import DataError

PREFIX = "datasets:"
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "img", "content")


@dataclass(frozen=True)
class RowsSource:
    """The rows that have a caption, in their order."""

    rows: datasets.Dataset = field(repr=False)  # of two columns, the picture not decoded
    image: str  # name of the column
    text: str
    kept: Int[np.ndarray, " n"] = field(repr=False)  # rows with a caption
    left_out: Mapping[str, int]  # why -> how many rows
    where: Path  # a folder for what is found out about these pictures

    def __len__(self) -> int:
        return len(self.kept)

    def caption(self, index: int, *, slot: int | None = None) -> str:
        return " ".join(self.rows.data[self.text][int(self.kept[index])].as_py().split())

    def content(self, index: int, length: int | None = None) -> bytes:
        """The bytes of picture `index`, or its first `length`; raises BrokenPicture where they cannot be read."""
        row = int(self.kept[index])
        value = self.rows.data[self.image][row].as_py() or {}
        if value.get("bytes"):
            return value["bytes"][:length]
        if not value.get("path"):
            raise BrokenPicture(f"row {row}", "no picture in this row")
        try:
            with fsspec.open(value["path"], "rb") as file:
                return file.read(-1 if length is None else length)
        except OSError as error:
            raise BrokenPicture(value["path"], error.strerror or str(error)) from error

    def read(self, index: int, *, slot: int | None = None) -> Picture:
        return Picture(decode(self.content(index), name=f"row {self.kept[index]}"), self.caption(index))

    def size_of(self, index: int) -> tuple[int, int]:
        return size_in(lambda length: self.content(index, length), name=f"row {self.kept[index]}")

    def keys(self) -> pa.Table:
        """Where each picture lies, and a stamp that changes with what is there."""
        stamp = self.rows._fingerprint
        return pa.table({"file": pa.array([""] * len(self), pa.large_string()), "offset": pa.array(self.kept),
                         "stamp": pa.array([stamp] * len(self), pa.large_string())})  # fmt: skip

    def memory(self) -> Path:
        return self.where / f"rows-{self.rows._fingerprint}"


def open_parquet(address: Address, names: Sequence[str], *, log: Callable[[str], None] = print) -> RowsSource:
    """The captioned pictures in the rows of Parquet files below `address`; they are made into Arrow files once, which
    the `datasets` library keeps in its cache. Raises DataError."""
    files = [f"{address.url.rstrip('/')}/{name}" for name in names]
    where = files[0] if len(files) == 1 else str(address)
    rows = _loaded(lambda: datasets.load_dataset("parquet", data_files=files, split="train"), where)
    return _source(rows, where, address.memory(), log)


def open_dataset(name: str, *, log: Callable[[str], None] = print) -> RowsSource:
    """A data set by name, "datasets:NAME?config=CONFIG&split=SPLIT": of the hub, a folder that `datasets` reads, or
    one that its `save_to_disk` wrote. Without a split: train. Raises DataError."""
    base, _, query = name.removeprefix(PREFIX).partition("?")
    options = dict(parse_qsl(query))
    unknown = sorted(options.keys() - {"config", "split"})
    if unknown:
        fix = "As in datasets:NAME?config=CONFIG&split=SPLIT"
        raise DataError(f"no option {unknown[0]!r}", where=name, fix=fix)
    split = options.get("split", "train")

    def load():
        saved = os.path.isdir(base) and any(os.path.exists(os.path.join(base, page)) for page in _SAVED)
        if not saved:
            return datasets.load_dataset(base, options.get("config"), split=split)
        found = datasets.load_from_disk(base)
        return found[split] if isinstance(found, datasets.DatasetDict) else found

    rows = _loaded(load, name)
    return _source(rows, name, cache_folder(name), log)


_SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk writes


def _loaded(load: Callable[[], datasets.Dataset], where: str) -> datasets.Dataset:
    had_bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return load()
    except Exception as error:  # the library, the hub and every filesystem raise their own kinds
        line = " ".join(str(error).split())[:200]
        fix = "Check the name, or download the data set first"
        raise DataError(
            f"cannot be loaded by datasets ({type(error).__name__}: {line})", where=where, fix=fix
        ) from error
    finally:
        if had_bars:
            datasets.enable_progress_bars()


def _source(rows: datasets.Dataset, where: str, memory: Path, log: Callable[[str], None]) -> RowsSource:
    image = _image_column(rows.features)
    text = next((name for name in CAPTION_COLUMNS if name in rows.features), None)
    if image is None or text is None:
        need = f"It needs one of {', '.join(IMAGE_COLUMNS)} and one of {', '.join(CAPTION_COLUMNS)}"
        raise DataError(f"columns {', '.join(rows.features)}", where=where, fix=need)
    rows = rows.select_columns([image, text]).cast_column(image, datasets.Image(decode=False))
    captions = rows.data[text].to_pylist()
    other = next((number for number, caption in enumerate(captions) if not isinstance(caption, str | None)), None)
    if other is not None:
        raise DataError(f"row {other}: {text} is not text", where=where, fix="Give a column of text")
    kept = np.array([row for row, caption in enumerate(captions) if caption and caption.strip()], np.int64)
    left_out = {"no caption": sum(caption is None for caption in captions)}
    left_out["an empty caption"] = len(captions) - len(kept) - left_out["no caption"]
    left_out = {why: count for why, count in left_out.items() if count}
    if not len(kept):
        raise DataError(f"none of {len(captions)} rows has a caption", where=where, fix=HOW_TO_CAPTION)
    for why, count in left_out.items():
        log(f"{where}: left out {count} of {len(captions)} pictures with {why}")
    return RowsSource(rows, image, text, kept, left_out, memory)


def _image_column(features: Mapping) -> str | None:
    """A column of pictures, or one of a usual name that holds bytes or structs with bytes."""
    typed = next((name for name, kind in features.items() if isinstance(kind, datasets.Image)), None)
    if typed is not None:
        return typed
    for name in IMAGE_COLUMNS:
        kind = features.get(name)
        is_bytes = isinstance(kind, datasets.Value) and kind.dtype in ("binary", "large_binary")
        if is_bytes or (isinstance(kind, dict) and "bytes" in kind):
            return name
    return None

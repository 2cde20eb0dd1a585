"""A source of pictures by name: a folder, shards, Parquet files, an fsspec address, or a data set's name."""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from fnmatch import fnmatchcase

from braceexpand import braceexpand

from onestroke.data.address import Address
from onestroke.data.folder import METADATA, FolderSource, natural_key, open_folder, open_tars
from onestroke.data.rows import PREFIX, RowsSource, open_dataset, open_parquet
from onestroke.data.tars import IMAGE_TYPES
from onestroke.errors import DataError

SHARD_TYPES = (".tar", ".parquet")


def open_pictures(source: str, *, log: Callable[[str], None] = print) -> FolderSource | RowsSource:
    """The captioned pictures that `source` names. Raises DataError.

    A folder of pictures, tars or Parquet files; `.tar` or `.parquet` files, `*` and `{000..119}` standing for several;
    either on this machine or at an address that fsspec knows ("s3://bucket/set/shard-*.tar"); or
    "datasets:NAME?config=CONFIG&split=SPLIT" for one of the `datasets` library.
    """
    if source.startswith(PREFIX):
        return open_dataset(source, log=log)
    if source.lower().endswith(SHARD_TYPES):
        return _open_shards(source, log)
    address = Address(source)
    files = address.files()
    if not any(name.lower().endswith((*IMAGE_TYPES, ".tar")) for name in files):
        pages = [
            name for name in files if name.lower().endswith(".parquet") and posixpath.basename(name) not in METADATA
        ]
        if pages:
            return open_parquet(address, sorted(pages, key=natural_key), log=log)
    return open_folder(source, log=log, files=files)


def _open_shards(source: str, log: Callable[[str], None]) -> FolderSource | RowsSource:
    """Tars or Parquet files of one folder."""
    folder, _, pattern = source.replace("\\", "/").rpartition("/")
    address = Address(folder or ("/" if source.startswith("/") else "."))
    files = address.files()
    names = []
    for wanted in braceexpand(pattern):
        found = sorted((name for name in files if "/" not in name and fnmatchcase(name, wanted)), key=natural_key)
        if not found:
            raise DataError("there is no such file", where=f"{address}/{wanted}", fix="Check the name")
        names += found
    names = list(dict.fromkeys(names))
    if source.lower().endswith(".tar"):
        return open_tars(address, {name: files[name] for name in names}, log=log)
    return open_parquet(address, names, log=log)

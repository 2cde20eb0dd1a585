"""Text files and tables that people write: UTF-8 text, JSON lines, CSV and Parquet, as rows; bad ones in one line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from onestroke.errors import DataError

TABLE_TYPES = (".jsonl", ".csv", ".parquet")


def text_of(path: Path) -> str:
    """A UTF-8 file, without a byte order mark. Raises DataError."""
    try:
        return text_in(path.read_bytes(), where=str(path))
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=str(path), fix="Check the path") from error


def text_in(content: bytes, *, where: str) -> str:
    """The text of a UTF-8 file with any kind of line ends, without a byte order mark. Raises DataError."""
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text (byte {error.start})", where=where, fix="Save it as UTF-8") from error


def rows_of(path: Path, columns: Sequence[str] | None = None) -> list[dict]:
    """The rows of a table of one of `TABLE_TYPES`; of Parquet only `columns` where they are given. Raises DataError."""
    if path.suffix.lower() == ".jsonl":
        return _json_rows(path)
    return _csv_rows(path) if path.suffix.lower() == ".csv" else _parquet_rows(path, columns)


def _json_rows(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(text_of(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"line {number} is not JSON", where=str(path), fix="Correct that line") from error
        if not isinstance(row, dict):
            raise DataError(f"line {number} is not an object", where=str(path), fix="Write one {...} on each line")
        rows.append(row)
    return rows


def _csv_rows(path: Path) -> list[dict]:
    try:
        return list(csv.DictReader(io.StringIO(text_of(path)), strict=True))
    except csv.Error as error:
        raise DataError(f"not CSV ({error})", where=str(path), fix="Save it as comma-separated UTF-8") from error


def _parquet_rows(path: Path, columns: Sequence[str] | None) -> list[dict]:
    try:
        known = parquet.read_schema(path).names
        wanted = known if columns is None else [name for name in known if name in columns]
        return parquet.read_table(path, columns=wanted).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError("cannot be read as Parquet", where=str(path), fix="Write the file again") from error

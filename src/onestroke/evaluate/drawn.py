"""Pictures and measures kept between runs, so that what was drawn or measured once costs nothing again.

    pictures/ab/abcd....png     one picture, by model, prompt, seed, steps and guidance
    measures/NAME-VERSION/...   what an observer saw in a run of pictures

Files are written beside their place and renamed: a run may be killed at any point. What cannot be read is made again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from onestroke.errors import ResourceError


class PictureCache:
    """Pictures by key below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "pictures"

    def key(self, way: str, prompt: str, seed: int) -> str:
        return hashlib.sha256(f"{way}\0{seed}\0{prompt}".encode()).hexdigest()[:32]

    def holds(self, key: str) -> bool:
        return self._path(key).exists()

    def load(self, key: str) -> np.ndarray | None:
        """The picture, h w 3, or None where there is none or a damaged one."""
        try:
            with Image.open(self._path(key)) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError):
            return None

    def save(self, key: str, picture: np.ndarray) -> None:
        _write_whole(self._path(key), lambda file: Image.fromarray(picture).save(file, "PNG", compress_level=1))

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.png"


class MeasureCache:
    """Rows of numbers by observer and by the keys of the pictures that they belong to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "measures"

    def load(self, observer: str, keys: Sequence[str]) -> np.ndarray | None:
        try:
            rows = np.load(self._path(observer, keys), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return rows if len(rows) == len(keys) else None

    def save(self, observer: str, keys: Sequence[str], rows: np.ndarray) -> None:
        _write_whole(self._path(observer, keys), lambda file: np.save(file, rows.astype(np.float32)))

    def _path(self, observer: str, keys: Sequence[str]) -> Path:
        name = hashlib.sha256("\n".join(keys).encode()).hexdigest()[:32]
        return self.folder / observer / f"{name}.npy"


def _write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):  # it may not even have been begun
            temporary.unlink()
        fix = "Make room, or choose another folder with --out, and run it again: it goes on where it stopped."
        raise ResourceError(f"the cache cannot be written ({error.strerror})", where=str(path), fix=fix) from error

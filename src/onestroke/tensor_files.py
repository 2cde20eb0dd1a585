"""Safetensors files, whole or not there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from onestroke.errors import ResourceError


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, what: str
) -> None:
    """A reader sees no file, the old one or the whole new one: a temporary file beside `path` takes its name last.

    `what` names the contents in the ResourceError of a disk that is full or not writable ("the latents").
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {key: tensor.contiguous() for key, tensor in tensors.items()},
            temporary,
            dict(metadata) if metadata else None,
        )
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ResourceError(
            f"{what} could not be written ({reason})",
            where=str(path),
            fix="Free disk space or choose another folder.",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)

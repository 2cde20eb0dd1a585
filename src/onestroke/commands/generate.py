"""`onestroke generate`: a picture from words."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image
from rich.console import Console

from onestroke import __version__
from onestroke.api import load
from onestroke.build import device_of
from onestroke.commands.machine import use_machine
from onestroke.commands.quiet import quiet_libraries
from onestroke.embedded import STUDENT, TEACHER
from onestroke.embedded.vocabulary import unknown_words
from onestroke.errors import RecipeError, ResourceError
from onestroke.evaluate.pictures import model_size
from onestroke.picture_metadata import metadata_options
from onestroke.sample import draw

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def run_generate(
    prompt: str,
    out: Path,
    model: str,
    *,
    steps: int,
    seed: int,
    guidance: float,
    count: int,
    console: Console,
    width: int | None = None,
    height: int | None = None,
) -> None:
    """Draw `count` pictures of `prompt`, seeds `seed` on, side by side into the file `out`; print what it took.

    `width`, `height`: pixels, multiples of 8; the model's own where they are not given.
    """
    check_order(prompt, out)
    for name, side in (("--width", width), ("--height", height)):
        if side is not None and (side < 8 or side % 8):
            raise RecipeError(f"{side} pixels cannot be drawn", where=name, fix="Give a multiple of 8.")
    quiet_libraries()
    use_machine()
    pipeline = load(model)
    pipeline.to(device_of("auto"))
    pipeline.set_progress_bar_config(disable=True)
    for warning in warnings_about(prompt, pipeline, model):
        console.print(f"note: {warning}", markup=False, highlight=False, soft_wrap=True)
    started = time.perf_counter()
    own_height, own_width = model_size(pipeline)
    size = (height or own_height, width or own_width)
    seeds = range(seed, seed + count)
    images = draw(pipeline, [prompt] * count, seeds=seeds, steps=steps, guidance=guidance, size=size)
    seconds = time.perf_counter() - started
    save_picture(
        np.concatenate(list(images), axis=1),
        out,
        {
            "prompt": prompt,
            "seed": str(seed),
            "count": str(count),
            "steps": str(steps),
            "guidance": f"{guidance:g}",
            "model": model,
            "software": f"onestroke {__version__}",
        },
    )
    console.print(f"{out} ({seconds:.2f} s to draw)", markup=False, highlight=False, soft_wrap=True)


def check_order(prompt: str, out: Path) -> None:
    """Refuse an empty prompt, a file type that is not written, and a place that cannot be written to."""
    if not prompt.strip():
        raise RecipeError("the prompt is empty", where="generate", fix='Say what to draw, as in "a laughing person".')
    if out.suffix.lower() not in FORMATS:
        raise RecipeError(
            f"no picture is written as {out.suffix or 'a file without a suffix'!r}",
            where=str(out),
            fix=f"Choose one of {', '.join(FORMATS)}.",
        )
    if out.is_dir():
        raise RecipeError("this is a folder", where=str(out), fix="Give a file name after --out.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(out, error) from error
    if not os.access(out.parent, os.W_OK):
        raise ResourceError("this folder cannot be written to", where=str(out.parent), fix="Choose another --out.")


def warnings_about(prompt: str, pipeline: DiffusionPipeline, model: str) -> list[str]:
    """A line where the prompt is cut, and one where it has words that the embedded model never saw."""
    lines = []
    limit = pipeline.tokenizer.model_max_length
    num_tokens = len(pipeline.tokenizer(prompt, truncation=False).input_ids)
    if num_tokens > limit:
        lines.append(f"the prompt is too long: its last {num_tokens - limit} of {num_tokens - 2} tokens are cut.")
    unknown = unknown_words(prompt) if model in (STUDENT, TEACHER) else []
    if unknown:
        lines.append(f"the embedded model never saw {', '.join(map(repr, unknown))}; it draws comic characters only.")
    return lines


def save_picture(image: np.ndarray, out: Path, metadata: Mapping[str, str]) -> None:
    """Write `image` (h w 3, uint8) whole or not at all, with `metadata` in it.

    PNG: a text chunk for each entry. JPEG and WebP: JSON in Exif's ImageDescription. Raises ResourceError.
    """
    kind = FORMATS[out.suffix.lower()]
    temporary = out.with_name(f".{out.name}.partial")
    try:
        with temporary.open("wb") as file:
            Image.fromarray(image).save(file, kind, **metadata_options(kind, metadata))
        os.replace(temporary, out)
    except (OSError, ValueError) as error:  # Pillow's encoders raise ValueError for a picture that is too large
        temporary.unlink(missing_ok=True)
        raise _unwritable(out, error) from error


def _unwritable(out: Path, error: Exception) -> ResourceError:
    reason = getattr(error, "strerror", None) or str(error)
    return ResourceError(
        f"the picture cannot be written ({reason})", where=str(out), fix="Choose another --out, or free some space."
    )

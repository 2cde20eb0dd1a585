"""`onestroke data inspect`: numbers on the terminal, the contact sheet as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from rich.console import Console

from onestroke.data.curation.files import atomic
from onestroke.data.curation.inspection import contact_sheet, described, inspect
from onestroke.data.folder import open_folder
from onestroke.data.source import Crop
from onestroke.errors import DataError, RecipeError


def run_inspect(folder: Path, out: Path, *, size: int, crop: str, sample: int, console: Console) -> None:
    """Tell what is in `folder` and write its contact sheet to `out`."""
    if crop not in get_args(Crop):
        raise RecipeError(f"no crop {crop!r}", where="--crop", fix=f"Choose one of {', '.join(get_args(Crop))}.")
    out = out.resolve()
    if folder.resolve() in out.parents:
        fix = "Write it elsewhere: the trainer would take it for one of the pictures."
        raise DataError("the sheet would lie among the pictures", where=str(out), fix=fix)

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    found = inspect(open_folder(folder, log=tell), size=size, crop=crop, sample=sample)  # type: ignore[arg-type]
    for line in described(found):
        tell(line)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic(out) as temporary:
        contact_sheet(found).save(temporary, "PNG")
    tell(str(out))

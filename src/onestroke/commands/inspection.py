"""`onestroke data inspect`: numbers on the terminal, the contact sheet as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from rich.console import Console

from onestroke.build import chosen_sizes
from onestroke.config import DataRecipe, validated
from onestroke.data.address import is_remote
from onestroke.data.buckets import Buckets
from onestroke.data.curation.files import atomic
from onestroke.data.curation.inspection import contact_sheet, described, inspect
from onestroke.data.framing import Crop
from onestroke.data.opening import open_pictures
from onestroke.errors import DataError, RecipeError


def run_inspect(
    folder: str | Path,
    out: Path,
    *,
    size: int,
    crop: str,
    sample: int,
    console: Console,
    buckets: str = "none",
    num_buckets: int = 12,
    batch_size: int = 1,
) -> None:
    """Tell what is in `folder`, any source that training takes, and write its contact sheet to `out`.

    `buckets`, `num_buckets`, `batch_size`: as in a recipe; a bucket that cannot fill a batch is dissolved.
    """
    tree = {"source": str(folder), "size": size, "buckets": buckets, "num_buckets": num_buckets}
    data = validated(DataRecipe, tree, where="data inspect")
    if crop not in get_args(Crop):
        raise RecipeError(f"no crop {crop!r}", where="--crop", fix=f"Choose one of {', '.join(get_args(Crop))}.")
    out = out.resolve()
    if not is_remote(str(folder)) and Path(folder).resolve() in out.parents:
        fix = "Write it elsewhere: the trainer would take it for one of the pictures."
        raise DataError("the sheet would lie among the pictures", where=str(out), fix=fix)

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    source = open_pictures(str(folder), log=tell)
    chosen = chosen_sizes(data, source, multiple=8, batch_size=batch_size)
    in_buckets = chosen if isinstance(chosen, Buckets) else None
    found = inspect(source, size=size, crop=crop, sample=sample, buckets=in_buckets)  # type: ignore[arg-type]
    for line in described(found):
        tell(line)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic(out) as temporary:
        contact_sheet(found).save(temporary, "PNG")
    tell(str(out))

"""What a run's folder says of the run in it: its recipe and its pictures, which a run that goes on has to share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from onestroke.config import Recipe, SharpenRecipe
from onestroke.errors import CheckpointError

RECIPE, PICTURES = "recipe.yaml", "pictures.yaml"
FREE = frozenset({  # keys that change nothing that ADD has learnt, beyond the rounding of sums in another order
    "train.parallel", "train.micro_batch_size", "train.device", "train.checkpoint_minutes", "train.keep_checkpoints",
    "train.sample_images", "train.evaluate_images", "train.evaluate_count", "train.evaluate_features",
    "train.on_alarm", "train.compile", "student.gradient_checkpointing", "data.num_workers",
    "anchors.kept", *(f"sharpen.{name}" for name in SharpenRecipe.model_fields),
})  # fmt: skip


def check_recipe(out: Path, recipe_text: str) -> None:
    """Refuse to mix two recipes that differ in more than `FREE` keys. Raises CheckpointError."""
    path = out / RECIPE
    if not path.exists():
        return
    before, now = (_leaves(yaml.safe_load(text)) for text in (path.read_text("utf-8"), recipe_text))
    defaults = _leaves(Recipe().model_dump(mode="json"))
    defaults |= _leaves({"sharpening": SharpenRecipe().model_dump(mode="json")})  # what comes after ADD notes besides
    before = {key: defaults[key] for key in now if key in defaults} | before  # the run may be older than a key
    keys = [key for key in [*now, *(before.keys() - now.keys())] if before.get(key) != now.get(key)]
    changed = [f"{key}: {before.get(key)} -> {now.get(key)}" for key in keys if key not in FREE]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise CheckpointError(
            f"this folder holds a run of another recipe ({', '.join(changed[:3])}{more})",
            where=str(out),
            fix="Give another --out, or the same recipe to continue.",
        )


def check_pictures(out: Path, pictures: Mapping[str, int]) -> None:
    """Refuse to go on with other pictures, whose order is another. Raises CheckpointError.

    `pictures`: what tells them from others, by name.
    """
    path = out / PICTURES
    before = yaml.safe_load(path.read_text("utf-8")) if path.exists() else {}
    changed = [key for key in pictures if before and before.get(key) != pictures[key]]
    if not changed:
        return
    key = changed[0]
    difference = f"{before.get(key)} -> {pictures[key]}" if key.startswith("number") else key
    raise CheckpointError(
        f"this run began with other pictures ({difference})",
        where=str(out),
        fix="Put them back or give another --out; to go on with them as they are, some seen twice in this epoch and "
        f"some not at all, delete {path}.",
    )


def record(out: Path, recipe_text: str, pictures: Mapping[str, int]) -> None:
    """Keep both beside the run's results."""
    _write_whole(out / RECIPE, recipe_text)
    if pictures:
        _write_whole(out / PICTURES, yaml.safe_dump(dict(pictures), sort_keys=False))


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


def _leaves(tree: object, prefix: str = "") -> dict[str, object]:
    """A recipe's values by their dotted keys."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    parts = (_leaves(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in tree.items())
    return {key: value for part in parts for key, value in part.items()}

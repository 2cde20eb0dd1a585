"""`onestroke encode`: what frozen networks say of the training pictures, kept beside them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress

from onestroke.build import kept_dtype, sizes_of, source_of, teacher_of
from onestroke.commands.distill import resolve_recipe
from onestroke.commands.machine import use_machine
from onestroke.commands.quiet import quiet_libraries
from onestroke.config import Recipe
from onestroke.data.buckets import Buckets, one_bucket
from onestroke.data.facts import measured_sizes
from onestroke.data.framing import Framing
from onestroke.data.source import StoredSource
from onestroke.distill.conditions import ImageEmbedder, TextEmbedder
from onestroke.distill.encoding import Encoding, encode_pictures, encoders_of, encodings_folder
from onestroke.distill.features import load_features
from onestroke.distill.frozen import lower
from onestroke.errors import DataError, RecipeError
from onestroke.precision import autocast_dtype


def run_encode(
    data: str, recipe: str | None, teacher: str | None, overrides: Sequence[str], *, console: Console
) -> None:
    """Encode `data` as a distillation by the same recipe reads it; say what was done, and how it is used."""
    quiet_libraries()
    use_machine()
    resolved = resolve_recipe(recipe, teacher, None, data, overrides)

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("encoding", total=None)
        source, done = encode(resolved, lambda count, total: progress.update(task, completed=count, total=total))
    tell(f"{done.cuts:,} cuts of pictures and {done.captions:,} captions encoded, {done.known:,} cuts known before, "
         f"{done.broken:,} pictures broken; in {encodings_folder(source)}")  # fmt: skip
    for line in left_out(resolved):
        tell(line)
    given = [recipe] if recipe else []
    given += ["--teacher", teacher] if teacher else []
    settings = [part for line in overrides for part in ("--set", line)]
    tell("next:")
    tell("  " + shlex.join(["onestroke", "distill", *given, "--data", data, *settings]))


def encode(recipe: Recipe, observe=lambda done, total: None) -> tuple[StoredSource, Encoding]:
    """Encode the pictures of a recipe; `observe(done, pictures)`. Raises RecipeError for what cannot be kept."""
    data = recipe.data
    source = source_of(data, seed=recipe.seed)
    if not isinstance(source, StoredSource):
        raise DataError("these pictures are drawn anew at every reading", where=data.source, fix="Give a folder.")
    if data.crop == "random" and data.crops_per_image is None:
        fix = "Set data.crops_per_image, e.g. to 4, or data.crop to center."
        raise RecipeError("crops without number cannot be kept", where="data.crop", fix=fix)
    model = teacher_of(recipe)
    features = load_features(recipe.discriminator.features, source=recipe.discriminator.features_source)
    dtype = model.unet.dtype
    embed_image = ImageEmbedder(features.to(model.device, dtype), recipe.discriminator).to(model.device)
    embed_text = TextEmbedder(model, recipe.discriminator.text_encoder).to(model.device)
    lower([net for net in (embed_image.network, embed_text.encoder) if net is not None], kept_dtype(recipe))
    encoders = encoders_of(
        recipe.discriminator, model, embed_image, embed_text, autocast_dtype(recipe.train.precision, model.device)
    )
    size = sizes_of(recipe, source, model)
    if not isinstance(size, Buckets):
        readable = (measured_sizes(source) > 0).all(axis=1).nonzero()[0]
        size = Buckets((size,), (one_bucket(len(source), size).members[0][readable],))
    framing = Framing(recipe.seed, data.crop, data.random_flip, data.crops_per_image)
    return source, encode_pictures(source, size, framing, encoders, num_workers=data.num_workers, observe=observe)


def left_out(recipe: Recipe) -> list[str]:
    """What the recipe asks for and no encoding can save, and why."""
    settings, lines = recipe.discriminator, []
    if settings.conditioning in ("image", "both") and (settings.crop < 1 or settings.real != "data"):
        why = "shown parts of them" if settings.crop < 1 else "shown what the VAE makes of them"
        lines.append(f"image embeddings are not kept: the feature network is {why}")
    if settings.conditioning in ("text", "both") and settings.text_encoder == "teacher":
        lines.append("text embeddings are not kept: they come with the teacher's own")
    if settings.real == "data":
        lines.append("training reads the pictures too: the feature network is shown them (discriminator.real)")
    return lines

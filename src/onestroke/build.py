"""Composition root: the only place that turns a recipe's names into objects."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline

from onestroke.compiler import check_compiler, compile_blocks
from onestroke.config import DataRecipe, Recipe
from onestroke.data.buckets import Buckets, Size, assign, computed_buckets, sdxl_buckets
from onestroke.data.comicset.dataset import ComicSource
from onestroke.data.encodings import Encoded
from onestroke.data.facts import measured_sizes
from onestroke.data.opening import open_pictures
from onestroke.data.source import Source, StoredSource
from onestroke.distill.add import ADD
from onestroke.distill.add import STUDENT as STUDENT_PLAYER
from onestroke.distill.anchors import Anchors
from onestroke.distill.encoding import encoders_of, known_encodings
from onestroke.distill.features import load_features
from onestroke.distill.frozen import lower, to_float8
from onestroke.distill.student import build_student
from onestroke.embedded import STUDENT, TEACHER, embedded_judge, embedded_student, embedded_teacher
from onestroke.embedded.held_out import comic_pictures, comic_prompts, judge_observer
from onestroke.errors import RecipeError, ResourceError
from onestroke.evaluate.features import FEATURES, load_all, trained_against
from onestroke.evaluate.observer import Observer
from onestroke.evaluate.pictures import RealSet, halves
from onestroke.families.load import from_pipeline, load_pipeline
from onestroke.families.model import DiffusionModel
from onestroke.plan.devices import peak_of
from onestroke.precision import autocast_dtype, frozen_dtype
from onestroke.train.evaluation import Yardstick
from onestroke.train.ranks import num_ranks, share_of
from onestroke.train.sharding import shard
from onestroke.train.trainer import Trainer, TrainSettings

VALIDATION = "validation"  # comicset's pictures that students are chosen by; reports have the held-out ones
COMICSET_IMAGES = 1_000_000  # pictures in an epoch of the rendered set, which has no last picture


def pipeline_of(name: str, *, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """A pipeline by name: "embedded" (the student), "embedded-teacher", a folder, a hub id, or a checkpoint file."""
    if name == STUDENT:
        return embedded_student(dtype=dtype)
    if name == TEACHER:
        return embedded_teacher(dtype=dtype)
    return load_pipeline(name, dtype=dtype)


def device_of(name: str) -> torch.device:
    """The device called `name`; "auto" takes the best there is."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available[name]:
        raise ResourceError(f"this machine has no {name} device", where="train.device", fix='Set it to "auto".')
    return torch.device(name)


def teacher_of(recipe: Recipe) -> DiffusionModel:
    """The frozen teacher on its device; "embedded" names the embedded teacher here.

    Its UNet is whole, for a student to begin from: `add_trainer` lowers it to what the recipe says.
    """
    source = TEACHER if recipe.teacher.source == STUDENT else recipe.teacher.source
    pipeline = pipeline_of(source)
    device = device_of(recipe.train.device)
    pipeline.to(device, torch.float64 if recipe.train.precision == "float64" else torch.float32)
    if is_sharded(recipe):
        pipeline.unet.to("cpu")  # `add_trainer` spreads it over the devices, and its copy, the student
    for name in ("unet", "vae"):
        getattr(pipeline, name).to(memory_format=torch.channels_last)
    model = from_pipeline(pipeline, source=source)
    lower([model.vae, *model.text_encoders], kept_dtype(recipe))
    return model


def kept_dtype(recipe: Recipe) -> torch.dtype:
    """That of the weights that are not trained. Raises RecipeError where the step's own does not go with it."""
    settings = recipe.train
    return frozen_dtype(settings.frozen_precision, settings.precision, device_of(settings.device))


def whole_teacher(teacher: DiffusionModel) -> DiffusionModel:
    """The teacher as it was published, to write what is made of it: loaded again where training keeps it in less."""
    if teacher.vae.dtype in (torch.float32, torch.float64):
        return teacher
    return from_pipeline(pipeline_of(teacher.source), source=teacher.source)


def source_of(recipe: DataRecipe, *, seed: int = 0) -> Source:
    """The training pictures."""
    if recipe.source == "comicset":
        return ComicSource(COMICSET_IMAGES, size=recipe.size, seed=seed)
    return open_pictures(recipe.source)


def sizes_of(recipe: Recipe, source: Source, teacher: DiffusionModel) -> Size | Buckets:
    """Height and width of all training pictures, or the buckets that they go into. Raises DataError."""
    return chosen_sizes(recipe.data, source, multiple=size_multiple(teacher), batch_size=recipe.train.batch_size)


def chosen_sizes(data: DataRecipe, source: Source, *, multiple: int, batch_size: int) -> Size | Buckets:
    """The same for a model whose sides divide by `multiple`."""
    if data.buckets == "none":
        return data.size, data.size
    pictures = measured_sizes(source)
    if data.buckets == "sdxl":
        sizes = sdxl_buckets(data.size, multiple=multiple)
    else:
        sizes = computed_buckets(pictures, data.size, multiple=multiple, most=data.num_buckets)
    return assign(pictures, sizes, batch_size=batch_size)


def size_multiple(teacher: DiffusionModel) -> int:
    """What a picture's sides have to divide by, in pixels."""
    return max(8, teacher.vae_scale_factor)  # diffusers' pipelines draw multiples of 8 only


def encoded_of(recipe: Recipe, source: Source, method: ADD) -> Encoded | None:
    """What `onestroke encode` kept of the training pictures by this run's own networks; None where that is nothing."""
    if not isinstance(source, StoredSource):
        return None
    encoders = encoders_of(
        recipe.discriminator,
        method.model,
        method.embed_image,
        method.embed_text,
        autocast_dtype(recipe.train.precision, method.model.device),
    )
    return known_encodings(source, encoders, needs_images=recipe.discriminator.real == "data")


def yardstick_of(recipe: Recipe, source: Source) -> Yardstick:
    """What the short evaluations of a run measure by; prompts and real pictures are different ones.

    Of comicset's validation pictures, which nothing is trained on; of a set of the user's own, which has no such part,
    captions of the one half and pictures of the other. Raises RecipeError, DataError.
    """
    count, size = recipe.train.evaluate_count, (recipe.data.size, recipe.data.size)
    guidance = sum(recipe.teacher.guidance) / 2
    observer = _observer_of(recipe)
    if not isinstance(source, StoredSource):
        prompts = comic_prompts(count, split=VALIDATION).texts
        real = comic_pictures(count, odd=True, label="real pictures", size=recipe.data.size, split=VALIDATION)
        return Yardstick(observer, prompts, real, size, guidance)
    captioned, shown = halves(len(source))
    count, keys = min(count, len(captioned), len(shown)), source.keys()
    real = RealSet("real pictures", source, shown[:count], size, lambda index: str(keys.slice(index, 1).to_pylist()))
    return Yardstick(observer, [source.caption(index) for index in captioned[:count]], real, size, guidance)


def _observer_of(recipe: Recipe) -> Observer:
    """The network that looks at pictures in short evaluations, which the discriminator does not see."""
    seen, name, is_comic = trained_against(recipe), recipe.train.evaluate_features, recipe.data.source == "comicset"
    where = "train.evaluate_features"
    if name == "judge" and not is_comic:
        raise RecipeError("the judge knows the embedded pictures alone", where=where, fix='Set it to "auto".')
    if name in seen:
        raise RecipeError(f"the discriminator sees {name} too", where=where, fix="Name another, or auto.")
    if name == "judge" or (name == "auto" and is_comic):
        return judge_observer(embedded_judge())
    names = [one for one in FEATURES if one not in seen] if name == "auto" else [name]
    found, lacking = load_all(names, FEATURES, weights={}, device=device_of(recipe.train.device))
    if not found:
        raise RecipeError(
            f"{' and '.join(missing.name for missing in lacking)} cannot be loaded to evaluate with",
            where=where,
            fix=f"{lacking[0].fix}; or set train.evaluate_images to 0.",
        )
    return found[0]


def add_trainer(recipe: Recipe, teacher: DiffusionModel, *, anchors: Anchors | None = None) -> Trainer:
    """A trainer for ADD of `teacher`, before its first step; `anchors` where the recipe has some."""
    settings = recipe.train
    multiple = size_multiple(teacher)
    if recipe.data.size % multiple:
        raise RecipeError(
            f"{recipe.data.size} pixels do not divide by {multiple}",
            where="data.size",
            fix=f"Set it to {recipe.data.size // multiple * multiple or multiple}.",
        )
    dtype = torch.float64 if settings.precision == "float64" else torch.float32
    device, shares = device_of(settings.device), is_sharded(recipe)
    share_of(settings.batch_size)
    if shares and recipe.student_optimizer.kind == "muon":
        raise RecipeError(
            "muon needs whole matrices, which fsdp splits",
            where="train.parallel",
            fix="Set it to ddp, or student_optimizer.kind to adamw.",
        )
    if shares and "adamw8bit" in (recipe.student_optimizer.kind, recipe.discriminator_optimizer.kind):
        raise RecipeError(
            "8-bit moments are of whole weights, which fsdp splits",
            where="train.parallel",
            fix="Set it to ddp, or the optimizers' kind to adamw, whose moments fsdp splits.",
        )
    if shares and recipe.student.lora is not None:
        raise RecipeError(
            "a LoRA student shares its teacher's weights, which fsdp would split twice",
            where="train.parallel",
            fix="Set it to ddp: the adapter is all that is trained.",
        )
    if recipe.teacher.fp8 != "none" and (shares or recipe.student.lora is not None):
        why = "fsdp splits its weights" if shares else "a LoRA student learns through its weights"
        raise RecipeError(f"a teacher in float8 has to be whole, and {why}", where="teacher.fp8", fix="Leave it out.")
    for where, images in (("anchors.images", recipe.anchors.images), ("sharpen.images", recipe.sharpen.images)):
        if images and shares:
            raise RecipeError(
                "what comes before and after ADD is not split over processes",
                where=where,
                fix="Set it to 0, or train.parallel to ddp.",
            )
    student = build_student(teacher, recipe.student, seed=recipe.seed).to(dtype=dtype)
    low, autocast = kept_dtype(recipe), autocast_dtype(settings.precision, device)
    lower([teacher.unet], low)
    if recipe.teacher.fp8 != "none":
        to_float8(teacher.unet, recipe.teacher.fp8, device)
    if settings.compile:
        check_compiler(device, where="train.compile")
        compile_blocks([student, teacher.unet])
    if shares:  # the trainer shards the student
        shard(teacher.unet, device)
    else:
        student.to(device, memory_format=torch.channels_last)
    features = load_features(recipe.discriminator.features, source=recipe.discriminator.features_source)
    method = ADD(teacher, student, features.to(teacher.device, dtype), recipe, anchors=anchors)
    method.heads.to(dtype)
    others = [network for network in method.frozen if network is not teacher.unet]
    lower(others, low)
    if settings.compile:
        compile_blocks(others)
    return Trainer(
        method,
        TrainSettings(
            settings.num_images,
            settings.batch_size,
            settings.micro_batch_size,
            autocast,
            sharded=frozenset({STUDENT_PLAYER} if shares else ()),
            device=device.type,
            shows_speed=True,
            peak=peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" and autocast else None,
        ),
    )


def is_sharded(recipe: Recipe) -> bool:
    """Whether this run splits the UNets' weights over several processes."""
    return recipe.train.parallel == "fsdp" and num_ranks() > 1

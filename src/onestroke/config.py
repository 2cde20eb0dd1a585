"""What a run is: frozen models of every setting, read from YAML and written back resolved.

Units stand in the field's comment. Unknown keys fail and name the nearest known one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from onestroke.errors import RecipeError

Precision = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Kind = TypeVar("Kind", bound="Section")


class Section(BaseModel):
    """One part of a recipe, or a whole one."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class OptimizerRecipe(Section):
    """AdamW or Muon. ADD's paper gives neither rates nor betas: ours, between its published neighbours."""

    kind: Literal["adamw", "adamw8bit", "muon"] = "adamw"  # adamw8bit: a byte for each moment of a weight (torchao);
    # muon: orthogonalised momentum for matrices, AdamW for the rest
    learning_rate: float = Field(1e-6, gt=0)
    betas: tuple[float, float] = (0.0, 0.99)  # no momentum: the other player moves
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_images: int = Field(0, ge=0)  # pictures
    decay: Literal["constant", "cosine", "linear"] = "constant"  # to a tenth at the end; or, over the last 40%, to 2%
    max_grad_norm: float | None = Field(1.0, gt=0)
    every: int = Field(1, ge=1)  # takes part in every n-th step

    @field_validator("betas")
    @classmethod
    def _below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("each beta has to be at least 0 and below 1")
        return betas


class TeacherRecipe(Section):
    source: str = "embedded"  # "embedded", a diffusers folder, a hub id, or one .safetensors file
    guidance: tuple[float, float] = (3.0, 3.0)  # classifier-free guidance scale, uniform between the two; 1 is off
    min_t: float = Field(0.02, ge=0, lt=1)  # lowest and highest teacher timestep, as shares of the schedule
    max_t: float = Field(0.98, gt=0, le=1)
    negative_prompt: str = "unrealistic, blurry, low quality, out of focus, ugly, low contrast"  # for nfsd
    fp8: Literal["none", "weights", "dynamic"] = "none"  # its linear layers in float8 (torchao): kept so, computed in
    # the dtype of before; or multiplied so too (Ada, Hopper)

    @model_validator(mode="after")
    def _ordered(self):
        if self.min_t >= self.max_t or self.guidance[0] > self.guidance[1]:
            raise ValueError("min_t has to be below max_t, and guidance [low, high]")
        return self


class UnetRecipe(Section):
    """A smaller student UNet: what differs from the teacher's config. Blocks of the same shape are copied."""

    block_out_channels: tuple[int, ...] | None = None
    layers_per_block: int | None = Field(None, ge=1)
    transformer_layers_per_block: tuple[int, ...] | None = None


class LoraRecipe(Section):
    """A student that is a low-rank adapter on the teacher (LoRA, arXiv 2106.09685)."""

    rank: int = Field(64, ge=1)
    alpha: float | None = Field(None, gt=0)  # the adapter's product counts alpha / rank times; None: rank
    targets: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"), min_length=1
    )  # ends of layers' names, inside the UNet's blocks

    @property
    def scaling(self) -> float:
        return self.rank if self.alpha is None else self.alpha


def _check_weights(weights: tuple[float, ...] | None, count: int, name: str) -> None:
    if weights is not None and (len(weights) != count or min(weights) < 0 or sum(weights) <= 0):
        raise ValueError(f"{name} has to hold one number per timestep, none negative, not all zero")


class StudentRecipe(Section):
    source: str | None = None  # continue this student: a diffusers folder; None starts from the teacher
    init: Literal["teacher", "random"] = "teacher"
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None  # None: the teacher's
    num_timesteps: int = Field(4, ge=1, le=64)  # N of the paper
    timestep_weights: tuple[float, ...] | None = None  # how often each is trained, noisiest first; None is uniform
    ema_images: float = Field(20_000, gt=0)  # half-life of the weights' average, in pictures
    unet: UnetRecipe | None = None
    lora: LoraRecipe | None = None  # train an adapter alone; None trains every weight
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _one_weight_a_timestep(self):
        _check_weights(self.timestep_weights, self.num_timesteps, "timestep_weights")
        return self

    @model_validator(mode="after")
    def _adapter_of_the_teacher(self):
        if self.lora and (self.source or self.unet or self.init == "random" or self.prediction_type):
            raise ValueError("lora adapts the teacher itself: leave out source, unet, init and prediction_type")
        return self


class DiscriminatorRecipe(Section):
    features: Literal["efficientnet-lite0", "dinov2-small", "dinov2-large"] = "efficientnet-lite0"
    features_source: str | None = None  # a local folder or hub id in place of the network's own
    conditioning: Literal["none", "text", "image", "both"] = "both"
    text_encoder: str = "teacher"  # "teacher": its pooled embedding; or a CLIP text model's folder or hub id
    image_encoder: str = "features"  # "features": the feature network's own; or dinov2-small, dinov2-large
    image_encoder_source: str | None = None
    real: Literal["data", "reconstructed"] = "data"  # reconstructed: as the VAE decodes them, so that its blur tells
    # nothing of who drew a picture
    # Side of the part that is looked at, as a share of the picture's; its place is random (StyleGAN-T, arXiv
    # 2301.09515, section 3.2), so that no pattern in step with the features' grid pays.
    crop: float = Field(1.0, gt=0, le=1)


class LossRecipe(Section):
    adversarial_weight: float = Field(1.0, ge=0)
    distill_weight: float = Field(2.5, ge=0)  # lambda
    weighting: Literal["exponential", "sds", "nfsd"] = "exponential"  # c(t)
    distance: Literal["pixel", "latent"] = "pixel"
    r1_gamma: float = Field(1e-5, ge=0)
    r1_every: int = Field(1, ge=1)  # in every n-th step of the heads, n times as strong (arXiv 1912.04958, section 3.1)


class AnchorRecipe(Section):
    """Pictures that the guided teacher draws from known noise, for the student to draw in one step."""

    count: int = Field(0, ge=0)  # of them; 0: none
    steps: int = Field(12, ge=2)  # of the solver that draws them; a multiple of student.num_timesteps
    given_by_student: float = Field(0.0, ge=0, le=1)  # share whose later timesteps begin from what student.source
    # drew at the timestep before, not from the teacher's pictures
    images: int = Field(0, ge=0)  # pictures that the student learns from anchors alone, before ADD begins
    learning_rate: float | None = Field(None, gt=0)  # while it does; None: the student's
    every: int = Field(4, ge=1)  # beside ADD: one anchor to so many pictures
    weight: float = Field(5.0, ge=0)  # beside ADD: of an anchor's loss, the distance between latents
    perceptual: float = Field(0.0, ge=0)  # in that loss: of the distance between the discriminator's features of the
    # decoded pictures
    emphasis: float = Field(1.0, ge=0)  # of the places that words moved last, beside the whole picture's weight
    timestep_weights: tuple[float, ...] | None = None  # as the student's, for anchors; None: the student's
    kept: float = Field(0.0, ge=0, lt=1)  # share that the weights before ADD have in those that are exported

    @model_validator(mode="after")
    def _some_to_learn_from(self):
        if self.images and not self.count:
            raise ValueError("anchors.images pictures can be learnt only from a count of anchors")
        if self.kept and not self.images:
            raise ValueError("anchors.kept is a share of what anchors.images pictures left, and there are none")
        return self


class SharpenRecipe(Section):
    """After ADD: the student learns from its own pictures, under an unsharp mask and a step further."""

    images: int = Field(0, ge=0)  # prompts, each drawn at the timesteps of the student; 0: nothing is sharpened
    amount: float = Field(1.6, ge=0)  # of what the blur takes from a picture, added to it; a student learns less
    later_amount: float | None = Field(None, ge=0)  # the same, of the pictures at the later timesteps; None: as much
    radius: float = Field(1.0, gt=0, le=16)  # of the Gaussian blur, its standard deviation in pixels
    gain: float = Field(1.0, gt=0, le=2)  # of the latents of the first prediction, which the mask is then laid over;
    # below 1: what was exaggerated is taken back
    text_gain: float = Field(1.0, gt=0, le=4)  # of what sets a caption's embeddings, which the first target is drawn
    # with, apart from those of no words; above 1: the student is to keep to the words more than it does
    ahead: bool = False  # the first prediction learns what the second one, under the same noise, makes of it
    perceptual: float = Field(0.0, ge=0)  # of the distance between features of the first prediction's pictures, beside
    # that between pixels
    later_every: int = Field(1, ge=1)  # of so many prompts one is drawn at the later timesteps too
    learning_rate: float | None = Field(None, gt=0)  # of AdamW; None: the student's

    @property
    def amounts(self) -> tuple[float, float]:
        """The mask's amount at pure noise, and that at the later timesteps."""
        return self.amount, self.amount if self.later_amount is None else self.later_amount

    def predictions(self, num_timesteps: int) -> float:
        """How many a prompt has on average, of a student with so many timesteps."""
        return 1 + (num_timesteps - 1) / self.later_every

    @model_validator(mode="after")
    def _something_to_learn(self):
        if self.images and not (any(self.amounts) or self.ahead or (self.gain, self.text_gain) != (1, 1)):
            raise ValueError("without amount or gain, and not ahead, the student would learn what it draws already")
        return self


class DecodeRecipe(Section):
    """How latents become the pictures that discriminator and pixel loss look at: by default the VAE, all at once."""

    chunk: int | None = Field(None, ge=1)  # pictures decoded at once, and again in the backward pass; None: all, once
    autoencoder: str | None = None  # folder or hub id of an AutoencoderTiny in the VAE's place (madebyollin/taesdxl)
    scale: float = Field(1.0, gt=0, le=1)  # side of the decoded picture, as a share of data.size
    margin: int | None = Field(None, ge=0)  # latents around discriminator.crop that are decoded with it; None, or
    # beside a pixel loss, which compares whole pictures: all


class DataRecipe(Section):
    source: str = "comicset"  # "comicset"; a folder of captioned pictures or shards, on this machine or at an address
    # ("s3://..."); .tar or .parquet files ("shard-{000..119}.tar", "*.parquet"); or "datasets:NAME?split=train"
    size: int = Field(128, ge=8, le=8192)  # pixels a side
    random_flip: bool = False
    crop: Literal["center", "random"] = "center"
    crops_per_image: int | None = Field(None, ge=1)  # random crops that a picture has in all; None: a new one each time
    buckets: Literal["none", "sdxl", "computed"] = "none"  # one square size; SDXL's list, its square being `size` a
    # side; or the sizes that crop these pictures least
    num_buckets: int = Field(12, ge=1, le=64)  # of computed ones, at most
    num_workers: int = Field(1, ge=0)
    max_broken_share: float = Field(0.05, ge=0, le=1)


class TrainRecipe(Section):
    num_images: int = Field(40_000, ge=1)  # pictures in the whole run
    batch_size: int = Field(16, ge=1)  # pictures in a step, of all processes together
    micro_batch_size: int | None = Field(None, ge=1)  # pictures at once in a process; gradients add up to the batch
    parallel: Literal["ddp", "fsdp"] = "ddp"  # under torchrun: each process holds all weights, or a part of the UNets'
    precision: Precision = "auto"  # of autocast; auto: bfloat16 where the device computes in it; weights stay float32
    frozen_precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of the weights that are not trained; auto:
    # bfloat16 on a GPU whose autocast is bfloat16, else as those that are trained
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    compile: bool = False  # the transformer blocks of UNets and DINOv2 (torch.compile), in minutes at the start
    checkpoint_minutes: float = Field(4.0, gt=0)
    keep_checkpoints: int = Field(2, ge=1)
    sample_images: int = Field(4_000, ge=0)  # pictures between sample grids; 0 draws none
    evaluate_images: int = Field(0, ge=0)  # pictures between short evaluations, whose best student is kept; 0: none
    evaluate_count: int = Field(256, ge=2)  # pictures in each: of the student at every number of steps, of the teacher
    evaluate_features: Literal["auto", "judge", "inception", "dinov2-large", "clip-vit-large", "efficientnet-lite0"] = (
        "auto"  # what looks at them, never what the discriminator sees; auto: the judge for comicset, else the first of
        # the others that is on this machine
    )
    on_alarm: Literal["warn", "rollback", "stop"] = "warn"  # when training goes wrong: say so; go back to the oldest
    # checkpoint and on at half the learning rate at fault; or stop

    @model_validator(mode="after")
    def _one_step_at_least(self):
        if self.num_images < self.batch_size:
            raise ValueError("num_images has to be at least batch_size, or no step is taken")
        return self


class Recipe(Section):
    """A distillation run."""

    name: str = "distill"
    seed: int = Field(0, ge=0)
    teacher: TeacherRecipe = TeacherRecipe()
    student: StudentRecipe = StudentRecipe()
    discriminator: DiscriminatorRecipe = DiscriminatorRecipe()
    losses: LossRecipe = LossRecipe()
    anchors: AnchorRecipe = AnchorRecipe()
    sharpen: SharpenRecipe = SharpenRecipe()
    decode: DecodeRecipe = DecodeRecipe()
    data: DataRecipe = DataRecipe()
    student_optimizer: OptimizerRecipe = OptimizerRecipe()
    discriminator_optimizer: OptimizerRecipe = OptimizerRecipe(learning_rate=1e-5)
    train: TrainRecipe = TrainRecipe()

    @model_validator(mode="after")
    def _anchors_that_can_be_drawn(self):
        steps, stations = self.anchors.steps, self.student.num_timesteps
        _check_weights(self.anchors.timestep_weights, stations, "anchors.timestep_weights")
        if self.anchors.count and self.data.buckets != "none":
            raise ValueError("anchors are of one size: set data.buckets to none, or anchors.count to 0")
        if self.anchors.count and steps % stations:
            raise ValueError(
                f"anchors.steps is no multiple of student.num_timesteps: set it to {stations * (1 + steps // stations)}"
            )
        if self.anchors.given_by_student and self.student.source is None:
            raise ValueError(
                "anchors.given_by_student needs a student that draws in one step already: name it in student.source"
            )
        if self.anchors.kept and self.student.lora:
            raise ValueError("anchors.kept mixes whole weights: set it to 0 for an adapter (student.lora)")
        if self.sharpen.images and self.student.lora:
            raise ValueError("sharpen.images trains whole weights: set it to 0 for an adapter (student.lora)")
        if self.sharpen.images and self.sharpen.ahead and stations == 1:
            raise ValueError("sharpen.ahead needs a second timestep: set student.num_timesteps to 2 or more")
        return self


class PretrainRecipe(Section):
    """A training of the embedded models from nothing. The defaults take about 3 hours on 2 cores."""

    size: int = Field(128, ge=32, le=1024, multiple_of=16)  # pixels a side; the VAE halves them thrice, the UNet once
    vae_images: int = Field(84_000, ge=1)  # pictures that each stage sees
    judge_images: int = Field(110_000, ge=1)
    text_captions: int = Field(40_000, ge=0)  # of comicset: what the text encoders learn words from; with `start`: 0
    latent_images: int = Field(50_000, ge=1)  # encoded once and shown again and again, under new captions
    decoder_images: int = Field(24_000, ge=0)  # of the VAE's decoder alone; with `start` or `vae`: 0
    teacher_images: int = Field(200_000, ge=0)  # 0: what goes before the teacher, which stays as it is
    batch_size: int = Field(32, ge=1)  # of the teacher
    learning_rate: float = Field(3e-3, gt=0)  # of the teacher, by Muon
    uniform_timesteps: float = Field(0.3, ge=0, le=1)  # share of timesteps; the others are logit-normal
    timestep_logit: float = Field(-0.7, ge=-4, le=4)  # mean of logit(t / 1000) of these; -0.7: about log-SNR 0
    emphasis: float = Field(1.0, ge=0)  # of comicset's small parts that have names, beside the whole picture's weight
    start: str | None = None  # a teacher to go on from: "embedded-teacher", or a folder of the same architecture
    vae: str | None = None  # a teacher whose VAE is taken and not trained; None: that of `start`, or a new one
    seed: int = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _what_is_trained_already(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        words = {"text_captions": 0} if given.get("start") else {}
        decoder = {"decoder_images": 0} if given.get("start") or given.get("vae") else {}
        return words | decoder | given


def load_recipe(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in the YAML file `source`, or the packaged one of that name ("mini", "sdxl-anime", "sd15").

    `overrides`: "section.key=value" lines, the value in YAML. Raises `RecipeError` with the nearest known key.
    """
    path = Path(source)
    packaged = files("onestroke.recipes").joinpath(f"{source}.yaml")
    if path.is_file():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError("this is not UTF-8", where=str(source), fix="Save it as UTF-8.") from error
    elif packaged.is_file():
        text = packaged.read_text("utf-8")
    else:
        names = sorted(p.name[:-5] for p in files("onestroke.recipes").iterdir() if p.name.endswith(".yaml"))
        raise RecipeError(
            "there is no such recipe", where=str(source), fix=f"Give a YAML file or one of {', '.join(names)}."
        )
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise RecipeError("this is not YAML", where=str(source), fix=" ".join(str(error).split())) from error
    return recipe_from(tree, overrides, where=str(source))


def recipe_from(tree: Mapping[str, Any], overrides: Iterable[str] = (), *, where: str = "recipe") -> Recipe:
    """A recipe from nested mappings and "section.key=value" overrides."""
    return _section_from(Recipe, tree, overrides, where)


def pretrain_recipe(overrides: Iterable[str] = ()) -> PretrainRecipe:
    """The default training of the embedded models, with "key=value" overrides."""
    return _section_from(PretrainRecipe, {}, overrides, "pretrain")


def _section_from(kind: type[Kind], tree: Mapping[str, Any], overrides: Iterable[str], where: str) -> Kind:
    if not isinstance(tree, Mapping):
        raise RecipeError("a recipe is a mapping of sections", where=where, fix="See recipes/mini.yaml.")
    merged = _copied(tree)
    for line in overrides:
        key, separator, value = line.partition("=")
        if not separator:
            raise RecipeError("an override has the form section.key=value", where=f"--set {line}")
        try:
            _assign(merged, key.strip().split("."), yaml.safe_load(value), line)
        except yaml.YAMLError as error:
            raise RecipeError("the value is not YAML", where=f"--set {line}", fix="Quote it.") from error
    return validated(kind, merged, where=where)


def validated(model: type[Kind], tree: Any, *, where: str) -> Kind:
    """`tree` as a recipe of this kind; raises `RecipeError` with the nearest known key."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise _explained(error, where, model) from error


def save_recipe(recipe: Recipe, path: Path) -> None:
    path.write_text(recipe_text(recipe), "utf-8")


def recipe_text(recipe: Recipe) -> str:
    """Every setting, defaults included, in YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _copied(tree: Mapping) -> dict:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _assign(tree: dict, keys: list[str], value: Any, line: str) -> None:
    for key in keys[:-1]:
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise RecipeError(f"{key!r} holds a value, not a section", where=f"--set {line}")
    tree[keys[-1]] = value


def _explained(error: ValidationError, where: str, model: type[Section]) -> RecipeError:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    name = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = _keys_beside(path, model)
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        fix = f"Did you mean {'.'.join([*path[:-1], near[0]])!r}?" if near else f"Known keys: {', '.join(known)}."
        return RecipeError(f"unknown key {name!r}", where=where, fix=fix)
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(first["input"], Mapping | Section):  # of keys that do not go together
        return RecipeError(f"{name}: {message}" if name else message, where=where)
    return RecipeError(f"{name} = {first['input']!r}: {message}", where=where)


def _keys_beside(path: list[str], model: type[BaseModel]) -> list[str]:
    """The known keys of the section of `model` that holds the last part of `path`."""
    for part in path[:-1]:
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return sorted(model.model_fields)

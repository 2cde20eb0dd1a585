"""Train the embedded models from nothing: VAE, judge, text encoders, teacher; each stage resumes where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

from onestroke.config import PretrainRecipe
from onestroke.data.comicset.dataset import ComicSource
from onestroke.data.framing import centre_cut
from onestroke.data.latents import CachedLatents, cache_latents, latent_batches
from onestroke.data.plan import picture_at
from onestroke.data.source import BrokenPicture, Source
from onestroke.distill.denoising import Denoising, DenoisingSettings
from onestroke.embedded import TEACHER, embedded_teacher
from onestroke.embedded.architecture import build_pipeline
from onestroke.embedded.autoencoder import AutoencoderRecipe, DecoderRecipe, train_autoencoder, train_decoder
from onestroke.embedded.fit import Machine, fit, stack_images
from onestroke.embedded.judge import (
    Judge,
    judge_loss,
    labels_of,
    load_judge,
    new_judge,
    save_judge,
    settle_norms,
)
from onestroke.embedded.known import VALUES, blank_odds, naming_hint, parts_counting, rows_at
from onestroke.embedded.naming import TextNaming, named_labels
from onestroke.errors import DataError, ModelError
from onestroke.export import export_folder
from onestroke.families.fingerprint import fingerprint
from onestroke.families.load import from_pipeline, load_pipeline
from onestroke.precision import autocast_dtype, fast_dtype
from onestroke.train.method import OptimizerSettings
from onestroke.train.run import Observer, run_training
from onestroke.train.trainer import Trainer, TrainSettings
from onestroke.types import Batch

MOST_BROKEN = 32  # pictures, one after another
JUDGE_PICTURES = 50_000  # different ones, shown again and again
TEXT_BATCH = 32
TEXT_SETTINGS = ("text_captions", "learning_rate", "start", "seed")
TEACHER_SETTINGS = (
    *TEXT_SETTINGS,
    "size",
    "latent_images",
    "teacher_images",
    "batch_size",
    "uniform_timesteps",
    "timestep_logit",
    "emphasis",
)
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def pretrain_vae(
    out: Path,
    source: Source,
    recipe: PretrainRecipe,
    machine: Machine = Machine(),
    *,
    log: Callable[[str], None] = print,
) -> AutoencoderKL:
    """The VAE in `out/vae`, trained or, where it is finished, loaded."""
    final = out / "vae" / "final"
    if not final.exists():
        reader = _Reader(source, recipe.size, recipe.seed)
        settings = AutoencoderRecipe(num_images=recipe.vae_images)
        vae = train_autoencoder(out / "vae", reader, settings, machine=machine, log=log)
        _save(vae, final)
    return AutoencoderKL.from_pretrained(final)


def pretrain_decoder(
    out: Path,
    source: Source,
    cache: CachedLatents,
    recipe: PretrainRecipe,
    machine: Machine = Machine(),
    *,
    log: Callable[[str], None] = print,
) -> AutoencoderKL:
    """The VAE of `out/vae` with its decoder trained on, in `out/decoder`; where that is finished, loaded."""
    final = out / "decoder" / "final"
    if not final.exists():
        vae = AutoencoderKL.from_pretrained(out / "vae" / "final")
        parts = parts_counting(out, source, cache, recipe, num_workers=machine.num_workers, log=log)

        vae = train_decoder(
            vae,
            out / "decoder",
            _OfCache(source, cache, recipe.seed),
            lambda slots: cache.latents[rows_at(slots, cache, recipe)].float() / vae.config.scaling_factor,
            lambda slots: torch.zeros(len(slots), *cache.latents.shape[-2:]) if parts is None else parts(slots),
            DecoderRecipe(num_images=recipe.decoder_images),
            machine=machine,
            log=log,
        )
        _save(vae, final)
    return AutoencoderKL.from_pretrained(final)


def _save(vae: AutoencoderKL, final: Path) -> None:
    """Whole or not at all."""
    saving = final.with_name("saving")
    vae.save_pretrained(saving)
    saving.replace(final)


def _vae(out: Path) -> AutoencoderKL:
    """The VAE, with the better decoder where there is one."""
    final = out / "decoder" / "final"
    return AutoencoderKL.from_pretrained(final if final.exists() else out / "vae" / "final")


def _encoder(vae: AutoencoderKL) -> str:
    """A name for what makes a VAE's latents: decoders may change under a teacher, its latents may not."""
    return fingerprint(vae.encoder, vae.quant_conv)


def adopt_vae(teacher: str, out: Path) -> None:
    """Put this teacher's VAE in `out/vae`, unless there is one."""
    final = out / "vae" / "final"
    if not final.exists():
        _save(_teacher(teacher).vae, final)


def _teacher(name: str) -> DiffusionPipeline:
    return embedded_teacher() if name == TEACHER else load_pipeline(name)


def pretrain_judge(
    out: Path, recipe: PretrainRecipe, machine: Machine = Machine(), *, log: Callable[[str], None] = print
) -> Judge:
    """The judge in `out/judge`, trained on comicset alone."""
    path = out / "judge" / "judge.safetensors"
    if not path.exists():
        source = ComicSource(JUDGE_PICTURES, size=recipe.size, seed=recipe.seed)
        judge = new_judge().to(machine.device, memory_format=torch.channels_last)

        def loss(images: torch.Tensor, indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            labels = [labels_of(source.character(index % len(source)), judge.values) for index in indices.tolist()]
            return judge_loss(judge, images, torch.tensor(labels, device=images.device))

        fit(
            judge,
            loss,
            _InOrder(source),
            out / "judge",
            num_images=recipe.judge_images,
            batch_size=32,
            learning_rate=5e-3,
            weight_decay=1e-2,
            optimizer_kind="muon",  # named far more than by AdamW after as many pictures
            num_workers=machine.num_workers,
            log=log,
        )
        settle_norms(judge.cpu(), _fresh_batches(source.size))
        save_judge(judge, path)
    return load_judge(path)


def _fresh_batches(size: int) -> Iterator[torch.Tensor]:
    """20 batches of 64 training pictures."""
    source = ComicSource(1280, size=size)
    for first in range(0, 1280, 64):
        yield stack_images(source.read(index).image for index in range(first, first + 64))


def pretrain_latents(
    out: Path,
    source: Source,
    recipe: PretrainRecipe,
    machine: Machine = Machine(),
    *,
    log: Callable[[str], None] = print,
) -> CachedLatents:
    """The latents that the teacher learns from, in `out/latents`, by the VAE in `out/vae`."""
    vae = AutoencoderKL.from_pretrained(out / "vae" / "final")
    made_by = _encoder(vae)
    vae.to(machine.device, memory_format=torch.channels_last)
    count = min(len(source), recipe.latent_images)
    fast = fast_dtype(machine.device) != torch.float32

    @torch.no_grad()
    def encode(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(machine.device.type, fast_dtype(machine.device), enabled=fast):
            latents = vae.encode(images.to(machine.device)).latent_dist.mean
        return latents.float().cpu() * vae.config.scaling_factor

    size = (recipe.size, recipe.size)
    cached = cache_latents(
        out / "latents",
        source,
        encode,
        made_by=made_by,
        count=count,
        size=size,
        num_workers=machine.num_workers,
        log=lambda done: log(f"{done}/{count} pictures encoded"),
    )
    if broken := count - len(cached):
        log(f"{broken} of {count} pictures cannot be read and are left out; `onestroke data inspect` names some")
    return cached


def pretrain_text(
    out: Path,
    source: ComicSource,
    recipe: PretrainRecipe,
    machine: Machine = Machine(),
    *,
    minutes: float | None = None,
    observe: Observer = lambda progress, left: None,
) -> bool:
    """The text encoders in `out/text`, trained to tell what captions name; returns whether the end was reached."""
    final = out / "text" / "final"
    if final.exists():
        return True
    pipeline = _untrained(out, source, recipe)
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        encoder.to(machine.device)

    def labels_of(slots: torch.Tensor) -> torch.Tensor:
        places = [picture_at(slot, len(source), seed=recipe.seed) for slot in slots.tolist()]
        described = (source.described(place, slot=slot) for place, slot in zip(places, slots.tolist(), strict=True))
        return torch.tensor([named_labels(caption.named, VALUES) for caption in described], device=machine.device)

    optimizer = OptimizerSettings(
        recipe.learning_rate, "muon", (0.9, 0.99), weight_decay=1e-2, warmup_images=1_600, decay="linear"
    )
    method = TextNaming(from_pipeline(pipeline), optimizer, VALUES, labels_of)
    trainer = Trainer(
        method, TrainSettings(recipe.text_captions, TEXT_BATCH, autocast=autocast_dtype("auto", machine.device))
    )

    def batches_from(first_slot: int) -> Iterator[Batch]:
        for first in range(first_slot, recipe.text_captions, TEXT_BATCH):
            slots = range(first, first + TEXT_BATCH)
            captions = tuple(source.caption(picture_at(i, len(source), seed=recipe.seed), slot=i) for i in slots)
            yield Batch(None, captions, torch.tensor(slots), torch.zeros(len(slots), 4, dtype=torch.int64))

    text = yaml.safe_dump({name: getattr(recipe, name) for name in TEXT_SETTINGS}, sort_keys=False)
    finished = run_training(trainer, batches_from, out / "text", recipe_text=text, minutes=minutes, observe=observe)
    if finished:
        for i, name in enumerate(TEXT_ENCODERS):
            getattr(pipeline, name).load_state_dict(trainer.averages["text"][i].state_dict())
            getattr(pipeline, name).save_pretrained(out / "text" / "saving" / name)
        (out / "text" / "saving").replace(final)
    return finished


def pretrain_teacher(
    out: Path,
    source: Source,
    cache: CachedLatents,
    recipe: PretrainRecipe,
    machine: Machine = Machine(),
    *,
    minutes: float | None = None,
    observe: Observer = lambda progress, left: None,
    log: Callable[[str], None] = print,
) -> bool:
    """The UNet and text encoders around the VAE in `out/vae`; a diffusers folder `out/teacher` at the end.

    Returns whether the last picture was reached; stopped earlier, the folder holds what there is so far.
    """
    pipeline = _untrained(out, source, recipe)
    pipeline.to(machine.device)
    for name in ("unet", "vae"):
        getattr(pipeline, name).to(memory_format=torch.channels_last)
    optimizer = OptimizerSettings(
        recipe.learning_rate, "muon", (0.9, 0.99), weight_decay=1e-2, warmup_images=3_200, decay="linear"
    )
    settings = DenoisingSettings(
        optimizer,
        ema_images=10_000,
        uniform_share=recipe.uniform_timesteps,
        logit_mean=recipe.timestep_logit,
        seed=recipe.seed,
    )
    emphasis = parts_counting(out, source, cache, recipe, num_workers=machine.num_workers, log=log)
    method = Denoising(
        from_pipeline(pipeline),
        settings,
        hint=naming_hint(source, cache, recipe, pipeline),
        emphasis=emphasis,
        blank_odds=blank_odds(source, cache, recipe),
    )
    trainer = Trainer(
        method, TrainSettings(recipe.teacher_images, recipe.batch_size, autocast=autocast_dtype("auto", machine.device))
    )

    def batches_from(first_slot: int):
        return latent_batches(
            cache,
            source,
            batch_size=recipe.batch_size,
            first_slot=first_slot,
            last_slot=recipe.teacher_images,
            seed=recipe.seed,
            num_workers=1,
        )

    text = yaml.safe_dump({name: getattr(recipe, name) for name in TEACHER_SETTINGS}, sort_keys=False)
    finished = run_training(
        trainer, batches_from, out / "teacher-run", recipe_text=text, minutes=minutes, observe=observe
    )
    _export_average(trainer, pipeline, out / "teacher")
    return finished


def _untrained(out: Path, source: Source, recipe: PretrainRecipe) -> StableDiffusionXLPipeline:
    """The pipeline that training starts with: a new one, or `recipe.start`, whose VAE has to be the one in `out`.

    Text encoders that are trained already, in `out/text`, take their place.
    """
    vae = _vae(out)
    if recipe.start is None:
        captions = [source.caption(index) for index in range(0, len(source), max(1, len(source) // 8000))]
        pipeline = build_pipeline(vae, captions, seed=recipe.seed)
    else:
        pipeline = _started(recipe.start, out, vae)
    side = recipe.size // pipeline.vae_scale_factor  # of the pictures that are drawn where no size is asked for
    pipeline.unet.register_to_config(sample_size=side)
    trained = out / "text" / "final"
    if trained.exists():
        for name in TEXT_ENCODERS:
            getattr(pipeline, name).load_state_dict(load_file(trained / name / "model.safetensors"))
    return pipeline


def _started(start: str, out: Path, vae: AutoencoderKL) -> StableDiffusionXLPipeline:
    pipeline = _teacher(start)
    if _encoder(pipeline.vae) != _encoder(vae):
        raise ModelError(
            "this teacher has another VAE",
            where=start,
            fix=f"Copy its vae folder to {out / 'vae' / 'final'}, or train in a new folder.",
        )
    pipeline.vae.load_state_dict(vae.state_dict())
    return pipeline


def _export_average(trainer: Trainer, pipeline: StableDiffusionXLPipeline, out: Path) -> None:
    average = trainer.averages["denoiser"]
    pipeline.unet.load_state_dict(average["unet"].state_dict())
    pipeline.text_encoder.load_state_dict(average["text_0"].state_dict())
    pipeline.text_encoder_2.load_state_dict(average["text_1"].state_dict())
    pipeline.to("cpu")
    export_folder(pipeline, out, card="# A small SDXL model, trained by `onestroke pretrain`\n")


@dataclass(frozen=True)
class _InOrder:
    """Pictures of a source by index, round and round, as `fit` wants them."""

    source: Source

    def __call__(self, index: int):
        return self.source.read(index % len(self.source)).image


@dataclass(frozen=True)
class _Reader:
    """Pictures of a source by slot, cut to a square."""

    source: Source
    size: int
    seed: int

    def __call__(self, slot: int):
        """In place of a broken picture the next whole one; `pretrain_latents` reports how many there are."""
        first, count = picture_at(slot, len(self.source), seed=self.seed), len(self.source)
        for index in range(first, first + min(count, MOST_BROKEN)):
            try:
                image = self.source.read(index % count, slot=slot).image
            except BrokenPicture as error:
                broken = error
            else:
                return centre_cut(image, (self.size, self.size))
        raise DataError(
            f"{min(count, MOST_BROKEN)} pictures one after another cannot be read", where=str(broken),
            fix="Look at the data with `onestroke data inspect`.",
        )  # fmt: skip


@dataclass(frozen=True)
class _OfCache:
    """The pictures whose latents are cached, by slot, cut as they were encoded."""

    source: Source
    cache: CachedLatents
    seed: int

    def __call__(self, slot: int):
        index = int(self.cache.indices[picture_at(slot, len(self.cache), seed=self.seed)])
        return centre_cut(self.source.read(index).image, self.cache.target)

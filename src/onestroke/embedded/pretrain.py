"""Train the embedded models from nothing: VAE, judge, then teacher; each stage resumes where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionXLPipeline

from onestroke.config import PretrainRecipe
from onestroke.data.comicset.dataset import ComicSource
from onestroke.data.latents import CachedLatents, cache_latents, latent_batches
from onestroke.data.source import Source, cut, picture_at, place
from onestroke.distill.denoising import Denoising, DenoisingSettings
from onestroke.embedded import TEACHER, embedded_teacher
from onestroke.embedded.architecture import build_pipeline
from onestroke.embedded.autoencoder import AutoencoderRecipe, train_autoencoder
from onestroke.embedded.fit import Machine, fit, stack_images
from onestroke.embedded.judge import Judge, judge_loss, labels_of, load_judge, new_judge, save_judge, settle_norms
from onestroke.errors import ModelError
from onestroke.evaluate.observer import fingerprint
from onestroke.export import export_folder
from onestroke.families.load import from_pipeline, load_pipeline
from onestroke.train.method import OptimizerSettings
from onestroke.train.run import Observer, run_training
from onestroke.train.trainer import Trainer, TrainSettings

JUDGE_PICTURES = 50_000  # different ones, shown again and again
TEACHER_SETTINGS = ("size", "latent_images", "teacher_images", "batch_size", "learning_rate", "start", "seed")


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
        vae.save_pretrained(final)
    return AutoencoderKL.from_pretrained(final)


def adopt_vae(teacher: str, out: Path) -> None:
    """Put the VAE of the teacher that training goes on from in `out/vae`, unless there is one."""
    final = out / "vae" / "final"
    if not final.exists():
        _teacher(teacher).vae.save_pretrained(final)


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
    made_by = fingerprint(vae)
    vae.to(machine.device, memory_format=torch.channels_last)
    count = min(len(source), recipe.latent_images)

    @torch.no_grad()
    def encode(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(machine.device.type, torch.bfloat16):
            latents = vae.encode(images.to(machine.device)).latent_dist.mean
        return latents.float().cpu() * vae.config.scaling_factor

    size = (recipe.size, recipe.size)
    return cache_latents(
        out / "latents",
        source,
        encode,
        made_by=made_by,
        count=count,
        size=size,
        num_workers=machine.num_workers,
        log=lambda done: log(f"{done}/{count} pictures encoded"),
    )


def pretrain_teacher(
    out: Path,
    source: Source,
    cache: CachedLatents,
    recipe: PretrainRecipe,
    machine: Machine = Machine(),
    *,
    minutes: float | None = None,
    observe: Observer = lambda progress, left: None,
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
    method = Denoising(from_pipeline(pipeline), DenoisingSettings(optimizer, ema_images=10_000, seed=recipe.seed))
    settings = TrainSettings(recipe.teacher_images, recipe.batch_size, autocast=torch.bfloat16)
    trainer = Trainer(method, settings)

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
    """The pipeline that training starts with: a new one, or `recipe.start`, whose VAE has to be the one in `out`."""
    vae = AutoencoderKL.from_pretrained(out / "vae" / "final")
    if recipe.start is None:
        captions = [source.caption(index) for index in range(0, len(source), max(1, len(source) // 8000))]
        return build_pipeline(vae, captions, seed=recipe.seed)
    pipeline = _teacher(recipe.start)
    if fingerprint(pipeline.vae) != fingerprint(vae):
        raise ModelError(
            "this teacher has another VAE",
            where=recipe.start,
            fix=f"Copy its vae folder to {out / 'vae' / 'final'}, or train in a new folder.",
        )
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
        import numpy as np

        image = self.source.read(picture_at(slot, len(self.source), seed=self.seed), slot=slot).image
        size = (self.size, self.size)
        return cut(
            image, size, place(image.shape[:2], size, np.random.default_rng(slot), crop="center", random_flip=False)
        )

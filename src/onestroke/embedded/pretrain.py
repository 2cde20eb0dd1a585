"""Train the embedded models from nothing: VAE, judge, then teacher; each stage resumes where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderKL, StableDiffusionXLPipeline

from onestroke.data.comicset.dataset import ComicSource
from onestroke.data.source import Source, batches, cut, picture_at, place
from onestroke.distill.denoising import Denoising, DenoisingSettings
from onestroke.embedded.architecture import build_pipeline
from onestroke.embedded.autoencoder import AutoencoderRecipe, train_autoencoder
from onestroke.embedded.fit import fit, stack_images
from onestroke.embedded.judge import Judge, judge_loss, labels_of, load_judge, new_judge, save_judge, settle_norms
from onestroke.export import export_folder
from onestroke.families.load import from_pipeline
from onestroke.train.method import OptimizerSettings
from onestroke.train.run import Observer, run_training
from onestroke.train.trainer import Trainer, TrainSettings


@dataclass(frozen=True)
class PretrainRecipe:
    """Pictures seen by each stage. The defaults take about 2 hours on 2 cores."""

    size: int = 128  # pixels a side
    vae_images: int = 84_000
    judge_images: int = 40_000
    teacher_images: int = 200_000
    batch_size: int = 32
    learning_rate: float = 8e-4
    seed: int = 0


def pretrain_vae(out: Path, source: Source, recipe: PretrainRecipe, *, log: Callable[[str], None] = print):
    """The VAE in `out/vae`, trained or, where it is finished, loaded."""
    final = out / "vae" / "final"
    if not final.exists():
        reader = _Reader(source, recipe.size, recipe.seed)
        vae = train_autoencoder(out / "vae", reader, AutoencoderRecipe(num_images=recipe.vae_images), log=log)
        vae.save_pretrained(final)
    return AutoencoderKL.from_pretrained(final)


def pretrain_judge(out: Path, recipe: PretrainRecipe, *, log: Callable[[str], None] = print) -> Judge:
    """The judge in `out/judge`, trained on comicset alone, with pictures that no other stage sees first."""
    path = out / "judge" / "judge.safetensors"
    if not path.exists():
        source = ComicSource(recipe.judge_images, size=recipe.size, seed=recipe.seed)
        judge = new_judge().to(memory_format=torch.channels_last)

        def loss(images: torch.Tensor, indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            labels = [labels_of(source.character(index), judge.values) for index in indices.tolist()]
            return judge_loss(judge, images, torch.tensor(labels))

        fit(
            judge,
            loss,
            _InOrder(source),
            out / "judge",
            num_images=recipe.judge_images,
            batch_size=32,
            learning_rate=3e-3,
            log=log,
        )
        settle_norms(judge, _fresh_batches(source.size))
        save_judge(judge, path)
    return load_judge(path)


def _fresh_batches(size: int) -> Iterator[torch.Tensor]:
    """20 batches of 64 training pictures."""
    source = ComicSource(1280, size=size)
    for first in range(0, 1280, 64):
        yield stack_images(source.read(index).image for index in range(first, first + 64))


def pretrain_teacher(
    out: Path,
    source: Source,
    recipe: PretrainRecipe,
    *,
    minutes: float | None = None,
    observe: Observer = lambda progress, left: None,
) -> bool:
    """The UNet and text encoders around the VAE in `out/vae`; a diffusers folder `out/teacher` at the end.

    Returns whether the last picture was reached; stopped earlier, the folder holds what there is so far.
    """
    vae = AutoencoderKL.from_pretrained(out / "vae" / "final")
    captions = [source.caption(index) for index in range(0, len(source), max(1, len(source) // 8000))]
    pipeline = build_pipeline(vae, captions, seed=recipe.seed)
    for name in ("unet", "vae"):
        getattr(pipeline, name).to(memory_format=torch.channels_last)
    optimizer = OptimizerSettings(
        recipe.learning_rate, (0.9, 0.99), weight_decay=1e-2, warmup_images=6_000, decay="cosine"
    )
    method = Denoising(from_pipeline(pipeline), DenoisingSettings(optimizer, ema_images=10_000, seed=recipe.seed))
    settings = TrainSettings(recipe.teacher_images, recipe.batch_size, autocast=torch.bfloat16)
    trainer = Trainer(method, settings)

    def batches_from(first_slot: int):
        return batches(
            source,
            batch_size=recipe.batch_size,
            size=(recipe.size, recipe.size),
            first_slot=first_slot,
            last_slot=recipe.teacher_images,
            seed=recipe.seed,
            num_workers=1,
        )

    text = yaml.safe_dump(recipe.__dict__, sort_keys=False)
    finished = run_training(
        trainer, batches_from, out / "teacher-run", recipe_text=text, minutes=minutes, observe=observe
    )
    _export_average(trainer, pipeline, out / "teacher")
    return finished


def _export_average(trainer: Trainer, pipeline: StableDiffusionXLPipeline, out: Path) -> None:
    average = trainer.averages["denoiser"]
    pipeline.unet.load_state_dict(average["unet"].state_dict())
    pipeline.text_encoder.load_state_dict(average["text_0"].state_dict())
    pipeline.text_encoder_2.load_state_dict(average["text_1"].state_dict())
    export_folder(pipeline, out, card="# A small SDXL model, trained by `onestroke pretrain`\n")


@dataclass(frozen=True)
class _InOrder:
    """Pictures of a source by index, as `fit` wants them."""

    source: Source

    def __call__(self, index: int):
        return self.source.read(index).image


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

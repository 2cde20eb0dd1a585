"""Small runs on tiny pipelines: their pictures, their recipe, their trainer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from pipelines import tiny_sd, tiny_sdxl
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from onestroke.config import Recipe, recipe_from
from onestroke.distill.add import ADD
from onestroke.distill.anchors import Anchors, Drawn
from onestroke.distill.features import FeatureNetwork
from onestroke.distill.student import build_student
from onestroke.families.load import from_pipeline
from onestroke.train.trainer import Trainer, TrainSettings
from onestroke.types import Batch

SIZES = ((64, 64), (90, 50), (40, 70), (33, 120), (128, 64), (64, 48))  # width, height of the pictures of a folder


def tiny_batch(count: int = 4, *, first: int = 0, size: int = 32) -> Batch:
    """Pictures `first` .. of an endless smooth random set, with original sizes that differ."""
    slots = torch.arange(first, first + count)
    coarse = torch.stack([torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(int(s))) for s in slots])
    images = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear") * 2 - 1
    sizes = torch.stack([torch.tensor([100 + int(s), 80, int(s) % 5, 1]) for s in slots])
    return Batch(images, tuple(f"picture {int(s)}" for s in slots), slots, sizes)


def tiny_recipe(*overrides: str) -> Recipe:
    """float64, four pictures a step, both conditions, all at the defaults else."""
    return recipe_from({}, [
        "train.precision=float64", "train.batch_size=4", "train.num_images=400", "data.size=32", "data.num_workers=0",
        "train.sample_images=0", "student_optimizer.learning_rate=1e-3", "discriminator_optimizer.learning_rate=1e-3",
        *overrides,
    ])  # fmt: skip


class TinyBackbone(nn.Module):
    """Two random maps, of 8 channels at stride 4 and of 16 at stride 8, for a `FeatureNetwork`."""

    widths, is_spatial, stride, embed_dim = (8, 16), True, 8, 16

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.shallow, self.deep = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 16, 2, stride=2)

    def forward(self, images: Tensor) -> list[Tensor]:
        shallow = self.shallow(images).tanh()
        return [shallow, self.deep(shallow).tanh()]

    def embed(self, images: Tensor) -> Tensor:
        return self.both(images)[1]

    def both(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        features = self(images)
        return features, features[-1].mean(dim=(2, 3))


def tiny_features(dtype: torch.dtype = torch.float64) -> FeatureNetwork:
    return FeatureNetwork(TinyBackbone(), (0.5,) * 3, (0.5,) * 3).to(dtype)


def tiny_add(
    *overrides: str, family: str = "sdxl", kind: str = "epsilon", zero_snr: bool = False,
    dtype: torch.dtype = torch.float64,
) -> ADD:  # fmt: skip
    """ADD of a tiny teacher, as `build.add_trainer` puts it together."""
    recipe = tiny_recipe(*overrides)
    pipeline = {"sdxl": tiny_sdxl, "sd": tiny_sd}[family](kind, zero_snr)
    teacher = from_pipeline(pipeline.to(dtype))
    student = build_student(teacher, recipe.student, seed=recipe.seed).to(dtype)
    method = ADD(teacher, student, tiny_features(dtype), recipe)
    method.heads.to(dtype)
    return method


def tiny_trainer(*overrides: str, **kinds) -> Trainer:
    method = tiny_add(*overrides, **kinds)
    train = method.recipe.train
    return Trainer(method, TrainSettings(train.num_images, train.batch_size, train.micro_batch_size))


def some_anchors(count: int = 5, *, side: int = 8) -> Anchors:
    pictures = torch.randn(count, 4, 4, side, side, generator=torch.Generator().manual_seed(3)).half()
    worded = torch.rand(count, 4, side, side, generator=torch.Generator().manual_seed(4)).half()
    given = torch.cat([torch.zeros_like(pictures[:, :1]), pictures[:, :-1]], 1)
    parts = Drawn(pictures, worded, given)
    shards = [Drawn(*(part[first : first + 3] for part in parts)) for first in range(0, count, 3)]
    return Anchors(shards, [f"anchor {i}" for i in range(count)], seed=0, size=(4 * side, 4 * side))


def endless(batch_size: int = 4):
    """`batches_from` of the endless set."""

    def batches_from(first_slot: int):
        while True:
            yield tiny_batch(batch_size, first=first_slot)
            first_slot += batch_size

    return batches_from


def tiny_dinov2(folder: Path) -> Path:
    """A random DINOv2 of 4 blocks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Dinov2Config(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14)
        Dinov2Model(config).save_pretrained(folder)
    return folder


def write_folder(folder: Path, *, rounds: int = 1) -> Path:
    """An imagefolder of captioned pictures of six sizes, `rounds` of each."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, size in enumerate(SIZES * rounds):
        Image.radial_gradient("L").resize(size).convert("RGB").rotate(30 * i).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"picture number {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


class Spy(nn.Module):
    """A denoiser that keeps the timesteps and inputs that it was asked at."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser, self.asked = denoiser, []

    def forward(self, x_t, t, condition):
        self.asked.append((x_t, t))
        return self.denoiser(x_t, t, condition)

"""The loop that trains the embedded VAE and judge: one network, one loss, pictures by index, exact resume."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from onestroke.errors import NonFiniteLoss, OnestrokeError, ResourceError
from onestroke.precision import autocast_dtype
from onestroke.train.method import OptimizerSettings
from onestroke.train.optimizers import build_optimizer

ImagesAt = Callable[[int], np.ndarray]  # index -> uint8 h w 3


CPU = torch.device("cpu")


@dataclass(frozen=True)
class Machine:
    """Where to train, and how many processes draw or read the pictures; neither changes what is learnt."""

    device: torch.device = CPU
    num_workers: int = 1


def stack_images(pictures: Iterable[np.ndarray]) -> Tensor:
    """uint8 h w 3 pictures as one b 3 h w float tensor in [-1, 1], channels last in memory."""
    stacked = torch.from_numpy(np.stack(list(pictures)))
    return (stacked.float() / 127.5 - 1).permute(0, 3, 1, 2)  # b 3 h w


class _Pictures(Dataset):
    def __init__(self, images_at: ImagesAt, first: int, last: int) -> None:
        self.images_at, self.first, self.last = images_at, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, position: int):
        """The index and the picture, or why there is none: raised in a worker, that would come with its traceback."""
        try:
            return self.first + position, self.images_at(self.first + position)
        except OnestrokeError as error:
            return self.first + position, error


def _collate(rows):
    for index, picture in rows:
        if isinstance(picture, OnestrokeError):
            return index, picture
    return torch.tensor([index for index, _ in rows]), stack_images(picture for _, picture in rows)


def learning_rate_at(progress: float, peak: float) -> float:
    """Linear warm-up over the first 2%, then a cosine to 2% of the peak; `progress` in [0, 1]."""
    if progress < 0.02:
        return peak * max(progress, 1e-4) / 0.02
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def fit(
    model: nn.Module,
    loss_of: Callable[[Tensor, Tensor, torch.Generator], Tensor],
    images_at: ImagesAt,
    out: Path,
    *,
    num_images: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float = 1e-4,
    optimizer_kind: str = "adamw",
    num_workers: int = 1,
    log: Callable[[str], None] = print,
    checkpoint_every: int = 100,
) -> nn.Module:
    """Train `model` in place on pictures 0 .. num_images; ends with its weights averaged (EMA, decay 0.995).

    `loss_of(images, indices, generator)`: images b 3 h w in [-1, 1] on the model's device; the generator, a CPU's, is
    seeded from the position.
    A checkpoint in `out` is continued and ends in the same weights.
    """
    out.mkdir(parents=True, exist_ok=True)
    path, device = out / "training.pt", next(model.parameters()).device
    dtype = autocast_dtype("auto", device)
    settings = OptimizerSettings(learning_rate, optimizer_kind, (0.9, 0.99), weight_decay=weight_decay)
    optimizer = build_optimizer(model, settings)
    average = [parameter.detach().clone() for parameter in model.parameters()]
    done = 0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, done = state["average"], state["done"]
    loader = DataLoader(
        _Pictures(images_at, done, max(done, num_images - num_images % batch_size)),
        batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        prefetch_factor=8,
    )
    model.train()
    started, since, running = time.monotonic(), done, 0.0
    for step, (indices, images) in enumerate(loader, start=1):
        if isinstance(images, OnestrokeError):
            raise images
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(done / num_images, learning_rate)
        generator = torch.Generator().manual_seed(done)
        with torch.autocast(device.type, enabled=dtype is not None, dtype=dtype or torch.bfloat16):
            loss = loss_of(images.to(device), indices, generator)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        value = loss.item()
        if not math.isfinite(value) or not math.isfinite(norm):
            raise NonFiniteLoss(
                f"the {'gradient' if math.isfinite(value) else 'loss'} is not finite", where=f"{out}, picture {done}",
                fix="The last checkpoint is whole. Lower the learning rate or train in float32.",
            )  # fmt: skip
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += len(images)
        decay = min(0.995, (1 + done / batch_size) / (10 + done / batch_size))
        torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 1 - decay)
        running = value if step == 1 else 0.98 * running + 0.02 * value
        if step % checkpoint_every == 0:
            _save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "done": done},
                path,
            )
            rate = (done - since) / (time.monotonic() - started)
            log(f"{done}/{num_images} pictures, loss {running:.4f}, {rate:.1f} pictures/s")
    with torch.no_grad():
        for parameter, mean in zip(model.parameters(), average, strict=True):
            parameter.copy_(mean)
    return model.eval()


def _save(state: dict, path: Path) -> None:
    """Whole or not at all. Raises ResourceError where there is no room."""
    temporary = path.with_suffix(".tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's own writer
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ResourceError(
            f"the checkpoint could not be written ({reason})", where=str(path),
            fix="Free disk space and run again; the last checkpoint is whole.",
        ) from error  # fmt: skip

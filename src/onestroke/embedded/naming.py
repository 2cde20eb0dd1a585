"""Attribute names as a teacher of the teacher: what words mean is learnt before and beside the denoising.

SDXL's text encoders come from CLIP, trained on pictures that no small model will see. Here they first learn to tell
what a caption names (`TextNaming`), which takes minutes: by the denoising loss alone, an eye's word moves two of 256
latents and is not heeded after 100,000 pictures. Beside the denoising loss, the UNet's middle block has to tell what
the clean picture shows (`PictureNaming`), from the noised one and from the text that it attends to: the idea of
representation alignment (REPA, arXiv 2410.06940) with comicset's labels in place of a pretrained network's features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from onestroke.embedded.judge import IGNORED, NOTHING
from onestroke.families.model import DiffusionModel
from onestroke.train.method import Loss, OptimizerSettings, Player
from onestroke.types import Batch

Values = Mapping[str, Sequence[str]]  # attribute -> its values, `NOTHING` first


class NamingHead(nn.Module):
    """Vectors to one distribution per attribute, over its values and `NOTHING`."""

    def __init__(self, width: int, values: Values) -> None:
        super().__init__()
        assert all(names[0] == NOTHING for names in values.values())
        self.sizes = [len(names) for names in values.values()]
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, sum(self.sizes))

    def loss(self, vectors: Float[Tensor, "b d"], labels: Int[Tensor, "b a"]) -> Tensor:
        """Mean cross-entropy over pictures and attributes; `IGNORED` labels count as no error."""
        parts = self.out(self.norm(vectors)).float().split(self.sizes, dim=1)
        losses = [
            F.cross_entropy(logits, labels[:, i], ignore_index=IGNORED, reduction="sum")
            for i, logits in enumerate(parts)
        ]
        return torch.stack(losses).sum() / labels.numel()


def named_labels(named: Mapping[str, str], values: Values) -> list[int]:
    """The index of each attribute's value in `values`, 0 where the caption does not name the attribute."""
    return [names.index(named[name]) if name in named else 0 for name, names in values.items()]


class TextNaming:
    """Train text encoders alone to tell what captions name: one player, cross-entropy; a `Method`.

    `labels_of(slots)`: b a indices into `values`, 0 for not named. The end token's hidden states in the layers that
    the UNet attends to, and the pooled embedding, each have a head.
    """

    def __init__(
        self,
        model: DiffusionModel,
        optimizer: OptimizerSettings,
        values: Values,
        labels_of: Callable[[Int[Tensor, " b"]], Int[Tensor, "b a"]],
    ) -> None:
        self.model, self.labels_of = model, labels_of
        condition = model.encode_prompts(["a person"])
        pooled = 0 if condition.pooled is None else condition.pooled.shape[-1]
        self.heads = nn.ModuleList([NamingHead(width, values) for width in (condition.text.shape[-1], pooled) if width])
        encoders = [encoder.train() for encoder in model.text_encoders]
        self.players = {"text": Player(nn.ModuleList([*encoders, self.heads]), optimizer, ema_images=10_000)}

    @property
    def frozen(self) -> list[nn.Module]:
        """The networks that are not trained."""
        return [self.model.unet, self.model.vae]

    def rollout(self, batch: Batch, due: frozenset[str]) -> tuple[list[Tensor], Tensor]:
        """What the heads read, and the labels."""
        condition = self.model.encode_prompts(batch.captions)
        vectors = [condition.text[:, -1]]  # every token after the caption's last is an end token that has read it all
        if condition.pooled is not None:
            vectors.append(condition.pooled)
        return vectors, self.labels_of(batch.slots)

    def loss(self, player: str, rollout: tuple[list[Tensor], Tensor]) -> Loss:
        vectors, labels = rollout
        losses = [head.loss(vector, labels) for head, vector in zip(self.heads, vectors, strict=True)]
        return Loss(torch.stack(losses).sum())

    def finish_step(self, due: frozenset[str]) -> None:
        """Nothing to do."""


class PictureNaming:
    """A hint for `Denoising`: the middle block's map has to tell what the clean picture shows.

    `labels_of(slots)`: b a indices into `values`, `IGNORED` where the picture hides the attribute.
    """

    def __init__(
        self,
        width: int,
        values: Values,
        labels_of: Callable[[Int[Tensor, " b"]], Int[Tensor, "b a"]],
        *,
        weight: float = 0.1,
    ) -> None:
        self.module, self.labels_of, self.weight = NamingHead(2 * width, values), labels_of, weight

    def loss(self, middle: Float[Tensor, "b d h w"], batch: Batch) -> Tensor:
        """The weighted loss of one batch."""
        pooled = torch.cat([middle.mean(dim=(2, 3)), middle.amax(dim=(2, 3))], dim=1)
        return self.weight * self.module.loss(pooled, self.labels_of(batch.slots).to(middle.device))

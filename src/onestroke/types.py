"""What passes between the rooms.

Shape letters: b pictures, c channels, h w height and width, n tokens, d width of a feature or embedding.
Images are RGB in [-1, 1]; latents are scaled by the VAE's scaling factor; timesteps are integers in [0, 999].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True)
class Condition:
    """What a denoiser is told besides `x_t` and `t`."""

    text: Float[Tensor, "b n d"]  # hidden states of the text encoder(s)
    pooled: Float[Tensor, "b d"] | None = None  # SDXL: projected embedding of the second text encoder
    time_ids: Float[Tensor, "b 6"] | None = None  # SDXL: original height, width, crop top, left, target height, width

    def __getitem__(self, rows) -> Condition:
        """The condition of some of the pictures: `rows` indexes the first axis."""
        return Condition(
            self.text[rows],
            None if self.pooled is None else self.pooled[rows],
            None if self.time_ids is None else self.time_ids[rows],
        )


@dataclass(frozen=True)
class Batch:
    """Pictures of one size with their captions; the pictures as images, as cached latents, or as both."""

    images: Float[Tensor, "b 3 h w"] | None  # RGB in [-1, 1]
    captions: tuple[str, ...]
    slots: Int[Tensor, " b"]  # global picture numbers: seeds of everything random about each picture
    sizes: Int[Tensor, "b 4"]  # original height, width, crop top, crop left, in pixels of the scaled picture
    latents: Float[Tensor, "b c h2 w2"] | None = None  # scaled, as `DiffusionModel.encode_images` gives them
    target: tuple[int, int] | None = None  # height, width of the pictures, where only latents are given
    image_embeddings: Float[Tensor, "b d"] | None = None  # of the whole pictures, as `ImageEmbedder` gives them
    text_embeddings: Float[Tensor, "b d"] | None = None  # of the captions, as `TextEmbedder` gives them

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        size = self.target if self.images is None else tuple(self.images.shape[-2:])
        assert size is not None, "a batch of latents alone says its pictures' size"
        return size

    @property
    def num_pixels(self) -> int:
        """Of one picture; 0 where there are captions alone."""
        return 0 if self.images is None and self.target is None else math.prod(self.picture_size)

    def rows(self, rows: slice) -> Batch:
        """Some of the pictures."""
        given = (self.images, self.latents, self.image_embeddings, self.text_embeddings)
        images, latents, of_images, of_texts = (None if x is None else x[rows] for x in given)
        captions, slots, sizes = self.captions[rows], self.slots[rows], self.sizes[rows]
        return Batch(images, captions, slots, sizes, latents, self.target, of_images, of_texts)

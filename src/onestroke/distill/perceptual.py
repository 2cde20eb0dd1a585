"""How unlike two sets of pictures look to a feature network.

A student that is only as near as it can get to a teacher's latents draws the mean of what they might have been: soft
lines. Between features, the mean of two lines is far from both (LPIPS, arXiv 1801.03924; DMD, arXiv 2311.18828, section
3.2, takes it for its regression loss).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from onestroke.distill.crops import random_crops
from onestroke.distill.decoding import Decoder
from onestroke.distill.features import FeatureNetwork
from onestroke.schedule import exact


def perceptual_distance(
    features: FeatureNetwork, one: Float[Tensor, "b 3 h w"], two: Float[Tensor, "b 3 h w"]
) -> Float[Tensor, " b"]:
    """Mean squared distance of channel-normalised features, averaged over layers (LPIPS without its learnt weights,
    arXiv 1801.03924, section 3), of each pair; no gradient to `two`."""
    with torch.no_grad():
        wanted = features(two)
    dim = 1 if features.is_spatial else 2  # channels
    layers = []
    for a, b in zip(features(one), wanted, strict=True):
        error = F.normalize(exact(a), dim=dim) - F.normalize(exact(b), dim=dim)
        layers.append(error.square().sum(dim).flatten(1).mean(1))
    return torch.stack(layers).mean(0)


@dataclass(frozen=True)
class Perception:
    """Latents compared as the pictures that they decode to, in the part of them that the discriminator looks at."""

    decode: Decoder
    features: FeatureNetwork
    crop: float  # share of each side; 1: whole pictures
    seed: int

    @property
    def modules(self) -> list[nn.Module]:
        """The networks that it looks through, beside the model's own."""
        return [network for network in (self.features, self.decode.tiny) if network is not None]

    def distance(
        self, one: Float[Tensor, "b c h w"], two: Float[Tensor, "b c h w"], slots: Int[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """`perceptual_distance` of both, cut alike; no gradient to `two`."""
        with torch.no_grad():
            wanted = self._shown(two, slots)
        return perceptual_distance(self.features, self._shown(one, slots), wanted)

    def _shown(self, latents: Float[Tensor, "b c h w"], slots: Int[Tensor, " b"]) -> Float[Tensor, "b 3 _ _"]:
        if self.crop == 1:
            return self.decode(latents)
        size = self.decode.picture_size(latents)
        crops = random_crops(size, self.crop, slots, seed=self.seed, stream="anchor crop")
        return self.decode.parts(latents, crops)

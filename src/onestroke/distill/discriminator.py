"""The discriminator's heads on frozen features (ADD, arXiv 2311.17042, section 3.2).

The heads are StyleGAN-T's (arXiv 2301.09515, section 3.2), written from the description.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

Conditioning = Literal["none", "text", "image", "both"]

PROJECTION_DIM = 64  # StyleGAN-T: the last convolution's channels, and the sqrt(64) that the logits are divided by
LEAK = 0.2
SMALL_MAP = 9  # places; of so few a CPU makes a matrix product sooner than a convolution, which wants padding
FIRST_ITERATIONS = 16  # of the power method, before training


class Discriminator(nn.Module):
    """One head per feature of the frozen network; high logits mean real.

    `widths`, `is_spatial`: those of the `FeatureNetwork`. `text_dim`, `image_dim`: widths of the conditions in use.
    `normalise_input`: LayerNorm (no parameters) of each position's channels on the way in. Off, as published: the norm
    after the first convolution already makes a head blind to its feature's overall scale. It helps where a few channels
    dwarf the rest, and R1 stays with respect to the raw features either way.

    Spectral norm's power iteration advances by `advance_spectral_norm` alone, which the trainer calls once after each
    optimizer step; a forward pass, in train or eval mode, changes nothing, so every loss of a step sees one function.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        is_spatial: bool,
        conditioning: Conditioning = "none",
        text_dim: int | None = None,
        image_dim: int | None = None,
        normalise_input: bool = False,
    ) -> None:
        super().__init__()
        self.uses_text, self.uses_image = conditioning in ("text", "both"), conditioning in ("image", "both")
        assert not (self.uses_text and text_dim is None), "conditioning on text needs text_dim"
        assert not (self.uses_image and image_dim is None), "conditioning on images needs image_dim"
        dim = (text_dim or 0) * self.uses_text + (image_dim or 0) * self.uses_image
        self.heads = nn.ModuleList(
            Head(width, is_spatial=is_spatial, condition_dim=dim, normalise_input=normalise_input) for width in widths
        )

    def forward(
        self,
        features: Sequence[Float[Tensor, "b ..."]],
        c_text: Float[Tensor, "b d_text"] | None = None,
        c_img: Float[Tensor, "b d_image"] | None = None,
        has_image: Bool[Tensor, " b"] | None = None,
    ) -> list[Float[Tensor, "b _"]]:
        """Logits per head, one per token or map position (flattened in raster order), in float32 at least.

        `features`: b n d, or b c h w if `is_spatial`; any number of positions. `has_image`: false for pictures whose
        student input was pure noise, so that there is no image to condition on; None means that all have one.
        A condition that is not used may be given, and is ignored.
        """
        assert len(features) == len(self.heads), f"{len(features)} features for {len(self.heads)} heads"
        condition = self.condition(c_text, c_img, has_image)
        return [head(feature, condition) for head, feature in zip(self.heads, features, strict=True)]

    def condition(
        self, c_text: Tensor | None, c_img: Tensor | None, has_image: Tensor | None
    ) -> Float[Tensor, "b d"] | None:
        """What the heads project on: the conditions in use, side by side; None if there are none.

        Each is scaled to a root mean square of 1 (our choice: encoders differ in scale), then `c_img` is zeroed where
        there is no image.
        """
        parts = []
        if self.uses_text:
            assert c_text is not None, "this discriminator is conditioned on text: give c_text"
            parts.append(_unit_rms(c_text))
        if self.uses_image:
            assert c_img is not None, "this discriminator is conditioned on images: give c_img"
            seen = _unit_rms(c_img)
            # where, not a product: an embedding of nothing may hold anything, NaN included
            parts.append(seen if has_image is None else torch.where(rearrange(has_image, "b -> b 1"), seen, 0.0))
        return torch.cat(parts, dim=1) if parts else None

    @torch.no_grad()
    def advance_spectral_norm(self) -> None:
        """One power iteration for every normalised weight; the trainer calls it once after each optimizer step."""
        for module in self.modules():
            if isinstance(module, SpectralConv):
                module.advance()


class Head(nn.Module):
    """1x1, norm, LeakyReLU; a residual block of 9 circular taps; 1x1 to 64; an inner product with the condition.

    Tokens are taken as a map of height 1, so the 9 taps are 1x9 (StyleGAN-T's kernel) there and 3x3 on maps. Norms are
    GroupNorms: a picture's logits depend on no other picture.
    `logit = <out, FC(c)> / sqrt(64)` at each position; FC's bias is what an unconditional head projects on.

    Two steps are taken in another order than said, for the same numbers from fewer operations: a norm follows on a
    convolution times its sigma, not divided by it; and a picture has one condition, so that the last convolution's
    transpose is applied to that, not the convolution to each position.
    """

    def __init__(self, width: int, *, is_spatial: bool, condition_dim: int, normalise_input: bool) -> None:
        super().__init__()
        self.is_spatial, self.normalise_input = is_spatial, normalise_input
        self.enter = SpectralConv(width, width, (1, 1))
        self.enter_norm = _group_norm(width)
        self.residual = SpectralConv(width, width, (3, 3) if is_spatial else (1, 9))
        self.residual_norm = _group_norm(width)
        self.leave = SpectralConv(width, PROJECTION_DIM, (1, 1))
        # Unit variance for either part (our choice), c having a root mean square of 1.
        self.fc_bias = nn.Parameter(torch.randn(PROJECTION_DIM))
        shape = (PROJECTION_DIM, condition_dim)
        self.fc_weight = nn.Parameter(torch.randn(shape) * condition_dim**-0.5) if condition_dim else None

    def forward(self, feature: Tensor, condition: Float[Tensor, "b d"] | None) -> Float[Tensor, "b _"]:
        assert feature.ndim == (4 if self.is_spatial else 3), f"a feature of shape {tuple(feature.shape)}"
        x = feature if self.is_spatial else rearrange(feature, "b n d -> b d 1 n")
        if self.normalise_input:
            x = rearrange(F.layer_norm(rearrange(x, "b d h w -> b h w d"), x.shape[1:2]), "b h w d -> b d h w")
        x = F.leaky_relu(self.enter_norm(self.enter(x)), LEAK)
        x = x + F.leaky_relu(self.residual_norm(self.residual(x)), LEAK)  # sqrt(2) of the block's output
        return self._logits(rearrange(x, "b d h w -> b (h w) d"), self._projection(condition))

    def _logits(self, x: Float[Tensor, "b n d"], projection: Float[Tensor, "_ 64"]) -> Float[Tensor, "b n"]:
        """`<leave(x / sqrt(2)), projection> / sqrt(64)`, in float32 at least."""
        with torch.autocast(x.device.type, enabled=False):
            projection = projection.expand(len(x), -1) / PROJECTION_DIM**0.5
            direction = projection @ self.leave.weight.flatten(1) * (0.5**0.5 / self.leave.sigma())
            offset = rearrange(projection @ self.leave.bias, "b -> b 1 1")
            return torch.baddbmm(offset, _exact(x), rearrange(direction, "b d -> b d 1")).squeeze(2)

    def _projection(self, condition: Tensor | None) -> Float[Tensor, "b 64"]:
        """FC(c), b 64; 1 64 without a condition."""
        if self.fc_weight is None or condition is None:
            return rearrange(self.fc_bias, "d -> 1 d")
        return _exact(F.linear(condition, self.fc_weight.to(condition.dtype), self.fc_bias.to(condition.dtype)))


class SpectralConv(nn.Module):
    """A circular convolution of stride 1 under spectral norm (arXiv 1802.05957) that forward passes never advance.

    It gives `sigma` times its output, `conv(x, W) + sigma bias`, of which a norm that follows makes the same (but for
    its epsilon): where a map is smaller than its kernel's weights, dividing these, both ways, takes longer than the
    convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int]) -> None:
        super().__init__()
        plain = nn.Conv2d(in_channels, out_channels, kernel)
        self.weight, self.bias = plain.weight, plain.bias
        self.register_buffer("u", F.normalize(torch.randn(out_channels), dim=0))  # left and right singular vectors
        self.register_buffer("v", F.normalize(torch.randn(in_channels * math.prod(kernel)), dim=0))
        for _ in range(FIRST_ITERATIONS if plain.weight.device.type != "meta" else 0):
            self.advance()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b _ h w"]:
        """The normalised convolution, times `sigma`."""
        (kernel_h, kernel_w), (h, w) = self.weight.shape[-2:], x.shape[-2:]
        bias = self.bias * self.sigma()
        if x.device.type == "cpu" and h * w <= SMALL_MAP:
            around = torch.tensor(neighbours(h, w, kernel_h, kernel_w), dtype=x.dtype)
            taken = rearrange(x.flatten(2) @ around, "b c (n taps) -> (b n) (c taps)", n=h * w)
            return rearrange(F.linear(taken, self.weight.flatten(1), bias), "(b h w) c -> b c h w", h=h, w=w)
        x = circular_pad(circular_pad(x, kernel_h // 2, dim=-2), kernel_w // 2, dim=-1)
        return F.conv2d(x, self.weight, bias)

    def sigma(self) -> Float[Tensor, ""]:
        """The weight's largest singular value, as far as the power iteration has come; in the weight's precision."""
        with torch.autocast(self.weight.device.type, enabled=False):
            # Clones: `advance` may write to the vectors before the backward pass.
            return self.u.clone() @ (self.weight.flatten(1) @ self.v.clone())

    @torch.no_grad()
    def advance(self) -> None:
        """One power iteration."""
        with torch.autocast(self.weight.device.type, enabled=False):
            matrix = self.weight.flatten(1)
            self.u.copy_(F.normalize(matrix @ self.v, dim=0))
            self.v.copy_(F.normalize(matrix.T @ self.u, dim=0))


@lru_cache
def neighbours(h: int, w: int, kernel_h: int, kernel_w: int) -> np.ndarray:
    """What takes from a map, flattened in raster order, each place's taps in turn, round its edges: n (n taps)."""
    places = np.arange(h * w).reshape(h, w)
    shifts = product(range(-(kernel_h // 2), kernel_h // 2 + 1), range(-(kernel_w // 2), kernel_w // 2 + 1))
    taps = np.stack([np.roll(places, (-y, -x), (0, 1)) for y, x in shifts], axis=-1)
    return np.eye(h * w, dtype=np.float32)[:, taps.ravel()]


def circular_pad(x: Tensor, padding: int, *, dim: int) -> Tensor:
    """`x` continued periodically by `padding` on both ends of `dim`, round more than once where it is that short."""
    size = x.shape[dim]
    if padding == 0:
        return x
    if padding <= size:
        return torch.cat([x.narrow(dim, size - padding, padding), x, x.narrow(dim, 0, padding)], dim)
    index = torch.arange(-padding, size + padding, device=x.device) % size
    return x.index_select(dim, index)


def _group_norm(width: int) -> nn.GroupNorm:
    """Groups of 8 channels or more, 32 groups at most: one channel alone would vanish on a map of one position."""
    most = max(1, min(32, width // 8))
    return nn.GroupNorm(next(g for g in range(most, 0, -1) if width % g == 0), width)


def _unit_rms(c: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    exact = _exact(c)
    return exact * (exact.square().mean(dim=1, keepdim=True) + 1e-6).rsqrt()


def _exact(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

"""The embedded VAE: 128 px comic pictures to 16 x 16 x 8 latents, small enough to decode in 5 ms on a CPU core."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from onestroke.embedded.fit import fit

LATENT_CHANNELS = 8  # 4, as in SDXL, lost mouths and mixed up colours after equal training


@dataclass(frozen=True)
class AutoencoderRecipe:
    num_images: int = 36_000
    batch_size: int = 8
    learning_rate: float = 1e-3
    kl_weight: float = 5e-4  # per latent element, beside the per-pixel distances


def build_autoencoder() -> AutoencoderKL:
    """An untrained VAE. 16 channels at full resolution: the decoder's cost, and with it the 1-step latency, lie there."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,  # one group: on a CPU the backward pass of 8 groups of 2 channels takes 5 times as long
        sample_size=128,
    )


def autoencoder_loss(vae: AutoencoderKL, images: Tensor, noise: Tensor, *, kl_weight: float) -> Tensor:
    """Per-pixel L1 and squared distance plus the per-element Kullback-Leibler distance of the latents from N(0, 1).

    `images` b 3 h w in [-1, 1]; `noise` standard normal of the latents' shape.
    """
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    error = decoded - images
    return error.abs().mean() + error.square().mean() + kl_weight * divergence


def train_autoencoder(
    out: Path, images_at, recipe: AutoencoderRecipe = AutoencoderRecipe(), *, log=print
) -> AutoencoderKL:
    """Train on `images_at(index) -> uint8 h w 3`; resumes from the checkpoint in `out`. Sets `scaling_factor`."""
    torch.manual_seed(0)
    vae = build_autoencoder().to(memory_format=torch.channels_last)

    def loss(images: Tensor, indices: Tensor, generator: torch.Generator) -> Tensor:
        side = images.shape[-1] // 8
        noise = torch.randn(len(images), LATENT_CHANNELS, side, side, generator=generator)
        return autoencoder_loss(vae, images, noise, kl_weight=recipe.kl_weight)

    fit(
        vae,
        loss,
        images_at,
        out,
        num_images=recipe.num_images,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        log=log,
    )
    vae.register_to_config(scaling_factor=_scaling_factor(vae, images_at))
    return vae


@torch.inference_mode()
def _scaling_factor(vae: AutoencoderKL, images_at, *, num_images: int = 512) -> float:
    """1 / standard deviation of the latents, so that diffusion sees unit variance (LDM, arXiv 2112.10752, 3.2)."""
    from onestroke.embedded.fit import stack_images

    batches = [range(first, first + 32) for first in range(0, num_images, 32)]
    latents = [vae.encode(stack_images(map(images_at, batch))).latent_dist.mean for batch in batches]
    return 1.0 / torch.cat(latents).std().item()

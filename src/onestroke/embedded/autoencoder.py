"""The embedded VAE: 128 px comic pictures to 16 x 16 x 8 latents, small enough to decode in 5 ms on a CPU core."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor, nn

from onestroke.distill.features import load_features
from onestroke.distill.perceptual import perceptual_distance
from onestroke.embedded.fit import ImagesAt, Machine, fit, stack_images

LATENT_CHANNELS = 8  # 4, as in SDXL, lost mouths and mixed up colours after equal training


@dataclass(frozen=True)
class AutoencoderRecipe:
    num_images: int = 84_000
    batch_size: int = 8
    learning_rate: float = 1e-3
    kl_weight: float = 5e-4  # per latent element, beside the per-pixel distances
    perceptual_weight: float = 0.5


@dataclass(frozen=True)
class DecoderRecipe:
    num_images: int = 24_000
    batch_size: int = 8
    learning_rate: float = 1.5e-3
    perceptual_weight: float = 0.5


def build_autoencoder() -> AutoencoderKL:
    """An untrained VAE. 16 channels at full resolution: the decoder's cost, and the 1-step latency, lie there."""
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


def autoencoder_loss(
    vae: AutoencoderKL,
    images: Tensor,
    noise: Tensor,
    *,
    kl_weight: float,
    perceptual: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Per-pixel L1 and squared distance, a perceptual distance, and the per-element Kullback-Leibler distance of the
    latents from N(0, 1).

    `images` b 3 h w in [-1, 1]; `noise` standard normal of the latents' shape.
    """
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    error = decoded - images
    return error.abs().mean() + error.square().mean() + perceptual(decoded, images) + kl_weight * divergence


def _perceptual(weight: float, machine: Machine) -> Callable[[Tensor, Tensor], Tensor]:
    features = load_features("efficientnet-lite0").to(machine.device)
    return lambda decoded, images: weight * perceptual_distance(features, decoded, images).mean()


def train_autoencoder(
    out: Path,
    images_at: ImagesAt,
    recipe: AutoencoderRecipe = AutoencoderRecipe(),
    *,
    machine: Machine = Machine(),
    log=print,
) -> AutoencoderKL:
    """Train on `images_at(index) -> uint8 h w 3`; resumes from the checkpoint in `out`. Its latents end normalised.

    The VAE comes back on the CPU.
    """
    torch.manual_seed(0)
    vae = build_autoencoder().to(machine.device, memory_format=torch.channels_last)
    perceptual = _perceptual(recipe.perceptual_weight, machine)

    def loss(images: Tensor, indices: Tensor, generator: torch.Generator) -> Tensor:
        side = images.shape[-1] // 8
        noise = torch.randn(len(images), LATENT_CHANNELS, side, side, generator=generator)
        return autoencoder_loss(vae, images, noise.to(images), kl_weight=recipe.kl_weight, perceptual=perceptual)

    fit(
        vae,
        loss,
        images_at,
        out,
        num_images=recipe.num_images,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        num_workers=machine.num_workers,
        log=log,
    )
    vae.cpu()
    normalise_latents(vae, [stack_images(map(images_at, range(n, n + 32))) for n in range(0, 512, 32)])
    return vae


def decoder_loss(
    vae: AutoencoderKL,
    latents: Float[Tensor, "b c h w"],
    images: Float[Tensor, "b 3 _ _"],
    more: Float[Tensor, "b h w"],
    *,
    perceptual: Callable[[Tensor, Tensor], Tensor],
) -> Float[Tensor, ""]:
    """The distances of `autoencoder_loss`, for given latents; `more` is what each of their places counts beyond 1.

    `images` in [-1, 1].
    """
    decoded = vae.decode(latents).sample
    error = decoded.float() - images
    weight = 1 + F.interpolate(more[:, None], size=images.shape[-2:])  # b 1 h w
    return (weight * (error.abs() + error.square())).mean() + perceptual(decoded, images)


def train_decoder(
    vae: AutoencoderKL,
    out: Path,
    images_at: ImagesAt,
    latents_at: Callable[[Tensor], Float[Tensor, "b c h w"]],
    more_at: Callable[[Tensor], Float[Tensor, "b h w"]],
    recipe: DecoderRecipe = DecoderRecipe(),
    *,
    machine: Machine = Machine(),
    log=print,
) -> AutoencoderKL:
    """Train the decoder of a trained `vae` on; its latents, and all that was learnt from them, stay what they are.

    By index: `images_at` gives uint8 h w 3, `latents_at` their latents' means and `more_at` what each place counts
    beyond 1. Resumes from the checkpoint in `out`. The VAE comes back on the CPU.
    """
    torch.manual_seed(0)
    vae.to(machine.device, memory_format=torch.channels_last)
    perceptual = _perceptual(recipe.perceptual_weight, machine)
    spread = _posterior_std(vae, [stack_images(map(images_at, range(64)))]).to(machine.device)

    def loss(images: Tensor, indices: Tensor, generator: torch.Generator) -> Tensor:
        means = latents_at(indices).float()
        noise = torch.randn(means.shape, generator=generator)
        latents = means.to(images) + spread * noise.to(images)
        return decoder_loss(vae, latents, images, more_at(indices).to(images), perceptual=perceptual)

    fit(
        nn.ModuleList([vae.post_quant_conv, vae.decoder]),
        loss,
        images_at,
        out,
        num_images=recipe.num_images,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        optimizer_kind="muon",
        num_workers=machine.num_workers,
        log=log,
    )
    return vae.cpu().eval()


@torch.no_grad()
def _posterior_std(vae: AutoencoderKL, batches: Sequence[Tensor]) -> Float[Tensor, "1 c 1 1"]:
    """How far each channel's latents may lie from their mean, as the encoder has it."""
    device = next(vae.parameters()).device
    stds = torch.cat([vae.encode(images.to(device)).latent_dist.std for images in batches])
    return stds.mean(dim=(0, 2, 3), keepdim=True)


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, batches: Sequence[Tensor]) -> None:
    """Give every latent channel mean 0 and variance 1 over `batches` (b 3 h w), with a scaling factor of 1.

    The 1x1 convolutions at the VAE's waist take the change up, so the VAE computes the same pictures. One factor for
    all channels, as in LDM (arXiv 2112.10752, 3.2), would leave them up to fourfold apart, and the noise with them.
    """
    latents = torch.cat([vae.encode(images).latent_dist.mean for images in batches])
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    into, out_of, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    into.weight[:channels] /= std[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) / std
    into.bias[channels:] -= 2 * std.log()  # the logarithm of the posterior's variance
    out_of.bias += out_of.weight[:, :, 0, 0] @ mean
    out_of.weight *= std[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)

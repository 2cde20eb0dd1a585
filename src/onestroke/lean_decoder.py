"""A VAE's decoder on a CPU with its weights laid out once, and without what changes nothing.

oneDNN's convolutions want weights in blocks, into which PyTorch brings plain ones anew in every call. Of one small
picture's decoding that, divisions by one, dropout and copies are an eighth.
"""

from __future__ import annotations

import platform
from functools import cache

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from jaxtyping import Float
from torch import Tensor, nn

from onestroke.upsampling import MergedUpsample2D

MACHINES = ("x86_64", "AMD64")  # where it was measured


def make_lean(decoder: nn.Module) -> int:
    """Change a diffusers decoder that is to draw, on a CPU and in its final dtype, in place; returns how many parts.

    Its weights then lie in memory twice. What is saved stays as it is; changes to the weights change nothing any more.
    In another dtype, on another device and where gradients are asked for, each part computes as it did before.
    """
    if not packs_weights(next(decoder.parameters()).dtype):
        return 0
    found = 0
    for part in list(decoder.modules()):
        if kind := _lean(part):
            part.__class__ = kind
            part.prepare()
            found += 1
    return found


@cache
@torch.no_grad()
def packs_weights(dtype: torch.dtype) -> bool:
    """Whether this PyTorch does so on this machine: the operations are those of its compiler, and may change.

    A CPU with AVX2 alone packs no bfloat16.
    """
    if platform.machine() not in MACHINES or not torch.backends.mkldnn.is_available():
        return False
    layer = nn.utils.skip_init(nn.Conv2d, 1, 1, 1, dtype=dtype)
    upsample = Upsample2D(1)
    upsample.conv, upsample.merged = layer, torch.ones(1, 1, 4, 4, dtype=dtype)
    picture = torch.ones(1, 1, 2, 2, dtype=dtype)
    try:
        for part, kind in ((layer, _PackedConv2d), (upsample, _PackedUpsample2D)):
            part.__class__ = kind
            part.prepare()
        return layer(layer.added(picture, picture)).shape == picture.shape and upsample(picture).shape[-1] == 4
    except (AttributeError, RuntimeError, TypeError):
        return False


class _Packs(nn.Module):
    """A layer with a copy of its weights in blocks, `packed`, which it makes anew where it is copied."""

    packed: Tensor

    def prepare(self) -> None:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "packed"}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self.prepare()


class _PackedConv2d(_Packs, nn.Conv2d):
    """A convolution with its weights in blocks."""

    def prepare(self) -> None:
        self.packed = torch.ops.mkldnn._reorder_convolution_weight(
            self.weight.detach(), self.padding, self.stride, self.dilation, self.groups
        )

    @property
    def _window(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
        return self.padding, self.stride, self.dilation, self.groups

    def forward(self, input: Float[Tensor, "n into h w"]) -> Float[Tensor, "n out _ _"]:
        if not _draws(input, self.packed.dtype):
            return super().forward(input)
        return torch.ops.mkldnn._convolution_pointwise(input, self.packed, self.bias, *self._window, "none", [], "")

    def added(
        self, other: Float[Tensor, "n out h w"], input: Float[Tensor, "n into _ _"]
    ) -> Float[Tensor, "n out h w"]:
        """`other` and the convolution of `input`, rounded once."""
        return torch.ops.mkldnn._convolution_pointwise.binary(
            input, other, self.packed, self.bias, *self._window, "add", 1.0, None, [], None
        )


class _PackedUpsample2D(_Packs, MergedUpsample2D):
    """Upsampling and the convolution after it, merged, with the weights of the two in blocks."""

    def prepare(self) -> None:
        self.packed = torch.ops.mkldnn._reorder_convolution_transpose_weight(self.merged, *self._window[:4], 1)

    @property
    def _window(self) -> tuple[tuple[int, int], ...]:
        return (1, 1), (0, 0), (2, 2), (1, 1)  # padding, output padding, stride, dilation

    def forward(
        self, hidden_states: Float[Tensor, "n into h w"], output_size: int | None = None
    ) -> Float[Tensor, "n out 2h 2w"]:
        if output_size is not None or not _draws(hidden_states, self.packed.dtype):
            return super().forward(hidden_states, output_size)
        return torch.ops.mkldnn._convolution_transpose_pointwise(
            hidden_states, self.packed, self.conv.bias, *self._window, 1, "none", [], ""
        )


class _LeanResnet(ResnetBlock2D):
    """Without dropout, and the sum of both ways inside the last convolution."""

    def prepare(self) -> None:
        """Its convolutions are prepared on their own."""

    def forward(self, input_tensor: Float[Tensor, "n into h w"], temb: None = None) -> Float[Tensor, "n out h w"]:
        if not _draws(input_tensor, self.conv2.packed.dtype):
            return super().forward(input_tensor, temb)
        hidden = self.conv1(F.silu(self.norm1(input_tensor), inplace=True))
        hidden = F.silu(self.norm2(hidden), inplace=True)
        other = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return self.conv2.added(other, hidden)


class _LeanAttention(Attention):
    """Attention of a picture's places to each other: queries, keys and values by one product, nothing copied before."""

    def prepare(self) -> None:
        projections = (self.to_q, self.to_k, self.to_v)
        self.joined = tuple(
            torch.cat([getattr(layer, name).detach() for layer in projections]) for name in ("weight", "bias")
        )

    def forward(self, hidden_states: Float[Tensor, "n c h w"], **others: None) -> Float[Tensor, "n c h w"]:
        weight, bias = self.joined
        if not _draws(hidden_states, weight.dtype):
            return super().forward(hidden_states, **others)
        n, c, h, w = hidden_states.shape
        places = self.group_norm(hidden_states).permute(0, 2, 3, 1).reshape(n, h * w, c)
        heads = F.linear(places, weight, bias).view(n, h * w, 3, self.heads, c // self.heads)
        seen = F.scaled_dot_product_attention(*heads.permute(2, 0, 3, 1, 4))
        changed = self.to_out[0](seen.transpose(1, 2).reshape(n, h * w, c))
        return hidden_states + changed.view(n, h, w, c).permute(0, 3, 1, 2)


def _draws(input: Tensor, dtype: torch.dtype) -> bool:
    return not torch.is_grad_enabled() and input.dtype == dtype and input.device.type == "cpu"


def _lean(part: nn.Module) -> type | None:
    """What takes the place of a part's class; None where it does more than what is made lean here."""
    if type(part) is nn.Conv2d and part.padding_mode == "zeros" and not isinstance(part.padding, str):
        return _PackedConv2d
    if type(part) is ResnetBlock2D and _adds_plainly(part):
        return _LeanResnet
    if type(part) is MergedUpsample2D:
        return _PackedUpsample2D
    if type(part) is Attention and _attends_plainly(part):
        return _LeanAttention
    return None


def _adds_plainly(part: ResnetBlock2D) -> bool:
    return (
        part.time_emb_proj is None
        and part.time_embedding_norm != "scale_shift"
        and part.output_scale_factor == 1
        and isinstance(part.nonlinearity, nn.SiLU)
        and part.upsample is None
        and part.downsample is None
        and type(part.conv2) is nn.Conv2d
        and not part.training
    )


def _attends_plainly(part: Attention) -> bool:
    return (
        type(part.processor) is AttnProcessor2_0
        and part.residual_connection
        and part.rescale_output_factor == 1
        and part.group_norm is not None
        and part.spatial_norm is None
        and part.norm_q is None
        and part.norm_k is None
        and not part.is_cross_attention
        and part.inner_dim == part.query_dim == part.out_dim
        and part.to_q.bias is not None
        and not part.training
    )

"""Nearest-neighbour upsampling and the convolution after it as one transposed convolution: the same numbers, sooner."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from jaxtyping import Float
from torch import Tensor, nn

# Where the three taps of a row fall on the picture before it was enlarged. An even pixel 2i sees pixel i - 1 by its
# first tap and i by the two others, an odd one sees i by the first two and i + 1 by its last; rows are the taps of a
# transposed convolution with stride 2 and padding 1.
TAPS = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))


def merge_upsampling(module: nn.Module) -> int:
    """Change every `Upsample2D` of `module` that a 3 x 3 convolution ends, in place; returns how many those are.

    Four of nine products are left for each pixel, and the enlarged picture is never made. The weights that are saved
    stay as they are; once merged, changes to them change nothing.
    """
    found = [part for part in module.modules() if type(part) is Upsample2D and _is_plain(part)]
    for part in found:
        part.register_buffer("merged", merged_weight(part.conv.weight.detach()), persistent=False)
        part.__class__ = MergedUpsample2D
    return len(found)


def merged_weight(weight: Float[Tensor, "out into 3 3"]) -> Float[Tensor, "into out 4 4"]:
    """The transposed convolution's weight."""
    taps = torch.tensor(TAPS, dtype=torch.float32, device=weight.device)
    return torch.einsum("oikl,pk,ql->iopq", weight.float(), taps, taps).to(weight.dtype)


class MergedUpsample2D(Upsample2D):
    """An `Upsample2D` with a buffer `merged`."""

    def forward(
        self, hidden_states: Float[Tensor, "n into h w"], output_size: int | None = None, *args, **kwargs
    ) -> Float[Tensor, "n out 2h 2w"]:
        """Twice as high and wide; to another `output_size` as before."""
        if output_size is not None:
            return super().forward(hidden_states, output_size, *args, **kwargs)
        return F.conv_transpose2d(hidden_states, self.merged, self.conv.bias, stride=2, padding=1)


def _is_plain(part: Upsample2D) -> bool:
    conv = part.conv if part.use_conv and part.name == "conv" else None
    return (
        isinstance(conv, nn.Conv2d)
        and not part.use_conv_transpose
        and part.interpolate
        and part.norm is None
        and (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )

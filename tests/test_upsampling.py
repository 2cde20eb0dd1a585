"""Merged upsampling: the numbers of the two operations it stands for, and what it leaves alone."""

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from pipelines import tiny_sdxl

from onestroke.fast import make_fast
from onestroke.upsampling import merge_upsampling, merged_weight


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (4, 4), (7, 3)])
def test_it_is_nearest_upsampling_and_the_convolution_after_it(height, width):
    layer = Upsample2D(5, use_conv=True, out_channels=3).double()
    pictures = torch.randn(2, 5, height, width, dtype=torch.float64)
    expected = layer(pictures)
    assert merge_upsampling(layer) == 1 and merge_upsampling(layer) == 0
    layer.merged = merged_weight(layer.conv.weight.detach().float()).double()  # the sums are made in float32
    found = layer(pictures)
    assert found.shape == (2, 3, 2 * height, 2 * width) and torch.allclose(found, expected, rtol=0, atol=1e-6)


def test_one_bright_pixel_by_hand():
    """Weights 1 to 9 and the pixel's four copies: a corner of the enlarged block sees four taps, its neighbour two."""
    layer = Upsample2D(1, use_conv=True)
    layer.conv.weight.data = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3)
    layer.conv.bias.data.zero_()
    merge_upsampling(layer)
    pictures = torch.zeros(1, 1, 3, 3)
    pictures[0, 0, 1, 1] = 1.0
    expected = [[9, 17, 15, 7], [15, 28, 24, 11], [9, 16, 12, 5], [3, 5, 3, 1]]
    assert layer(pictures)[0, 0, 1:5, 1:5].tolist() == expected and layer(pictures).sum() == 4 * 45


def test_another_size_and_other_layers_stay_as_they_are():
    layer = Upsample2D(2, use_conv=True)
    pictures = torch.randn(1, 2, 4, 4)
    expected = layer(pictures, (7, 9))
    merge_upsampling(layer)
    assert torch.equal(layer(pictures, (7, 9)), expected)
    others = (
        Upsample2D(2),
        Upsample2D(2, use_conv_transpose=True),
        Upsample2D(2, use_conv=True, name="Conv2d_0"),
        Upsample2D(2, use_conv=True, kernel_size=1, padding=0),
        Upsample2D(2, use_conv=True, interpolate=False),
    )
    assert [merge_upsampling(other) for other in others] == [0] * 5


def test_a_fast_pipeline_decodes_the_same_pictures_and_saves_the_same_weights(tmp_path):
    plain, fast = tiny_sdxl(), make_fast(tiny_sdxl()).to(torch.float32)
    latents = torch.randn(2, 4, 16, 16)
    assert sum(hasattr(part, "merged") for part in fast.vae.modules()) == 2
    assert not any(hasattr(part, "merged") for part in fast.unet.modules())  # a LoRA may change its convolutions
    with torch.inference_mode():
        one, two = plain.vae.bfloat16().float().decode(latents).sample, fast.vae.decode(latents).sample
    assert torch.allclose(one, two, rtol=0, atol=0.02 * float(one.abs().max()))
    assert plain.vae.state_dict().keys() == fast.vae.state_dict().keys()

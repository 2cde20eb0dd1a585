"""Decoding for the discriminator in little memory: by chunks, at a smaller size, by a tiny autoencoder."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from pipelines import tiny_sdxl
from tiny_runs import tiny_add, tiny_batch, tiny_trainer

from onestroke.config import DecodeRecipe, recipe_from
from onestroke.data.comicset.dataset import ComicSource
from onestroke.distill.add import DISCRIMINATOR, STUDENT
from onestroke.distill.crops import Crops, random_crops
from onestroke.distill.decoding import Decoder
from onestroke.embedded import embedded_teacher
from onestroke.embedded.fit import stack_images
from onestroke.errors import ModelError, RecipeError
from onestroke.families.load import from_pipeline

BOTH = frozenset({STUDENT, DISCRIMINATOR})


def tiny_autoencoder(folder, *, channels=4, levels=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        widths, counts = (8,) * levels, (1,) * levels
        AutoencoderTiny(
            encoder_block_out_channels=widths, decoder_block_out_channels=widths, latent_channels=channels,
            num_encoder_blocks=counts, num_decoder_blocks=counts,
        ).save_pretrained(folder)  # fmt: skip
    return folder


def decoder(**settings):
    model = from_pipeline(tiny_sdxl().to(torch.float64))
    return Decoder(model, DecodeRecipe(**settings)), model


def gradients(*overrides):
    """Of student and heads, after one batch of four."""
    trainer = tiny_trainer(*overrides)
    trainer._backward(tiny_batch(), BOTH, 1.0, {})
    return [p.grad for player in trainer.method.players.values() for p in player.module.parameters()]


@pytest.mark.parametrize("distance", ["pixel", "latent"])
@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_chunks_with_recomputation_give_the_gradients_of_the_whole(chunk, distance):
    whole = gradients(f"losses.distance={distance}")
    chunked = gradients(f"losses.distance={distance}", f"decode.chunk={chunk}")
    assert max(g.abs().max() for g in whole) > 1e-6
    for one, two in zip(whole, chunked, strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-9)


def test_chunks_keep_only_the_latents_for_the_backward_pass():
    def kept(**settings):
        decode, _ = decoder(**settings)
        latents = torch.randn(4, 4, 8, 8, dtype=torch.float64, requires_grad=True)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            decode(latents).sum().backward()
        return sizes

    calls = []
    decode, _ = decoder(chunk=1)
    original = AutoencoderKL.decode
    try:
        AutoencoderKL.decode = lambda self, z: calls.append(len(z)) or original(self, z)
        latents = torch.randn(3, 4, 8, 8, dtype=torch.float64, requires_grad=True)
        images = decode(latents)
        assert calls == [1, 1, 1]
        images.sum().backward()
        assert calls == [1] * 6  # once more each
        decode(latents.detach())
        assert calls == [1] * 9
    finally:
        AutoencoderKL.decode = original
    assert sum(kept(chunk=1)) <= sum(kept()) / 2


def test_a_chunk_decodes_what_the_vae_decodes():
    latents = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    decode, model = decoder(chunk=2)
    torch.testing.assert_close(decode(latents), model.decode_latents(latents), atol=1e-12, rtol=1e-9)


def test_scale_shrinks_what_is_decoded_and_the_real_pictures_alike():
    decode, model = decoder(scale=0.5)
    latents = torch.randn(2, 4, 8, 6, dtype=torch.float64)
    images = torch.randn(2, 3, 32, 24, dtype=torch.float64)
    assert decode(latents).shape == decode.resized(images).shape == (2, 3, 16, 12)
    shrunk = latents.reshape(2, 4, 4, 2, 3, 2).mean(dim=(3, 5))  # each the mean of four
    torch.testing.assert_close(decode(latents), model.decode_latents(shrunk))
    flat = torch.full((1, 3, 32, 32), 0.3, dtype=torch.float64)
    torch.testing.assert_close(decode.resized(flat), flat[:, :, :16, :16])
    assert decoder(scale=0.01)[0](latents).shape == (2, 3, 4, 4)  # one latent at least


@pytest.mark.parametrize("real", ["data", "reconstructed"])
def test_a_step_at_reduced_resolution_shows_all_pictures_at_one_size(real):
    method = tiny_add("decode.scale=0.5", f"discriminator.real={real}")
    seen = []
    method.features.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    original = method.features.forward_and_embed
    method.features.forward_and_embed = lambda images: seen.append(images.shape) or original(images)
    rollout = method.rollout(tiny_batch(size=32), BOTH)
    assert set(seen) == {(4, 3, 16, 16)} and len(seen) == 2
    assert rollout.x0.shape == rollout.target.x0.shape == (4, 3, 16, 16)
    method.loss(STUDENT, rollout).total.backward()
    assert all(p.grad is not None for p in method.players[STUDENT].module.parameters())


def test_a_tiny_autoencoder_decodes_in_the_vaes_place(tmp_path):
    folder = tiny_autoencoder(tmp_path / "tiny")
    decode, _ = decoder(autoencoder=str(folder), chunk=1)
    latents = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    images = decode(latents)
    tiny = AutoencoderTiny.from_pretrained(folder).double()
    torch.testing.assert_close(images, tiny.decode(latents).sample)
    images.sum().backward()
    assert latents.grad.abs().max() > 0 and not any(p.requires_grad for p in decode.tiny.parameters())
    steps = gradients(f"decode.autoencoder={folder}")
    assert all(g is not None and g.isfinite().all() for g in steps)


def test_a_tiny_autoencoder_of_another_family_or_none_is_one_line(tmp_path):
    for i, settings in enumerate(({"channels": 8}, {"levels": 4})):
        folder = tiny_autoencoder(tmp_path / str(i), **settings)
        with pytest.raises(RecipeError, match=r"the teacher's VAE 4 channels 4-fold") as caught:
            decoder(autoencoder=str(folder))
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"decode.autoencoder .*nothing: no tiny autoencoder can be loaded"):
        decoder(autoencoder=str(tmp_path / "nothing"))


@pytest.mark.parametrize("line", ["decode.chunk=0", "decode.scale=0", "decode.scale=1.5"])
def test_a_decode_out_of_range_is_named(line):
    with pytest.raises(RecipeError, match=line.split("=")[0]):
        recipe_from({}, [line])


def crops_of(share, size=(64, 64), count=3):
    return random_crops(size, share, torch.arange(count) + 5, seed=0, stream="crop")


def test_parts_without_a_margin_are_cut_from_the_whole_picture():
    decode, _ = decoder()
    latents, crops = torch.randn(3, 4, 8, 8, dtype=torch.float64), crops_of(0.5, size=(32, 32))
    whole = decode(latents)
    for i, part in enumerate(decode.parts(latents, crops)):
        top, left = crops.tops[i], crops.lefts[i]
        assert torch.equal(part, whole[i, :, top : top + 16, left : left + 16])


@pytest.mark.parametrize("margin", [0, 1, 7])
def test_with_a_margin_only_the_latents_under_a_part_and_so_many_around_it_are_decoded(margin):
    decode, model = decoder(margin=margin)
    factor = model.vae_scale_factor
    seen = []

    # a decoder without context: each latent becomes a square of its own value
    def enlarged(z):
        return z[:, :3].repeat_interleave(factor, 2).repeat_interleave(factor, 3)

    decode._decoded = lambda z: seen.append(z.shape[-2:]) or enlarged(z)
    latents = torch.randn(3, 4, 9, 12, dtype=torch.float64)
    crops = crops_of(0.5, size=(9 * factor, 12 * factor))
    parts = decode.parts(latents, crops)
    assert torch.equal(parts, crops.of(enlarged(latents))) and parts.shape[-2:] == (crops.height, crops.width)
    needed = [(side + factor - 2) // factor + 1 + 2 * margin for side in (crops.height, crops.width)]
    assert seen == [tuple(min(n, side) for n, side in zip(needed, (9, 12), strict=True))]


def test_the_margin_lies_on_every_side_where_there_is_room():
    crops = Crops([17, 0, 64], [31, 24, 64], 8, 8)  # of 72 px; latents of 8 px
    under = crops.coarser(8, 1, (9, 9))
    assert under == Crops([1, 0, 5], [2, 2, 5], 4, 4)  # 1 before the part, the part's 2, 1 after; at an edge all inside
    assert crops.inside(under, 8) == Crops([9, 0, 24], [15, 8, 24], 8, 8)


def test_a_part_decoded_alone_is_nearly_that_of_the_whole_picture():
    model = from_pipeline(embedded_teacher())
    latents = model.encode_images(stack_images(ComicSource(4).read(k).image for k in range(4)))
    crops = crops_of(0.75, size=(128, 128), count=4)
    with torch.no_grad():
        whole = Decoder(model, DecodeRecipe()).parts(latents, crops)
        errors = [
            (Decoder(model, DecodeRecipe(margin=margin)).parts(latents, crops) - whole).square().mean().item()
            for margin in (0, 2)
        ]
    assert errors[1] < errors[0] < 0.03 * whole.var().item()


def test_parts_pass_the_gradient_of_what_is_looked_at_alone():
    decode, _ = decoder(margin=0)
    latents = torch.randn(1, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    crops = Crops([0], [0], 8, 8)
    decode.parts(latents, crops).sum().backward()
    under = crops.coarser(decode.model.vae_scale_factor, 0, (8, 8))
    touched = latents.grad[0].abs().sum(0) > 0
    assert touched[: under.height, : under.width].all() and touched.sum() == under.height * under.width


def test_beside_a_loss_on_whole_pictures_whole_ones_are_decoded():
    settings = ("losses.distance=pixel", "discriminator.crop=0.5", "discriminator.real=reconstructed")
    for one, two in zip(gradients("decode.margin=0", *settings), gradients(*settings), strict=True):
        assert torch.equal(one, two)


def test_a_step_with_a_margin_trains_both_players():
    settings = ("losses.distance=latent", "discriminator.crop=0.5", "discriminator.real=reconstructed")
    found, whole = gradients("decode.margin=0", *settings), gradients(*settings)
    assert len(found) == len(whole) and all(torch.isfinite(g).all() for g in found)
    assert max((f - w).abs().max() for f, w in zip(found, whole, strict=True)) > 0

"""Pipelines made fast: the same pictures from less work."""

import logging

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from pipelines import tiny_sdxl

from onestroke.fast import make_fast

PROMPTS = ["a laughing person with pink hair", "round glasses"]


def encoded(pipeline, prompts=PROMPTS, *, guided=False, **settings):
    return pipeline.encode_prompt(
        prompt=prompts,
        device=torch.device("cpu"),
        num_images_per_prompt=1,
        do_classifier_free_guidance=guided,
        **settings,
    )


def both() -> tuple[StableDiffusionXLPipeline, StableDiffusionXLPipeline]:
    """As diffusers makes it, and fast; both with the weights rounded as the second's are."""
    plain, fast = tiny_sdxl(), make_fast(tiny_sdxl())
    return plain.to(fast.unet.dtype).to(torch.float32), fast.to(torch.float32)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
def test_words_are_those_of_diffusers(guided, zeros):
    plain, fast = both()
    for pipeline in (plain, fast):
        pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    for one, two in zip(encoded(plain, guided=guided), encoded(fast, guided=guided), strict=True):
        assert (one is None and two is None) or torch.equal(one, two)


def test_plain_prompts_are_split_into_tokens_once(monkeypatch):
    _, fast = both()
    kind, read = type(fast.tokenizer), []
    call = kind.__call__
    monkeypatch.setattr(
        kind, "__call__", lambda self, *rest, **settings: read.append(self) or call(self, *rest, **settings)
    )
    encoded(fast)
    assert read == [fast.tokenizer, fast.tokenizer_2]


def test_nothing_is_computed_behind_the_layer_that_is_read():
    """Of the first encoder alone; what is put into its layers or in its place later counts."""
    plain, fast = both()
    run: list[str] = []
    for name in ("text_encoder", "text_encoder_2"):
        inner = getattr(getattr(fast, name), "text_model", getattr(fast, name))
        for number, layer in enumerate(inner.encoder.layers):
            layer.register_forward_hook(lambda *_, name=name, number=number: run.append(f"{name} {number}"))
    encoded(fast)
    last = len(fast.text_encoder.encoder.layers) - 1
    assert f"text_encoder {last - 1}" in run and f"text_encoder {last}" not in run
    assert f"text_encoder_2 {len(fast.text_encoder_2.text_model.encoder.layers) - 1}" in run
    before = encoded(fast)[0]
    for pipeline in (plain, fast):
        layer = pipeline.text_encoder.encoder.layers[0]
        torch.manual_seed(1)
        layer.mlp.fc1 = torch.nn.Linear(layer.mlp.fc1.in_features, layer.mlp.fc1.out_features)
    changed = encoded(fast)[0]
    assert torch.equal(changed, encoded(plain)[0]) and not torch.equal(changed, before)
    plain.text_encoder = fast.text_encoder = tiny_sdxl().text_encoder
    assert torch.equal(encoded(fast)[0], encoded(plain)[0])


@pytest.mark.parametrize(
    "settings", [{"negative_prompt": ["a hat", "blue"]}, {"clip_skip": 1}, {"prompt_2": ["a beard", "a scarf"]}]
)
def test_what_is_not_plain_is_left_to_diffusers(settings):
    plain, fast = both()
    theirs = encoded(plain, guided=True, **settings)
    for one, two in zip(encoded(fast, guided=True, **settings), theirs, strict=True):
        assert torch.equal(one, two)
    usual = encoded(plain, guided=True)
    assert any(not torch.equal(one, two) for one, two in zip(theirs, usual, strict=True))


def test_diffusers_still_warns_of_a_prompt_that_is_too_long(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    plain, fast = both()
    long = ["a laughing person " * 60]
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        ours = encoded(fast, long)[0]
    assert any("truncated" in record.message for record in caplog.records)
    assert torch.equal(ours, encoded(plain, long)[0])


def test_words_of_several_embeddings_are_replaced_as_diffusers_does():
    """Textual inversion: `<comic>` stands for two tokens."""
    found = []
    for pipeline in both():
        for name in ("", "_2"):
            tokenizer, encoder = getattr(pipeline, f"tokenizer{name}"), getattr(pipeline, f"text_encoder{name}")
            tokenizer.add_tokens(["<comic>", "<comic>_1"])
            torch.manual_seed(0)
            encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        found.append(encoded(pipeline, ["a <comic> person"])[0])
    assert torch.equal(*found)


@pytest.mark.parametrize(("kind", "settings"), [
    ("pt", {}), ("np", {"return_dict": False}), ("pil", {}), ("latent", {}), ("np", {"guidance_scale": 4.0}),
])  # fmt: skip
def test_pictures_are_those_of_diffusers(kind, settings):
    """By the same weights; that the VAE's are the same arithmetic, test_upsampling.py says."""
    found, (_, fast) = [], both()
    for call in (StableDiffusionXLPipeline.__call__, type(fast).__call__):
        given = {"num_inference_steps": 2, "guidance_scale": 0.0, "height": 32, "width": 32} | settings
        output = call(fast, PROMPTS, generator=torch.Generator().manual_seed(0), output_type=kind, **given)
        assert isinstance(output, tuple) == ("return_dict" in settings)
        found.append(output[0] if isinstance(output, tuple) else output.images)
    one, two = found
    assert type(one) is type(two) and len(one) == 2
    assert one == two if kind == "pil" else np.array_equal(np.asarray(one), np.asarray(two))


def test_the_vae_is_not_searched_for_hooks(monkeypatch):
    _, fast = both()
    searched = []
    monkeypatch.setattr(
        "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl.get_module_execution_device",
        lambda module: searched.append(module) or module.device,
    )
    given = {"num_inference_steps": 1, "guidance_scale": 0.0, "height": 32, "width": 32, "output_type": "pt"}
    assert fast(["a hat"], **given).images.requires_grad is False and not searched

    fast._all_hooks = ["of a model that is offloaded"]
    fast.maybe_free_model_hooks = lambda: None
    assert fast(["a hat"], **given).images.any() and searched.pop() is fast.vae
    fast._all_hooks = []

    class Marks:
        def apply_watermark(self, images):
            return torch.full_like(images, -1.0)

    fast.watermark = Marks()
    assert not fast(["a hat"], **given).images.any() and searched == [fast.vae]

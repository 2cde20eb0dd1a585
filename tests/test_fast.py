"""Pipelines made fast: the same pictures from less work."""

import logging

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

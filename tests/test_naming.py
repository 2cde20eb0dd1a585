"""What is learnt beside the denoising: to name attributes, from text and from noised pictures."""

import math

import pytest
import torch

from onestroke.distill.denoising import LOGIT_DEVIATION, Denoising, DenoisingSettings, timestep_fractions
from onestroke.embedded.judge import IGNORED, NOTHING
from onestroke.embedded.naming import NamingHead, PictureNaming, TextNaming, named_labels
from onestroke.families.load import from_pipeline
from onestroke.train.method import OptimizerSettings
from onestroke.train.trainer import Trainer, TrainSettings
from onestroke.types import Batch
from tests.pipelines import tiny_sdxl

VALUES = {"hair": (NOTHING, "bob", "bun"), "glasses": (NOTHING, "round")}


def test_what_a_caption_does_not_name_is_nothing():
    assert named_labels({"hair": "bun"}, VALUES) == [2, 0]


def test_the_loss_of_an_even_guess_is_the_log_of_the_choices_and_hidden_attributes_cost_nothing():
    head = NamingHead(4, VALUES)
    torch.nn.init.zeros_(head.out.weight)
    torch.nn.init.zeros_(head.out.bias)
    vectors = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    # (ln 3 + ln 2) for each of two pictures, over two pictures and two attributes
    assert head.loss(vectors, torch.tensor([[1, 0], [2, 1]])).item() == pytest.approx((math.log(3) + math.log(2)) / 2)
    assert head.loss(vectors, torch.tensor([[1, IGNORED], [IGNORED, IGNORED]])).item() == pytest.approx(math.log(3) / 4)


CAPTIONS = (("a person with a bob", (1, 0)), ("a person with a bun", (2, 0)), ("round glasses", (0, 1)))


def captions_from(first_slot: int):
    for first in range(first_slot, 900, 6):
        slots = torch.arange(first, first + 6)
        yield Batch(
            None, tuple(CAPTIONS[s % 3][0] for s in slots.tolist()), slots, torch.zeros(6, 4, dtype=torch.int64)
        )


def test_text_encoders_learn_what_captions_name():
    model = from_pipeline(tiny_sdxl())
    method = TextNaming(
        model, OptimizerSettings(3e-3), VALUES, lambda slots: torch.tensor([CAPTIONS[s % 3][1] for s in slots.tolist()])
    )
    steps = list(Trainer(method, TrainSettings(600, 6)).run(captions_from))
    assert steps[0].terms["text/loss"] > 1 and steps[-1].terms["text/loss"] < 0.1


def test_a_hint_reaches_the_middle_block_and_through_it_the_text():
    model = from_pipeline(tiny_sdxl())
    width = model.unet.config.block_out_channels[-1]
    hint = PictureNaming(width, VALUES, lambda slots: torch.tensor([[1, 0]] * len(slots)), weight=0.5)
    method = Denoising(model, DenoisingSettings(OptimizerSettings(1e-3), blank_share=0.0), hint=hint)
    method.players["denoiser"].module.requires_grad_(True)  # as the trainer does
    batch = Batch(
        None, ("a bob", "a bun"), torch.arange(2), torch.tensor([[64, 64, 0, 0]] * 2),
        torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), (64, 64),
    )  # fmt: skip
    loss = method.loss("denoiser", method.rollout(batch, frozenset({"denoiser"})))
    assert loss.total.item() == pytest.approx((loss.terms["denoising"] + loss.terms["hint"]).item())
    loss.terms["hint"].backward()
    assert model.unet.conv_in.weight.grad.abs().max() > 0
    assert model.text_encoders[0].get_input_embeddings().weight.grad.abs().max() > 0
    assert model.unet.conv_out.weight.grad is None  # what comes after the middle block is the denoising's alone
    assert any(key.startswith("hint.") for key in method.players["denoiser"].module.state_dict())


def test_timesteps_are_uniform_in_the_given_share_and_logit_normal_in_the_rest():
    even = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert torch.equal(timestep_fractions(even, 1.0, 0.3), even)
    drawn = timestep_fractions(even, 0.25, 0.3)
    assert drawn.min() >= 0 and drawn.max() < 1
    first, rest = drawn[:25_000], drawn[25_000:]
    torch.testing.assert_close(first, (torch.arange(25_000, dtype=torch.float64) + 0.5) / 25_000)
    logits = torch.logit(rest)
    assert (logits.mean(), logits.std()) == (
        pytest.approx(0.3, abs=0.01),
        pytest.approx(LOGIT_DEVIATION, abs=0.01),
    )
    assert timestep_fractions(torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64), 0.0, 0.3).max() < 1


def test_captions_are_dropped_by_their_pictures_odds():
    model = from_pipeline(tiny_sdxl())
    batch = Batch(
        None,
        ("a bob",) * 400,
        torch.arange(400),
        torch.tensor([[64, 64, 0, 0]] * 400),
        torch.zeros(400, 4, 2, 2),
        (8, 8),
    )
    settings = DenoisingSettings(OptimizerSettings(1e-3), blank_share=0.2)

    def dropped(odds) -> torch.Tensor:
        rollout = Denoising(model, settings, blank_odds=odds).rollout(batch, frozenset({"denoiser"}))
        blank = model.blank_prompts(rollout.condition)
        return (rollout.condition.pooled == blank.pooled).all(1)

    alike, uneven = dropped(None), dropped(lambda slots: torch.where(slots < 200, 0.0, 2.0))
    assert torch.equal(alike, dropped(lambda slots: torch.ones(len(slots))))
    assert 55 < alike.sum() < 105 and not uneven[:200].any() and 55 < uneven[200:].sum() < 105

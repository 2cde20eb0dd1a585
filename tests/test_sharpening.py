"""Sharpening: the mask by hand and by Pillow, what the student is asked and held against, and the run after ADD."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image, ImageFilter
from pipelines import tiny_sdxl
from rank_runs import in_ranks
from tiny_runs import tiny_add, tiny_dinov2, tiny_features, tiny_recipe, write_folder

from onestroke import build
from onestroke.api import distill
from onestroke.card import model_card
from onestroke.config import DecodeRecipe, Recipe, SharpenRecipe, recipe_from
from onestroke.distill.add import STUDENT
from onestroke.distill.decoding import Decoder
from onestroke.distill.perceptual import perceptual_distance
from onestroke.distill.sharpening import Compared, Sharpening, unsharp
from onestroke.errors import CheckpointError, RecipeError
from onestroke.families.load import load_model
from onestroke.randomness import normal
from onestroke.schedule import beta_settings
from onestroke.train.checkpoint import load_newest
from onestroke.train.folder import RECIPE, check_recipe
from onestroke.train.method import OptimizerSettings
from onestroke.train.trainer import Trainer, TrainSettings
from onestroke.types import Batch, Condition


def test_the_mask_by_hand():
    """A blur that reaches three pixels: a lone bright pixel keeps the square of the bell's middle."""
    images = torch.zeros(1, 3, 9, 9, dtype=torch.float64)
    images[:, 1, 4, 4] = 0.25
    bell = np.exp(-0.5 * np.arange(-3, 4) ** 2)
    bell /= bell.sum()
    sharp = unsharp(images, 0.8, 1.0)
    assert not sharp[:, [0, 2]].any()
    assert sharp[0, 1, 4, 4].item() == pytest.approx(0.25 + 0.8 * 0.25 * (1 - bell[3] ** 2))
    assert sharp[0, 1, 4, 6].item() == pytest.approx(-0.8 * 0.25 * bell[3] * bell[5])
    assert unsharp(4 * images, 0.8, 1.0).max() == 1  # clamped
    even = torch.full((1, 3, 9, 9), 0.3)
    torch.testing.assert_close(unsharp(even, 5.0, 2.0), even)  # at the edges too


def test_the_mask_is_pillows():
    given = np.asarray(Image.radial_gradient("L").resize((48, 40)).rotate(20).convert("RGB"))
    wanted = Image.fromarray(given).filter(ImageFilter.UnsharpMask(radius=1, percent=80, threshold=0))
    images = torch.from_numpy(given.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    ours = ((unsharp(images, 0.8, 1.0)[0].permute(1, 2, 0) + 1) * 127.5).numpy()
    assert np.abs(ours - np.asarray(wanted, dtype=float)).max() < 4  # of 255: Pillow's blur is three boxes
    assert np.abs(ours - given).max() > 20


def some_prompts(count: int = 4) -> Batch:
    slots = torch.arange(count)
    sizes = torch.zeros(count, 4, dtype=torch.int64)
    return Batch(None, tuple(f"picture {i}" for i in range(count)), slots, sizes, target=(16, 16))


def sharpening(*, rate: float = 1e-3, **settings) -> Sharpening:
    """Of a student that is its teacher."""
    add = tiny_add(kind="v_prediction", zero_snr=True)
    return Sharpening(
        add.model, add.student, add.players[STUDENT].module, add.model.denoiser(), Decoder(add.model, DecodeRecipe()),
        tiny_features(), SharpenRecipe(images=8, **settings), OptimizerSettings(rate), num_timesteps=4,
        ema_images=10.0, seed=3,
    )  # fmt: skip


def noise(place: int, slots: torch.Tensor) -> torch.Tensor:
    return normal((4, 4, 4), 3, f"sharpening, timestep {place}", slots).double()


@pytest.mark.parametrize("ahead", [False, True])
def test_the_student_is_asked_on_its_own_way(ahead):
    """One prediction after the other, each under new noise of its own; the first from noise alone."""
    alone, batch = sharpening(ahead=ahead), some_prompts(2)
    asked, schedule = alone.asked(batch), alone.model.schedule
    condition = alone.model.full_size(alone.model.encode_prompts(batch.captions), (16, 16))
    x0, seen = torch.zeros(2, 4, 4, 4, dtype=torch.float64), set()
    for place, timestep in enumerate((999, 749, 499, 249)):
        rows, t = slice(2 * place, 2 * place + 2), torch.full((2,), timestep)
        eps = noise(place, batch.slots)
        seen |= set(eps.flatten().tolist())
        expected = schedule.add_noise(x0, eps, t) if place else eps
        torch.testing.assert_close(asked.x_s[rows], expected)
        assert torch.equal(asked.s[rows], t)
        with torch.no_grad():
            x0 = alone.before(expected, t, condition)
        if place or not ahead:
            torch.testing.assert_close(asked.target[rows], x0)
    assert len(seen) == 4 * 2 * 64 and len(asked.condition.text) == 8


def test_looking_ahead_is_ddim_to_the_second_timestep_and_its_prediction():
    alone, batch = sharpening(ahead=True), some_prompts(2)
    eps = noise(0, batch.slots)
    condition = alone.model.full_size(alone.model.encode_prompts(batch.captions), (16, 16))
    solver = DDIMScheduler(**beta_settings(alone.model.scheduler_config), prediction_type="sample",
                           timestep_spacing="trailing", clip_sample=False)  # fmt: skip
    solver.set_timesteps(4)
    first, second = solver.timesteps[:2]
    with torch.no_grad():
        x = solver.step(alone.before(eps, first.expand(2), condition), first, eps).prev_sample
        expected = alone.before(x, second.expand(2), condition)
    assert (first, second) == (999, 749)
    torch.testing.assert_close(alone.asked(batch).target[:2], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ahead", [False, True])
def test_the_gain_is_of_the_first_latents_and_of_what_later_ones_begin_from(ahead):
    batch = some_prompts(2)
    plain, scaled = (sharpening(ahead=ahead, gain=gain) for gain in (1.0, 0.9))
    was, now = plain.asked(batch), scaled.asked(batch)
    torch.testing.assert_close(now.target[:2], 0.9 * was.target[:2])
    torch.testing.assert_close(now.x_s[:2], was.x_s[:2])
    with torch.no_grad():
        x0 = 0.9 * plain.before(was.x_s[:2], was.s[:2], was.condition[slice(0, 2)])
        later = plain.model.schedule.add_noise(x0, noise(1, batch.slots), was.s[2:4])
        expected = plain.before(later, was.s[2:4], was.condition[slice(2, 4)])
    torch.testing.assert_close(now.x_s[2:4], later)
    torch.testing.assert_close(now.target[2:4], expected)  # as the student will go on, and no gain of its own


@pytest.mark.parametrize("ahead", [False, True])
def test_the_first_target_is_drawn_with_more_of_the_words(ahead):
    """What sets text apart from that of an empty prompt, 1.5 times; the student itself is told the plain words."""
    batch = some_prompts(2)
    alone, plain = sharpening(ahead=ahead, text_gain=1.5, gain=0.9), sharpening(ahead=ahead)
    model, asked = alone.model, alone.asked(batch)
    words = model.full_size(model.encode_prompts(batch.captions), (16, 16))
    empty = model.encode_prompts([""])
    more = Condition(empty.text + 1.5 * (words.text - empty.text), empty.pooled + 1.5 * (words.pooled - empty.pooled),
                     words.time_ids)  # fmt: skip
    eps, first, second = noise(0, batch.slots), torch.full((2,), 999), torch.full((2,), 749)
    with torch.no_grad():
        x0 = alone.before(eps, first, more)
        ahead_of_it = alone.before(model.schedule.add_noise(x0, eps, second), second, more)
        later = model.schedule.add_noise(0.9 * x0, noise(1, batch.slots), second)
        expected = alone.before(later, second, words)
    torch.testing.assert_close(asked.target[:2], 0.9 * (ahead_of_it if ahead else x0))
    torch.testing.assert_close(asked.target[2:4], expected)
    torch.testing.assert_close(asked.condition.text, words.text.repeat(4, 1, 1))
    torch.testing.assert_close(asked.condition.pooled, words.pooled.repeat(4, 1))
    assert not torch.allclose(asked.target[:2], 0.9 * plain.asked(batch).target[:2])
    without_pooled = alone.emphasized(Condition(words.text))  # as SD 1.x and 2.x have it
    torch.testing.assert_close(without_pooled.text, more.text)
    assert without_pooled.pooled is None and without_pooled.time_ids is None


def test_some_prompts_alone_go_on_to_the_later_timesteps():
    alone, batch = sharpening(later_every=3), some_prompts(5)
    asked, every = alone.asked(batch), sharpening().asked(batch)
    assert asked.s.tolist() == [999] * 5 + [749] * 2 + [499] * 2 + [249] * 2
    rows = [0, 1, 2, 3, 4, *(5 * place + row for place in (1, 2, 3) for row in (0, 3))]
    torch.testing.assert_close(asked.target, every.target[rows])
    torch.testing.assert_close(asked.x_s, every.x_s[rows])
    assert torch.equal(asked.condition.text, every.condition.text[rows])
    none = alone.asked(some_prompts(5).rows(slice(1, 3)))
    assert none.s.tolist() == [999, 999]


def test_the_loss_by_hand():
    """Three prompts, one of which goes on: on average a prompt has 1 + 3/3 predictions."""
    drawn = torch.zeros(6, 3, 2, 2)
    wanted = torch.tensor([0.1, -0.2, 0.3, 0.4, 0.5, 0.6]).reshape(6, 1, 1, 1).expand_as(drawn)
    plain = sharpening(later_every=3)
    loss = plain.loss(STUDENT, Compared(drawn, wanted, 3))
    assert loss.total.item() == pytest.approx((0.1 + 0.2 + 0.3 + 0.4 + 0.5 + 0.6) / (3 * 2))
    assert loss.terms["first"].item() == pytest.approx(0.2) and "perceptual" not in loss.terms

    looking, batch = sharpening(later_every=3, perceptual=2.0, amount=1.0), some_prompts(3)
    compared = looking.rollout(batch, frozenset({STUDENT}))
    found = looking.loss(STUDENT, compared)
    features = perceptual_distance(looking.features, compared.drawn[:3], compared.wanted[:3]).mean().item()
    assert features > 0 and found.terms["perceptual"].item() == pytest.approx(features)
    assert found.total.item() == pytest.approx(plain.loss(STUDENT, compared).total.item() + 2 * features)


def test_what_it_draws_is_held_against_its_own_pictures_under_the_mask():
    alone, batch = sharpening(amount=0.7), some_prompts()
    drawn, wanted, count = alone.rollout(batch, frozenset({STUDENT}))
    assert drawn.shape == wanted.shape == (16, 3, 16, 16) and count == 4
    torch.testing.assert_close(wanted, unsharp(drawn.clamp(-1, 1), 0.7, 1.0))  # it is still what it was
    loss = alone.loss(STUDENT, Compared(drawn, wanted, 4)).total
    assert loss.item() == pytest.approx((drawn - wanted).abs().mean().item()) and loss.item() > 0
    loss.backward()
    assert all(parameter.grad is None for parameter in alone.before.parameters())
    assert any(parameter.grad.abs().sum() > 0 for parameter in alone.players[STUDENT].module.parameters())
    lighter = sharpening(amount=0.7, later_amount=0.2, later_every=3).rollout(batch, frozenset({STUDENT}))
    amounts = torch.tensor([0.7] * 4 + [0.2] * 6)[:, None, None, None]
    torch.testing.assert_close(lighter.wanted, unsharp(lighter.drawn.clamp(-1, 1), amounts, 1.0))
    without = sharpening(amount=0.0, ahead=True).rollout(batch, frozenset({STUDENT}))
    torch.testing.assert_close(without.wanted[4:], drawn.clamp(-1, 1)[4:])  # of the later timesteps


def learn(alone: Sharpening, settings: TrainSettings) -> Trainer:
    trainer = Trainer(alone, settings)

    def batches_from(slot: int):
        while True:
            yield some_prompts()

    for _ in trainer.run(batches_from):
        pass
    return trainer


def test_its_pictures_move_as_the_mask_would_have_them():
    alone, batch = sharpening(rate=3e-3), some_prompts()
    began, wanted, _ = alone.rollout(batch, frozenset({STUDENT}))
    learn(alone, TrainSettings(160, 4))
    ended, again, _ = alone.rollout(batch, frozenset({STUDENT}))
    assert torch.equal(again, wanted)  # it is held against what it was
    moved, asked = (ended - began).flatten(), (wanted - began).flatten()
    assert torch.cosine_similarity(moved, asked, dim=0) > 0.15
    assert (ended - wanted).abs().mean() < (began - wanted).abs().mean()


@pytest.mark.parametrize("size", [1, 3])
def test_parts_of_a_batch_add_up_to_its_gradient(size):
    settings = {"later_every": 3, "perceptual": 0.5, "ahead": True}
    one, other = (
        list(learn(sharpening(**settings), TrainSettings(8, 4, micro)).method.players[STUDENT].module.parameters())
        for micro in (None, size)
    )
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    """Three steps of ADD on four pictures, then four steps of one prompt at four timesteps."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_sdxl("v_prediction", True).save_pretrained(folder / "teacher")
    write_folder(folder / "pictures")
    return tiny_recipe(
        f"teacher.source={folder / 'teacher'}", f"data.source={folder / 'pictures'}", "data.size=16",
        "train.num_images=12", "discriminator.features=dinov2-small",
        f"discriminator.features_source={tiny_dinov2(folder / 'dinov2')}", "student.ema_images=4", "sharpen.images=4",
        "sharpen.ahead=true", "sharpen.perceptual=0.3",
    )  # fmt: skip


def weights(run: Path) -> dict[str, torch.Tensor]:
    return UNet2DConditionModel.from_pretrained(run / "student" / "unet").state_dict()


def changed(recipe: Recipe, **settings) -> Recipe:
    return recipe.model_copy(update={"sharpen": recipe.sharpen.model_copy(update=settings)})


def test_the_run_goes_on_after_add_and_exports_what_came_of_it(recipe, tmp_path):
    distill(changed(recipe, images=0), tmp_path / "run")
    before, state = weights(tmp_path / "run"), load_newest(tmp_path / "run" / "checkpoints")
    assert not (tmp_path / "run" / "sharpening").exists()
    distill(recipe, tmp_path / "run")  # a run of ADD that has ended is sharpened without another
    ended = load_newest(tmp_path / "run" / "sharpening" / "checkpoints")
    assert ended["images"] == 4 and load_newest(tmp_path / "run" / "checkpoints")["images"] == state["images"] == 12
    after = weights(tmp_path / "run")
    for name, value in ended["averages"]["student"].items():
        torch.testing.assert_close(after[name], value.float())
    assert any(not torch.equal(before[name], after[name]) for name in before)
    card = (tmp_path / "run" / "student" / "README.md").read_text("utf-8")
    assert "on 12 pictures. On 4 prompts it then learnt to draw as under an unsharp mask (160%, radius 1" in card
    assert "and to draw in its first step what a second one made of it from its own pictures." in card
    StableDiffusionXLPipeline.from_pretrained(tmp_path / "run" / "student")
    with pytest.raises(CheckpointError, match=re.escape("sharpening.amount: 1.6 -> 2.0")):
        distill(changed(recipe, amount=2.0), tmp_path / "run")


def test_a_run_that_was_stopped_ends_in_the_same_weights(recipe, tmp_path):
    for _ in range(4):
        distill(recipe, tmp_path / "stopped", minutes=0)  # a step each
    assert load_newest(tmp_path / "stopped" / "sharpening" / "checkpoints")["images"] == 2
    distill(recipe, tmp_path / "stopped")
    distill(recipe, tmp_path / "straight")
    one, other = weights(tmp_path / "stopped"), weights(tmp_path / "straight")
    assert all(torch.equal(one[name], other[name]) for name in one)


def _distilled(recipe: Recipe, out: Path) -> None:
    distill(recipe, out)


def test_two_processes_end_near_one(recipe, tmp_path):
    """Each of two takes a prompt a step; the one takes both."""
    train = recipe.train.model_copy(update={"batch_size": 8, "num_images": 16})
    wider = recipe.model_copy(update={"train": train})
    in_ranks(_distilled, 2, wider, tmp_path / "two")
    distill(wider, tmp_path / "one")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert load_newest(tmp_path / "two" / "sharpening" / "checkpoints")["step"] == 2
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("where", ["sharpen.images", "anchors.images"])
def test_what_is_not_split_over_processes_is_refused(recipe, where, monkeypatch):
    monkeypatch.setattr(build, "is_sharded", lambda recipe: True)
    anchored = recipe_from(recipe.model_dump(), ["anchors.count=8", "anchors.images=8", "sharpen.images=0"])
    with pytest.raises(RecipeError, match=f"{where}.*not split over processes"):
        build.add_trainer(anchored if where.startswith("anchors") else recipe, load_model(recipe.teacher.source))


def test_what_cannot_be_is_refused():
    with pytest.raises(RecipeError, match="sharpen.images trains whole weights: set it to 0 for an adapter"):
        tiny_recipe("sharpen.images=8", "student.lora.rank=2")
    with pytest.raises(RecipeError, match="the student would learn what it draws already"):
        tiny_recipe("sharpen.images=8", "sharpen.amount=0")
    scaled = tiny_recipe("sharpen.images=8", "sharpen.amount=0", "sharpen.gain=0.9")
    said = "On 8 prompts it then learnt to draw 0.9 times its latents in its first step from its own pictures."
    assert said in model_card(scaled, images=12, sharpened=8)
    worded = tiny_recipe("sharpen.images=8", "sharpen.amount=0", "sharpen.text_gain=1.2")
    said = "On 8 prompts it then learnt to draw in its first step what it makes of 1.2 times the words from its own"
    assert said in model_card(worded, images=12, sharpened=8)
    with pytest.raises(RecipeError, match="sharpen.ahead needs a second timestep"):
        tiny_recipe("sharpen.images=8", "sharpen.ahead=true", "student.num_timesteps=1")
    assert tiny_recipe("sharpen.images=0", "sharpen.ahead=true", "student.num_timesteps=1").sharpen.ahead
    with pytest.raises(RecipeError, match="sharpen.radius"):
        tiny_recipe("sharpen.radius=0")


def test_a_sharpening_that_began_before_a_setting_existed_goes_on(tmp_path):
    now = {"sharpening": SharpenRecipe(amount=0.8).model_dump(mode="json")} | Recipe().model_dump(mode="json")
    older = now | {"sharpening": {k: v for k, v in now["sharpening"].items() if k != "text_gain"}}
    (tmp_path / RECIPE).write_text(yaml.safe_dump(older))
    check_recipe(tmp_path, yaml.safe_dump(now))
    other = now | {"sharpening": now["sharpening"] | {"text_gain": 1.2}}
    with pytest.raises(CheckpointError, match=r"sharpening\.text_gain: 1\.0 -> 1\.2"):
        check_recipe(tmp_path, yaml.safe_dump(other))

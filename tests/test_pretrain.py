"""`onestroke pretrain`, stage by stage."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file

from onestroke.commands import pretrain
from onestroke.config import pretrain_recipe
from onestroke.data.comicset import ComicSource, write_comicset
from onestroke.data.latents import CachedLatents
from onestroke.data.plan import picture_at
from onestroke.data.source import BrokenPicture
from onestroke.distill.denoising import Denoising
from onestroke.embedded.autoencoder import build_autoencoder
from onestroke.embedded.emphasis import small_parts
from onestroke.embedded.known import blank_odds
from onestroke.embedded.pretrain import _Reader, pretrain_decoder, pretrain_teacher
from onestroke.errors import CheckpointError, DataError, ModelError
from onestroke.families.fingerprint import fingerprint
from tests.consoles import onestroke, paper, text_of


def tiny_pretrain(*overrides: str):
    small = ("size=32", "vae_images=8", "judge_images=1", "decoder_images=8", "teacher_images=32")
    return pretrain_recipe([*small, *overrides])


def test_pretrain_of_the_users_pictures_leaves_a_teacher_and_goes_on(tmp_path):
    write_comicset(tmp_path / "pictures", count=40, size=32, layout="webdataset")
    pictures = str(tmp_path / "pictures" / "*.tar")
    for minutes, expected in ((0.0, "run the same command again"), (None, "distill mini --teacher")):
        console = paper()
        pretrain.run_pretrain(pictures, tiny_pretrain(), minutes, tmp_path / "out", console=console)
        assert expected in text_of(console)
    assert (tmp_path / "out" / "teacher" / "model_index.json").exists()
    config = json.loads((tmp_path / "out" / "teacher" / "unet" / "config.json").read_text())
    assert 8 * config["sample_size"] == tiny_pretrain().size  # what plain diffusers draws where no size is asked for
    assert not (tmp_path / "out" / "judge").exists()


def test_broken_pictures_give_way_to_the_next_whole_ones_before_they_are_counted(tmp_path):
    class Torn:
        whole = ComicSource(6, size=32)

        def __len__(self) -> int:
            return 6

        def read(self, index: int, *, slot: int | None = None):
            if index in broken:
                raise BrokenPicture(f"{index}.jpg", "truncated")
            return self.whole.read(index)

    broken = {2, 5}
    read = _Reader(Torn(), 32, seed=0)
    shown = [read(slot) for slot in range(6)]
    for slot, image in enumerate(shown):
        index = picture_at(slot, 6, seed=0)
        expected = Torn.whole.read({2: 3, 5: 0}.get(index, index)).image
        assert np.array_equal(image, expected)
    broken = set(range(6))
    with pytest.raises(DataError, match=r"jpg \(truncated\): 6 pictures one after another cannot be read"):
        read(0)


def test_pretrain_goes_past_a_broken_picture_and_says_so(tmp_path):
    write_comicset(tmp_path / "pictures", count=12, size=32, layout="imagefolder")
    next((tmp_path / "pictures").glob("*.png")).write_bytes(b"torn")
    console = paper()
    recipe = tiny_pretrain("vae_images=64")
    pretrain.run_pretrain(str(tmp_path / "pictures"), recipe, None, tmp_path / "out", console=console)
    assert "1 of 12 pictures cannot be read and are left out" in text_of(console)
    assert (tmp_path / "out" / "teacher" / "model_index.json").exists()


def test_pictures_that_are_all_broken_are_one_line(tmp_path):
    write_comicset(tmp_path / "pictures", count=4, size=32, layout="imagefolder")
    for path in (tmp_path / "pictures").glob("*.png"):
        path.write_bytes(b"torn")
    with pytest.raises(DataError, match=r"^\d+\.png \(not a picture\): 4 pictures one after another cannot be read\."):
        pretrain.run_pretrain(
            str(tmp_path / "pictures"), tiny_pretrain("vae_images=64"), None, tmp_path / "out", console=paper()
        )


def test_minutes_bound_the_stages_together(monkeypatch, tmp_path):
    calls = []

    def latents(out, source, recipe, machine, *, log) -> None:
        calls.append("latents")

    def decoder(out, source, cache, recipe, machine, *, log) -> None:
        calls.append("decoder")

    def text(out, source, recipe, machine, *, minutes, observe) -> bool:
        calls.append("text")
        return True

    def teacher(out, source, cache, recipe, machine, *, minutes, observe, log) -> bool:
        calls.append(minutes)
        return True

    monkeypatch.setattr(pretrain, "pretrain_vae", lambda out, source, recipe, machine, *, log: calls.append("vae"))
    monkeypatch.setattr(pretrain, "pretrain_judge", lambda out, recipe, machine, *, log: calls.append("judge"))
    monkeypatch.setattr(pretrain, "pretrain_latents", latents)
    monkeypatch.setattr(pretrain, "pretrain_decoder", decoder)
    monkeypatch.setattr(pretrain, "pretrain_text", text)
    monkeypatch.setattr(pretrain, "pretrain_teacher", teacher)
    pretrain.run_pretrain(None, tiny_pretrain(), 10.0, tmp_path, console=paper())
    assert calls[:5] == ["vae", "judge", "text", "latents", "decoder"] and 9.9 < calls[5] <= 10.0
    pretrain.run_pretrain(None, tiny_pretrain(), 0.0, tmp_path, console=paper())
    assert calls[6:] == ["vae"]
    calls.clear()
    monkeypatch.setattr(pretrain, "adopt_vae", lambda teacher, out: calls.append(teacher))
    pretrain.run_pretrain(None, pretrain_recipe(["start=embedded-teacher"]), None, tmp_path, console=paper())
    assert calls == ["embedded-teacher", "vae", "latents", None]  # no judge is of use to it, and its words are known


def test_pretrain_goes_on_from_a_teacher_with_its_own_vae(tmp_path):
    write_comicset(tmp_path / "pictures", count=40, size=32)
    first, second = tmp_path / "first", tmp_path / "second"
    pretrain.run_pretrain(str(tmp_path / "pictures"), tiny_pretrain(), None, first, console=paper())
    again = tiny_pretrain(f"start={first / 'teacher'}")
    pretrain.run_pretrain(str(tmp_path / "pictures"), again, None, second, console=paper())
    before, after = (load_file(f / "teacher" / "unet" / "diffusion_pytorch_model.safetensors") for f in (first, second))
    moved = [(before[name] - after[name]).abs().max().item() for name in before]
    assert 0 < max(moved) < 0.1
    taken = tiny_pretrain(f"vae={first / 'teacher'}")  # its VAE alone: the rest is new
    pretrain.run_pretrain(str(tmp_path / "pictures"), taken, 0.0, tmp_path / "taken", console=paper())
    one = AutoencoderKL.from_pretrained(first / "teacher", subfolder="vae")
    other = AutoencoderKL.from_pretrained(tmp_path / "taken" / "vae" / "final")
    assert fingerprint(one) == fingerprint(other)
    other = tmp_path / "third"
    build_autoencoder().save_pretrained(other / "vae" / "final")
    with pytest.raises(ModelError, match="another VAE"):
        pretrain.run_pretrain(str(tmp_path / "pictures"), again, None, other, console=paper())


def test_a_new_decoder_goes_under_a_trained_teacher(tmp_path):
    write_comicset(tmp_path / "pictures", count=40, size=32)
    first, second = tmp_path / "first", tmp_path / "second"
    pretrain.run_pretrain(str(tmp_path / "pictures"), tiny_pretrain("decoder_images=0"), None, first, console=paper())
    again = tiny_pretrain(f"start={first / 'teacher'}", "teacher_images=0", "decoder_images=16")
    pretrain.run_pretrain(str(tmp_path / "pictures"), again, None, second, console=paper())
    before, after = (DiffusionPipeline.from_pretrained(folder / "teacher") for folder in (first, second))
    assert fingerprint(before.unet, before.vae.encoder) == fingerprint(after.unet, after.vae.encoder)
    latents = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        moved = (before.vae.decode(latents).sample - after.vae.decode(latents).sample).abs().max()
    assert moved > 1e-3
    again = tiny_pretrain(f"start={first / 'teacher'}", "teacher_images=0")  # the first one's decoder is left behind
    pretrain.run_pretrain(str(tmp_path / "pictures"), again, None, second, console=paper())
    kept = DiffusionPipeline.from_pretrained(second / "teacher")
    assert fingerprint(kept.vae) == fingerprint(after.vae)


def test_what_is_small_counts_more_to_the_decoder(monkeypatch, tmp_path):
    build_autoencoder().save_pretrained(tmp_path / "vae" / "final")
    source, sizes = ComicSource(6), torch.zeros(6, 4)
    cache = CachedLatents(torch.randn(6, 8, 16, 16), torch.arange(6), sizes, (128, 128))
    given = []
    monkeypatch.setattr("onestroke.embedded.pretrain.train_decoder", lambda vae, *a, **b: given.append(a) or vae)
    pretrain_decoder(tmp_path, source, cache, pretrain_recipe(["emphasis=0.5"]), log=lambda line: None)
    (_, images_at, latents_at, more_at, _), slots = given[0], torch.arange(6)
    rows = [picture_at(slot, 6, seed=0) for slot in range(6)]
    torch.testing.assert_close(latents_at(slots) * build_autoencoder().config.scaling_factor, cache.latents[rows])
    assert all(np.array_equal(images_at(slot), source.read(row).image) for slot, row in enumerate(rows))
    for row, more in zip(rows, more_at(slots), strict=True):
        parts = torch.from_numpy(small_parts(source.character(row), size=128, cells=16))
        assert torch.equal(more > 0, parts)
    assert more_at(slots).sum() > 0


def test_the_teachers_timesteps_are_the_recipes(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(
        "onestroke.embedded.pretrain.Denoising",
        lambda model, settings, **kwargs: given.append((settings, kwargs)) or Denoising(model, settings, **kwargs),
    )
    write_comicset(tmp_path / "pictures", count=40, size=32)
    recipe = tiny_pretrain("uniform_timesteps=0.6", "timestep_logit=0.25")
    pretrain.run_pretrain(str(tmp_path / "pictures"), recipe, None, tmp_path / "out", console=paper())
    ((settings, others),) = given
    assert (settings.uniform_share, settings.logit_mean) == (0.6, 0.25)
    assert others["blank_odds"] is None  # nobody knows what these captions could have named
    with pytest.raises(CheckpointError, match="uniform_timesteps: 0.6 -> 0.3"):
        pretrain.run_pretrain(str(tmp_path / "pictures"), tiny_pretrain(), None, tmp_path / "out", console=paper())


def test_a_blank_caption_stands_rather_for_pictures_of_which_there_is_little_to_say():
    source = ComicSource(60)
    cache = CachedLatents(torch.zeros(50, 8, 4, 4), torch.arange(5, 55), torch.zeros(50, 4), (32, 32))
    recipe = tiny_pretrain()
    odds = blank_odds(source, cache, recipe)(torch.arange(50))
    assert odds.mean() == pytest.approx(1)
    names = [len(source.character(5 + picture_at(slot, 50, seed=recipe.seed)).values) for slot in range(50)]
    for slot in range(1, 50):
        assert odds[slot] / odds[0] == pytest.approx(0.5 ** (names[slot] - names[0]))


def test_the_teacher_of_comicset_is_told_what_its_pictures_hold(monkeypatch, tmp_path):
    class Reached(Exception):
        pass

    def take(model, settings, **kwargs):
        raise Reached(kwargs)

    monkeypatch.setattr("onestroke.embedded.pretrain.Denoising", take)
    build_autoencoder().save_pretrained(tmp_path / "vae" / "final")
    source, recipe, slots = ComicSource(6), pretrain_recipe([]), torch.arange(6)
    cache = CachedLatents(torch.randn(6, 8, 16, 16), torch.arange(6), torch.zeros(6, 4), (128, 128))
    with pytest.raises(Reached) as reached:
        pretrain_teacher(tmp_path, source, cache, recipe, log=lambda line: None)
    (given,) = reached.value.args
    assert torch.equal(given["blank_odds"](slots), blank_odds(source, cache, recipe)(slots))
    assert given["blank_odds"](slots).std() > 0 and given["emphasis"](slots).sum() > 0 and given["hint"] is not None


def test_a_stage_stops_at_the_first_saving_past_its_time():
    times = iter([4.0, 6.0])
    log = pretrain.stage_log("vae", 5.0, paper(), clock=lambda: next(times))
    log("100 pictures")
    with pytest.raises(pretrain.OutOfTime):
        log("200 pictures")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [(("--size", "100"), "multiple of 16"), (("--set", "teacher_image=3"), "Did you mean 'teacher_images'?")],
)
def test_pretrain_refuses_bad_settings_in_one_line(arguments, part, monkeypatch, capsys):
    status, _, error = onestroke("pretrain", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert status == 1 and part in error and error.count("\n") == 1

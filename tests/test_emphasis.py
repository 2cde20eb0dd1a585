"""Where comicset's small named parts are, and what an error counts there."""

import numpy as np
import pytest
import torch

from onestroke.data.comicset.dataset import ComicSource
from onestroke.data.comicset.render import render
from onestroke.data.comicset.vocabulary import load_style
from onestroke.data.latents import CachedLatents
from onestroke.distill.denoising import Denoising, DenoisingSettings
from onestroke.embedded.emphasis import MOST, altered, emphasis, parts_of, small_parts
from onestroke.families.load import from_pipeline
from onestroke.train.method import OptimizerSettings
from onestroke.types import Batch
from tests.pipelines import tiny_sdxl

SOURCE = ComicSource(40)


def test_parts_cover_what_changes_and_leave_out_most_of_the_picture():
    for index in range(40):
        character = SOURCE.character(index)
        parts = small_parts(character, size=128, cells=16)
        if not {"expression", "eyes", "glasses", "beard", "gesture"} & character.values.keys():
            continue
        assert 0 < parts.sum() < 0.4 * parts.size
        before, after = (render(which).astype(int) for which in (character, altered(character)))
        elsewhere = ~np.kron(parts, np.ones((8, 8), bool))
        assert np.abs(before - after)[elsewhere].mean() < 1  # of 255


def test_hair_clothes_colours_and_place_stay():
    for character in map(SOURCE.character, range(40)):
        other = altered(character)
        changed = {name for name in other.options if other.options[name] != character.options.get(name)}
        assert changed
        attributes = load_style(character.style).attributes
        parts = {
            part for attribute in attributes if attribute.name in ("hair", "clothes") for part in attribute.components
        }
        large = {f"{part}Variant" for part in parts} | {"scale", "translateX", "translateY", "flip"}
        assert not changed & large and not any("Color" in name for name in changed)


def test_emphasis_is_shared_out_to_the_given_sum_and_bounded():
    parts = torch.zeros(3, 4, 4, dtype=torch.bool)
    parts[0, 0, :4], parts[1, 2, 2] = True, True
    added = emphasis(parts, 0.5)
    assert added[0].sum() == 8 and added[0, 0, 0] == 2 and added[0, 1:].sum() == 0  # half of 16 places
    assert added[1].sum() == 8 and added[2].sum() == 0
    assert emphasis(parts, 4.0)[1].max() == MOST


def test_parts_are_kept_and_only_missing_ones_drawn(tmp_path, monkeypatch):
    cache = CachedLatents(torch.zeros(6, 8, 16, 16), torch.tensor([0, 1, 2, 5, 6, 7]), torch.zeros(6, 4), (128, 128))
    monkeypatch.setattr("onestroke.embedded.emphasis.SHARD_PICTURES", 4)
    told = []
    parts = parts_of(tmp_path, SOURCE, cache, num_workers=0, log=told.append)
    assert told == [4, 6] and parts.shape == (6, 16, 16)
    np.testing.assert_array_equal(parts[3], small_parts(SOURCE.character(5), size=128, cells=16))
    monkeypatch.setattr("onestroke.embedded.emphasis.small_parts", lambda *a, **b: pytest.fail("drawn again"))
    assert torch.equal(parts_of(tmp_path, SOURCE, cache, num_workers=0, log=told.append), parts)


def test_an_error_counts_more_there_as_far_as_the_signal_shows():
    model = from_pipeline(tiny_sdxl())
    batch = Batch(
        None, ("a bob", "a bun"), torch.arange(2), torch.tensor([[64, 64, 0, 0]] * 2),
        torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), (64, 64),
    )  # fmt: skip
    added = torch.zeros(2, 16, 16)
    added[:, 3, 5] = 7.0
    settings = DenoisingSettings(OptimizerSettings(1e-3), blank_share=0.0)
    method = Denoising(model, settings, emphasis=lambda slots: added[slots])
    rollout = method.rollout(batch, frozenset({"denoiser"}))
    loss = method.loss("denoiser", rollout)
    output = model.family.call_unet(model.unet, rollout.x_t, rollout.t, rollout.condition).float()
    error = (output - rollout.target).square()
    signal = model.schedule.alphas_cumprod[rollout.t].float()
    more = (7.0 * signal[:, None] * error[:, :, 3, 5]).sum() / error.numel()
    torch.testing.assert_close(loss.total, error.mean() + more)
    torch.testing.assert_close(loss.terms["denoising"], error.mean())

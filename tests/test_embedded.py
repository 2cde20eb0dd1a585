"""The embedded model's parts: what a trained VAE, judge and package owe to the rest."""

import errno

import numpy as np
import pytest
import torch

from onestroke.data.comicset.character import draw_character
from onestroke.data.comicset.dataset import ComicSource
from onestroke.embedded import embedded_judge, embedded_student, embedded_teacher, weights_folder
from onestroke.embedded.architecture import build_unet, train_tokenizer
from onestroke.embedded.autoencoder import build_autoencoder, decoder_loss, normalise_latents
from onestroke.embedded.fit import fit, stack_images
from onestroke.embedded.held_out import JUDGE, comic_pictures, comic_prompts, judged, value_namer
from onestroke.embedded.judge import IGNORED, NOTHING, Judge, judge_loss, labels_of, load_judge, new_judge, save_judge
from onestroke.embedded.vocabulary import completions, unknown_words
from onestroke.errors import NonFiniteLoss, ResourceError


def test_normalised_latents_have_unit_channels_and_decode_to_the_same_pictures():
    torch.manual_seed(0)
    vae = build_autoencoder().double().eval()
    with torch.no_grad():  # channels far apart, as training leaves them
        vae.quant_conv.weight[:8] *= torch.linspace(0.5, 4, 8)[:, None, None, None]
        vae.quant_conv.bias[:8] += torch.linspace(-2, 2, 8)
    images = torch.rand(4, 3, 64, 64, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        before = vae.encode(images).latent_dist
        pictures = vae.decode(before.mean).sample
        normalise_latents(vae, [images])
        after = vae.encode(images).latent_dist
        torch.testing.assert_close(vae.decode(after.mean).sample, pictures, atol=1e-9, rtol=0)
    scale = before.mean.std(dim=(0, 2, 3))
    torch.testing.assert_close(after.mean.mean(dim=(0, 2, 3)), torch.zeros(8, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(after.mean.std(dim=(0, 2, 3)), torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(after.std * scale[None, :, None, None], before.std)  # the noise follows its channel


def test_an_error_of_the_decoder_counts_more_in_small_parts():
    torch.manual_seed(0)
    vae = build_autoencoder().eval()
    latents, images = torch.randn(1, 8, 2, 2), torch.rand(1, 3, 16, 16) * 2 - 1
    more = torch.tensor([[[0.0, 3.0], [0.0, 0.0]]])
    with torch.no_grad():
        loss = decoder_loss(vae, latents, images, more, perceptual=lambda one, two: torch.tensor(0.25))
        error = vae.decode(latents).sample - images
    each = error.abs() + error.square()
    torch.testing.assert_close(loss, (each.sum() + 3 * each[:, :, :8, 8:].sum()) / each.numel() + 0.25)


def test_the_judges_labels_tell_nothing_from_hidden():
    values = {name: (NOTHING, *names) for name, names in new_judge().values.items() if names}
    values = {name: tuple(dict.fromkeys(names)) for name, names in values.items()}
    seen = set()
    for index in range(400):
        character = draw_character(index)
        labels = dict(zip(values, labels_of(character, values), strict=True))
        for name, value in character.values.items():
            assert values[name][labels[name]] == value
        if character.style == "adventurer":
            assert labels["clothes"] == 0  # the style has no clothes: nothing
            if character.values.get("glasses") == "sunglasses":
                assert labels["eyes"] == IGNORED  # it has eyes, and glasses hide them
                seen.add("hidden")
    assert seen == {"hidden"}


def test_an_ignored_label_carries_no_loss():
    torch.manual_seed(0)
    judge = Judge({"a": ["x", "y"], "b": ["z"]}).eval()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    logits = judge(images)
    # cross-entropy of a's label 1 in both pictures over the batch, b ignored: its mean over two attributes is half
    by_hand = -logits["a"].log_softmax(1)[:, 1].sum() / 2 / 2
    loss = judge_loss(judge, images, torch.tensor([[1, IGNORED], [1, IGNORED]]))
    torch.testing.assert_close(loss, by_hand)


def test_a_saved_judge_names_the_same_values(tmp_path):
    judge = Judge({"a": ["x", "y"], "b": ["z"]}).eval()
    save_judge(judge, tmp_path / "judge.safetensors")
    images = torch.rand(3, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        loaded = load_judge(tmp_path / "judge.safetensors")
        torch.testing.assert_close(loaded.features(images), judge.features(images), atol=2e-2, rtol=2e-2)
        assert loaded.values == judge.values


def test_fit_continues_to_the_same_weights(tmp_path):
    def run(folder, *stops):
        for stop in stops:
            torch.manual_seed(0)
            model = torch.nn.Conv2d(3, 3, 1)

            def loss(images, indices, generator, model=model):
                return (model(images) - torch.randn(images.shape, generator=generator)).float().square().mean()

            def interrupt(line, stop=stop):
                if int(line.split("/")[0]) >= stop:
                    raise KeyboardInterrupt

            try:
                fit(model, loss, lambda index: ComicSource(99, size=16).read(index).image, folder, num_images=24,
                    batch_size=4, learning_rate=1e-2, log=interrupt, checkpoint_every=1)  # fmt: skip
            except KeyboardInterrupt:
                continue
        return model

    straight, broken_off = run(tmp_path / "a", 99), run(tmp_path / "b", 8, 16, 99)
    for one, two in zip(straight.parameters(), broken_off.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("trouble", ["loss", "gradient", "disk"])
def test_a_fit_that_fails_keeps_its_last_checkpoint_and_one_with_fewer_pictures_is_over(trouble, tmp_path, monkeypatch):
    told: list[str] = []

    def run(last: int, broken: str = ""):
        model = torch.nn.Conv2d(3, 3, 1)

        def loss(images, indices, generator):
            value, is_late = model(images).square().mean(), indices[0] >= 8
            if broken == "gradient" and is_late:
                return (value * 0).sqrt()
            return value * (torch.nan if broken == "loss" and is_late else 1.0)

        fit(model, loss, lambda index: ComicSource(99, size=16).read(index).image, tmp_path, num_images=last,
            batch_size=4, learning_rate=1e-2, log=told.append, checkpoint_every=1)  # fmt: skip

    run(8)
    before = (tmp_path / "training.pt").read_bytes()
    if trouble != "disk":
        with pytest.raises(NonFiniteLoss, match=f"picture 8: the {trouble} is not finite"):
            run(16, broken=trouble)
    else:

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch, pytest.raises(ResourceError, match="No space left on device"):
            patch.setattr("onestroke.embedded.fit.os.replace", full)
            run(16)
    assert [path.name for path in tmp_path.iterdir()] == ["training.pt"]
    assert (tmp_path / "training.pt").read_bytes() == before
    told.clear()
    run(4)
    assert not told


def test_the_tokenizer_keeps_the_captions_words_whole_and_falls_back_to_bytes():
    tokenizer = train_tokenizer([ComicSource(400).caption(index) for index in range(400)])
    assert tokenizer.tokenize("a person with pink hair") == ["a</w>", "person</w>", "with</w>", "pink</w>", "hair</w>"]
    unknown = tokenizer("Zürich 漫画").input_ids
    assert tokenizer.unk_token_id not in unknown[1:-1] and len(unknown) > 4
    assert tokenizer.model_max_length == 64


def test_the_unet_has_at_most_8_5_million_parameters():
    assert sum(parameter.numel() for parameter in build_unet(8).parameters()) <= 8_500_000


# the package's own weights


def test_teacher_student_and_judge_are_in_the_package_and_small():
    size = sum(path.stat().st_size for path in weights_folder().rglob("*.safetensors"))
    assert 20e6 < size <= 40 * 2**20


def test_the_packages_configs_name_no_place_that_they_were_trained_in():
    assert not [path for path in weights_folder().rglob("*.json") if "_name_or_path" in path.read_text("utf-8")]


@pytest.fixture(scope="module")
def student():
    pipeline = embedded_student()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_shipped_student_draws_what_its_seed_says(student):
    def drawn(seed):
        how = {"num_inference_steps": 1, "guidance_scale": 0.0, "generator": torch.Generator().manual_seed(seed)}
        return student("a person", output_type="pt", **how).images

    one, again, other = drawn(1), drawn(1), drawn(2)
    assert one.shape == (1, 3, 128, 128)
    assert torch.equal(one, again) and (one - other).abs().mean() > 0.01


def test_teacher_and_student_share_all_but_the_unet(student):
    teacher = embedded_teacher()
    assert torch.equal(teacher.vae.decoder.conv_in.weight, student.vae.decoder.conv_in.weight)
    assert not torch.equal(teacher.unet.conv_in.weight, student.unet.conv_in.weight)
    assert student.scheduler.config.prediction_type == teacher.scheduler.config.prediction_type


def test_prompts_and_reference_pictures_are_different_halves():
    real, reference = (comic_pictures(6, odd=odd, label="x") for odd in (False, True))
    assert not set(real.indices) & set(reference.indices)
    assert [real.prompt(row) for row in range(6)] == list(comic_prompts(6).texts)
    assert not {reference.prompt(row) for row in range(6)} & set(comic_prompts(6).texts)
    rendered = dict(real.read(range(6)))
    assert stack_images([rendered[row] for row in range(6)]).shape == (6, 3, 128, 128)


def test_prompts_name_what_the_judge_can_find_and_the_style_they_ask_for(tmp_path):
    prompts = comic_prompts(30)
    seen = judged(embedded_judge(), comic_pictures(30, odd=False, label="real"), tmp_path)
    values = value_namer(embedded_judge())(seen.parts[JUDGE])
    assert all(set(named) <= set(found) for named, found in zip(prompts.named, values, strict=True))
    hits = [named[k] == found[k] for named, found in zip(prompts.named, values, strict=True) for k in named]
    assert np.mean(hits) > 0.5  # guessing finds about a fifth
    assert prompts.columns["style"] == tuple(named.get("style", "not named") for named in prompts.named)


def test_the_judge_sees_pictures_of_another_size_as_at_its_own(tmp_path):
    small, large = (
        judged(embedded_judge(), comic_pictures(8, odd=False, label="x", size=size), tmp_path).parts[JUDGE]
        for size in (128, 256)
    )
    assert np.linalg.norm(small - large) < 0.3 * np.linalg.norm(small - np.roll(small, 1, axis=0))


def test_completions_are_whole_phrases_of_words_that_the_embedded_model_knows():
    assert {"pink hair", "round glasses", "a yellow background"} <= set(completions())
    assert not any(unknown_words(phrase) or "{" in phrase for phrase in completions())

"""Feature networks and scorers: those of transformers, those that are not here, and what was trained against."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from painted import colour_looking, noise_pictures, paint, task_of
from pipelines import tiny_text_config, tiny_tokenizer
from tiny_runs import tiny_dinov2
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionModelWithProjection

from onestroke.embedded.held_out import comic_pictures
from onestroke.errors import ModelError
from onestroke.evaluate.compare import find
from onestroke.evaluate.features import FEATURES, STYLE, load_all, load_observer
from onestroke.evaluate.figures import flags_of
from onestroke.evaluate.observer import Observer
from onestroke.evaluate.scorers import OTHER, SCORERS
from onestroke.families.fingerprint import fingerprint

CPU = torch.device("cpu")


def test_networks_that_are_not_here_are_named_with_the_way_to_get_them(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found, missing = load_all([*FEATURES, *SCORERS], FEATURES | SCORERS, weights={}, device=CPU)
    assert "efficientnet-lite0" in {one.name for one in found}
    by_name = {one.name: one for one in missing}
    assert by_name.keys() | {one.name for one in found} == {*FEATURES, *SCORERS}
    assert all(one.why and f"--weights {name}=PATH" in one.fix for name, one in by_name.items())
    if "dinov2-large" in by_name:
        assert "hf download facebook/dinov2-large" in by_name["dinov2-large"].fix


def test_a_folder_that_was_given_and_does_not_load_is_an_error(tmp_path):
    for name, kinds in (("dinov2-large", FEATURES), ("clip-vit-large", FEATURES), ("hpsv2", SCORERS)):
        with pytest.raises(ModelError):
            load_observer(name, kinds, weights={name: str(tmp_path)}, device=CPU)


def test_imagenet_features_come_with_a_style_that_knows_tone_and_not_place():
    network = load_observer("efficientnet-lite0", FEATURES, weights={}, device=CPU)
    pictures = np.stack([comic_pictures(3, odd=False, label="x").source.read(2 * i).image for i in range(3)])
    moved, toned = np.roll(pictures, 32, axis=2), (pictures * 0.6).astype(np.uint8)
    parts = [network.split(network.observe(p, [""] * 3)) for p in (pictures, moved, toned)]
    assert parts[0]["efficientnet-lite0"].shape == (3, 320) and parts[0][STYLE].shape == (3, 128)
    distance = [np.linalg.norm(p[STYLE] - parts[0][STYLE]) for p in parts]
    assert distance[1] < 0.5 * distance[2]


def test_dinov2_and_clip_vision_features_are_those_of_transformers(tmp_path):
    tiny_dinov2(tmp_path / "dino")
    dino = load_observer("dinov2-large", FEATURES, weights={"dinov2-large": str(tmp_path / "dino")}, device=CPU)
    assert dino.observe(noise_pictures(), [""] * 5).shape == (5, 16)
    torch.manual_seed(0)
    config = tiny_clip_config().vision_config
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "clip")
    clip = load_observer("clip-vit-large", FEATURES, weights={"clip-vit-large": str(tmp_path / "clip")}, device=CPU)
    square = noise_pictures(side=32)  # as the network wants it: nothing is resized
    model = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "clip").eval()
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)(list(square), return_tensors="pt")
    with torch.no_grad():
        expected = model(**pixels).image_embeds.numpy()
    np.testing.assert_allclose(clip.observe(square, [""] * 5), expected, atol=1e-5)


class _Script(torch.nn.Module):
    """Stands for inception-2015-12-05.pt: called with uint8 pictures and return_features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 7, 3)

    def forward(self, pixels: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features and pixels.dtype == torch.uint8
        return self.conv(pixels.float()).mean(dim=(2, 3))


def test_inception_is_read_from_a_torchscript_file(tmp_path):
    torch.manual_seed(0)
    module = _Script()
    torch.jit.script(module).save(tmp_path / "inception.pt")
    observer = load_observer("inception", FEATURES, weights={"inception": str(tmp_path / "inception.pt")}, device=CPU)
    pictures = noise_pictures()
    with torch.no_grad():
        expected = module(torch.from_numpy(pictures).permute(0, 3, 1, 2), True)
    np.testing.assert_allclose(observer.observe(pictures, [""] * 5), expected.numpy(), rtol=1e-5)


def tiny_clip_config() -> CLIPConfig:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 32, "patch_size": 8, "projection_dim": 24}
    return CLIPConfig(
        text_config=tiny_text_config("gelu").to_dict(),
        vision_config=vision,
        projection_dim=24,
        logit_scale_init_value=3.0,
    )


def test_scores_are_those_of_transformers_clip_model(tmp_path):
    torch.manual_seed(0)
    CLIPModel(tiny_clip_config()).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    prompts = ["a cat", "a dog on a mat", "ink", "a bird"]
    pictures = noise_pictures(4, side=48)[:, :, :40]  # 48 x 40: scaled, and cut to the middle
    model = CLIPModel.from_pretrained(tmp_path).eval()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    words = tiny_tokenizer()(prompts, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        output = model(**processor(list(pictures), return_tensors="pt"), input_ids=words.input_ids)
    scaled = output.logits_per_image.numpy()
    for name, scale in (("clip-score", model.logit_scale.exp().item()), ("pickscore", 1.0), ("hpsv2", None)):
        scorer = load_observer(name, SCORERS, weights={name: str(tmp_path)}, device=CPU)
        rows = scorer.split(scorer.observe(pictures, prompts))
        expected = scaled / (scale or model.logit_scale.exp().item())
        # PIL rounds resized pixels to whole levels
        np.testing.assert_allclose(rows[name][:, 0], expected.diagonal(), atol=0.01 * np.abs(expected).max())
        np.testing.assert_allclose(
            rows[name + OTHER][:, 0], expected[range(4), [2, 3, 0, 1]], atol=0.01 * np.abs(expected).max()
        )


def test_a_score_counts_what_is_heeded_of_the_prompt(tmp_path):
    """A scorer that knows `paint`: heed is 1 for it, 0 for a painter that does not read."""

    def fit(pictures, prompts):
        def score(prompt, picture):
            return 0.3 - np.abs(paint([prompt], [0])[0].mean((0, 1)) - picture.mean((0, 1))).mean() / 1000

        others = np.roll(prompts, len(prompts) // 2)
        return np.array([[score(p, x), score(o, x)] for p, o, x in zip(prompts, others, pictures, strict=True)])

    scorer = Observer("clip-score", "1", {"clip-score": 1, "clip-score" + OTHER: 1}, fit)
    plain = colour_looking(scorers=("clip-score",))
    looking = replace(plain, observers=(*plain.observers, scorer))
    for student, low, high in (
        (lambda p, s: paint(p, [x + 5 for x in s]), 0.8, 1.2),
        (lambda p, s: paint(["x"] * len(p), s), -0.3, 0.3),
    ):
        findings = find(task_of(tmp_path / str(low), student), looking)
        kept = next(m for m in findings.measured if m.key == "clip_score_kept" and m.role == "student")
        assert low < kept.value < high
        flags = flags_of(findings.measured, base_steps=20)
        assert (("student, 1 step", "clip_score_kept") in {(f.label, f.key) for f in flags}) == (low < 0)


def test_fingerprints_tell_weights_apart_and_change_nothing():
    one, other = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    assert fingerprint(one) == fingerprint(one) != fingerprint(other)
    assert fingerprint(one.to(torch.bfloat16)) == fingerprint(one)

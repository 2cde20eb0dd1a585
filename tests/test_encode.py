"""Encoded once: the same losses as without, from latents and embeddings alone; stopped, edited, renamed, refused."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import tiny_sdxl, tiny_text_config, tiny_tokenizer
from tiny_runs import tiny_dinov2, tiny_recipe
from transformers import CLIPTextModelWithProjection

import onestroke
from onestroke.commands.encode import encode, left_out
from onestroke.data.encodings import Encodings
from onestroke.data.folder import FolderSource
from onestroke.distill import encoding
from onestroke.distill.conditions import ImageEmbedder, TextEmbedder
from onestroke.distill.features import FeatureNetwork
from onestroke.errors import CheckpointError, DataError, RecipeError, ResourceError
from onestroke.families.model import DiffusionModel

SHAPES = ((64, 40), (60, 40), (66, 41), (40, 60), (44, 66), (40, 58), (48, 48), (50, 50))  # height, width


def write_pictures(folder):
    folder.mkdir()
    lines = []
    for number, (height, width) in enumerate(SHAPES):
        image = Image.radial_gradient("L").resize((width, height)).convert("RGB").rotate(40 * number)
        image.save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"picture {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_sdxl().save_pretrained(root / "teacher")
    tiny_dinov2(root / "dinov2")
    CLIPTextModelWithProjection(tiny_text_config("gelu")).save_pretrained(root / "clip")
    tiny_tokenizer().save_pretrained(root / "clip")
    return root


def recipe_of(models, folder, *lines):
    return tiny_recipe(
        f"teacher.source={models / 'teacher'}", f"data.source={folder}", "data.buckets=computed",
        "data.random_flip=true",
        "data.size=48", "train.batch_size=2", "train.num_images=8", "discriminator.features=dinov2-small",
        f"discriminator.features_source={models / 'dinov2'}", "discriminator.image_encoder=dinov2-small",
        f"discriminator.image_encoder_source={models / 'dinov2'}", f"discriminator.text_encoder={models / 'clip'}",
        "data.max_broken_share=0.5", *lines,
    )  # fmt: skip


def losses(recipe, out):
    terms = []
    onestroke.distill(recipe, out, observe=lambda progress, left: terms.append(dict(progress.terms)))
    return terms


def counted(monkeypatch, kind, name):
    calls, real = [], getattr(kind, name)

    def call(self, *arguments, **options):
        calls.append(arguments)
        return real(self, *arguments, **options)

    monkeypatch.setattr(kind, name, call)
    return calls


@pytest.mark.parametrize("lines", [
    ("data.crop=random", "data.crops_per_image=2", "data.num_workers=1"),
    ("discriminator.real=reconstructed", "discriminator.crop=0.75"),
])  # fmt: skip
def test_training_on_encodings_gives_the_losses_of_training_on_pictures(lines, models, tmp_path, monkeypatch):
    """With buckets, crops, flips and a broken picture; nothing that is kept is computed again."""
    folder = write_pictures(tmp_path / "pictures")
    whole = (folder / "4.png").read_bytes()
    (folder / "4.png").write_bytes(whole[: len(whole) // 2])
    recipe = recipe_of(models, folder, *lines)
    without = losses(recipe, tmp_path / "without")
    _, done = encode(recipe)
    cuts = (2 if "data.crop=random" in lines else 1) * 2
    assert done.broken == 1 and 7 * 2 <= done.cuts <= 7 * cuts and done.captions == 8
    encoded = counted(monkeypatch, DiffusionModel, "encode_images")
    embedded, worded = counted(monkeypatch, ImageEmbedder, "forward"), counted(monkeypatch, TextEmbedder, "encode")
    joined = counted(monkeypatch, FeatureNetwork, "forward_and_embed")  # features and embedding of one network
    read = counted(monkeypatch, FolderSource, "read")
    with_cache = losses(recipe, tmp_path / "with")
    assert len(without) == len(with_cache) == 4
    for one, two in zip(without, with_cache, strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert without != with_cache  # float32 beside float64: the encodings were really used
    assert not encoded and not worded
    if "discriminator.real=reconstructed" in lines:
        # of what the VAE makes of them, cropped, none is kept: four steps, and a picture whose operations are counted
        assert not read and len(embedded) + len(joined) == 5
    else:
        assert not embedded and not joined


def test_half_precision_keeps_the_losses_close(models, tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    recipe = recipe_of(models, folder, "train.precision=bfloat16")
    without = losses(recipe, tmp_path / "without")
    encode(recipe)
    rows = next((folder / ".onestroke" / "encoded").glob("latents-*-bfloat16/*.safetensors"))
    assert Encodings(rows.parent).get(int(Encodings(rows.parent)._keys[0])).dtype == np.float16
    for one, two in zip(without, losses(recipe, tmp_path / "with"), strict=True):
        for name in ("student/adversarial", "student/distillation", "discriminator/hinge"):
            assert two[name] == pytest.approx(one[name], rel=0.05, abs=0.02), name


def test_what_is_encoded_is_not_encoded_again_and_an_edited_picture_is(models, tmp_path, monkeypatch):
    folder = write_pictures(tmp_path / "pictures")
    recipe = recipe_of(models, folder)
    _, first = encode(recipe)
    assert (first.cuts, first.known, first.captions, first.broken) == (16, 0, 8, 0)
    assert encode(recipe)[1] == (0, 16, 0, 0)
    Image.new("RGB", (40, 64), "red").save(folder / "0.png")
    os.rename(folder / "1.png", folder / "one.png")
    page = (
        (folder / "metadata.jsonl")
        .read_text()
        .replace('"1.png", "text": "picture 1"', '"one.png", "text": "new words"')
    )
    (folder / "metadata.jsonl").write_text(page)
    assert encode(recipe)[1] == (2, 14, 1, 0)  # both flips of the edited one; the renamed one has the same bytes
    assert encode(recipe_of(models, folder, "train.precision=float32"))[1].cuts == 16  # of other numbers


def test_a_stopped_run_goes_on_at_the_shards_that_are_missing(models, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "SHARD_ROWS", 4)
    folder = write_pictures(tmp_path / "pictures")
    recipe = recipe_of(models, folder)

    def stop(done, total):
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background process ignores

    try:
        with pytest.raises(KeyboardInterrupt):
            encode(recipe, stop)
    finally:
        signal.signal(signal.SIGINT, before)
    _, rest = encode(recipe)
    assert rest.known == 4 and rest.cuts == 12 and rest.captions == 0
    stores = {path.name.split("-")[0]: Encodings(path) for path in (folder / ".onestroke" / "encoded").iterdir()
              if path.is_dir()}  # fmt: skip
    assert {kind: len(store) for kind, store in stores.items()} == {"latents": 16, "image": 16, "text": 8}
    assert not list((folder / ".onestroke").rglob("*.tmp"))


def test_a_full_disk_leaves_no_half_shard(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    store = Encodings(tmp_path / "latents")
    store.add([5, 9], torch.tensor([[1.0], [2.0]]))
    monkeypatch.setattr("onestroke.tensor_files.save_file", full)
    with pytest.raises(ResourceError, match="Free disk space"):
        store.add([7], torch.zeros(1, 1))
    again = Encodings(tmp_path / "latents")
    assert len(again) == 2 and again.get(9).tolist() == [2.0] and again.get(7) is None
    assert again.has(np.array([9, 7, 5])).tolist() == [True, False, True]


def test_what_cannot_be_encoded_is_one_line(models, tmp_path):
    folder = write_pictures(tmp_path / "pictures")

    def refused(kind, match, *lines, during=lambda done, total: None):
        with pytest.raises(kind, match=match) as caught:
            encode(recipe_of(models, folder, *lines), during)
        assert "\n" not in str(caught.value)

    refused(RecipeError, r"data\.crop: crops without number.*crops_per_image", "data.crop=random")
    refused(DataError, "drawn anew", "data.source=comicset")
    refused(CheckpointError, "another run is writing",
            during=lambda done, total: encode(recipe_of(models, folder)))  # fmt: skip
    store = next((folder / ".onestroke" / "encoded").glob("latents-*/*.safetensors"))
    store.write_bytes(store.read_bytes()[:40])
    refused(DataError, "cannot be read. Delete this file")


def test_what_a_recipe_cannot_keep_is_told(models, tmp_path):
    assert left_out(tiny_recipe("discriminator.conditioning=none", "discriminator.real=reconstructed")) == []
    lines = left_out(tiny_recipe("discriminator.crop=0.5"))
    assert len(lines) == 3 and "shown parts of them" in lines[0] and "teacher's own" in lines[1]

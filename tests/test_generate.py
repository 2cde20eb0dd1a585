"""`onestroke generate`, and the words that the embedded model knows."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from onestroke import embedded
from onestroke.commands import generate
from onestroke.data.comicset import ComicSource
from onestroke.embedded.vocabulary import known_words, unknown_words, words_in
from onestroke.errors import ResourceError
from tests.consoles import onestroke, paper, text_of


def test_generate_writes_the_same_picture_again_with_what_it_was_drawn_from(weights, tmp_path):
    console = paper()
    for name in ("a.png", "b.png"):
        generate.run_generate(
            "a laughing person", tmp_path / name, "embedded", steps=1, seed=7, guidance=0.0, count=2, console=console
        )
    image = Image.open(tmp_path / "a.png")
    assert image.size == (256, 128)
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / "b.png")))
    assert {"prompt": "a laughing person", "seed": "7", "steps": "1", "model": "embedded"}.items() <= image.text.items()
    assert image.text["software"].startswith("onestroke ")
    assert re.search(r"a\.png \(\d+\.\d\d s to draw\)", text_of(console))
    assert "note" not in text_of(console)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_pictures_side_by_side_are_those_of_the_seeds_one_by_one(weights, tmp_path):
    for name, seed, count in (("both.png", 3, 2), ("second.png", 4, 1)):
        generate.run_generate(
            "a person", tmp_path / name, "embedded", steps=1, seed=seed, guidance=0.0, count=count, console=paper()
        )
    both, second = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("both.png", "second.png"))
    assert np.abs(both[:, 128:] - second).max() <= 8  # bfloat16 rounds otherwise in another batch
    assert np.abs(both[:, :128] - second).max() > 8


def test_generate_draws_portraits_and_landscapes(weights, monkeypatch, capsys, tmp_path):
    for options, size in ((("--width", "96", "--height", "160"), (96, 160)), (("--width", "168"), (168, 128))):
        out = tmp_path / "a.png"
        status, _, error = onestroke("generate", "a person", "-o", str(out), *options, monkeypatch=monkeypatch,
                                     capsys=capsys)  # fmt: skip
        assert status == 0 and Image.open(out).size == size, error
    status, _, error = onestroke("generate", "a person", "-o", str(out), "--width", "100", monkeypatch=monkeypatch,
                                 capsys=capsys)  # fmt: skip
    assert status == 1 and "--width: 100 pixels cannot be drawn. Give a multiple of 8." in error


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_other_formats_carry_the_prompt_in_exif(suffix, tmp_path):
    picture = np.zeros((8, 8, 3), np.uint8)
    generate.save_picture(picture, tmp_path / f"a.{suffix}", {"prompt": "a café 笑", "software": "onestroke 1"})
    description = Image.open(tmp_path / f"a.{suffix}").getexif()[0x010E]
    assert description == '{"prompt": "a caf\\u00e9 \\u7b11", "software": "onestroke 1"}'


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path):
    out = tmp_path / "a.webp"
    out.write_bytes(b"old")
    with pytest.raises(ResourceError, match="cannot be written"):
        generate.save_picture(np.zeros((4, 20_000, 3), np.uint8), out, {"software": "x"})  # WebP ends at 16,383 px
    assert out.read_bytes() == b"old" and list(tmp_path.iterdir()) == [out]


def test_generate_refuses_bad_orders_in_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    orders = {
        ("  ", str(tmp_path / "a.png")): "the prompt is empty",
        ("a person", str(tmp_path / "a.tiff")): ".tiff",
        ("a person", str(tmp_path / "a")): "without a suffix",
        ("a person", str(tmp_path / "file" / "a.png")): "cannot be written",
    }
    for (prompt, out), part in orders.items():
        status, printed, error = onestroke("generate", prompt, "-o", out, monkeypatch=monkeypatch, capsys=capsys)
        assert status == 1 and part in error and error.count("\n") == 1 and not printed


def test_a_prompt_that_is_cut_or_unknown_is_named(weights):
    pipeline = embedded.embedded_student()
    words = pipeline.tokenizer.model_max_length - 2
    assert generate.warnings_about("a " * words, pipeline, "embedded") == []
    long, strange = generate.warnings_about("a " * (words + 3) + "Zeppelin", pipeline, "embedded")
    tokens = len(pipeline.tokenizer("Zeppelin").input_ids) - 2
    assert f"its last {3 + tokens} of {words + 3 + tokens} tokens" in long and "'zeppelin'" in strange
    assert generate.warnings_about("a zeppelin", pipeline, "some/folder") == []


def test_known_words_are_those_of_captions():
    source = ComicSource(4000)
    seen = {word for index in range(0, 4000, 3) for word in words_in(source.caption(index))}
    assert seen <= known_words()
    assert len(known_words() - seen) < 0.15 * len(known_words())  # rare phrases
    assert set(embedded.vocabulary.FUNCTION_WORDS) <= seen


def test_words_outside_the_vocabulary_are_told_once_and_in_order():
    assert unknown_words("A laughing person with pink hair and round glasses") == []
    assert unknown_words("a dragon, a castle and a DRAGON with 3 heads") == ["dragon", "castle", "heads"]

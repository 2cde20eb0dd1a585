"""The embedded comic pictures: what they show, what their captions say, and how they are written."""

import json
import re
import tarfile
from functools import cache
from importlib.resources import files
from itertools import combinations

import numpy as np
import pytest

from onestroke.data import open_folder
from onestroke.data.comicset import (
    SPLITS,
    STYLE_NAMES,
    ComicSource,
    draw_character,
    load_style,
    make_caption,
    write_comicset,
)
from onestroke.data.comicset import captions as captions_module
from onestroke.data.comicset.character import generator
from onestroke.data.comicset.render import render
from onestroke.errors import DataError, RecipeError, ResourceError

STYLES = tuple(map(load_style, STYLE_NAMES))
GENDERED = re.findall(
    r"\w+",
    """man men woman women boy boys girl girls guy guys lady ladies gentleman he she him her his hers male female
    masculine feminine manly womanly girlish boyish mr mrs ms sir madam king queen prince princess mother father brother
    sister son daughter husband wife""",
)


def held_out_in(character):
    pairs = map(frozenset, combinations(character.values.items(), 2))
    return [pair for pair in pairs if pair in load_style(character.style).held_out]


def phrases_of(style, attribute, value, color):
    """What a caption may write for a value, with every article as "a" (captions say "an afro")."""
    if attribute == "style":
        return [articled(phrase) for phrase in style.phrases]
    if attribute == "hair color":
        return [value]
    return [articled(phrase.replace("{color}", color)) for phrase in style[attribute][value].phrases]


def articled(text):
    return re.sub(r"\ban\b", "a", re.sub(r"\s+", " ", text)).strip()


def contains(text, phrase):
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text) is not None


@pytest.fixture(scope="module")
def characters():
    """Split -> the characters of its first 3,000 pictures."""
    return {split: [draw_character(index, split=split) for index in range(3000)] for split in SPLITS}


@pytest.fixture(scope="module")
def captions(characters):
    return {
        split: [make_caption(one, generator(0, split, index, 1)) for index, one in enumerate(drawn)]
        for split, drawn in characters.items()
    }


def test_a_picture_is_a_function_of_seed_split_and_index():
    source = ComicSource(10, size=48)
    first, again, other = source.read(3), ComicSource(1000, size=48).read(3), ComicSource(10, size=48, seed=1).read(3)
    assert first.caption == again.caption and np.array_equal(first.image, again.image)
    assert first.image.shape == (48, 48, 3) and first.image.dtype == np.uint8
    assert not np.array_equal(first.image, other.image)
    assert len({source.read(index).image.tobytes() for index in range(10)}) == 10


def test_a_new_epoch_words_the_same_picture_anew():
    source = ComicSource(4, size=16)
    readings = [source.read(2, slot=slot) for slot in (2, 6, 10, 14)]
    assert len({picture.image.tobytes() for picture in readings}) == 1
    assert len({picture.caption for picture in readings}) == 4
    assert source.read(2, slot=6).caption == readings[1].caption == source.described(2, slot=6).text
    assert source.read(2).caption == source.described(2).text


def test_training_and_validation_never_show_a_held_out_pair(characters):
    assert not [pair for split in ("train", "validation") for one in characters[split] for pair in held_out_in(one)]


def test_every_held_out_picture_shows_exactly_its_pair_and_nearly_every_pair_is_shown(characters):
    for one in characters["held-out"]:
        assert held_out_in(one) == [frozenset(one.held_out)]
    shown = {(one.style, frozenset(one.held_out)) for one in characters["held-out"]}
    # A few pairs go together with nothing that training may show beside them, or are rare.
    assert len(shown) > 0.9 * sum(len(style.held_out) for style in STYLES)


def seeable_pairs(style):
    """Pairs of values of two attributes that one picture can show, worked out from the style's page."""

    def ruled_out_by(attribute, value):
        names = {*style.hides.get((attribute, value), ()), *style.excludes.get((attribute, value), ())}
        variants = {v for choices in style[attribute][value].draw.values() for v in choices}
        return names | ({"hair color"} if attribute == "hair" and variants <= style.uncolored else set())

    return {
        frozenset(((one.name, a.name), (two.name, b.name)))
        for one, two in combinations(style.attributes, 2)
        for a in one.values
        for b in two.values
        if two.name not in ruled_out_by(one.name, a.name) and one.name not in ruled_out_by(two.name, b.name)
    }


@pytest.mark.parametrize("style", STYLES, ids=STYLE_NAMES)
def test_a_tenth_of_the_pairs_that_can_be_seen_together_is_held_out(style):
    assert len(style.held_out) == round(len(seeable_pairs(style)) / 10)


def test_no_held_out_pair_is_one_that_no_picture_can_show():
    assert not [(style.name, set(style.held_out - seeable_pairs(style))) for style in STYLES
                if style.held_out - seeable_pairs(style)]  # fmt: skip


def test_a_caption_names_what_it_says_and_nothing_else(characters, captions):
    for split in SPLITS:
        for character, caption in zip(characters[split], captions[split], strict=True):
            style, text, color = (
                load_style(character.style),
                articled(caption.text),
                caption.named.get("hair color", ""),
            )
            assert set(caption.named.items()) <= {("style", character.style), *character.values.items()}
            for attribute, value in caption.named.items():
                assert any(contains(text, phrase) for phrase in phrases_of(style, attribute, value, color)), caption
            for attribute in style.attributes:
                if attribute.name not in caption.named and attribute.role != "hair color":
                    told = [phrase for phrase in telltales(style.name, attribute.name, color) if phrase in text]
                    assert not any(contains(text, phrase) for phrase in told), (caption, attribute.name)


@cache
def telltales(style_name, attribute_name, color):
    """Phrases that only this attribute can have brought into a caption of the style."""
    style = load_style(style_name)

    def phrases(attribute):
        return {p for value in attribute.values for p in phrases_of(style, attribute.name, value.name, color)}

    others = {phrase for other in style.attributes if other.name != attribute_name for phrase in phrases(other)}
    others |= set(phrases_of(style, "style", style_name, color))
    return [phrase for phrase in phrases(style[attribute_name]) if not any(phrase in other for other in others)]


def test_captions_leave_something_unsaid_and_held_out_captions_name_their_pair(characters, captions):
    shares = []
    for character, caption in zip(characters["train"], captions["train"], strict=True):
        assert caption.named
        shares.append(len(caption.named) / (1 + len(character.values)))
    assert 0.5 < np.mean(shares) < 0.7 and np.std(shares) > 0.15  # drawn from [0.25, 0.95] for each caption
    for character, caption in zip(characters["held-out"], captions["held-out"], strict=True):
        assert dict(character.held_out).items() <= caption.named.items()
    character = characters["train"][0]
    assert len(make_caption(character, np.random.default_rng(0), share=0.0).named) == 1
    everything = make_caption(character, np.random.default_rng(0), share=1.0).named
    assert everything == {"style": character.style, **character.values}


def test_captions_hardly_repeat():
    texts = {ComicSource(6000).described(index).text for index in range(6000)}
    assert len(texts) >= 5000


def test_no_phrase_is_gendered():
    phrases = [*captions_module.NOUNS, *captions_module.OPENINGS, *captions_module.BACKGROUNDS]
    for style in STYLES:
        phrases += [*style.phrases, *(a.name for a in style.attributes)]
        phrases += [text for a in style.attributes for value in a.values for text in (value.name, *value.phrases)]
    words = {word for phrase in phrases for word in re.findall(r"[a-z]+", phrase.lower())}
    assert len(words) > 100 and not words & set(GENDERED)


def test_each_style_has_six_attributes_and_all_have_120_to_200_values():
    assert min(len(style.attributes) for style in STYLES) >= 6
    drawn = {(s.name, a.name, v.name) for s in STYLES for a in s.attributes for v in a.values if a.components}
    colors = {(a.name, v.name) for s in STYLES for a in s.attributes for v in a.values if not a.components}
    assert 120 <= len(drawn) + len(colors) <= 200


@pytest.mark.parametrize("style", STYLES, ids=STYLE_NAMES)
def test_every_variant_and_color_named_exists_in_its_dicebear_style(style):
    page = json.loads(files("dicebear_styles").joinpath(f"{style.name}.json").read_text("utf-8"))
    options = [(o, c) for a in style.attributes for v in a.values for o, c in v.draw.items()]
    options += [*style.free.items(), *((o, c) for o, c in style.fixed.items() if o.endswith("Variant"))]
    for option, choices in options:
        if option.endswith("Variant"):
            assert set(choices) <= page["components"][option.removesuffix("Variant")]["variants"].keys(), option
        else:
            assert option.removesuffix("Color") in {*page["colors"], "background"}, option
    components = {component for attribute in style.attributes for component in attribute.components}
    assert components <= page["components"].keys()
    heads = {v for component in page["components"].values() for v in component["variants"]}
    assert style.uncolored <= heads


def test_an_attribute_changes_the_picture():
    """Each value of each attribute draws something of its own: no word is a silent option."""
    for style in STYLES:
        character = next(c for c in (draw_character(i, style=style.name) for i in range(50)) if "glasses" in c.values)
        for attribute in style.attributes:
            pictures = set()
            for value in attribute.values:
                options = {**character.options, **{option: [choices[0]] for option, choices in value.draw.items()}}
                options |= {f"{component}Probability": 100 for component in attribute.components}
                if attribute.role == "hair color":
                    hair = next(a for a in style.attributes if a.role == "hair")
                    options |= next(
                        {option: [variant]}
                        for v in hair.values for option, choices in v.draw.items()
                        for variant in choices if variant not in style.uncolored
                    )  # fmt: skip
                if attribute.name in ("eyes", "expression"):
                    options |= {"glassesProbability": 0, "beardProbability": 0, "facialHairProbability": 0}
                pictures.add(render(type(character)(style.name, {}, options), size=64).tobytes())
            assert len(pictures) == len(attribute.values), (style.name, attribute.name)


def test_placement_scale_and_flip_vary(characters):
    for style in STYLES:
        placed = [one.options for one in characters["train"] if one.style == style.name]
        for option, (low, high) in {"scale": style.scale, "translateX": style.shift_x}.items():
            values = [options[option] for options in placed]
            assert low <= min(values) < low + 0.1 * (high - low) and high - 0.1 * (high - low) < max(values) <= high
        assert np.std([options["translateY"] for options in placed]) > 0.5  # % of the picture
        assert 0.4 < np.mean([options["flip"] == "horizontal" for options in placed]) < 0.6
    assert abs(len(placed) / 3000 - 1 / 4) < 0.03


def test_no_training_picture_is_a_validation_picture(characters):
    looks = {split: {f"{c.style} {sorted(c.options.items())}" for c in drawn} for split, drawn in characters.items()}
    assert len(looks["train"]) == 3000 and not looks["train"] & looks["validation"]
    pixels = [{render(c, size=32).tobytes() for c in characters[split][:300]} for split in ("train", "validation")]
    assert len(pixels[0]) == 300 and not pixels[0] & pixels[1]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_imagefolder_holds_the_pictures_and_opens_as_a_source(tmp_path):
    seen = []
    out = write_comicset(tmp_path / "set", count=5, size=32, split="validation",
                         on_progress=lambda done, count: seen.append((done, count)))  # fmt: skip
    source, folder = ComicSource(5, "validation", 32), open_folder(out)
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)] and len(folder) == 5
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    for index, row in enumerate(rows):
        picture, written = source.read(index), folder.read(index)
        assert np.array_equal(picture.image, written.image) and picture.caption == written.caption == row["text"]
        assert (
            row["attributes"] == dict(source.character(index).values) and row["style"] == source.character(index).style
        )
        assert row["named"] == dict(source.described(index).named)
    page = (out / "CREDITS.md").read_text()
    assert all(style.credit["artist"] in page and style.credit["licence"] in page for style in STYLES)


def test_shards_hold_the_same_pictures_whichever_library_reads_them(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    out = write_comicset(tmp_path / "set", count=5, size=32, layout="webdataset", shard_size=2)
    shards = sorted(map(str, out.glob("*.tar")))
    source, folder = ComicSource(5, size=32), open_folder(out)
    for shard, num_members in zip(shards, (6, 6, 3), strict=True):
        with tarfile.open(shard) as tar:
            assert len(tar.getnames()) == num_members and {(m.mtime, m.uid, m.uname) for m in tar} == {(0, 0, "")}
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"))
    for index, sample in enumerate(samples):
        picture, written = source.read(index), folder.read(index)
        assert np.array_equal(picture.image, written.image) and np.array_equal(picture.image, sample["png"])
        assert picture.caption == written.caption == sample["txt"] == sample["json"]["text"]
    assert len(samples) == len(folder) == 5


@pytest.mark.parametrize("layout", ["imagefolder", "webdataset"])
def test_an_interrupted_writing_goes_on_and_ends_in_the_same_bytes(tmp_path, layout):
    def stop(done, count):
        if done == 3:
            raise KeyboardInterrupt

    how = {"count": 5, "size": 16, "layout": layout, "shard_size": 2}
    whole = write_comicset(tmp_path / "whole", **how)
    with pytest.raises(KeyboardInterrupt):
        write_comicset(tmp_path / "set", **how, on_progress=stop)
    assert not (tmp_path / "set").exists()
    (partial,) = (path for path in tmp_path.iterdir() if path.name.startswith("."))
    kept = {path: path.stat().st_mtime_ns for path in partial.iterdir() if path.suffix in (".png", ".tar")}
    assert kept
    out = write_comicset(tmp_path / "set", **how)
    assert contents(out) == contents(whole)
    assert all((out / path.name).stat().st_mtime_ns == time for path, time in kept.items()), "drawn twice"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "whole"]
    assert write_comicset(out, **how) == out  # done already


def test_writing_refuses_what_it_did_not_write_and_what_it_cannot_draw(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("precious")
    with pytest.raises(DataError, match="not written by comicset"):
        write_comicset(tmp_path / "mine", count=2)
    assert contents(tmp_path / "mine") == {"a.txt": b"precious"}
    out = write_comicset(tmp_path / "set", count=2, size=16)
    with pytest.raises(DataError, match="other comic pictures"):
        write_comicset(out, count=3, size=16)
    for wrong in ({"count": 0}, {"split": "test"}, {"size": 0}, {"layout": "zip"}, {"seed": -1}, {"shard_size": 0}):
        with pytest.raises(RecipeError, match=next(iter(wrong))):
            write_comicset(tmp_path / "new", **{"count": 2, **wrong})


def test_a_full_disk_says_so(tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(ResourceError, match="no room left on the disk"):
        write_comicset(tmp_path / "set", count=2, size=16)

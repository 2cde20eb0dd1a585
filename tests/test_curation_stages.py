"""The stages of a curation, each alone: what it measures, what it drops, what it mends."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from known_curation import curation_benchmark
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from onestroke.data.comicset.dataset import ComicSource
from onestroke.data.curation import near
from onestroke.data.curation.captions import clean_caption, shortened
from onestroke.data.curation.decoding import Undecodable, decode, wrong_suffix
from onestroke.data.curation.duplicates import Survivors, Thumbs, _greedy, find_copies, merged, near_pairs, search_part
from onestroke.data.curation.measures import MEASURES, Views
from onestroke.data.curation.pace import Pace
from onestroke.data.curation.recaption import load_captioner
from onestroke.data.curation.recipe import CaptionStage, CurationRecipe, RecaptionStage, Score, load_curation
from onestroke.data.curation.scoring import load_scorer
from onestroke.errors import ModelError, RecipeError


def packed(image, kind="PNG", **options):
    page = io.BytesIO()
    image.save(page, kind, **options)
    return page.getvalue()


def colors(width=24, height=16):
    """Every pixel differs from its neighbours, smoothly."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def scene(seed, size=64):
    """A picture like no other: smooth blotches of colour."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    return coarse.resize((size, size), Image.Resampling.BICUBIC)


def measure(stage, image):
    picture = Image.fromarray(np.asarray(image))
    return MEASURES[stage](Views(picture, picture.size))


# Decoding


def test_a_picture_lying_on_its_side_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    found = decode(packed(colors().transpose(Image.Transpose.ROTATE_90), exif=exif))
    assert np.array_equal(found.image, np.asarray(colors())) and found.repairs == ("turned upright",)


def test_every_odd_kind_of_picture_becomes_eight_bit_rgb_and_says_what_was_odd():
    red = Image.new("RGB", (6, 4), (200, 10, 30))
    clear = Image.new("RGBA", (6, 4), (200, 10, 30, 0))
    sixteen = Image.fromarray(np.full((4, 6), 257 * 90, np.uint16))
    cases = {
        "CMYK": (packed(red.convert("CMYK"), "TIFF"), (200, 10, 30), ("CMYK",)),
        "palette": (packed(red.quantize(4)), (200, 10, 30), ("palette",)),
        "16 bits": (packed(sixteen), (90, 90, 90), ("16 bits",)),
        "transparent": (packed(clear), (255, 255, 255), ("transparency",)),
        "animated": (
            packed(red, "WEBP", save_all=True, append_images=[Image.new("RGB", (6, 4))], lossless=True),
            (200, 10, 30), ("first frame",),
        ),
        "grey": (packed(Image.new("L", (6, 4), 77)), (77, 77, 77), ()),
    }  # fmt: skip
    for name, (content, color, repairs) in cases.items():
        found = decode(content)
        assert found.image.shape == (4, 6, 3) and (found.image == color).all(), name
        assert found.repairs == repairs, name


def test_what_is_no_picture_is_refused_with_the_reason():
    whole = packed(colors(200, 200), "JPEG")
    animated = packed(colors(), "GIF", save_all=True, append_images=[colors().rotate(180)])
    for content, reason, how in (
        (b"", "empty file", {}),
        (b"<html>not found</html>", "not a picture", {}),
        (whole[: len(whole) // 2], "truncated", {}),
        (whole, "200 x 200 is more than 39999 pixels", {"max_pixels": 39_999}),
        (animated, "animated", {"animated": "drop"}),
    ):
        with pytest.raises(Undecodable, match=reason):
            decode(content, **how)
    assert decode(whole, max_pixels=40_000).image.shape == (200, 200, 3)


def test_a_bomb_is_refused_before_its_pixels_are_decoded(monkeypatch):
    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    for side in (10_000, 40_000):
        with pytest.raises(Undecodable, match="pixels"):
            decode(curation_benchmark().bomb(side))


def test_a_large_jpeg_is_decoded_as_far_as_the_measures_need_it():
    lying = Image.Exif()
    lying[0x0112] = 6
    content = packed(scene(4, 1280).resize((1280, 960)), "JPEG", exif=lying)
    found = decode(content, enough=600)
    assert (found.picture.size, found.size) == ((480, 640), (960, 1280))  # a quarter would leave 320
    assert np.abs(found.image.astype(int) - np.asarray(decode(content).picture.resize((480, 640)))).mean() < 2
    assert decode(content).picture.size == decode(content, enough=641).picture.size == (960, 1280)
    with pytest.raises(Undecodable, match="truncated"):
        decode(content[: len(content) // 2], enough=600)


def test_the_suffix_is_compared_with_what_the_file_is():
    assert wrong_suffix("a.png", "JPEG") and wrong_suffix("a", "JPEG") and wrong_suffix("jpg", "JPEG")
    assert not any(wrong_suffix(*case) for case in (("a.JPEG", "JPEG"), ("b.c.jpg", "JPEG"), ("a.webp", "WEBP")))


# Measures


def test_size_and_aspect_are_those_of_the_picture():
    assert measure("size", colors(90, 40)) == 40 and measure("aspect", colors(90, 40)) == 90 / 40
    assert measure("aspect", colors(40, 90)) == 90 / 40


def test_sharpness_of_a_hard_edge_is_what_a_box_of_nine_takes_away():
    edge = np.zeros((60, 60, 3), np.uint8)
    edge[:, 30:] = 180
    # one step of 180 becomes nine of 20: what is lost at the edge is 160 of 180
    assert measure("blur", edge) == pytest.approx(160 / 180)
    soft = Image.fromarray(edge).filter(ImageFilter.GaussianBlur(4))
    assert measure("blur", soft) < 0.35
    assert measure("blur", Image.new("RGB", (60, 60), "red")) == 1.0  # no edge: flatness is another stage's


def test_flatness_is_the_share_of_cells_without_anything_in_them():
    half = np.full((64, 64, 3), 200, np.uint8)
    half[:, 32:] = np.random.default_rng(0).integers(0, 256, (64, 32, 3))
    assert measure("flat", half) == 0.5
    assert measure("flat", np.full((64, 64, 3), 7, np.uint8)) == 1.0
    assert measure("flat", scene(0, 20)) < 0.5  # however small
    assert measure("flat", np.zeros((1, 9, 3), np.uint8)) == 1.0


def test_borders_are_measured_and_a_plain_background_is_none():
    inside = np.random.default_rng(0).integers(120, 256, (80, 80, 3), dtype=np.uint8)
    framed = np.zeros((100, 100, 3), np.uint8)
    framed[10:90, 10:90] = inside
    assert measure("borders", framed) == pytest.approx(1 - 0.8 * 0.8)
    barred = np.zeros((100, 80, 3), np.uint8)
    barred[15:95] = inside
    assert measure("borders", barred) == pytest.approx(20 / 100)
    plain = Image.new("RGB", (100, 100), "white")
    ImageDraw.Draw(plain).ellipse((10, 15, 90, 99), "black")
    assert measure("borders", plain) == 0
    assert measure("borders", inside) == 0


def test_a_page_of_text_is_told_from_a_drawing():
    page, font = Image.new("RGB", (300, 300), "white"), ImageFont.load_default(14)
    for row in range(12):
        ImageDraw.Draw(page).text((10, 10 + 23 * row), "the quick brown fox jumps over it", "black", font)
    assert measure("text", page) > 0.2
    assert measure("text", ImageOps.invert(page)) > 0.2
    assert measure("text", scene(1, 300)) == 0
    dots = Image.new("RGB", (300, 300), "white")
    for k in range(60):
        ImageDraw.Draw(dots).ellipse((37 * k % 280, 61 * k % 290, 37 * k % 280 + 6, 61 * k % 290 + 6), "black")
    assert measure("text", dots) < 0.05


def test_chroma_sees_colour_but_no_tint():
    grey = scene(2).convert("L")
    assert measure("greyscale", grey.convert("RGB")) == pytest.approx(0, abs=1e-6)
    assert measure("greyscale", ImageOps.colorize(grey, (45, 25, 10), (250, 235, 205))) < 1
    assert measure("greyscale", scene(2)) > 20
    halves = np.zeros((2, 2, 3), np.uint8)
    halves[:, 0], halves[:, 1] = (100, 0, 0), (0, 51, 0)  # both of about the same brightness, 29.9
    # Cr is 0.713 (100 - 29.9) = 50.0 and -21.3, Cb is -16.9 at both: half the difference of Cr is left
    assert measure("greyscale", halves) == pytest.approx(35.7, abs=0.5)


# Near copies


def thumbs(*images):
    return np.stack([near.thumbnail(image) for image in images])


def test_the_hash_of_the_mirror_image_is_known_without_drawing_it():
    whole = thumbs(*map(scene, range(20)))
    bits = near.window_bits(whole)[:, 0]
    assert bits.shape == (20, 128) and 40 < bits.sum(axis=1).mean() < 88
    assert (near.mirrored(bits) == near.window_bits(whole[:, :, ::-1])[:, 0]).mean() > 0.999  # a wave of exactly 0
    assert (near.mirrored(bits) != bits).mean() > 0.3


def test_copies_are_found_among_many_pictures_and_nothing_else():
    size, changes = 64, {
        "smaller": lambda image: image.resize((40, 40), Image.Resampling.BICUBIC),
        "recoded": lambda image: Image.open(io.BytesIO(packed(image, "JPEG", quality=40))),
        "cropped": lambda image: image.crop((5, 2, size - 4, size - 6)),
        "mirrored": ImageOps.mirror,
        "both": lambda image: ImageOps.mirror(image.crop((4, 4, size - 2, size - 5))),
    }  # fmt: skip
    originals = [scene(seed, size) for seed in range(150)]
    copies = [change(original) for change in changes.values() for original in originals[:30]]
    pairs, apart = near_pairs(thumbs(*originals, *copies), np.arange(300), CurationRecipe().near.at_most)
    found = {tuple(pair) for pair, value in zip(pairs.tolist(), apart, strict=True) if value <= 29}
    expected = {(k % 30, 150 + k) for k in range(150)}
    assert len(expected - found) <= 3
    assert {(i if i < 150 else (i - 150) % 30) == (j - 150) % 30 for i, j in found} == {True}


def test_a_recoloured_picture_is_no_copy():
    image = scene(5)
    hue = np.array(image.convert("HSV"))
    hue[..., 0] += np.uint8(85)
    other = thumbs(Image.fromarray(hue, "HSV").convert("RGB"), image.filter(ImageFilter.GaussianBlur(0.5)))
    apart = near.differences(thumbs(image, image), other, np.zeros(2, np.int64))
    assert apart[0] > 60 and apart[1] < 10


def test_the_difference_of_a_crop_is_that_of_the_window_it_was_cut_from():
    image = scene(9, 320)
    crop = image.crop((32, 16, 320, 304))  # a tenth and a twentieth of two sides
    both = thumbs(image, crop)
    window = next(row[2] for row in np.concatenate(list(near.close_pairs(both))) if row[0] == 0)
    apart = near.differences(both[:1], both[1:], np.array([window]))
    assert apart[0] < 8 < np.abs(thumbs(image).astype(int) - thumbs(crop)).max(axis=-1).mean()


def test_a_thousand_times_the_same_picture_is_not_compared_a_million_times():
    same = np.repeat(thumbs(scene(3)), 600, axis=0)
    rows = np.concatenate(list(near.close_pairs(same)))
    assert 600 <= len(rows) <= 600 * near.PER_BUCKET  # not 600 x 599


def test_of_copies_the_best_is_kept_and_a_chain_is_no_copy():
    # 0 and 1 are copies, 1 and 2 are, 0 and 2 are not
    pairs, apart = np.array([[0, 1], [1, 2]]), np.array([5.0, 6.0])
    assert _greedy(pairs, apart, np.array([0, 1, 2]), 10.0) == {1: (0, 5.0)}
    assert _greedy(pairs, apart, np.array([1, 0, 2]), 10.0) == {0: (1, 5.0), 2: (1, 6.0)}
    assert _greedy(pairs, apart, np.array([0, 1, 2]), 5.5) == {1: (0, 5.0)}


def test_the_same_bytes_or_pixels_are_one_picture():
    pixels = np.array([[1, 7], [1, 7], [1, 7], [1, 8], [2, 7], [1, 8]], np.uint64)
    survivors = Survivors(np.arange(6), np.array([2, 0, 1, 5, 3, 4]), pixels, thumbs(*map(scene, range(6))))
    assert find_copies(survivors, CurationRecipe()).exact == {0: 1, 2: 1, 3: 5}


def test_the_hash_of_a_whole_picture_is_that_of_its_first_window():
    every = thumbs(*map(scene, range(9)))
    assert (near.unpacked(near.whole_words(every)) == near.window_bits(every)[:, 0]).all()


def test_thumbnails_on_the_disk_are_read_as_they_were_written(tmp_path):
    every = thumbs(*map(scene, range(9)))
    (tmp_path / "thumbs").write_bytes(every.tobytes())
    stored = Thumbs(tmp_path / "thumbs", np.array([1, 3, 8, 2]))
    assert (
        len(stored) == 4 and (stored[1:3] == every[[3, 8]]).all() and (stored[np.array([3, 0])] == every[[2, 1]]).all()
    )


def test_a_projection_shares_what_machines_share_and_lets_the_search_grow():
    pace = Pace(1024, {"measuring": 10.0, "searching copies": 5.0, "writing shards": 2.0, "listing": 1.0, "index": 1.0})
    assert pace.pictures_per_second == 1024 / 19
    # 2048 pictures: twice everything, the search 11/10 of that, half of it on either machine
    assert pace.projected(2048, 2) == pytest.approx((10 + 5 * 1.1 + 2) + 4)
    assert Pace(1024, {"measuring": 10.0}).projected(2048, 2) is None  # a run that timed only a part


def test_a_search_in_parts_finds_what_one_search_finds():
    originals = [scene(seed, 64) for seed in range(70)]
    every = thumbs(*originals, *(ImageOps.mirror(image) for image in originals))
    whole = near_pairs(every, np.arange(140), 29.0)
    index = near.Index(near.whole_words(every))
    parts = [search_part(every, index, 29.0, start=at, stop=min(at + 48, 140)) for at in range(0, 140, 48)]
    pairs, apart = merged(parts)
    assert (pairs.tolist(), apart.tolist()) == (whole[0].tolist(), whole[1].tolist())
    assert {(k, 70 + k) for k in range(70)} <= {tuple(pair) for pair in pairs.tolist()}
    assert all(len(part[0]) < len(pairs) for part in parts)


# Captions


@pytest.mark.parametrize(
    "caption, text",
    [
        ("1girl, solo, long_hair, blue_eyes, red_dress, smile, outdoors, highres, absurdres",
         "a girl with long hair and blue eyes, wearing red dress, smiling, outdoors"),
        ("2girls 1boy short_hair hat looking_at_viewer score_9",
         "two girls and a boy with short hair, wearing hat, looking at viewer"),
        ("hatsune_miku_(vocaloid), 1girl, twintails", "a girl with twintails, hatsune miku (vocaloid)"),
        ("A man, a woman, and a child, on a bench.", "A man, a woman, and a child, on a bench."),
        ("a laughing person with pink hair", "a laughing person with pink hair"),
        ("<b>A cat &amp; a dog</b>\n\n - stock photo", "A cat & a dog"),
        ("A red car. Click to enlarge https://example.org/a.jpg", "A red car."),
        ("Ｆｕｌｌ ｗｉｄｔｈ words", "Full width words"),
    ],
)  # fmt: skip
def test_captions_become_plain_words(caption, text):
    cleaned = clean_caption(caption, CaptionStage())
    assert (cleaned.text, cleaned.dropped) == (text, "")


@pytest.mark.parametrize(
    "caption, reason",
    [
        (None, "no caption"),
        (" \n ", "empty"),
        ("IMG_2041.jpg", "nothing but boilerplate"),
        ("© 2024 somebody. All rights reserved", "nothing but boilerplate"),
        ("青い髪の女の子", "not in latin script"),
        ("смеющийся человек", "not in latin script"),
        ("ein lachender Mensch mit rosa Haaren", "in de, not en"),
        ("une fille aux cheveux longs, souriante", "in fr, not en"),
        ("ab", "shorter than 3 characters"),
    ],
)
def test_captions_of_no_use_are_dropped(caption, reason):
    assert clean_caption(caption, CaptionStage()).dropped == reason


def test_other_scripts_are_kept_where_the_recipe_names_them():
    assert not clean_caption("青い髪の女の子", CaptionStage(scripts=("cjk", "hiragana"), languages=("ja",))).dropped
    assert not clean_caption("青い髪", CaptionStage(scripts=(), languages=())).dropped
    assert clean_caption("a girl 青", CaptionStage()).text == "a girl 青"  # 5 of 6 letters


def test_a_caption_whose_language_is_doubtful_is_kept():
    german = "ein lachender Mensch mit rosa Haaren"
    assert not clean_caption(german, CaptionStage(languages=("en", "de"))).dropped
    assert not clean_caption(german, CaptionStage(min_confidence=0.99)).dropped
    names = ("Pikachu", "konohana kitan, sakura trick", "a quiff", "hatsune miku (vocaloid), twintails")
    assert [clean_caption(name, CaptionStage()).dropped for name in names] == [""] * 4
    drawn = [ComicSource(300).caption(index) for index in range(300)]
    assert not [text for text in drawn if clean_caption(text, CaptionStage()).dropped]


def test_long_captions_are_cut_where_a_sentence_ends():
    assert shortened("One two three. Four five six. Seven", 30) == "One two three. Four five six."
    assert shortened("one two three, four five, six", 20) == "one two three"
    assert shortened("x" * 50, 20) == "x" * 20
    cleaned = clean_caption("A word. " * 400, CaptionStage(max_chars=100))
    assert len(cleaned.text) <= 100 and cleaned.text.endswith("word.") and cleaned.repairs == ("shortened",)


# Recipes


def test_a_recipe_file_changes_what_it_names_and_nothing_else(tmp_path):
    path = tmp_path / "curate.yaml"
    path.write_text("blur: {enabled: false}\nsize: {at_least: 64}\n")
    recipe = load_curation(path)
    assert recipe.blur.at_least == CurationRecipe().blur.at_least and not recipe.blur.enabled
    assert recipe.size.at_least == 64 and recipe.near == CurationRecipe().near
    assert recipe.size.keeps(64) and not recipe.size.keeps(63) and recipe.size.bounds == "at least 64"


@pytest.mark.parametrize(
    "text, words",
    [
        ("blurr: {}", "'blurr'.*'blur'"),
        ("near: {at_mosst: 3}", "'near.at_mosst'.*'near.at_most'"),
        ("safety: {enabled: true}", "safety.*needs a model"),
        ("size: 3", "size"),
        ("captions: {languages: [english]}", "captions.languages"),
        ("- a", "curate.yaml"),
    ],
)
def test_mistakes_in_a_recipe_are_named_with_the_nearest_key(tmp_path, text, words):
    (tmp_path / "curate.yaml").write_text(text)
    with pytest.raises(RecipeError, match=words):
        load_curation(tmp_path / "curate.yaml")


# Networks


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    from transformers import ViTConfig, ViTForImageClassification

    folder = tmp_path_factory.mktemp("classifier")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32,
            patch_size=16, id2label={0: "safe", 1: "nsfw"}, label2id={"safe": 0, "nsfw": 1}, initializer_range=0.5,
        )  # fmt: skip
        ViTForImageClassification(config).save_pretrained(folder)
    page = {"do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3,
            "image_std": [0.25] * 3, "image_processor_type": "ViTImageProcessor", "resample": 2,
            "rescale_factor": 1 / 255, "size": {"height": 32, "width": 32}}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(page))
    return folder


def test_a_score_is_the_probability_of_the_labels_named(classifier):
    from transformers import ViTForImageClassification

    image = np.asarray(scene(1, 32))  # the network's own size: nothing to resize
    score = load_scorer(Score(enabled=True, model=str(classifier), labels=("NSFW",)), name="safety")(image)
    pixels = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25
    logits = ViTForImageClassification.from_pretrained(classifier).eval()(pixels).logits[0]
    assert score == pytest.approx(logits.softmax(0)[1].item(), abs=1e-6) and 0.001 < score < 0.999


def test_a_network_that_cannot_be_used_says_what_to_do(classifier, tmp_path):
    with pytest.raises(ModelError, match=r"no label 'gore'.*nsfw, safe"):
        load_scorer(Score(enabled=True, model=str(classifier), labels=("gore",)), name="safety")
    with pytest.raises(ModelError, match=r"safety.model .*cannot be loaded.*folder.*safety.enabled to false"):
        load_scorer(Score(enabled=True, model=str(tmp_path / "none"), labels=("x",)), name="safety")


class _Server(BaseHTTPRequestHandler):
    asked: list = []
    busy = 0

    def do_POST(self):
        cls = type(self)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        cls.asked.append((self.path, self.headers["Authorization"], body))
        cls.busy -= 1
        self.send_response(503 if cls.busy >= 0 else 200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": " A red\nsquare. "}}]}).encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    _Server.asked, _Server.busy = [], 0
    http = HTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1"
    http.shutdown()
    http.server_close()


def test_an_endpoint_is_shown_the_picture_and_asked_again_where_it_is_busy(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    _Server.busy = 2
    stage = RecaptionStage(enabled=True, model="vlm", endpoint=server, key_variable="MY_KEY", max_side=32)
    waited = []
    assert load_captioner(stage, pause=waited.append)(np.asarray(scene(1, 64)), "old words") == "A red square."
    assert waited == [1.0, 2.0] and len(_Server.asked) == 3
    path, key, body = _Server.asked[-1]
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer secret", "vlm", 0)
    text, picture = body["messages"][0]["content"]
    assert stage.prompt in text["text"] and "old words" in text["text"]
    shown = Image.open(io.BytesIO(base64.b64decode(picture["image_url"]["url"].partition(",")[2])))
    assert shown.size == (32, 32)


def test_an_endpoint_that_does_not_answer_says_how_to_do_without(server):
    stage = RecaptionStage(enabled=True, model="vlm", endpoint="http://127.0.0.1:9/v1", timeout=1)
    with pytest.raises(ModelError, match=r"no caption.*recaption.enabled to false"):
        load_captioner(stage, pause=lambda seconds: None)(np.asarray(scene(1)), "")


def test_a_vision_language_model_in_a_folder_writes_captions(tmp_path):
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "square"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**size, "vocab_size": len(words), "encoder_hidden_size": 16, "max_position_embeddings": 32,
            "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}  # fmt: skip
    config = BlipConfig(text_config=text, vision_config={**size, "image_size": 32, "patch_size": 16})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BlipForConditionalGeneration(config)
    head = model.text_decoder.cls.predictions
    torch.nn.init.zeros_(head.decoder.weight)  # whatever it sees, it writes what the bias says
    torch.nn.init.zeros_(head.decoder.bias).data[words.index("red")] = 9.0
    model.save_pretrained(tmp_path)
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(tmp_path)
    caption = load_captioner(RecaptionStage(enabled=True, model=str(tmp_path), max_tokens=3))
    assert caption(np.asarray(scene(1, 40)), "old words") == "red red red"
    with pytest.raises(ModelError, match="recaption.model .*none: the model cannot be loaded.*enabled to false"):
        load_captioner(RecaptionStage(enabled=True, model=str(tmp_path / "none")))

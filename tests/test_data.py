"""Folders, tars and batches: every caption format, every kind of picture, and the same batches at any restart."""

import csv
import io
import json
import multiprocessing
import os
import signal
import tarfile
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from onestroke.data import Broken, BrokenPicture, Picture, batches, open_folder, plan
from onestroke.data.comicset import ComicSource
from onestroke.data.folder import decode
from onestroke.data.framing import Placement, cut, place
from onestroke.data.plan import picture_at
from onestroke.errors import DataError


@dataclass(frozen=True)
class Numbered:
    """Pictures whose pixels are their number, of sizes that differ; those in `broken` cannot be read."""

    num_pictures: int
    broken: frozenset = field(default_factory=frozenset)

    def __len__(self):
        return self.num_pictures

    def caption(self, index, *, slot=None):
        return f"number {index}"

    def read(self, index, *, slot=None):
        if index in self.broken:
            raise BrokenPicture(f"{index}.png", "truncated")
        return Picture(np.full((20 + index % 5, 30 - index % 7, 3), index % 256, np.uint8), self.caption(index))


@dataclass(frozen=True)
class Noise(Numbered):
    """The same, but every pixel differs, so that any change of crop or flip shows."""

    def read(self, index, *, slot=None):
        flat = super().read(index, slot=slot)
        pixels = np.random.default_rng(index).integers(0, 256, flat.image.shape, dtype=np.uint8)
        return Picture(pixels, f"{flat.caption} at {slot}")


def numbers(run):
    return [int(caption.removeprefix("number ")) for batch in run for caption in batch.captions]


def run(source, first=0, last=20, **how):
    how = {"batch_size": 4, "size": (16, 16), "seed": 0, "random_flip": True, "crop": "random", **how}
    return list(batches(source, first_slot=first, last_slot=last, **how))


def assert_same(ones, others):
    assert len(ones) == len(others) > 0
    for one, other in zip(ones, others, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.sizes, other.sizes)
        assert one.captions == other.captions and torch.equal(one.slots, other.slots)


# Plans and batches


def test_each_epoch_shows_each_picture_once_in_an_order_of_its_own():
    assert numbers(run(Numbered(20), 0, 60)) == [*plan(20, seed=0, epoch=0), *plan(20, seed=0, epoch=1),
                                                 *plan(20, seed=0, epoch=2)]  # fmt: skip
    orders = {tuple(plan(20, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4 and all(sorted(order) == list(range(20)) for order in orders)


def test_workers_change_nothing():
    source = Noise(30, frozenset({3}))
    assert_same(run(source, 2, 33), run(source, 2, 33, num_workers=2))


def test_a_run_from_any_slot_is_the_tail_of_the_whole_run():
    source = Noise(10, frozenset({3}))
    assert_same(run(source, 0, 32, broken=Broken(10, max_share=0.5))[3:],
                run(source, 12, 32, broken=Broken(10, max_share=0.5)))  # fmt: skip
    assert [len(batch) for batch in run(source, 12, 21, broken=Broken(10, max_share=0.5))] == [4, 4, 1]
    assert run(source, 12, 12) == []


def test_the_same_slot_draws_the_same_numbers_in_batches_of_any_size():
    fours, sixes = run(Noise(12), 0, 24), run(Noise(12), 0, 24, batch_size=6)
    assert torch.equal(torch.cat([batch.images for batch in fours]), torch.cat([batch.images for batch in sixes]))
    assert not torch.equal(fours[0].images, run(Noise(12), 0, 24, seed=1)[0].images)


def test_each_slot_cuts_a_picture_anew():
    pictures = {image.numpy().tobytes() for batch in run(Noise(1), 0, 80) for image in batch.images}
    assert len(pictures) >= 15  # of 18: 20 x 30 pixels become 16 x 24, 9 places to crop, flipped or not


def test_batches_leave_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    run(Numbered(8), 0, 8)
    assert torch.equal(torch.rand(3), expected)


def test_images_are_in_minus_one_to_one_and_slots_count_over_epochs():
    batch = run(Numbered(6), 4, 8)[0]
    assert batch.images.shape == (4, 3, 16, 16) and batch.images.dtype == torch.float32
    assert batch.images[:, 0, 0, 0].tolist() == pytest.approx([n / 127.5 - 1 for n in numbers([batch])])
    assert batch.slots.tolist() == [4, 5, 6, 7] and batch.sizes.dtype == torch.int64
    assert run(ComicSource(2, size=16), 0, 1)[0].images.max() <= 1


# Cutting to size


def test_time_ids_say_where_the_crop_lies_and_a_flip_mirrors_it():
    """A ramp of columns shows where a crop was taken: column value / 4 = column of the 20 x 60 picture."""
    ramp = np.broadcast_to(np.arange(60, dtype=np.uint8)[None, :, None] * 4, (20, 60, 3))

    @dataclass(frozen=True)
    class Ramp:
        def __len__(self):
            return 1

        def caption(self, index, *, slot=None):
            return ""

        def read(self, index, *, slot=None):
            return Picture(np.ascontiguousarray(ramp), "")

    flipped = 0
    for batch in run(Ramp(), 0, 40, size=(20, 24)):
        for image, (height, width, top, left) in zip(batch.images, batch.sizes.tolist(), strict=True):
            columns = ((image[0, 0] + 1) * 127.5 / 4).round().int().tolist()
            shown = list(range(columns[0], columns[0] + 24)) if columns[1] > columns[0] else None
            flipped += shown is None
            # Flipped, column c of the picture is column 59 - c of the mirrored one, in which the crop starts at `left`.
            assert columns == (shown or [59 - left - offset for offset in range(24)])
            assert (height, width, top, left) == (20, 60, 0, columns[0] if shown else 59 - columns[0])
    assert 10 < flipped < 30
    assert {tuple(row) for batch in run(Ramp(), 0, 8, size=(20, 24), crop="center", random_flip=False)
            for row in batch.sizes.tolist()} == {(20, 60, 0, 18)}  # fmt: skip


def test_crops_are_measured_in_the_scaled_picture():
    rng = np.random.default_rng(0)
    # 400 x 300 covers 100 x 100 at scale 1/3: 133 x 100, of which a third of 33 rows is cut at the top and bottom.
    assert place((400, 300), (100, 100), rng, crop="center", random_flip=False) == Placement(133, 100, 16, 0, False)
    # 10 x 5 is enlarged to 200 x 100 to cover 100 x 100.
    assert place((10, 5), (100, 100), rng, crop="center", random_flip=False) == Placement(200, 100, 50, 0, False)
    tops = {place((400, 300), (100, 100), rng, crop="random", random_flip=True).top for _ in range(600)}
    assert tops == set(range(34))


@pytest.mark.parametrize("shape", [(90, 140), (300, 200), (50, 33), (64, 64), (2000, 3)])
def test_cutting_is_scaling_the_whole_picture_and_cropping(shape):
    # Mid-range pixels: PIL clips overshoot between its two passes, whose order it chooses by the shape.
    image = np.random.default_rng(0).integers(80, 176, (*shape, 3), dtype=np.uint8)
    placement = place(shape, (64, 48), np.random.default_rng(1), crop="random", random_flip=True)
    kind = Image.Resampling.LANCZOS if placement.height < shape[0] else Image.Resampling.BICUBIC
    whole = Image.fromarray(image).resize((placement.width, placement.height), kind)
    part = np.asarray(whole)[placement.top : placement.top + 64, placement.left : placement.left + 48]
    got = cut(image, (64, 48), placement).astype(int)
    assert np.abs(got - (part[:, ::-1] if placement.flip else part)).max() <= 2  # two passes, each rounded


# Broken pictures


def test_a_broken_picture_yields_its_slot_to_a_spare_and_is_counted():
    whole, broken = Numbered(40), Broken(40)
    source = Numbered(40, frozenset({5}))
    shown, expected = numbers(run(source, 0, 80, broken=broken)), numbers(run(whole, 0, 80))
    assert [slot for slot in range(80) if shown[slot] != expected[slot]] == [
        expected.index(5),
        40 + expected[40:].index(5),
    ]
    assert 5 not in shown and broken.num_seen == 40
    assert broken.reasons == {5: "5.png (truncated)"}
    assert str(broken) == "1 of 40 pictures read are broken (2.5%): 5.png (truncated)"
    assert numbers(run(source, 0, 80, num_workers=2)) == shown
    spares = {seed: numbers(run(source, slot, slot + 1, seed=seed, batch_size=1))
              for seed in range(8) for slot in range(40) if picture_at(slot, 40, seed=seed) == 5}  # fmt: skip
    assert len({tuple(spare) for spare in spares.values()}) > 3  # not always the same picture


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_broken_pictures_stop_the_run_and_are_named(num_workers):
    source = Numbered(400, frozenset(range(0, 400, 2)))
    with pytest.raises(DataError, match=r"\d+ of \d+ pictures read are broken \(\d+\.\d%\): \d+\.png \(truncated\), "):
        run(source, 0, 400, num_workers=num_workers)


def test_the_share_of_broken_pictures_is_judged_from_twenty_on_and_exactly_once_all_are_read():
    def judged(num_pictures, num_broken, num_read):
        broken = Broken(num_pictures)
        for index in range(num_read):
            broken.record(index, "broken" if index < num_broken else None)
        return broken.too_many()

    assert not judged(1000, 19, 19) and judged(1000, 20, 20)
    # 20 read: 5% is 1, three standard errors are 3 sqrt(0.05 * 0.95 * 20) = 2.9.
    assert not judged(1000, 3, 20) and judged(1000, 4, 20)
    assert not judged(1000, 50, 1000) and judged(1000, 51, 1000)
    assert not judged(10, 1, 9) and judged(10, 1, 10)
    broken = Broken(100)
    for _epoch in range(9):
        for index in range(100):
            broken.record(index, "broken" if index < 5 else None)
    assert not broken.too_many() and len(broken) == 5 and broken.num_seen == 100


def test_a_source_of_nothing_but_broken_pictures_ends_at_once():
    for count in (1, 3, 500):
        with pytest.raises(DataError, match="100.0%"):
            run(Numbered(count, frozenset(range(count))), 0, 4)


# Folders


def save(path, color=(10, 200, 30), size=(12, 8), **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **how)


def quiet(path):
    return open_folder(path, log=lambda line: None)


def captions_of(source):
    assert [source.caption(i) for i in range(len(source))] == [source.read(i).caption for i in range(len(source))]
    return {source.entries["file"][i].as_py(): source.caption(i) for i in range(len(source))}


def write_metadata(folder, kind, rows):
    path = folder / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    elif kind == "csv":
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_metadata_of_every_kind_captions_nested_pictures(tmp_path, kind, column):
    save(tmp_path / "a.png")
    save(tmp_path / "deep" / "er" / "b.JPG", quality=95)
    rows = [{"file_name": "a.png", column: "a dog,\nbig — “é”", "other": 3},
            {"file_name": "deep/er/b.JPG", column: "a cat", "other": 4}]  # fmt: skip
    write_metadata(tmp_path, kind, rows)
    assert captions_of(quiet(tmp_path)) == {"a.png": "a dog, big — “é”", "deep/er/b.JPG": "a cat"}


def test_metadata_in_a_subfolder_names_files_from_there_and_goes_before_text_files(tmp_path):
    save(tmp_path / "train" / "a.png")
    save(tmp_path / "b.webp")
    write_metadata(tmp_path / "train", "jsonl", [{"file_name": "a.png", "text": "from metadata"}])
    (tmp_path / "train" / "a.txt").write_text("from the text file")
    (tmp_path / "b.txt").write_text("beside")
    assert captions_of(quiet(tmp_path)) == {"train/a.png": "from metadata", "b.webp": "beside"}


def test_text_files_caption_the_picture_beside_them_in_natural_order(tmp_path):
    for number in (10, 2, 1):
        save(tmp_path / "x" / f"page{number}.png")
        (tmp_path / "x" / f"page{number}.{'txt' if number < 10 else 'caption'}").write_text(f" page\n{number} \n")
    save(tmp_path / ".hidden" / "page3.png")
    (tmp_path / ".hidden" / "page3.txt").write_text("hidden")
    source = quiet(tmp_path)
    assert [source.read(index).caption for index in range(3)] == ["page 1", "page 2", "page 10"] and len(source) == 3


def test_links_are_followed_and_circles_end(tmp_path):
    save(tmp_path / "real" / "a.png")
    (tmp_path / "real" / "a.txt").write_text("a")
    (tmp_path / "set").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "set" / "link")
    os.symlink(tmp_path / "set", tmp_path / "real" / "back")
    assert list(captions_of(quiet(tmp_path / "set"))) == ["link/a.png"]


def test_pictures_without_words_are_left_out_and_reported(tmp_path):
    for name in "abcd":
        save(tmp_path / f"{name}.png")
    for name, text in {"a": "a word", "b": " \n", "c": ""}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    lines = []
    source = open_folder(tmp_path, log=lines.append)
    assert len(source) == 1 and source.left_out == {"no caption": 1, "an empty caption": 2}
    assert any("left out 2 of 4 pictures with an empty caption" in line for line in lines)
    assert any("left out 1 of 4 pictures with no caption" in line for line in lines)


def test_folders_that_cannot_be_used_say_what_to_do(tmp_path):
    def refused(match, path=tmp_path):
        with pytest.raises(DataError, match=match) as caught:
            quiet(path)
        assert "\n" not in str(caught.value) and caught.value.fix

    refused("no such folder", tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    refused("not a folder", tmp_path / "file")
    refused("no pictures")
    save(tmp_path / "a.png")
    refused("no captioned pictures.*metadata.jsonl")
    (tmp_path / "a.txt").write_text("")
    refused("1 with an empty caption")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    refused("not UTF-8")
    (tmp_path / "a.txt").unlink()
    page = tmp_path / "metadata.jsonl"
    for content, match in {
        '{"file_name": "a.png"\n': "line 1 is not JSON",
        "[1]\n": "line 1 is not an object",
        '{"file_name": "a.png", "label": 1}\n': "columns file_name, label.*text or caption",
        '{"text": "x"}\n': "columns text",
        '{"file_name": "a.png", "text": ["x"]}\n': "row 1: text or file_name is not text",
    }.items():
        page.write_text(content)
        refused(match)
    page.unlink()
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 nonsense")
    refused("cannot be read as Parquet")
    write_metadata(tmp_path, "csv", [{"file_name": "a.png", "text": "x"}])
    refused("several metadata files in one folder")


# Kinds of pictures


def encoded(image, kind="PNG", **how):
    page = io.BytesIO()
    image.save(page, kind, **how)
    return page.getvalue()


def pixel(content):
    return decode(content, name="x")[0, 0].tolist()


def test_every_kind_of_picture_becomes_eight_bit_rgb():
    grey = Image.new("L", (3, 2), 77)
    palette = Image.new("RGB", (3, 2), (200, 100, 50)).quantize(4)
    sixteen = Image.fromarray(np.full((2, 3), 257 * 90, np.uint16))
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert pixel(encoded(grey)) == [77] * 3
    assert pixel(encoded(palette)) == [200, 100, 50]
    assert pixel(encoded(sixteen)) == pixel(encoded(sixteen, "TIFF")) == [90] * 3
    assert pixel(encoded(Image.new("1", (3, 2), 1))) == [255] * 3
    assert np.allclose(pixel(encoded(cmyk, "JPEG", quality=100)), [255, 0, 0], atol=3)
    for kind in ("BMP", "GIF", "TIFF", "PNG"):
        assert pixel(encoded(palette.convert("RGB"), kind)) == [200, 100, 50]
    assert np.allclose(pixel(encoded(palette.convert("RGB"), "WEBP", lossless=True)), [200, 100, 50])


def test_what_is_transparent_shows_white():
    half = Image.new("RGBA", (3, 2), (0, 0, 0, 51))  # a fifth black on white: 204
    nothing = Image.new("RGBA", (3, 2), (9, 9, 9, 0))
    palette = Image.new("P", (3, 2), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert pixel(encoded(half)) == [204] * 3 and pixel(encoded(nothing)) == [255] * 3
    assert pixel(encoded(half.convert("LA"))) == [204] * 3
    assert pixel(encoded(palette, transparency=0)) == [255] * 3 and pixel(encoded(palette)) == [255, 0, 0]
    assert pixel(encoded(Image.new("RGB", (3, 2), (1, 2, 3)), transparency=(1, 2, 3))) == [255] * 3


def test_pictures_are_turned_upright_and_animations_show_their_first_frame():
    image = Image.new("RGB", (6, 4), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn a quarter clockwise
    upright = decode(encoded(image, exif=exif), name="x")
    assert upright.shape == (6, 4, 3) and upright[0, 3].tolist() == [255] * 3 and upright.sum() == 3 * 255
    frames = [Image.new("RGB", (3, 2), color) for color in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert np.allclose(pixel(content), [255, 0, 0], atol=2)


def test_what_cannot_be_decoded_is_broken_and_says_why(monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    floats = Image.fromarray(np.ones((2, 2), np.float32))
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        content = encoded(noise, kind)
        with pytest.raises(BrokenPicture):
            decode(content[: len(content) // 2], name="x")
    for content, reason in ((b"", "empty file"), (b"<html>", "not a picture"), (encoded(floats, "TIFF"), "floating")):
        with pytest.raises(BrokenPicture, match=reason) as caught:
            decode(content, name="some.png")
        assert caught.value.path == "some.png"
    damaged = bytearray(encoded(noise))
    damaged[200] ^= 255
    with pytest.raises(BrokenPicture):
        decode(bytes(damaged), name="x")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # 64 * 64 is more, though less than twice as much
    with pytest.raises(BrokenPicture, match="bomb"):
        decode(encoded(noise), name="x")


def test_a_folder_with_mixed_sizes_and_a_truncated_picture_trains(tmp_path):
    for number in range(40):
        save(tmp_path / f"{number}.png", (number, 0, 0), (10 + 7 * number, 90 - 2 * number))
        (tmp_path / f"{number}.txt").write_text(f"number {number}")
    whole = (tmp_path / "7.png").read_bytes()
    (tmp_path / "7.png").write_bytes(whole[: len(whole) // 2])
    broken = Broken(40)
    batches_seen = run(quiet(tmp_path), 0, 40, size=(24, 40), broken=broken, num_workers=1)
    assert all(batch.images.shape == (4, 3, 24, 40) for batch in batches_seen)
    assert (
        list(broken.reasons) == [7]
        and "7.png" in str(broken)
        and sorted({*numbers(batches_seen), 7}) == list(range(40))
    )
    for batch, caption, image in ((b, c, i) for b in batches_seen for c, i in zip(b.captions, b.images, strict=True)):
        assert image[0].mean() == pytest.approx(int(caption.split()[1]) / 127.5 - 1, abs=1e-5), batch.slots
    sizes = {
        caption: size[:2] for b in batches_seen for caption, size in zip(b.captions, b.sizes.tolist(), strict=True)
    }
    assert sizes["number 30"] == [30, 220] and sizes["number 0"] == [90, 10]


def test_a_picture_that_metadata_names_and_is_not_there_counts_as_broken(tmp_path):
    save(tmp_path / "a.png")
    write_metadata(tmp_path, "jsonl", [{"file_name": f"{name}.png", "text": name} for name in "ab"])
    with pytest.raises(BrokenPicture, match=r"b\.png \(No such file"):
        quiet(tmp_path).read(1)


# Tars


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_tars_are_read_by_sample_whatever_their_captions_are_called(tmp_path):
    def png(level):
        return encoded(Image.new("RGB", (3, 2), (level, 0, 0)))

    write_tar(tmp_path / "shard-10.tar", {"z/a.png": png(1), "z/a.txt": b"ten"})
    write_tar(tmp_path / "shard-2.tar", {
        "one.json": json.dumps({"caption": "two one", "size": 3}).encode(),
        "one.PNG": png(2),
        "two.txt": b"two  two\n",
        "two.json": b'{"text": "not this"}',
        "two.depth.png": png(99),
        "two.png": png(3),
        "bare.png": png(4),
        "empty.png": png(5), "empty.txt": b" ",
        "words.txt": b"no picture",
    })  # fmt: skip
    source = quiet(tmp_path)
    assert source.left_out == {"no caption": 1, "an empty caption": 1}
    read = [source.read(index) for index in (2, 0, 1)]  # any order
    assert [(picture.caption, picture.image[0, 0, 0]) for picture in read] == [
        ("ten", 1),
        ("two one", 2),
        ("two two", 3),
    ]
    assert_same(run(source, 0, 8, num_workers=2), run(source, 0, 8))


def test_tars_that_cannot_be_used_are_refused(tmp_path):
    content = encoded(Image.effect_noise((40, 40), 50))
    write_tar(tmp_path / "a.tar", {"a.png": content[:10], "a.txt": b"a", "b.png": content, "b.txt": b"b"})
    assert len(quiet(tmp_path)) == 2
    with pytest.raises(BrokenPicture, match=r"a\.tar/a\.png \("):
        quiet(tmp_path).read(0)
    save(tmp_path / "c.png")
    with pytest.raises(DataError, match=r"both pictures \(c\.png\) and tars \(a\.tar\)"):
        quiet(tmp_path)
    (tmp_path / "c.png").unlink()
    whole = (tmp_path / "a.tar").read_bytes()
    # In its second header; in the data of b.png; between two members; inside the last header; a header's bits turned.
    cuts = [whole[:end] for end in (700, 1600, 2048, len(whole) - 8000)]
    for damaged in (*cuts, whole[:2100] + b"?" + whole[2101:], b"", b"\x1f\x8b\x08 not a tar"):
        (tmp_path / "a.tar").write_bytes(damaged)
        with pytest.raises(DataError, match="a.tar"):
            quiet(tmp_path)
    write_tar(tmp_path / "a.tar", {"a.png": content, "a.json": b"{"})
    with pytest.raises(DataError, match=r"a\.tar/a\.json.*JSON"):
        quiet(tmp_path)
    write_tar(tmp_path / "a.tar", {"a.png": content})
    with pytest.raises(DataError, match="no captioned pictures"):
        quiet(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_process_group_leaves_the_workers_reading_until_the_loader_ends(number):
    reading = batches(Numbered(40), batch_size=4, size=(16, 16), first_slot=0, last_slot=40, seed=0, num_workers=1)
    first = next(reading)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, number)
    rest = list(reading)
    assert [len(batch) for batch in (first, *rest)] == [4] * 10
    worker.join(20)
    assert worker.exitcode == 0

"""Shards and tables at any address: the same pictures as in a folder, indexed once, each exactly once an epoch."""

import json
import os
import uuid

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from onestroke.commands.bench_loader import LoaderSpeed, measure_loader
from onestroke.data import batches
from onestroke.data.address import Address
from onestroke.data.comicset import write_comicset
from onestroke.data.facts import measured_sizes
from onestroke.data.opening import open_pictures
from onestroke.data.rows import open_dataset
from onestroke.errors import DataError

COUNT = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same pictures as an image folder and as three tars."""
    root = tmp_path_factory.mktemp("sets")
    images = write_comicset(root / "images", count=COUNT, size=40)
    tars = write_comicset(root / "tars", count=COUNT, size=40, layout="webdataset", shard_size=8)
    return images, tars


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "cache"


def copied(folder) -> str:
    """A folder on fsspec's filesystem in memory."""
    url = f"memory://{uuid.uuid4().hex}"
    filesystem, root = fsspec.url_to_fs(url)
    for name in os.listdir(folder):
        if not name.startswith("."):
            filesystem.pipe(f"{root}/{name}", (folder / name).read_bytes())
    return url


def quiet(source):
    return open_pictures(str(source), log=lambda line: None)


def assert_same_pictures(one, two):
    assert len(one) == len(two) > 0
    for index in range(len(one)):
        a, b = one.read(index), two.read(index)
        assert a.caption == b.caption == one.caption(index) == two.caption(index)
        assert np.array_equal(a.image, b.image)


def write_rows(folder, path, *, image="image", text="text", as_struct=True):
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    contents = [(folder / row["file_name"]).read_bytes() for row in rows]
    cells = [{"bytes": page, "path": None} for page in contents] if as_struct else contents
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table({"id": range(len(rows)), image: cells, text: [row["text"] for row in rows]}), path)


def test_shards_and_folders_at_an_address_are_read_as_local_ones(folders, cache):
    images, tars = folders
    local = quiet(images)
    for source in (tars, copied(tars), copied(images), f"{tars}/train-0000*.tar", f"{tars}/train-{{00000..00002}}.tar",
                   f"{copied(tars)}/train-{{00000..00002}}.tar"):  # fmt: skip
        assert_same_pictures(quiet(source), local)
    assert len(quiet(f"{tars}/train-00001.tar")) == 8


def test_workers_read_an_address_and_an_epoch_shows_each_picture_once_through_a_stop_and_more_ranks(folders, cache):
    source = quiet(copied(folders[1]))

    def read(first, last, **how):
        return [caption for batch in batches(source, batch_size=4, size=(32, 32), first_slot=first, last_slot=last,
                                             seed=1, **how) for caption in batch.captions]  # fmt: skip

    before = read(0, 8)
    after = [read(8, COUNT, rank=rank, num_ranks=2, num_workers=1) for rank in range(2)]
    captions = [source.caption(index) for index in range(COUNT)]
    assert sorted(before + after[0] + after[1]) == sorted(captions)
    assert read(0, COUNT)[8:] == [caption for four in range(4) for part in after for caption in part[2 * four :][:2]]


def test_a_tar_is_indexed_once_and_again_when_it_has_changed(folders, cache, monkeypatch):
    url = copied(folders[1])
    filesystem, root = fsspec.url_to_fs(url)
    opened = []
    monkeypatch.setattr(Address, "open", lambda self, name, real=Address.open: opened.append(name) or real(self, name))
    first = quiet(url)
    assert opened == [f"train-{n:05d}.tar" for n in range(3)]
    assert quiet(url).entries.equals(first.entries) and len(opened) == 3
    filesystem.pipe(f"{root}/train-00001.tar", filesystem.cat_file(f"{root}/train-00002.tar"))
    changed = quiet(url)
    assert opened[3:] == ["train-00001.tar"]
    assert changed.caption(8) == changed.caption(16) == first.caption(16)
    index = next((cache / "onestroke").rglob("*.parquet"))
    index.write_bytes(index.read_bytes()[:50])  # a copy that was cut short
    assert quiet(url).entries.equals(changed.entries) and len(opened) == 5


def test_sizes_are_read_from_the_first_bytes_once_and_again_for_what_changed(tmp_path, monkeypatch):
    shapes = {"a.png": (30, 20), "b.jpg": (70, 90), "c.webp": (16, 24), "d.gif": (10, 11), "e.tif": (9, 8)}
    for name, (height, width) in shapes.items():
        Image.effect_noise((width, height), 90).convert("RGB").save(tmp_path / name)
        (tmp_path / f"{name[0]}.txt").write_text(name)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (12, 34)).save(tmp_path / "f.jpg", exif=exif)
    (tmp_path / "f.txt").write_text("f")
    (tmp_path / "g.png").write_bytes(b"")
    (tmp_path / "g.txt").write_text("g")
    source = quiet(tmp_path)
    expected = [*shapes.values(), (12, 34), (0, 0)]
    assert measured_sizes(source).tolist() == [list(size) for size in expected]
    assert [source.read(index).image.shape[:2] for index in range(6)] == expected[:6]
    asked = []
    monkeypatch.setattr(type(source), "size_of", lambda self, index: asked.append(index) or (1, 1))
    assert measured_sizes(quiet(tmp_path)).tolist() == [list(size) for size in expected] and not asked
    Image.new("RGB", (50, 60)).save(tmp_path / "b.jpg")
    assert measured_sizes(quiet(tmp_path)).tolist()[:3] == [[30, 20], [1, 1], [16, 24]] and asked == [1]


@pytest.mark.parametrize("as_struct", [True, False])
def test_parquet_rows_are_pictures(as_struct, folders, tmp_path, cache):
    path = tmp_path / "rows" / "part-0.parquet"
    write_rows(folders[0], path, text="caption", image="image" if as_struct else "jpg", as_struct=as_struct)
    for name in (path, path.parent, f"{path.parent}/part-*.parquet"):
        assert_same_pictures(quiet(name), quiet(folders[0]))
    assert measured_sizes(quiet(path)).tolist() == [[40, 40]] * COUNT


def test_datasets_are_read_by_name(folders, tmp_path, cache):
    write_rows(folders[0], tmp_path / "named" / "data" / "train-0.parquet")
    assert_same_pictures(quiet(f"datasets:{tmp_path / 'named'}"), quiet(folders[0]))
    rows = datasets.Dataset.from_parquet(str(tmp_path / "named" / "data" / "train-0.parquet"), cache_dir=tmp_path / "c")
    rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    assert_same_pictures(quiet(f"datasets:{tmp_path / 'saved'}"), quiet(folders[0]))
    source = quiet(f"datasets:{tmp_path / 'named'}")
    how = {"batch_size": 4, "size": (32, 32), "first_slot": 0, "last_slot": 8, "seed": 1}
    for one, two in zip(batches(source, num_workers=1, **how), batches(quiet(folders[0]), **how), strict=True):
        assert torch.equal(one.images, two.images) and one.captions == two.captions


def test_rows_without_words_are_left_out_and_reported(tmp_path, cache):
    page = {"bytes": b"no picture", "path": None}
    parquet.write_table(pa.table({"image": [page] * 4, "text": ["a", "", None, " b\n c"]}), tmp_path / "a.parquet")
    lines = []
    source = open_pictures(str(tmp_path / "a.parquet"), log=lines.append)
    assert [source.caption(index) for index in range(len(source))] == ["a", "b c"]
    assert source.left_out == {"no caption": 1, "an empty caption": 1} and len(lines) == 2


def test_what_cannot_be_read_is_one_line(tmp_path, cache):
    def refused(match, source):
        with pytest.raises(DataError, match=match) as caught:
            quiet(source)
        assert "\n" not in str(caught.value) and caught.value.fix

    refused("no filesystem for this address", "nowhere://bucket/set")
    refused("no such folder", f"memory://{uuid.uuid4().hex}")
    refused("there is no such file", f"{tmp_path}/a-{{0..3}}.tar")
    refused("cannot be loaded by datasets", f"datasets:{tmp_path}/nothing")
    refused("no option 'part'", "datasets:name?part=1")
    parquet.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    refused("columns a", tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    refused("cannot be loaded by datasets", tmp_path / "b.parquet")
    url = f"memory://{uuid.uuid4().hex}"
    filesystem, root = fsspec.url_to_fs(url)
    filesystem.pipe(f"{root}/metadata.jsonl", b"{")
    filesystem.pipe(f"{root}/a.png", b"")
    refused(f"{url}/metadata.jsonl: line 1 is not JSON", url)
    filesystem.pipe(f"{root}/metadata.jsonl", b"")
    filesystem.pipe(f"{root}/a.txt", b"caf\xe9")
    refused(f"{url}/a.txt: not UTF-8", url)


def test_a_dataset_split_is_chosen(folders, tmp_path, cache):
    for split, folder in (("train", "a"), ("validation", "b")):
        write_rows(folders[0], tmp_path / "set" / f"{split}-{folder}.parquet")
    assert len(open_dataset(f"datasets:{tmp_path / 'set'}?split=validation[:5]", log=lambda line: None)) == 5


def test_the_loader_is_timed_over_all_that_it_is_asked_to_read(folders, cache):
    speed = measure_loader(quiet(folders[1]), size=32, num_images=40)
    assert speed.num_images == 40 and speed.seconds > 0 and speed.cpu_seconds > 0
    assert LoaderSpeed(400, 2.0, 0.5).line() == "400 pictures: 200 a second by the clock, 800 a second of one core"

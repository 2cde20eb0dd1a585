"""Cached latents beside encoding anew: the same numbers, made once, for readable pictures alone."""

import numpy as np
import pytest
import torch

from onestroke.data.latents import cache_latents, latent_batches
from onestroke.data.loader import batches
from onestroke.data.source import BrokenPicture, Picture
from onestroke.errors import DataError, ResourceError


class Squares:
    """Grey pictures of mixed sizes; `broken` ones cannot be read."""

    def __init__(self, count: int, broken: tuple[int, ...] = ()) -> None:
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def caption(self, index: int, *, slot: int | None = None) -> str:
        return f"picture {index} in slot {slot}"

    def read(self, index: int, *, slot: int | None = None) -> Picture:
        if index in self.broken:
            raise BrokenPicture(f"{index}.png", "broken")
        shades = np.random.default_rng(index).integers(0, 256, (20 + index % 3, 16 + index % 4, 3))
        return Picture(shades.astype(np.uint8), self.caption(index, slot=slot))


class Encoder:
    """Halves the resolution and counts the pictures it saw."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return torch.nn.functional.avg_pool2d(images, 2)


def cached(folder, source, encode, *, made_by: str = "a", count: int | None = None):
    return cache_latents(folder, source, encode, made_by=made_by, count=count or len(source), size=(16, 16))


def test_cached_batches_are_what_encoding_the_pictures_gives(tmp_path):
    source, encode = Squares(7), Encoder()
    span = {"batch_size": 4, "first_slot": 5, "last_slot": 17, "seed": 3}
    ours = list(latent_batches(cached(tmp_path, source, encode), source, **span))
    theirs = list(batches(source, size=(16, 16), **span))
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert a.captions == b.captions and a.images is None and a.picture_size == b.picture_size == (16, 16)
        assert torch.equal(a.slots, b.slots) and torch.equal(a.sizes, b.sizes)
        torch.testing.assert_close(a.latents, encode(b.images), atol=1e-3, rtol=1e-3)


def test_what_is_encoded_is_not_encoded_again(tmp_path, monkeypatch):
    monkeypatch.setattr("onestroke.data.latents.SHARD_PICTURES", 3)
    source, encode = Squares(8), Encoder()
    first = cached(tmp_path, source, encode)
    assert encode.seen == 8 and len(list(tmp_path.iterdir())) == 3
    (tmp_path / "latents-00001.safetensors").unlink()  # as if stopped
    again = cached(tmp_path, source, encode)
    assert encode.seen == 11 and torch.equal(first.latents, again.latents)


def test_broken_pictures_are_left_out(tmp_path):
    source = Squares(6, broken=(0, 4))
    cache = cached(tmp_path, source, Encoder())
    assert cache.indices.tolist() == [1, 2, 3, 5] and len(cache) == 4
    captions = [c for b in latent_batches(cache, source, batch_size=4, first_slot=0, last_slot=4, seed=0)
                for c in b.captions]  # fmt: skip
    assert sorted(int(caption.split()[1]) for caption in captions) == [1, 2, 3, 5]


def test_a_set_without_a_readable_picture_is_told(tmp_path):
    with pytest.raises(DataError, match="none of 3 pictures can be read"):
        cached(tmp_path, Squares(3, broken=(0, 1, 2)), Encoder())


def test_latents_of_another_vae_are_refused(tmp_path):
    cached(tmp_path, Squares(3), Encoder())
    with pytest.raises(DataError, match="another VAE"):
        cached(tmp_path, Squares(3), Encoder(), made_by="b")


def test_latents_of_other_pictures_are_refused(tmp_path):
    class Renamed(Squares):
        def caption(self, index: int, *, slot: int | None = None) -> str:
            return f"another picture {index}"

    cached(tmp_path, Squares(3), Encoder())
    with pytest.raises(DataError, match="other pictures"):
        cached(tmp_path, Renamed(3), Encoder())


def test_a_full_disk_is_told_and_leaves_no_half_shard(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onestroke.tensor_files.save_file", full)
    with pytest.raises(ResourceError, match="Free disk space"):
        cached(tmp_path, Squares(3), Encoder())
    assert not list(tmp_path.iterdir())

"""What frozen networks say of the training pictures, encoded once: latents, image and text embeddings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from onestroke.config import DiscriminatorRecipe
from onestroke.data.buckets import Buckets, Size
from onestroke.data.encodings import Encoded, Encodings, picture_key, text_key
from onestroke.data.facts import BROKEN, content_digests, mark_broken, measured_sizes
from onestroke.data.framing import Framing, Placement, cut
from onestroke.data.loader import ignore_interrupt
from onestroke.data.source import BrokenPicture, StoredSource
from onestroke.distill.conditions import ImageEmbedder, TextEmbedder
from onestroke.errors import ModelError
from onestroke.families.fingerprint import fingerprint
from onestroke.families.model import DiffusionModel
from onestroke.ownership import sole_owner

SHARD_ROWS = 1_000
_CAPTIONS_AT_ONCE = 64
_PIXELS_AT_ONCE = 16 * 512 * 512


@dataclass(frozen=True)
class Encoders:
    """The frozen networks of a run whose outputs can be kept. Rows are float16 under autocast, else float32."""

    model: DiffusionModel
    embed_image: ImageEmbedder | None  # None where the run does not ask for it, or shows it parts of the pictures
    embed_text: TextEmbedder | None  # None where the run does not ask for it, or takes the teacher's own
    autocast: torch.dtype | None

    def stores(self, root: Path) -> dict[str, Encodings]:
        """What is kept so far, by kind: latents, image, text; folders are named by weights and precision."""
        networks: dict[str, nn.Module] = {"latents": self.model.vae}
        if self.embed_image is not None:
            networks["image"] = self.embed_image.network
        if self.embed_text is not None and self.embed_text.encoder is not None:
            networks["text"] = self.embed_text.encoder
        precision = str(self.autocast or self.model.vae.dtype).removeprefix("torch.")
        return {kind: Encodings(root / f"{kind}-{fingerprint(net)}-{precision}") for kind, net in networks.items()}

    @torch.no_grad()
    def run(self, call: Callable[[], Tensor]) -> Tensor:
        """What a training step would be given, on the CPU."""
        with torch.autocast(self.model.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            rows = call().float().cpu()
        if not torch.isfinite(rows).all():
            raise ModelError("an encoding is not finite", where=self.model.source, fix="Encode in bfloat16 or float32.")
        return rows if self.autocast is None else rows.half()


def encoders_of(
    recipe: DiscriminatorRecipe,
    model: DiffusionModel,
    embed_image: ImageEmbedder,
    embed_text: TextEmbedder,
    autocast: torch.dtype | None,
) -> Encoders:
    """Those of a run with this discriminator."""
    whole = recipe.conditioning in ("image", "both") and recipe.crop == 1 and recipe.real == "data"
    worded = recipe.conditioning in ("text", "both") and embed_text.encoder is not None
    return Encoders(model, embed_image if whole else None, embed_text if worded else None, autocast)


def encodings_folder(source: StoredSource) -> Path:
    return source.memory() / "encoded"


def known_encodings(source: StoredSource, encoders: Encoders, *, needs_images: bool) -> Encoded | None:
    """What was encoded by these very networks; None where that is nothing."""
    root = encodings_folder(source)
    if not root.is_dir():
        return None
    stores = encoders.stores(root)
    if not len(stores["latents"]):
        line = "%s: nothing by these networks in this precision; run `onestroke encode` with this recipe"
        logging.getLogger(__name__).warning(line, root)
        return None
    digests, sizes = content_digests(source, read=False), measured_sizes(source)
    digests[(sizes == 0).any(axis=1)] = BROKEN
    return Encoded(digests, sizes, stores["latents"], stores.get("image"), stores.get("text"), needs_images)


class Encoding(NamedTuple):
    """What `encode_pictures` did."""

    cuts: int  # of pictures, encoded now
    known: int  # of pictures, encoded before
    captions: int  # encoded now
    broken: int  # pictures


class _Work(NamedTuple):
    """A picture and those of its cuts that are missing."""

    index: int
    shape: Size
    size: Size
    placements: list[Placement]
    keys: list[int]
    num_known: int  # of its cuts


def encode_pictures(
    source: StoredSource,
    buckets: Buckets,
    framing: Framing,
    encoders: Encoders,
    *,
    num_workers: int = 0,
    observe: Callable[[int, int], None] = lambda done, total: None,
) -> Encoding:
    """Encode what is missing of every cut that training can ask for, shard by shard; `observe(done, pictures)`.

    A run that is stopped goes on at the shards that are missing. Raises CheckpointError where another one encodes the
    same set at the same time, ResourceError on a full disk.
    """
    root = encodings_folder(source)
    with sole_owner(root):
        stores = encoders.stores(root)
        texts = stores.pop("text", None)
        captions = 0 if texts is None else _encode_captions(source, buckets, encoders, texts)
        made = known = broken = done = 0
        for shard in _shards(_work(source, buckets, framing, stores)):
            rows: dict[str, list[Tensor]] = {kind: [] for kind in stores}
            keys: list[int] = []
            unread: list[int] = []
            for some, images in _batches(source, shard, num_workers, unread):
                keys += some
                for kind, part in _encoded(encoders, stores, images).items():
                    rows[kind].append(part)
            for kind, store in stores.items():
                new = ~store.has(np.array(keys, np.int64))
                if new.any():
                    store.add(np.array(keys)[new].tolist(), torch.cat(rows[kind])[torch.from_numpy(new)])
            if unread:
                mark_broken(source, unread)
            made, broken, done = made + len(keys), broken + len(unread), done + len(shard)
            known += sum(one.num_known for one in shard)
            observe(done, buckets.num_pictures)
        return Encoding(made, known, captions, broken)


def _work(source: StoredSource, buckets: Buckets, framing: Framing, stores: dict[str, Encodings]) -> Iterator[_Work]:
    """Every picture that is not known to be broken, by bucket, with the cuts that some store lacks."""
    digests, sizes = content_digests(source), measured_sizes(source)
    for size, members in zip(buckets.sizes, buckets.members, strict=True):
        for index in members.tolist():
            if digests[index] == BROKEN:
                continue
            shape = (int(sizes[index, 0]), int(sizes[index, 1]))
            cuts = {picture_key(int(digests[index]), size, p): p for p in framing.all_of(index, shape, size)}
            known = np.all([store.has(np.array(list(cuts))) for store in stores.values()], axis=0)
            keys = [key for key, there in zip(cuts, known, strict=True) if not there]
            yield _Work(index, shape, size, [cuts[key] for key in keys], keys, int(known.sum()))


def _shards(work: Iterable[_Work]) -> Iterator[list[_Work]]:
    """Runs of one bucket, of `SHARD_ROWS` missing cuts or a little more."""
    shard: list[_Work] = []
    missing = 0
    for one in work:
        if shard and (one.size != shard[0].size or missing >= SHARD_ROWS):
            yield shard
            shard, missing = [], 0
        shard.append(one)
        missing += len(one.keys)
    if shard:
        yield shard


@dataclass(frozen=True)
class _Cuts(Dataset):
    source: StoredSource
    work: list[_Work]

    def __len__(self) -> int:
        return len(self.work)

    def __getitem__(self, place: int) -> np.ndarray | None:
        """The cuts of a picture, n h w 3; none if it is not of the size that its first bytes told; None: broken."""
        one = self.work[place]
        try:
            image = self.source.read(one.index).image
        except BrokenPicture:
            return None
        if image.shape[:2] != one.shape:
            return np.empty((0, *one.size, 3), np.uint8)
        return np.stack([cut(image, one.size, placement) for placement in one.placements])


def _batches(
    source: StoredSource, work: list[_Work], num_workers: int, unread: list[int]
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Keys and images (n h w 3) of about as many cuts as a device is given at once; `unread` comes to hold pictures
    that turn out broken."""
    work = [one for one in work if one.keys]
    if not work:
        return
    loader = DataLoader(
        _Cuts(source, work), batch_size=None, num_workers=num_workers, worker_init_fn=ignore_interrupt,
        generator=torch.Generator(), collate_fn=_as_it_is,
    )  # fmt: skip
    at_once = max(1, _PIXELS_AT_ONCE // (work[0].size[0] * work[0].size[1]))
    keys: list[int] = []
    images: list[np.ndarray] = []
    for one, cuts in zip(work, loader, strict=True):
        if cuts is None:
            unread.append(one.index)
            continue
        keys += one.keys[: len(cuts)]
        images.append(cuts)
        if len(keys) >= at_once:
            yield keys, np.concatenate(images)
            keys, images = [], []
    if keys:
        yield keys, np.concatenate(images)


def _as_it_is(cuts):
    """In place of tensors, which would need room in /dev/shm."""
    return cuts


def _encoded(encoders: Encoders, stores: dict[str, Encodings], images: np.ndarray) -> dict[str, Tensor]:
    """Rows of every kind that is kept of pictures."""
    shown = (torch.from_numpy(images).float() / 127.5 - 1).permute(0, 3, 1, 2).to(encoders.model.device)
    calls: dict[str, Callable[[], Tensor]] = {"latents": lambda: encoders.model.encode_images(shown)}
    if encoders.embed_image is not None:
        embed = encoders.embed_image
        calls["image"] = lambda: embed(shown)
    return {kind: encoders.run(calls[kind]) for kind in stores}


def _encode_captions(source: StoredSource, buckets: Buckets, encoders: Encoders, store: Encodings) -> int:
    """Embed the captions that are not known; returns how many."""
    captions = dict.fromkeys(source.caption(index) for members in buckets.members for index in members.tolist())
    keys = {text_key(caption): caption for caption in captions}
    new = [key for key, there in zip(keys, store.has(np.array(list(keys))), strict=True) if not there]
    embed = encoders.embed_text
    assert embed is not None
    for first in range(0, len(new), SHARD_ROWS):
        shard = new[first : first + SHARD_ROWS]
        parts = [shard[place : place + _CAPTIONS_AT_ONCE] for place in range(0, len(shard), _CAPTIONS_AT_ONCE)]
        rows = [encoders.run(partial(embed.encode, [keys[key] for key in part])) for part in parts]
        store.add(shard, torch.cat(rows))
    return len(new)

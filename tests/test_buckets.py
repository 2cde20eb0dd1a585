"""Buckets by hand and by exhaustive search; batches of one bucket, each picture once, whoever reads them."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import pytest
import torch
from tiny_runs import tiny_add, tiny_recipe, write_folder

from onestroke.build import sizes_of, source_of
from onestroke.data import Broken, BrokenPicture, Picture, batches
from onestroke.data.buckets import SDXL_SIZES, Buckets, assign, computed_buckets, sdxl_buckets, share_lost
from onestroke.data.facts import measured_sizes
from onestroke.data.framing import Framing
from onestroke.data.plan import Plan
from onestroke.distill.add import DISCRIMINATOR, STUDENT
from onestroke.errors import DataError, RecipeError
from onestroke.families.load import from_pipeline
from onestroke.train.trainer import Trainer, TrainSettings


@dataclass(frozen=True)
class Shapes:
    """A picture for each height and width, of noise; those in `broken` cannot be read, though their size can."""

    shapes: tuple
    broken: frozenset = field(default_factory=frozenset)

    def __len__(self):
        return len(self.shapes)

    def caption(self, index, *, slot=None):
        return f"number {index}"

    def size_of(self, index):
        if not self.shapes[index]:
            raise BrokenPicture(f"{index}.png", "truncated")
        return self.shapes[index]

    def read(self, index, *, slot=None):
        if index in self.broken:
            raise BrokenPicture(f"{index}.png", "truncated")
        pixels = np.random.default_rng(index).integers(0, 256, (*self.size_of(index), 3), dtype=np.uint8)
        return Picture(pixels, self.caption(index))


TALL, SQUARE, WIDE = (48, 32), (40, 40), (32, 48)
SHAPES = Shapes((*[(60, 40)] * 11, *[(50, 50)] * 7, *[(44, 66)] * 14))


def buckets_of(source, batch_size=4, sizes=(TALL, SQUARE, WIDE)):
    return assign(measured_sizes(source), sizes, batch_size=batch_size)


def run(source, first, last, *, batch_size=4, buckets=None, **how):
    size = buckets or buckets_of(source, batch_size)
    return list(batches(source, batch_size=batch_size, size=size, first_slot=first, last_slot=last, seed=3, **how))


def numbers(run):
    return [int(caption.removeprefix("number ")) for batch in run for caption in batch.captions]


# Sizes


def test_sdxl_list_is_the_papers_and_scales_with_the_square():
    assert len(set(SDXL_SIZES)) == 40
    assert set(sdxl_buckets(1024, multiple=8)) == set(SDXL_SIZES)
    assert all(h % 64 == w % 64 == 0 and 0.85 * 1024**2 <= h * w <= 1.003 * 1024**2 for h, w in SDXL_SIZES)
    # the rows of the table at aspect 0.52 (height by width 704 x 1344) and 4.0
    assert (704, 1344) in SDXL_SIZES and (2048, 512) in SDXL_SIZES and (1344, 704) not in SDXL_SIZES
    half = sdxl_buckets(512, multiple=8)
    assert (416, 608) in half and (512, 512) in half and all(h % 8 == w % 8 == 0 for h, w in half)
    assert (104, 152) in sdxl_buckets(128, multiple=8)


def test_a_crop_to_a_bucket_leaves_out_what_is_beside_its_aspect():
    assert share_lost((100, 100), (64, 128)) == share_lost((100, 100), (128, 64)) == 0.5
    assert share_lost((100, 200), (64, 128)) == 0 and share_lost((90, 100), (100, 100)) == pytest.approx(0.1)


def test_computed_buckets_are_the_best_choice_of_all():
    """Against trying every choice of candidates, on pictures of few aspects."""
    rng = np.random.default_rng(0)
    pictures = np.concatenate([np.array([(1200, 800)] * 30 + [(1000, 1000)] * 8 + [(700, 1300)] * 25 + [(900, 1000)]),
                               rng.integers(600, 1400, (12, 2))])  # fmt: skip
    everything = computed_buckets(pictures, 128, multiple=8, most=64)
    assert all(h % 8 == w % 8 == 0 and h * w <= 128**2 and min(h, w) >= 64 for h, w in everything)

    def loss(sizes):
        return sum(min(share_lost(tuple(picture), size) for size in sizes) for picture in pictures.tolist())

    for most in (1, 2, 3):
        chosen = computed_buckets(pictures, 128, multiple=8, most=most)
        assert len(chosen) <= most
        candidates = {*everything, *chosen, (128, 128)}
        best = min(loss(choice) for choice in combinations(sorted(candidates), most))
        assert loss(chosen) <= best + 0.01 * len(pictures)  # pictures are told apart by 512 levels of aspect
    assert computed_buckets(np.array([(300, 200)] * 9), 96, multiple=8, most=5) == ((112, 80),) or share_lost(
        (300, 200), computed_buckets(np.array([(300, 200)] * 9), 96, multiple=8, most=5)[0]) < 0.04  # fmt: skip


def test_pictures_go_to_the_nearest_aspect_and_small_buckets_are_dissolved():
    shapes = np.array([(60, 40), (60, 40), (50, 50), (49, 50), (51, 50), (20, 30), (0, 0)])
    three = assign(shapes, (TALL, SQUARE, WIDE), batch_size=1)
    assert three.sizes == (TALL, SQUARE, WIDE)
    assert [members.tolist() for members in three.members] == [[0, 1], [2, 3, 4], [5]]
    assert three.unreadable.tolist() == [6] and three.num_pictures == 6
    two = assign(shapes, (TALL, SQUARE, WIDE), batch_size=2)  # the lone wide one is cropped to a square
    assert (two.sizes, [members.tolist() for members in two.members]) == ((TALL, SQUARE), [[0, 1], [2, 3, 4, 5]])
    assert len(assign(shapes, (TALL, SQUARE, WIDE), batch_size=6)) == 1


def test_a_batch_that_no_bucket_can_fill_is_one_line():
    with pytest.raises(DataError, match=r"no bucket can fill a batch of 33: 32 pictures.*train\.batch_size") as caught:
        buckets_of(SHAPES, 33)
    assert "\n" not in str(caught.value)


# The plan


def test_each_batch_is_of_one_bucket_and_each_bucket_shows_its_pictures_once_before_any_again():
    buckets = buckets_of(SHAPES)
    seen = run(SHAPES, 0, 4 * 87)  # 11 epochs fill 30, 19 and 38 batches of 4 from 121, 77 and 154 pictures
    assert {batch.picture_size for batch in seen} == {TALL, SQUARE, WIDE}
    for size, members in zip(buckets.sizes, buckets.members, strict=True):
        shown = numbers([batch for batch in seen if batch.picture_size == size])
        assert set(shown) == set(members.tolist())
        for first in range(0, len(shown) - len(members) + 1, len(members)):
            assert sorted(shown[first : first + len(members)]) == members.tolist()
    counts = Counter(numbers(seen))
    # a bucket lags by less than a batch
    assert all(count in (10, 11) for count in counts.values()) and len(counts) == 32
    sizes = [batch.picture_size for batch in seen[:8]]
    assert len(set(sizes)) == 3 and sizes != sorted(sizes)  # mixed


def test_an_epoch_that_batches_divide_shows_every_picture_exactly_once():
    source = Shapes((*[(60, 40)] * 12, *[(50, 50)] * 8, *[(44, 66)] * 16))
    for epoch in range(3):
        shown = numbers(run(source, 36 * epoch, 36 * (epoch + 1)))
        assert sorted(shown) == list(range(36))


def test_the_plan_is_a_function_of_seed_and_slot_alone():
    buckets = buckets_of(SHAPES)
    ahead, back = Plan(buckets, batch_size=4, seed=1), Plan(buckets, batch_size=4, seed=1)
    forward = [(ahead.picture_at(slot), ahead.size_of(slot)) for slot in range(400)]
    assert forward == [(back.picture_at(slot), back.size_of(slot)) for slot in reversed(range(400))][::-1]
    other = Plan(buckets, batch_size=4, seed=2)
    assert forward != [(other.picture_at(slot), other.size_of(slot)) for slot in range(400)]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_and_workers_and_a_restart_share_out_the_same_batches(num_ranks):
    """A run on one process to slot 48, then on several with workers: the same pictures as in one go."""
    how = {"crop": "random", "random_flip": True}
    whole = run(SHAPES, 0, 96, **how)
    parts = [run(SHAPES, 48, 96, rank=rank, num_ranks=num_ranks, num_workers=rank % 2, **how)
             for rank in range(num_ranks)]  # fmt: skip
    assert all(len(part) == 12 for part in parts)
    for number, batch in enumerate(whole[12:]):
        shares = [part[number] for part in parts]
        assert [len(share) for share in shares] == [4 // num_ranks] * num_ranks
        assert torch.equal(torch.cat([share.images for share in shares]), batch.images)
        assert torch.equal(torch.cat([share.slots for share in shares]), batch.slots)
        assert torch.equal(torch.cat([share.sizes for share in shares]), batch.sizes)
        assert sum((share.captions for share in shares), ()) == batch.captions


def test_ranks_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(RecipeError, match=r"train\.batch_size: 4 pictures do not divide by 3 processes"):
        run(SHAPES, 0, 8, num_ranks=3)


def test_spares_are_of_the_same_bucket_and_what_has_no_size_counts_as_broken():
    source = Shapes((*SHAPES.shapes, None), frozenset({2}))
    broken = Broken(33, max_share=0.2)
    seen = run(source, 0, 64, broken=broken)
    assert 2 not in numbers(seen) and set(broken.reasons) == {2, 32}
    assert broken.reasons[32] == "32.png (truncated)"
    for batch in seen:
        assert all(share_lost(source.shapes[number], batch.picture_size) < 0.05 for number in numbers([batch]))


# Micro-conditioning and crops


def test_time_ids_are_of_the_picture_before_scaling_the_crop_and_the_bucket():
    """60 x 40 covers 48 x 32 whole; 44 x 66 scaled to cover 32 x 48 whole; 50 x 60 to cover 40 x 40 is 40 x 48."""
    source = Shapes((*[(60, 40)] * 4, *[(50, 60)] * 4))
    model = from_pipeline(tiny_pipeline())
    for batch in run(source, 0, 8, buckets=Buckets((TALL, SQUARE), (np.arange(4), np.arange(4, 8)))):
        ids = model.with_sizes(model.encode_prompts(batch.captions), batch.sizes, batch.picture_size).time_ids
        expected = (60, 40, 0, 0, 48, 32) if batch.picture_size == TALL else (50, 60, 0, 4, 40, 40)
        assert {tuple(row) for row in ids.long().tolist()} == {expected}


def tiny_pipeline():
    from pipelines import tiny_sdxl

    return tiny_sdxl()


def test_a_picture_with_numbered_crops_is_cut_in_these_ways_alone():
    framing = Framing(3, "random", True, 2)
    listed = framing.all_of(7, (50, 90), SQUARE)
    assert len(listed) == 4 and len({placement.left for placement in listed}) == 2
    drawn = {framing.at_slot(slot, 7, (50, 90), SQUARE) for slot in range(60)}
    assert drawn == set(listed)
    assert Framing(3, "center").all_of(7, (50, 60), SQUARE) == [Framing(3, "center").at_slot(9, 7, (50, 60), SQUARE)]


# Training


@pytest.mark.parametrize("discriminator", ["both", "text"])
def test_add_trains_on_portraits_and_landscapes(discriminator):
    """Losses of every bucket are finite, and the student's gradients reach it; crop 0.75 looks at a part of each."""
    method = tiny_add(f"discriminator.conditioning={discriminator}", "discriminator.crop=0.75")
    source = Shapes((*[(60, 40)] * 4, *[(44, 66)] * 4))
    trainer = Trainer(method, TrainSettings(16, 4))
    sizes = buckets_of(source)
    seen = []

    def batches_from(first_slot):
        for batch in batches(source, batch_size=4, size=sizes, first_slot=first_slot, last_slot=16, seed=0):
            seen.append(batch.picture_size)
            rollout = method.rollout(batch, frozenset((STUDENT, DISCRIMINATOR)))
            assert rollout.x0.shape[-2:] == batch.picture_size
            yield batch

    steps = list(trainer.run(batches_from))
    assert set(seen) == {TALL, WIDE} and len(steps) == 4
    assert all(np.isfinite(list(step.terms.values())).all() and step.terms["student/grad_norm"] > 0 for step in steps)


@pytest.mark.parametrize("kind", ["sdxl", "computed"])
def test_a_recipe_names_the_buckets(kind, tmp_path):
    folder = write_folder(tmp_path / "pictures")  # six pictures: three upright, two lying, one square
    model = from_pipeline(tiny_pipeline())
    recipe = tiny_recipe(f"data.source={folder}", f"data.buckets={kind}", "data.size=64", "train.batch_size=2")
    source = source_of(recipe.data)
    buckets = sizes_of(recipe, source, model)
    assert len(buckets) > 1 and buckets.num_pictures == 6
    assert all(h % 8 == w % 8 == 0 and h * w <= 1.3 * 64 * 64 for h, w in buckets.sizes)
    assert min(len(members) for members in buckets.members) >= 2
    assert (folder / ".onestroke" / "sizes.parquet").is_file()
    assert sizes_of(tiny_recipe("data.size=64"), source, model) == (64, 64)
    with pytest.raises(DataError, match="no bucket can fill a batch of 7"):
        sizes_of(tiny_recipe(f"data.buckets={kind}", "train.batch_size=7"), source, model)

"""Which picture each slot shows: an epoch is a plan, a pure function of (seed, epoch, index).

Position is one number, the slot, that counts pictures over all epochs. Batch k of the run is the slots k * batch_size
on, all of one bucket. A bucket's pictures come in an order that each epoch shuffles anew; what is left at its end and
fills no batch opens its next batch, so that a bucket shows each of its pictures once before any of them again. The
buckets' batches of an epoch are mixed in an order of the epoch's own.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from jaxtyping import UInt32

from onestroke.data.buckets import Buckets, Size

# Streams of randomness. NumPy pads short seeds with zeros, so (seed, 1, 2) and (seed, 1, 2, 0) draw the same numbers:
# these stay clear of the small numbers that comicset's four-part seeds have in their second place.
_PLAN, _MIX = 16, 19
_KEPT = 2  # epochs whose orders are remembered


def epoch_order(num_pictures: int, *, seed: int, epoch: int, bucket: int = 0) -> UInt32[np.ndarray, " n"]:
    """A permutation of 0 .. num_pictures, read-only."""
    order = np.random.default_rng((seed, _PLAN, epoch, bucket)).permutation(num_pictures).astype(np.uint32)
    order.setflags(write=False)
    return order


@lru_cache(maxsize=_KEPT)
def plan(num_pictures: int, *, seed: int, epoch: int) -> UInt32[np.ndarray, " n"]:
    """The order in which an epoch shows pictures that are all of one size."""
    return epoch_order(num_pictures, seed=seed, epoch=epoch)


def picture_at(slot: int, num_pictures: int, *, seed: int) -> int:
    """The index of the picture that `slot` shows, all pictures being of one size."""
    epoch, position = divmod(slot, num_pictures)
    return int(plan(num_pictures, seed=seed, epoch=epoch)[position])


class Plan:
    """The pictures and sizes of all slots. Holds nothing of where a run stands: workers have copies."""

    def __init__(self, buckets: Buckets, *, batch_size: int, seed: int) -> None:
        self.buckets, self.batch_size, self.seed = buckets, batch_size, seed
        self._counts = [len(members) for members in buckets.members]
        assert batch_size > 0 and min(self._counts) > 0
        self._orders: dict[int, dict[int, np.ndarray]] = {}  # bucket -> epoch -> order
        self._mixes: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # epoch -> bucket and place of each of its batches

    def bucket_of(self, slot: int) -> int:
        """The place of the slot's bucket in `buckets`."""
        return self._batch(slot // self.batch_size)[0]

    def size_of(self, slot: int) -> Size:
        """Height and width of the slot's picture in the batch."""
        return self.buckets.sizes[self.bucket_of(slot)]

    def picture_at(self, slot: int) -> int:
        """The index of the picture that `slot` shows unless it is broken."""
        number, place = divmod(slot, self.batch_size)
        bucket, batch = self._batch(number)
        epoch, position = divmod(batch * self.batch_size + place, self._counts[bucket])
        return int(self.buckets.members[bucket][self._order(bucket, epoch)[position]])

    def spare(self, slot: int, rng: np.random.Generator) -> int:
        """Another picture of the slot's bucket."""
        members = self.buckets.members[self.bucket_of(slot)]
        return int(members[rng.integers(len(members))])

    def num_batches(self, epoch: int) -> int:
        """Batches before `epoch` begins: the whole ones that each bucket has filled."""
        return sum(self._filled(bucket, epoch) for bucket in range(len(self._counts)))

    def _filled(self, bucket: int, epoch: int) -> int:
        return epoch * self._counts[bucket] // self.batch_size

    def _batch(self, number: int) -> tuple[int, int]:
        """Bucket of global batch `number`, and which of that bucket's batches it is, from the first epoch on."""
        if len(self._counts) == 1:
            return 0, number
        epoch = number * self.batch_size // sum(self._counts)
        while number >= self.num_batches(epoch + 1):
            epoch += 1
        while number < self.num_batches(epoch):
            epoch -= 1
        buckets, places = _kept(self._mixes, epoch, self._mix)
        position = number - self.num_batches(epoch)
        return int(buckets[position]), int(places[position])

    def _mix(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Bucket and place in its bucket of each batch of an epoch; a bucket's own batches stay in order."""
        firsts = [self._filled(bucket, epoch) for bucket in range(len(self._counts))]
        nums = [self._filled(bucket, epoch + 1) - first for bucket, first in enumerate(firsts)]
        rng = np.random.default_rng((self.seed, _MIX, epoch))
        buckets = rng.permutation(np.repeat(np.arange(len(nums)), nums))
        places = np.empty_like(buckets)
        for bucket, (first, num) in enumerate(zip(firsts, nums, strict=True)):
            places[buckets == bucket] = np.arange(first, first + num)
        return buckets, places

    def _order(self, bucket: int, epoch: int) -> np.ndarray:
        def made(epoch: int) -> np.ndarray:
            return epoch_order(self._counts[bucket], seed=self.seed, epoch=epoch, bucket=bucket)

        return _kept(self._orders.setdefault(bucket, {}), epoch, made)


def _kept(memory: dict, epoch: int, make):
    """What `make(epoch)` gives, remembered for the newest epochs asked for."""
    if epoch not in memory:
        while len(memory) >= _KEPT:
            memory.pop(next(iter(memory)))
        memory[epoch] = make(epoch)
    return memory[epoch]

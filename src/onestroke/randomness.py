"""Random numbers that depend on (seed, stream, picture number) alone.

Not on the rank, the batch size, or what was drawn before: a resumed run, and one on another number of processes, draws
the same numbers without any saved generator state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def generator(seed: int, stream: str, slot: int) -> torch.Generator:
    """A CPU generator for picture `slot` of `stream`, a word that names what the numbers are for."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{slot}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def normal(shape: Iterable[int], seed: int, stream: str, slots: Tensor) -> Tensor:
    """Standard normal numbers, b *shape, float32 on the CPU: one independent draw per picture."""
    size = tuple(shape)
    return torch.stack([torch.randn(size, generator=generator(seed, stream, s)) for s in slots.tolist()])


def uniform(seed: int, stream: str, slots: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), one per picture, float64 on the CPU."""
    return torch.stack(
        [torch.rand((), generator=generator(seed, stream, s), dtype=torch.float64) for s in slots.tolist()]
    )


def stratified(seed: int, stream: str, slots: Tensor) -> Tensor:
    """Numbers in [0, 1), each uniform, together spread evenly over any run of consecutive pictures.

    Picture `slot` takes the golden-ratio sequence's point, shifted by an offset that all pictures share.
    """
    offset = torch.rand((), generator=generator(seed, stream, 0), dtype=torch.float64)
    return (slots.to(torch.float64) * 0.6180339887498949 + offset) % 1.0

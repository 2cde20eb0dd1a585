"""Accelerators that a run may be planned for: memory and peak speed as their makers publish them."""

from __future__ import annotations

from typing import NamedTuple

from onestroke.errors import RecipeError


class Device(NamedTuple):
    """One accelerator."""

    memory: int  # bytes
    peak: float  # dense bfloat16 operations a second


GIB = 2**30
DEVICES = {
    "h200-141gb": Device(int(140 * GIB), 989e12),
    "h100-80gb": Device(int(79 * GIB), 989e12),
    "a100-80gb": Device(int(79 * GIB), 312e12),
    "a100-40gb": Device(int(39 * GIB), 312e12),
    "l40s-48gb": Device(int(44 * GIB), 362e12),
    "a6000-48gb": Device(int(47 * GIB), 155e12),
    "rtx4090-24gb": Device(int(23.5 * GIB), 165e12),
    "rtx3090-24gb": Device(int(23.5 * GIB), 71e12),
}
# Shares of the peak that a training step is taken to reach: assumptions, not measurements. A step in float32 has no
# use of the matrix units' peak at all.
UTILISATION = {"bfloat16": 0.35, "float16": 0.35, "float32": 0.05, "float64": 0.01}

NAMES = {  # what torch.cuda.get_device_name() says; cards of other builds and memories have other peaks
    "NVIDIA H200": "h200-141gb",
    "NVIDIA H100 80GB HBM3": "h100-80gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA A100 80GB PCIe": "a100-80gb",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-PCIE-40GB": "a100-40gb",
    "NVIDIA L40S": "l40s-48gb",
    "NVIDIA RTX A6000": "a6000-48gb",
    "NVIDIA GeForce RTX 4090": "rtx4090-24gb",
    "NVIDIA GeForce RTX 3090": "rtx3090-24gb",
}


def peak_of(name: str) -> float | None:
    """Dense bfloat16 operations a second of the card that PyTorch calls so; None where it is not in the table."""
    return DEVICES[NAMES[name]].peak if name in NAMES else None


def device_called(name: str) -> Device:
    """Raises `RecipeError` that lists those known."""
    if name.lower() not in DEVICES:
        raise RecipeError(f"no device {name!r} is known", where="--device", fix=f"Use one of {', '.join(DEVICES)}.")
    return DEVICES[name.lower()]

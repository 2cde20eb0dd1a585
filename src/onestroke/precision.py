"""What is fast on a device: bfloat16 where the hardware computes in it, fused attention of long sequences."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from onestroke.errors import RecipeError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
PLAIN_ATTENTION_PIXELS = 128 * 128  # 256 latents
NATIVE = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")  # the CPU features, by torch's names for x86 and Arm


@cache
def cpu_has_bfloat16() -> bool:
    """Whether this CPU computes in bfloat16. One that does not (AVX2 alone) takes 7 to 50 times as long as in float32.

    Asked of the CPU, not measured: two runs of one recipe on one machine have to end in the same bits.
    """
    if hasattr(torch.cpu, "get_capabilities"):  # not in torch 2.8
        features = torch.cpu.get_capabilities()
        return any(bool(features.get(name)) for name in NATIVE)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where `device` computes in it, else float32."""
    kind = torch.device(device).type
    native = cpu_has_bfloat16() if kind == "cpu" else kind != "cuda" or torch.cuda.is_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def named_precision(precision: str, device: torch.device | str) -> str:
    """A recipe's `train.precision` with "auto" replaced by the name of what it means on `device`."""
    return str(fast_dtype(device)).removeprefix("torch.") if precision == "auto" else precision


def autocast_dtype(precision: str, device: torch.device | str) -> torch.dtype | None:
    """The dtype of autocast for a recipe's `train.precision`, None for none; "auto" is the fast one on `device`."""
    dtype = DTYPES[named_precision(precision, device)]
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def named_frozen_precision(frozen: str, precision: str, device: torch.device | str) -> str:
    """`train.frozen_precision` with "auto" replaced by the name of what it means beside `train.precision` on `device`.

    Raises RecipeError for bfloat16 weights without an autocast to bfloat16, which their inputs would not fit.
    """
    fits = named_precision(precision, device) == "bfloat16"
    if frozen == "bfloat16" and not fits:
        raise RecipeError(
            "frozen weights in bfloat16 need a step in bfloat16",
            where="train.frozen_precision",
            fix="Set train.precision to bfloat16 too, or leave frozen_precision out.",
        )
    if frozen == "auto":
        return "bfloat16" if fits and torch.device(device).type == "cuda" else "float32"
    return frozen


def frozen_dtype(frozen: str, precision: str, device: torch.device | str) -> torch.dtype:
    """The dtype of the weights that are not trained; in a run in float64 all weights are float64."""
    if precision == "float64" and frozen != "bfloat16":
        return torch.float64
    return DTYPES[named_frozen_precision(frozen, precision, device)]


def training_attention(device: torch.device | str, pixels: int) -> AbstractContextManager:
    """The attention for steps on pictures of so many pixels.

    Of the short sequences of small pictures, PyTorch's fused attention on a CPU takes twice as long as the plain one,
    backward pass included; of long ones the plain one would hold every weight.
    """
    is_small = torch.device(device).type == "cpu" and pixels <= PLAIN_ATTENTION_PIXELS
    return sdpa_kernel(SDPBackend.MATH) if is_small else nullcontext()

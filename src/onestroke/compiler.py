"""Compiled blocks (torch.compile), and whether a machine can compile: by g++ for a CPU, by Triton for a GPU."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch._dynamo
from torch import nn

from onestroke.errors import ResourceError

REPEATED = ("BasicTransformerBlock", "Dinov2Layer")
RECOMPILE_LIMIT = 64


def check_compiler(device: torch.device, *, where: str) -> None:
    """Raise ResourceError, naming the recipe's key `where`, unless torch.compile can make kernels for `device`."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            fix = "Install g++ (apt-get install g++), or leave this line out."
            raise ResourceError("compiling for a CPU needs a C++ compiler", where=where, fix=fix) from error
    elif device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            fix = "Install it (pip install triton) on a GPU of compute capability 7 or above, or leave this line out."
            raise ResourceError("compiling for a GPU needs Triton", where=where, fix=fix)
    else:
        raise ResourceError(f"nothing is compiled for {device.type} devices", where=where, fix="Leave this line out.")


def compile_blocks(networks: Iterable[nn.Module]) -> int:
    """Have the transformer blocks of diffusers' UNets and of DINOv2 compiled when they are first called; their number.

    They are repeated, so that a few compiled forms serve all of them (regional compilation). Names of weights stay, and
    a copy of a network is not compiled. Compiled code has no second derivative: what R1 goes through stays out.
    """
    # a form for each width, grad mode, autocast and batch of the callers; PyTorch's own limit of 8 would leave some out
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    blocks = {id(m): m for network in networks for m in network.modules() if type(m).__name__ in REPEATED}
    for block in blocks.values():
        block.compile()
    return len(blocks)

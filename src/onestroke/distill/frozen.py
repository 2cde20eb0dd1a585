"""Networks that are not trained, in less memory: bfloat16 weights, and a teacher whose linear layers are float8."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from onestroke.distill.features import FeatureNetwork
from onestroke.errors import ResourceError

TORCHAO = "Install it: pip install 'onestroke[torchao]'."
ROW_SCALE = 4  # bytes: torchao keeps one float32 for each row of a float8 weight


def lower(networks: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Keep the networks' weights in `dtype`, in place."""
    for network in networks:
        network.lower(dtype) if isinstance(network, FeatureNetwork) else network.to(dtype)


def to_float8(unet: nn.Module, mode: str, device: torch.device) -> None:
    """Keep the weights of the linear layers of a frozen UNet in float8 (e4m3, a scale for each row), in place.

    `mode`: "weights" computes in the dtype of before, on any device; "dynamic" multiplies in float8, which GPUs of
    compute capability 8.9 (Ada, Hopper) and above do. Raises ResourceError where that, or torchao, is missing.
    """
    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Float8WeightOnlyConfig,
            PerRow,
            quantize_,
        )
    except ImportError as error:
        raise ResourceError("a teacher in float8 needs torchao", where="teacher.fp8", fix=TORCHAO) from error
    if mode == "dynamic":
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
            raise ResourceError(
                f"this {device.type} device does not multiply in float8",
                where="teacher.fp8",
                fix='Set it to "weights", or train on a GPU of compute capability 8.9 or above (Ada, Hopper).',
            )
        config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    else:
        config = Float8WeightOnlyConfig(set_inductor_config=False)
    quantize_(unet, config)


def float8_bytes(unet: nn.Module) -> int:
    """Bytes of the parameters and buffers of `unet` after `to_float8`."""
    linear = {id(layer.weight) for layer in unet.modules() if isinstance(layer, nn.Linear)}
    total = 0
    for tensor in (*unet.parameters(), *unet.buffers()):
        is_lowered = id(tensor) in linear
        total += tensor.numel() + ROW_SCALE * len(tensor) if is_lowered else tensor.numel() * tensor.element_size()
    return total

"""Weights and gradients over several processes: FSDP2 for the large networks, averaged gradients for the others.

The discriminator's heads are never sharded: R1 differentiates their gradients once more, which crashes through
`fully_shard` (torch 2.13). They are small, and every process holds them whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy

import torch
import torch.distributed as dist
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate

from onestroke.train.ranks import num_ranks, rank

UNITS = (Transformer2DModel, ResnetBlock2D)  # gathered, used and let go one at a time
BUCKET_BYTES = 64 * 2**20  # gradients averaged in one operation


def shard(module: nn.Module, device: torch.device) -> None:
    """Split a network's weights over all processes, in place, on `device`; it may lie elsewhere, whole, before."""
    module.to(memory_format=torch.contiguous_format)  # FSDP2 takes no other
    mesh = init_device_mesh(device.type, (num_ranks(),))
    for part in [part for part in module.modules() if isinstance(part, UNITS)]:
        fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    if device.type == "cpu":  # gloo sums, and does not average
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.set_force_sum_reduction_for_comms(True)


def outline(module: nn.Module) -> nn.Module:
    """A copy without numbers: parameters and buffers on the meta device."""
    memo: dict[int, Tensor] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return deepcopy(module, memo)


@torch.no_grad()
def sharded_copy(module: nn.Module, blank: nn.Module) -> nn.Module:
    """A copy of a sharded network, sharded likewise; `blank` is its outline from before. No process holds it whole."""
    device = local(next(module.parameters())).device
    copy = deepcopy(blank)
    shard(copy, device)
    copy.to_empty(device=device)
    for one, other in zip(copy.parameters(), module.parameters(), strict=True):
        local(one).copy_(local(other))
    for one, other in zip(copy.buffers(), module.buffers(), strict=True):
        one.copy_(other)
    return copy


@torch.no_grad()
def gathered(module: nn.Module, blank: nn.Module) -> nn.Module | None:
    """A sharded network whole, on the CPU of process 0; None in the others. Every process has to call this."""
    state = {}
    for name, value in module.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if rank() == 0:
            state[name] = whole.cpu()
    if rank() != 0:
        return None
    copy = deepcopy(blank)
    copy.load_state_dict(state, assign=True)
    return copy.train(module.training)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies in this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(whole: Tensor, placed: Tensor) -> Tensor:
    """A tensor that every process has whole, laid out as `placed` is."""
    if not isinstance(placed, DTensor):
        return whole
    replicated = DTensor.from_local(
        whole.to(placed.device), placed.device_mesh, [Replicate()] * placed.device_mesh.ndim, run_check=False
    )
    return replicated.redistribute(placements=placed.placements)


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace the gradients of what every process holds whole by their means over the processes.

    FSDP2 has averaged those of sharded parameters by the time that backward returns.
    """
    if num_ranks() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and (bucket[0].dtype != gradient.dtype or sum(g.nbytes for g in bucket) > BUCKET_BYTES):
            _average(bucket)
            bucket = []
        bucket.append(gradient)
    if bucket:
        _average(bucket)


def _average(gradients: list[Tensor]) -> None:
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= num_ranks()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))

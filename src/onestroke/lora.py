"""Low-rank adapters of a UNet (LoRA, arXiv 2106.09685): taken from two models, merged, written and read in two layouts.

An adapter maps names of a UNet's layers to factors whose product is added to the layer's weight. "diffusers" is the
layout of `pipeline.load_lora_weights`; "kohya" that of kohya's scripts, A1111 and ComfyUI, which names SDXL's layers
as LDM does and SD's as diffusers does. Both are written with alpha = rank: every scale is in the factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from onestroke.errors import ModelError
from onestroke.families.ldm_keys import unet_place
from onestroke.tensor_files import write_tensors

Layout = Literal["diffusers", "kohya"]
OVERSAMPLING, POWER_ITERATIONS = 16, 4  # of the randomised decomposition (arXiv 0909.4061, section 1.6)
_EXACT_UP_TO = 512  # shorter side of a matrix that is decomposed exactly


class Factors(NamedTuple):
    """`up @ down` is what a layer's weight gains; of a convolution, flattened to its output channels by all else."""

    up: Float[Tensor, "o r"]
    down: Float[Tensor, "r i"]


class Extraction(NamedTuple):
    """An adapter, the share of the layers' squared difference that it holds, and that of what no adapter can hold."""

    factors: dict[str, Factors]
    held: float  # in [0, 1], of the layers' squared difference
    outside: float  # in [0, 1], of all squared difference: in norms, biases and embeddings


def adaptable(unet: nn.Module) -> dict[str, nn.Module]:
    """The layers that have factors in both layouts: linear and convolutional ones inside the UNet's blocks."""
    inside = ("down_blocks.", "mid_block.", "up_blocks.")
    return {
        name: module
        for name, module in unet.named_modules()
        if name.startswith(inside) and isinstance(module, nn.Linear | nn.Conv2d)
    }


@torch.no_grad()
def extract_lora(student: nn.Module, teacher: nn.Module, *, rank: int) -> Extraction:
    """The best adapter of `rank` that leads from the teacher's UNet to the student's (Eckart-Young, layer by layer).

    Raises `ModelError` where the two are of other shapes.
    """
    ours, theirs = student.state_dict(), teacher.state_dict()
    wrong = next((k for k in ours if k not in theirs or theirs[k].shape != ours[k].shape), None)
    if wrong is not None or len(ours) != len(theirs):
        raise ModelError(
            f"student and teacher are of other architectures ({wrong or 'layers are missing'})",
            where="lora-extract",
            fix="Give a student of this teacher with all of its layers.",
        )
    total = sum(_difference(ours[name], theirs[name]).square().sum().item() for name in ours)
    factors, held, inside = {}, 0.0, 0.0
    for name in adaptable(student):
        delta = _difference(ours[f"{name}.weight"], theirs[f"{name}.weight"]).flatten(1)
        size = delta.square().sum().item()
        if size == 0:
            continue
        factors[name] = decomposed(delta, rank)
        inside += size
        held += size - (delta - factors[name].up @ factors[name].down).square().sum().item()
    return Extraction(factors, held / inside if inside else 1.0, (total - inside) / total if total else 0.0)


def decomposed(matrix: Float[Tensor, "o i"], rank: int) -> Factors:
    """The best factors of `rank`, or of the matrix's shorter side; of large matrices nearly the best."""
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= max(_EXACT_UP_TO, rank + OVERSAMPLING):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=rank + OVERSAMPLING, niter=POWER_ITERATIONS)
        vh = v.mH
    root = s[:rank].sqrt()
    return Factors(u[:, :rank] * root, root[:, None] * vh[:rank])


@torch.no_grad()
def merge_lora(unet: nn.Module, factors: Mapping[str, Factors]) -> None:
    """Add an adapter to the weights of `unet`, in place."""
    layers = adaptable(unet)
    for name, (up, down) in factors.items():
        if name not in layers:
            raise ModelError(f"the UNet has no layer {name}", fix="Merge an adapter into the model it was made for.")
        weight = layers[name].weight
        weight += (up.to(weight) @ down.to(weight)).view_as(weight)


def factors_of(parameters: Mapping[str, Tensor], scale: float) -> dict[str, Factors]:
    """peft's parameters ("layer.lora_A.default.weight") as factors, `scale` (alpha / rank) in `up`."""
    downs = {key.split(".lora_A.")[0]: value for key, value in parameters.items() if ".lora_A." in key}
    ups = {key.split(".lora_B.")[0]: value for key, value in parameters.items() if ".lora_B." in key}
    return {name: Factors(scale * ups[name].detach().flatten(1), downs[name].detach().flatten(1)) for name in downs}


def save_lora(
    factors: Mapping[str, Factors],
    path: Path,
    unet: UNet2DConditionModel,
    *,
    layout: Layout = "diffusers",
    is_sdxl: bool,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write an adapter of `unet` to a `.safetensors` file, whole or not at all. Raises `ResourceError`."""
    layers, tensors = adaptable(unet), {}
    for name, pair in factors.items():
        up, down = _as_layers(pair, layers[name])
        if layout == "diffusers":
            tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
        else:
            key = _kohya_key(name, unet, is_sdxl=is_sdxl)
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = torch.tensor(float(len(pair.down)))
    tensors = {key: tensor.to("cpu", dtype) for key, tensor in tensors.items()}
    write_tensors(path, tensors, {"format": "pt"}, what="the adapter")
    return path


def load_lora(path: Path, unet: UNet2DConditionModel, *, is_sdxl: bool) -> dict[str, Factors]:
    """An adapter of `unet` from a file in either layout. Raises `ModelError` for one that does not fit."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError("the adapter cannot be read", where=str(path), fix="Give a .safetensors file.") from error
    factors: dict[str, Factors] = {}
    for name in adaptable(unet):
        key = _kohya_key(name, unet, is_sdxl=is_sdxl)
        if f"unet.{name}.lora_A.weight" in tensors:
            down, up = (tensors.pop(f"unet.{name}.lora_{which}.weight").flatten(1) for which in "AB")
            factors[name] = Factors(up, down)
        elif f"{key}.lora_down.weight" in tensors:
            down, up = (tensors.pop(f"{key}.lora_{which}.weight").flatten(1) for which in ("down", "up"))
            scale = tensors.pop(f"{key}.alpha", torch.tensor(float(len(down)))).item() / len(down)
            factors[name] = Factors(scale * up, down)
    if tensors or not factors:
        surplus = next(iter(tensors), "it is empty")
        raise ModelError(f"this adapter does not fit the UNet ({surplus})", where=str(path), fix="Give its own model.")
    return factors


def _kohya_key(name: str, unet: UNet2DConditionModel, *, is_sdxl: bool) -> str:
    place = unet_place(f"{name}.weight", unet.config).key.removesuffix(".weight") if is_sdxl else name
    return f"lora_unet_{place.replace('.', '_')}"


def _as_layers(pair: Factors, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """`up` and `down` as the weights of two layers: of a convolution, one of its kernel, then one of 1 x 1."""
    if isinstance(layer, nn.Linear):
        return pair.up, pair.down
    assert isinstance(layer, nn.Conv2d)
    return pair.up[:, :, None, None], pair.down.view(-1, *layer.weight.shape[1:])


def _difference(one: Tensor, two: Tensor) -> Tensor:
    exact = torch.promote_types(one.dtype, torch.float32)
    return one.to(exact) - two.to(one.device, exact)


def num_parameters(factors: Iterable[Factors]) -> int:
    """Numbers in an adapter."""
    return sum(up.numel() + down.numel() for up, down in factors)

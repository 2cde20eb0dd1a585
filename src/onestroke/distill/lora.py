"""A student that is an adapter on its teacher (LoRA, arXiv 2106.09685), by peft; the teacher is kept once."""

from __future__ import annotations

from copy import deepcopy

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from onestroke.config import LoraRecipe
from onestroke.errors import RecipeError, ResourceError
from onestroke.lora import adaptable


class Adapter(nn.Module):
    """What is trained of a LoRA student: the parameters of its adapter, by their names in the UNet.

    They are the UNet's own, so that an optimizer's step is seen there. A copy of this module is an average's, or a
    checkpoint's, and as small as the adapter.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        parameters = {name: p for name, p in unet.named_parameters() if ".lora_" in name}
        self.weights = nn.ParameterDict({name.replace(".", "/"): p for name, p in parameters.items()})

    def named(self) -> dict[str, nn.Parameter]:
        """The parameters by their names in the UNet."""
        return {name.replace("/", "."): parameter for name, parameter in self.weights.items()}


def lora_student(unet: UNet2DConditionModel, recipe: LoraRecipe, *, seed: int) -> UNet2DConditionModel:
    """A copy of `unet` with a trainable adapter that begins at zero; all other weights are shared with `unet`.

    Raises `RecipeError` where `targets` name no layer, `ResourceError` where peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ResourceError(
            "LoRA students need peft", where="student.lora", fix="Install it: pip install 'onestroke[lora]'."
        ) from error
    unfit = [target for target in recipe.targets if not any(_is_target(n, target) for n in adaptable(unet))]
    if unfit:
        raise RecipeError(
            f"no layer inside the UNet's blocks is called {unfit[0]!r}",
            where="student.lora.targets",
            fix="Name ends of the UNet's layers, such as to_q, to_k, to_v, to_out.0, ff.net.2, conv1.",
        )
    student = _sharing(unet)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        targets = [name for name in adaptable(unet) if any(_is_target(name, target) for target in recipe.targets)]
        student.add_adapter(LoraConfig(r=recipe.rank, lora_alpha=recipe.scaling, target_modules=targets))
    for parameter in Adapter(student).parameters():
        parameter.data = parameter.data.to(torch.promote_types(unet.dtype, torch.float32))
    return student.train()


def trained_part(student: nn.Module) -> nn.Module:
    """What a player trains: the adapter of a LoRA student, else the whole student."""
    return Adapter(student) if getattr(student, "peft_config", None) else student


def drawing_unet(student: nn.Module, weights: nn.Module) -> nn.Module:
    """The UNet that draws with `weights`, a player's module or its average; of a LoRA student a copy that shares."""
    if not isinstance(weights, Adapter):
        return weights
    copy = _sharing(student, but=".lora_")
    with torch.no_grad():
        for name, parameter in Adapter(copy).named().items():
            parameter.copy_(weights.named()[name])
    return copy


def _sharing(module: nn.Module, *, but: str | None = None):
    """A deep copy whose parameters and buffers are the same ones, but those with `but` in their names."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return deepcopy(module, {id(tensor): tensor for name, tensor in tensors if but is None or but not in name})


def _is_target(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")

"""The student: the teacher's UNet, a smaller one with its matching blocks, or a student to continue."""

from __future__ import annotations

from copy import deepcopy

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from onestroke.config import StudentRecipe
from onestroke.distill.lora import lora_student
from onestroke.errors import ModelError
from onestroke.families.load import load_model
from onestroke.families.model import DiffusionModel
from onestroke.operations import checkpointed_block
from onestroke.schedule import student_timesteps


def build_student(teacher: DiffusionModel, recipe: StudentRecipe, *, seed: int) -> UNet2DConditionModel:
    """A trainable UNet in float32, initialised as the recipe says (ADD, table 1c: from the teacher).

    With `recipe.lora` only the adapter is trainable, and all else is shared with the teacher.
    """
    if recipe.lora is not None:
        unet = lora_student(teacher.unet, recipe.lora, seed=seed)
        if recipe.gradient_checkpointing:
            unet.enable_gradient_checkpointing(checkpointed_block)
        return unet
    if recipe.source is not None:
        unet = _continued(teacher, recipe)
    elif recipe.unet is None and recipe.init == "teacher":
        unet = deepcopy(teacher.unet)
    else:
        changes = recipe.unet.model_dump(exclude_none=True) if recipe.unet else {}
        unet = _built(teacher, changes, seed=seed)
        if recipe.init == "teacher":
            copy_matching(teacher.unet, unet)
    if recipe.gradient_checkpointing:
        unet.enable_gradient_checkpointing(checkpointed_block)
    return unet.float().requires_grad_(True).train()


def copy_matching(source: nn.Module, target: nn.Module) -> int:
    """Copy every tensor whose name and shape agree; returns how many."""
    available = source.state_dict()
    matching = {
        name: available[name]
        for name, value in target.state_dict().items()
        if name in available and available[name].shape == value.shape
    }
    target.load_state_dict(matching, strict=False)
    return len(matching)


def _continued(teacher: DiffusionModel, recipe: StudentRecipe) -> UNet2DConditionModel:
    source = str(recipe.source)
    student = load_model(source)
    if student.prediction_type != (recipe.prediction_type or teacher.prediction_type):
        raise ModelError(
            f"this student predicts {student.prediction_type}",
            where=source,
            fix=f"Set student.prediction_type to {student.prediction_type}.",
        )
    if student.unet.config.cross_attention_dim != teacher.unet.config.cross_attention_dim:
        raise ModelError(
            "this student reads other text embeddings than the teacher",
            where=source,
            fix="Continue a student of the same teacher.",
        )
    return student.unet


def _built(teacher: DiffusionModel, changes: dict, *, seed: int) -> UNet2DConditionModel:
    """A UNet of the teacher's config with `changes`, with random weights."""
    state = torch.get_rng_state()  # diffusers initialises from the global generator
    try:
        torch.manual_seed(seed)
        config = {key: value for key, value in teacher.unet.config.items() if not key.startswith("_")}
        return UNet2DConditionModel.from_config(config | changes)
    except (ValueError, IndexError, TypeError) as error:
        raise ModelError(
            f"no UNet can be built like this ({error})",
            where="student.unet",
            fix="Give one entry per block, as in the teacher's unet/config.json.",
        ) from error
    finally:
        torch.set_rng_state(state)


def choose_timesteps(fractions: Tensor, recipe: StudentRecipe, *, num_train_timesteps: int) -> Tensor:
    """One of the student's timesteps for each number in [0, 1); b, int64 (ADD, section 3.1; uniform by default)."""
    steps = torch.tensor(student_timesteps(recipe.num_timesteps, num_train_timesteps=num_train_timesteps))
    weights = torch.tensor(recipe.timestep_weights or (1.0,) * len(steps), dtype=torch.float64)
    edges = weights.cumsum(0) / weights.sum()
    return steps[torch.bucketize(fractions, edges, right=True).clamp(max=len(steps) - 1)]

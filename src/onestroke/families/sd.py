"""Stable Diffusion 1.x and 2.x: one text encoder, no micro-conditioning."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from onestroke.families.model import DiffusionModel
from onestroke.families.tokens import token_ids
from onestroke.types import Condition

name = "sd"


def encode_prompts(model: DiffusionModel, prompts: Sequence[str]) -> Condition:
    """The encoder's last hidden states (SD 2.x ships its encoder one layer short, so the last is OpenCLIP's last but
    one)."""
    encoder = model.text_encoders[0]
    output = encoder(token_ids(model.tokenizers[0], prompts).to(encoder.device))
    return Condition(output[0])


def blank_prompts(model: DiffusionModel, like: Condition) -> Condition:
    return Condition(encode_prompts(model, [""]).text.expand(len(like.text), -1, -1).to(like.text))


def with_sizes(condition: Condition, sizes: Tensor, target: tuple[int, int]) -> Condition:
    return condition


def call_unet(unet: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    return unet(x_t, t, encoder_hidden_states=condition.text, return_dict=False)[0]

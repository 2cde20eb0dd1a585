"""SDXL: two text encoders, a pooled embedding, and the picture's size and crop as time ids (arXiv 2307.01952, 2.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from onestroke.families.model import DiffusionModel
from onestroke.families.text_layers import last_but_one
from onestroke.families.tokens import token_ids
from onestroke.types import Condition

name = "sdxl"


def encode_prompts(model: DiffusionModel, prompts: Sequence[str]) -> Condition:
    """The encoders' last but one hidden states side by side, and the second's projected embedding."""
    *others, last = zip(model.tokenizers, model.text_encoders, strict=True)
    hidden = [last_but_one(encoder, token_ids(tokenizer, prompts).to(encoder.device)) for tokenizer, encoder in others]
    tokenizer, encoder = last
    output = encoder(token_ids(tokenizer, prompts).to(encoder.device), output_hidden_states=True)
    return Condition(torch.cat([*hidden, output.hidden_states[-2]], dim=-1), output.text_embeds)


def blank_prompts(model: DiffusionModel, like: Condition) -> Condition:
    """Zeros, or the embedding of "" where the pipeline says so; the time ids are those of the prompt."""
    if model.zero_blank_prompt:
        return Condition(torch.zeros_like(like.text), torch.zeros_like(like.pooled), like.time_ids)
    empty = encode_prompts(model, [""])
    rows = len(like.text)
    return Condition(
        empty.text.expand(rows, -1, -1).to(like.text), empty.pooled.expand(rows, -1).to(like.text), like.time_ids
    )


def with_sizes(condition: Condition, sizes: Tensor, target: tuple[int, int]) -> Condition:
    goal = torch.tensor([target]).expand(len(sizes), 2).to(sizes)
    dtype = torch.promote_types(condition.text.dtype, torch.float32)  # bfloat16 has no 1001
    ids = torch.cat([sizes, goal], dim=1).to(condition.text.device, dtype)  # b 6
    return Condition(condition.text, condition.pooled, ids)


def call_unet(unet: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    added = {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
    return unet(x_t, t, encoder_hidden_states=condition.text, added_cond_kwargs=added, return_dict=False)[0]

"""Prompts to token ids, as diffusers' pipelines do it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def token_ids(tokenizer, prompts: Sequence[str]) -> Tensor:
    """b n token ids, padded and cut to the tokenizer's length."""
    return tokenizer(
        list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids

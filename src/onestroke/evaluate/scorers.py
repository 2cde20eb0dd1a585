"""How well a picture fits its prompt, by models of people's captions and choices: CLIP, PickScore, HPSv2.1.

All three are CLIP models in transformers' layout; nothing is downloaded. Each scores a picture against its own prompt
and against another one of the same run: the difference is what the model heeds of the prompt, 0 where it heeds none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from onestroke.errors import ModelError
from onestroke.evaluate.features import CLIP_MEAN, CLIP_STD, Kind, local_folder, normalised
from onestroke.evaluate.observer import Observe, Pictures
from onestroke.families.fingerprint import fingerprint
from onestroke.families.tokens import token_ids

BATCH = 32
VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # whose tokenizer PickScore takes
OTHER = " of another prompt"  # ends the name of the part that scores another prompt


def _clip_scorer(
    source: str | None, device: torch.device, *, name: str, tokenizer_source: str | None = None, is_scaled: bool = False
) -> tuple[str, Mapping[str, int], Observe]:
    """Cosine of picture and prompt, times the model's own scale where `is_scaled` (PickScore's published score).

    Pictures are scaled so that the shorter side fits and cut at the centre, as CLIP's own processor does it.
    """
    if source is None:
        raise ModelError("its weights are not on this machine")
    model = CLIPModel.from_pretrained(source, local_files_only=True).requires_grad_(False).eval().to(device)
    tokenizer = _tokenizer(source, tokenizer_source, model.config.text_config.max_position_embeddings)
    side, scale = model.config.vision_config.image_size, float(model.logit_scale.exp()) if is_scaled else 1.0

    @torch.inference_mode()
    def observe(pictures: Pictures, prompts: Sequence[str]) -> Float[np.ndarray, "n 2"]:
        pairs = zip(pictures_of(pictures), prompts_of(prompts), strict=True)
        images, texts = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        own = (images * texts).sum(dim=1)
        other = (images * texts.roll(len(texts) // 2, dims=0)).sum(dim=1)
        return (scale * torch.stack([own, other], dim=1)).float().cpu().numpy()

    def pictures_of(pictures: Pictures):
        for first in range(0, len(pictures), BATCH):
            pixels = normalised(cut_to(pictures[first : first + BATCH], side, device), CLIP_MEAN, CLIP_STD)
            pooled = model.vision_model(pixel_values=pixels).pooler_output
            yield F.normalize(model.visual_projection(pooled), dim=1)

    def prompts_of(prompts: Sequence[str]):
        for first in range(0, len(prompts), BATCH):
            ids = token_ids(tokenizer, prompts[first : first + BATCH]).to(device)
            yield F.normalize(model.text_projection(model.text_model(input_ids=ids).pooler_output), dim=1)

    return fingerprint(model), {name: 1, name + OTHER: 1}, observe


def _tokenizer(source: str | None, tokenizer_source: str | None, length: int):
    """The tokenizer of the model's folder, or where that has none the one it was trained with."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if tokenizer_source is None:
            raise ModelError("the folder has no tokenizer", where=str(source), fix="Put CLIP's into it.") from error
        tokenizer = AutoTokenizer.from_pretrained(local_folder(tokenizer_source), local_files_only=True)
    tokenizer.model_max_length = min(tokenizer.model_max_length, length)  # some tokenizer files leave the length out
    return tokenizer


def cut_to(pictures: Pictures, side: int, device: torch.device) -> Float[Tensor, "b 3 side side"]:
    """The shorter side scaled to `side` pixels, bicubic and antialiased, and the centre cut out; in [0, 1]."""
    images = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).to(device).float() / 255
    height, width = images.shape[-2:]
    scale = side / min(height, width)
    size = [max(side, int(height * scale)), max(side, int(width * scale))]
    if size != [height, width]:
        images = F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = ((have - side) // 2 for have in size)
    return images[:, :, top : top + side, left : left + side]


SCORERS: Mapping[str, Kind] = {
    "clip-score": Kind(
        "laion/CLIP-ViT-g-14-laion2B-s12B-b42K", partial(_clip_scorer, name="clip-score"), title="CLIP ViT-g-14",
    ),
    "pickscore": Kind(
        "yuvalkirstain/PickScore_v1",
        partial(_clip_scorer, name="pickscore", tokenizer_source=VIT_H, is_scaled=True),
        title="PickScore v1",
    ),
    "hpsv2": Kind(
        "convert HPS_v2.1_compressed.pt (OpenCLIP ViT-H-14) to a transformers CLIPModel folder",
        partial(_clip_scorer, name="hpsv2"), on_hub=False, title="HPSv2.1",
    ),
}  # fmt: skip

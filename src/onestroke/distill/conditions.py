"""What the discriminator is conditioned on: an embedding of the caption and one of the student's input picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModelWithProjection

from onestroke.config import DiscriminatorRecipe
from onestroke.distill.features import FeatureNetwork, load_features
from onestroke.errors import ModelError
from onestroke.families.model import DiffusionModel
from onestroke.families.tokens import token_ids
from onestroke.types import Condition


class TextEmbedder(nn.Module):
    """Captions to one vector each: a CLIP text model's projection, or the teacher's own pooled embedding."""

    def __init__(self, teacher: DiffusionModel, source: str) -> None:
        super().__init__()
        self.encoder, self.tokenizer = (None, None) if source == "teacher" else _load_clip(source)
        if self.encoder is not None:
            self.dim = self.encoder.config.projection_dim
        else:
            encoder = teacher.text_encoders[-1].config
            self.dim = encoder.projection_dim if teacher.family.name == "sdxl" else encoder.hidden_size

    @torch.no_grad()
    def forward(self, captions: Sequence[str], condition: Condition) -> Float[Tensor, "b d"]:
        """`condition` is the teacher's: its pooled embedding, or (SD has none) its hidden states' mean over tokens."""
        if self.encoder is not None:
            ids = token_ids(self.tokenizer, captions).to(condition.text.device)
            return self.encoder(ids).text_embeds
        return condition.text.mean(dim=1) if condition.pooled is None else condition.pooled


class ImageEmbedder(nn.Module):
    """Pictures to one vector each, by the discriminator's own feature network or by a DINOv2 of its own.

    `is_shared`: it is the discriminator's own, whose `forward_and_embed` gives features and embedding in one pass.
    """

    def __init__(self, features: FeatureNetwork, recipe: DiscriminatorRecipe) -> None:
        super().__init__()
        own = recipe.image_encoder != "features"
        self.network = load_features(recipe.image_encoder, source=recipe.image_encoder_source) if own else features
        self.is_shared, self.dim = not own, self.network.embed_dim

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        return self.network.embed(images)


def _load_clip(source: str):
    try:
        encoder = CLIPTextModelWithProjection.from_pretrained(source, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # transformers, safetensors and the hub each raise their own kinds
        raise ModelError(
            f"the CLIP text model cannot be loaded ({type(error).__name__})",
            where=source,
            fix='Download it first, or set discriminator.text_encoder to "teacher".',
        ) from error
    if tokenizer.model_max_length > 512:  # some tokenizer files leave the length out
        tokenizer.model_max_length = encoder.config.max_position_embeddings
    return encoder.requires_grad_(False).eval(), tokenizer

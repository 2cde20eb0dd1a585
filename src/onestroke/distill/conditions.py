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
            return self.encode(captions)
        return condition.text.mean(dim=1) if condition.pooled is None else condition.pooled

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Float[Tensor, "b d"]:
        """The CLIP text model's projection, where there is such a model."""
        assert self.encoder is not None
        return self.encoder(token_ids(self.tokenizer, captions).to(self.encoder.device)).text_embeds


class ImageEmbedder(nn.Module):
    """Pictures to one vector each, by the discriminator's own feature network or by another DINOv2.

    `is_shared`: it is the discriminator's own, whose `forward_and_embed` gives features and embedding in one pass; a
    network that the recipe names twice is loaded once.
    """

    def __init__(self, features: FeatureNetwork, recipe: DiscriminatorRecipe) -> None:
        super().__init__()
        self.is_shared = is_shared(recipe)
        self.network = features
        if not self.is_shared:
            self.network = load_features(recipe.image_encoder, source=recipe.image_encoder_source)
        self.dim = self.network.embed_dim

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        return self.network.embed(images)


def is_shared(recipe: DiscriminatorRecipe) -> bool:
    """Whether the feature network embeds the pictures too."""
    named = (recipe.image_encoder, recipe.image_encoder_source)
    return recipe.image_encoder == "features" or named == (recipe.features, recipe.features_source)


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

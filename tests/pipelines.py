"""Tiny random pipelines of the real diffusers classes: the same weights at every call, built in a moment."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from onestroke.families.clip_vocabulary import END, START, byte_symbols
from onestroke.types import PredictionType

SEED = 20
WIDTH = 32  # of the text encoders
VOCABULARY = {token: i for i, token in enumerate([*byte_symbols(), *(f"{s}</w>" for s in byte_symbols()), START, END])}


def tiny_tokenizer() -> CLIPTokenizer:
    """One token a letter (lower-cased), 77 in all; a letter that ends a word is a token of its own."""
    return CLIPTokenizer(vocab=VOCABULARY, merges=[], pad_token=END, model_max_length=77)


def tiny_scheduler(prediction_type: PredictionType, zero_snr: bool) -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing" if zero_snr else "leading",
        steps_offset=1,
    )


def tiny_vae(scaling_factor: float) -> AutoencoderKL:
    """64 px pictures to 16 x 16 x 4 latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=scaling_factor,
    )


def tiny_text_config(hidden_act: str, *, width: int = WIDTH) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=24,
        hidden_act=hidden_act,
        bos_token_id=VOCABULARY[START],
        eos_token_id=VOCABULARY[END],
        pad_token_id=VOCABULARY[END],
    )


def tiny_sdxl(
    prediction_type: PredictionType = "epsilon", zero_snr: bool = False, *, second_width: int = WIDTH
) -> StableDiffusionXLPipeline:
    """SDXL in miniature for 64 px: two text encoders, a pooled embedding of 24, time ids."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        unet = UNet2DConditionModel(
            sample_size=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=2,
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4),
            norm_num_groups=8,
            cross_attention_dim=WIDTH + second_width,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
        )
        return StableDiffusionXLPipeline(
            vae=tiny_vae(0.13025),
            text_encoder=CLIPTextModel(tiny_text_config("quick_gelu")).eval(),
            text_encoder_2=CLIPTextModelWithProjection(tiny_text_config("gelu", width=second_width)).eval(),
            tokenizer=tiny_tokenizer(),
            tokenizer_2=tiny_tokenizer(),
            unet=unet.eval(),
            scheduler=tiny_scheduler(prediction_type, zero_snr),
            add_watermarker=False,
        )


def tiny_sd(
    prediction_type: PredictionType = "epsilon", zero_snr: bool = False, *, open_clip: bool = False
) -> StableDiffusionPipeline:
    """SD 1.x in miniature for 64 px, or SD 2.x (OpenCLIP's GELU, linear projections) with `open_clip`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        unet = UNet2DConditionModel(
            sample_size=16,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            attention_head_dim=4,
            norm_num_groups=8,
            cross_attention_dim=WIDTH,
            use_linear_projection=open_clip,
        )
        encoder = CLIPTextModel(tiny_text_config("gelu" if open_clip else "quick_gelu"))
        return StableDiffusionPipeline(
            vae=tiny_vae(0.18215),
            text_encoder=encoder.eval(),
            tokenizer=tiny_tokenizer(),
            unet=unet.eval(),
            scheduler=tiny_scheduler(prediction_type, zero_snr),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

"""The embedded model's untrained parts: an SDXL pipeline in miniature for 128 px comic pictures."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

MAX_TOKENS = 64  # the longest of 5,000 captions has 53; CLIP's 77 would cost more in each forward pass
WIDTHS, NUM_LAYERS = (96, 128), (3, 2)  # of the two text encoders
PROJECTION = 128
TIME_ID_WIDTH = 32
# A zero-terminal-SNR v-prediction model is what most anime finetunes are, and its last timestep, where the student
# draws from pure noise, does not multiply the network's error (epsilon-prediction: 14.6 times).
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
# Of an ODE's steps each inherits what went wrong before it; fresh noise makes a stochastic solver's mend it.
SAMPLER = {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "zero"}


def train_tokenizer(captions: Iterable[str], *, vocab_size: int = 640) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges come from `captions`; any other text falls back to its bytes."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    learner = Tokenizer(BPE(end_of_word_suffix="</w>", unk_token=end))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True)
    learner.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        captions, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, end_of_word_suffix="</w>")
    )
    merges = _merges(learner)
    symbols = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet), *("".join(pair) for pair in merges), start, end]
    vocab = {symbol: i for i, symbol in enumerate(dict.fromkeys(symbols))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def _merges(learner: Tokenizer) -> list[tuple[str, str]]:
    import json

    return [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]


def _text_config(which: int, tokenizer: CLIPTokenizer, *, activation: str) -> CLIPTextConfig:
    width = WIDTHS[which]
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=PROJECTION,
        num_hidden_layers=NUM_LAYERS[which],
        num_attention_heads=width // 32,
        max_position_embeddings=MAX_TOKENS,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_unet(latent_channels: int) -> UNet2DConditionModel:
    """An untrained UNet of 8.2 million parameters: two levels, text attention at 8 x 8."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(128, 160),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(4, 5),  # diffusers' name for the number of heads
        cross_attention_dim=sum(WIDTHS),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=PROJECTION + 6 * TIME_ID_WIDTH,
    )


def build_pipeline(vae: AutoencoderKL, captions: Iterable[str], *, seed: int = 0) -> StableDiffusionXLPipeline:
    """The untrained teacher around a trained VAE; `captions` make the tokenizer."""
    tokenizer = train_tokenizer(captions)
    torch.manual_seed(seed)
    first = CLIPTextModel(_text_config(0, tokenizer, activation="quick_gelu"))
    second = CLIPTextModelWithProjection(_text_config(1, tokenizer, activation="gelu"))
    unet = build_unet(vae.config.latent_channels)
    return StableDiffusionXLPipeline(
        vae,
        first,
        second,
        tokenizer,
        tokenizer,
        unet,
        DPMSolverMultistepScheduler(**SCHEDULER, **SAMPLER),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )

"""A diffusers pipeline without the work that is not drawing: for a small model on a CPU that is a fifth of a picture.

The same arithmetic, but that a CPU's decoder rounds some sums once that were rounded twice; on a CPU in bfloat16 and
channels_last where those are faster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion_xl import StableDiffusionXLPipelineOutput
from torch import Tensor

from onestroke.families.text_layers import last_but_one
from onestroke.lean_decoder import make_lean
from onestroke.precision import fast_dtype
from onestroke.upsampling import merge_upsampling

PLAIN = frozenset({"device", "num_images_per_prompt", "do_classifier_free_guidance"})


def make_fast(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline in its device's fast dtype and channels_last, quiet; changes it in place.

    On a CPU the VAE's upsampling is merged (upsampling.py), which halves its time there, and its decoder made lean
    (lean_decoder.py); not the UNet, whose convolutions a LoRA may change.
    """
    is_cpu = pipeline.device.type == "cpu"
    if is_cpu:
        merge_upsampling(pipeline.vae)
    pipeline.to(fast_dtype(pipeline.device))
    for name in ("unet", "vae"):
        getattr(pipeline, name).to(memory_format=torch.channels_last)
    if is_cpu:
        make_lean(pipeline.vae.decoder)
    pipeline.set_progress_bar_config(disable=True)
    _settle(pipeline)
    return pipeline


def _settle(pipeline: DiffusionPipeline) -> None:
    """Let a pipeline that is not offloaded take device and dtype from its first weights; changes it in place.

    diffusers looks through all modules for offloading hooks whenever it asks for either, a dozen times a picture: a
    tenth of the embedded student's time.
    """
    for module in (pipeline.unet, pipeline.vae):
        module.__class__ = _settled(
            type(module),
            device=property(lambda self: next(self.parameters()).device),
            dtype=property(lambda self: next(self.parameters()).dtype),
        )
    members = {"_execution_device": property(lambda self: self.unet.device)}
    if isinstance(pipeline, StableDiffusionXLPipeline):
        members["encode_prompt"] = _reading_once(type(pipeline).encode_prompt)
        members["__call__"] = _decoding_at_once(type(pipeline).__call__)
    pipeline.__class__ = _settled(type(pipeline), **members)


def _settled(cls: type, **members: Any) -> type:
    """A subclass of `cls` that is saved, and told apart, as `cls` is."""
    if "_is_settled" in vars(cls):
        return cls
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "_is_settled": True}
    return type(cls.__name__, (cls,), names | members)


def _decoding_at_once(call: Callable) -> Callable:
    """SDXL's call, whose latents are decoded without a search of the VAE for offloading hooks.

    Where more than that would be done, offloaded, with a watermark, in float16 or with means of latents, diffusers
    decodes.
    """

    @wraps(call)
    @torch.no_grad()
    def draw(self, *prompts, output_type="pil", return_dict=True, **settings):
        if output_type == "latent" or len(prompts) > 1 or not _decodes_plainly(self):
            return call(self, *prompts, output_type=output_type, return_dict=return_dict, **settings)
        latents = call(self, *prompts, output_type="latent", return_dict=False, **settings)[0]
        decoded = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        images = self.image_processor.postprocess(decoded, output_type=output_type)
        return StableDiffusionXLPipelineOutput(images=images) if return_dict else (images,)

    return draw


def _decodes_plainly(pipeline: StableDiffusionXLPipeline) -> bool:
    vae, unet = pipeline.vae, pipeline.unet
    has_means = getattr(vae.config, "latents_mean", None) is not None
    if has_means or pipeline.watermark is not None or getattr(pipeline, "_all_hooks", None):
        return False
    return vae.dtype == unet.dtype != torch.float16 and vae.device == unet.device


def _reading_once(encode_prompt: Callable) -> Callable:
    """SDXL's `encode_prompt`, which splits plain prompts into tokens once, where diffusers does so three times.

    Of the first encoder nothing is computed beyond the layer that SDXL reads, the last but one.
    What is not plain is left to diffusers: negative prompts, embeddings, LoRA scales, words of several embeddings, and
    prompts that are too long, of which it warns.
    """

    @wraps(encode_prompt)
    def encode(self, prompt=None, *others, **settings):
        ids = _plain_ids(self, prompt) if not others and _is_plain(self, settings) else None
        if ids is None:
            return encode_prompt(self, prompt, *others, **settings)
        first = last_but_one(self.text_encoder, ids[0].to(self.text_encoder.device))
        second = self.text_encoder_2(ids[1].to(self.text_encoder_2.device), output_hidden_states=True)
        words = torch.cat([first, second.hidden_states[-2]], dim=-1)
        words = words.to(device=settings["device"], dtype=self.text_encoder_2.dtype)
        pooled = second.text_embeds
        if not settings["do_classifier_free_guidance"]:
            return words, None, pooled, None
        return words, torch.zeros_like(words), pooled, torch.zeros_like(pooled)

    return encode


def _is_plain(pipeline: StableDiffusionXLPipeline, settings: Mapping) -> bool:
    """Whether nothing is asked of the encoders but to read the prompts."""
    blank = not settings.get("do_classifier_free_guidance", True) or pipeline.config.force_zeros_for_empty_prompt
    others = (value for name, value in settings.items() if name not in PLAIN)
    one_each = settings.get("num_images_per_prompt") == 1 and pipeline.text_encoder is not None
    return blank and one_each and settings.keys() >= PLAIN and all(value is None for value in others)


def _plain_ids(pipeline: StableDiffusionXLPipeline, prompts: object) -> list[Tensor] | None:
    """b n token ids of either encoder, padded; None where a prompt is too long or a word has several embeddings."""
    if not isinstance(prompts, list):
        return None
    found = []
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        added = tokenizer.added_tokens_encoder
        if any(f"{token}_1" in added for token in added):
            return None
        rows = tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, verbose=False).input_ids
        if any(len(row) > tokenizer.model_max_length for row in rows):
            return None
        found.append(torch.tensor(rows))
    return found

"""Draw pictures with a diffusers pipeline: the exported student's few steps, or the guided teacher's many."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, EulerAncestralDiscreteScheduler
from jaxtyping import Float, UInt8
from torch import Tensor

from onestroke.divided import draw_divided, num_parts, wait_for_all
from onestroke.errors import ModelError
from onestroke.schedule import beta_settings
from onestroke.types import PredictionType


def student_scheduler(
    teacher_config: Mapping, *, prediction_type: PredictionType | None = None
) -> EulerAncestralDiscreteScheduler | DDPMScheduler:
    """The exported sampler, by SDXL-Turbo's conventions: Euler ancestral, trailing timesteps, the teacher's betas.

    `prediction_type`: the student's, if not the teacher's.
    diffusers' Euler ancestral sampler cannot read "sample"; DDPM on the same timesteps is the same sampler (the
    posterior's variance in both), but that its first input is eps where ours is sigma_T eps (0.9977 for SDXL).
    """
    config = beta_settings(teacher_config)
    kind = prediction_type or teacher_config.get("prediction_type", "epsilon")
    if kind == "sample":
        return DDPMScheduler(**config, prediction_type=kind, timestep_spacing="trailing", clip_sample=False)
    return EulerAncestralDiscreteScheduler(**config, prediction_type=kind, timestep_spacing="trailing")


def draw(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    size: tuple[int, int] | None = None,
    batch_size: int = 32,
) -> UInt8[np.ndarray, "n h w 3"]:
    """One picture per prompt and seed; the same whatever the batch, up to the arithmetic's rounding.

    `guidance` 0 or 1 asks the UNet once a step, more asks it twice. `size`: height, width in pixels. On a CPU a batch
    is divided between threads (divided.py). Raises ModelError where the model's pictures are not finite (float16 VAEs
    overflow), rather than hand out black ones.
    """
    batches = (slice(first, first + batch_size) for first in range(0, len(prompts), batch_size))
    settings = {"steps": steps, "guidance": guidance, "size": size}
    return np.concatenate([begin_drawing(pipeline, prompts[b], seeds=seeds[b], **settings)() for b in batches])


@torch.inference_mode()
def begin_drawing(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    size: tuple[int, int] | None = None,
) -> Callable[[], UInt8[np.ndarray, "n h w 3"]]:
    """Begin to draw one batch as `draw` does; what it returns waits for the pictures.

    Where `num_parts` is more than 1 the batch is other threads' work, and further ones may begin meanwhile; else it is
    drawn when this returns.
    """
    settings = {
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "output_type": "pt",
    } | ({} if size is None else {"height": size[0], "width": size[1]})
    if (count := num_parts(pipeline, len(prompts))) > 1:
        waiting = draw_divided(pipeline, prompts, count, as_bytes, **settings)
        return lambda: np.concatenate([part.result() for part in wait_for_all(waiting)])
    pictures = as_bytes(pipeline(prompt=list(prompts), **settings).images)
    return lambda: pictures


def as_bytes(images: Float[Tensor, "n 3 h w"]) -> UInt8[np.ndarray, "n h w 3"]:
    """Pictures in [0, 1], a pipeline's `output_type="pt"`, as bytes, made where the images are.

    Raises ModelError where they are not finite.
    """
    if not images.sum(dtype=torch.float32).isfinite():  # four times as fast as a look at each
        raise ModelError(
            "the model drew pictures that are not finite", fix="Load it in float32 or bfloat16, or mend its VAE."
        )
    return images.float().mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

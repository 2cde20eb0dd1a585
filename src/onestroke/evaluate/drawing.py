"""Pipelines as contenders of `latency`: drawn end to end, the time of text encoders, UNet and VAE taken apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline

from onestroke.evaluate.latency import Contender, PartTimer
from onestroke.sample import draw

PROMPTS = ("a laughing person with pink hair and round glasses",)  # any do: prompts are padded to one length
STUDENT_STEPS = (1, 2, 4)


def part_timer(pipeline: DiffusionPipeline) -> PartTimer:
    """A timer that waits for the pipeline's device before it looks at the clock."""
    return PartTimer(torch.cuda.synchronize) if pipeline.device.type == "cuda" else PartTimer()


def time_parts(timer: PartTimer, *pipelines: DiffusionPipeline) -> None:
    """From now on report the parts of each pipeline's drawing to `timer`; what pipelines share is wrapped once.

    Changes the pipelines in place: time them with this timer alone, after all else that is drawn with them.
    """
    for pipeline in pipelines:
        pipeline.encode_prompt = timer.timed("text", pipeline.encode_prompt)
    for unet in {id(pipeline.unet): pipeline.unet for pipeline in pipelines}.values():
        unet.forward = timer.timed("unet", unet.forward)
    for vae in {id(pipeline.vae): pipeline.vae for pipeline in pipelines}.values():
        vae.decode = timer.timed("vae", vae.decode)


def contender(
    pipeline: DiffusionPipeline, label: str, *, steps: int, guidance: float = 0.0, prompts: Sequence[str] = PROMPTS
) -> Contender:
    """Drawing with `pipeline`, words to uint8 pictures; `prompts` are repeated to fill a batch."""

    def draw_batch(batch_size: int) -> None:
        filled = [prompts[i % len(prompts)] for i in range(batch_size)]
        draw(pipeline, filled, seeds=range(batch_size), steps=steps, guidance=guidance, batch_size=batch_size)

    return Contender(label, draw_batch, steps, guidance)


def contenders(
    student: DiffusionPipeline,
    teacher: DiffusionPipeline,
    timer: PartTimer,
    *,
    guidance: float,
    teacher_steps: int = 50,
    student_steps: Sequence[int] = STUDENT_STEPS,
    prompts: Sequence[str] = PROMPTS,
) -> list[Contender]:
    """The guided teacher, which the others compare with, and the student at each step count. See `time_parts`."""
    time_parts(timer, *{id(pipeline): pipeline for pipeline in (student, teacher)}.values())
    first = contender(
        teacher, f"teacher, {_steps(teacher_steps)}", steps=teacher_steps, guidance=guidance, prompts=prompts
    )
    return [first, *(contender(student, f"student, {_steps(n)}", steps=n, prompts=prompts) for n in student_steps)]


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"

"""One-step drawing at a model's true architecture, by part, beside its guided many-step teacher; random weights.

    python benchmarks/inference.py                              # SDXL at 512 and 1024 px, on the best device there is
    python benchmarks/inference.py --architecture FOLDER --sizes 64 --skip compiled     # any other, on a CPU

The student draws eager, with compiled blocks, with a tiny autoencoder (TAESD's shape), and with both; the teacher in 25
and 50 guided steps. Contenders draw in turn; medians over rounds, and each round's own ratio to the 50 steps.
"""

from __future__ import annotations

import argparse
import json
from copy import deepcopy

import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from rich.console import Console

from onestroke.commands.bench import latency_table
from onestroke.commands.machine import use_machine
from onestroke.commands.quiet import quiet_libraries
from onestroke.embedded import weights_folder
from onestroke.evaluate.drawing import PROMPTS, part_timer, time_parts
from onestroke.evaluate.latency import Contender, measure_latency
from onestroke.export import student_pipeline
from onestroke.fast import make_fast
from onestroke.plan.architecture import architecture_of
from onestroke.plan.untrained import tiny_autoencoder_for
from onestroke.sample import draw

GUIDANCE = 5.0


def pipelines_of(architecture: str, device: torch.device, *, skip: set[str]) -> dict[str, DiffusionPipeline]:
    """Teacher and student variants around one set of untrained weights; compiled ones have a copy of the UNet."""
    source = str(weights_folder() / "teacher") if architecture == "embedded" else architecture
    with torch.device(device):
        model = architecture_of(source).untrained()
        tiny = tiny_autoencoder_for(model)
    student = make_fast(student_pipeline(model, model.unet))
    tiny.to(student.dtype)
    found = {"eager": student}
    if "tiny" not in skip:
        found["tiny"] = _with(student, vae=tiny)
    if "compiled" not in skip:
        unet, vae = deepcopy(student.unet), deepcopy(student.vae)
        unet.compile_repeated_blocks(fullgraph=True)
        vae.decoder.compile()
        found["compiled"] = _with(student, unet=unet, vae=vae)
        if "tiny" not in skip:
            found["compiled, tiny"] = _with(student, unet=unet, vae=tiny)
    found["teacher"] = _with(student, scheduler=EulerDiscreteScheduler.from_config(model.scheduler_config))
    return found


def _with(pipeline: DiffusionPipeline, **parts) -> DiffusionPipeline:
    """The pipeline with other parts, the rest shared."""
    flags = ("force_zeros_for_empty_prompt", "requires_safety_checker")
    kept = {key: pipeline.config[key] for key in flags if key in pipeline.config}
    extra = {"add_watermarker": False} if "text_encoder_2" in pipeline.components else {}
    other = type(pipeline)(**{**pipeline.components, **parts, **kept, **extra})
    other.set_progress_bar_config(disable=True)
    return other


def contender(pipeline: DiffusionPipeline, label: str, *, steps: int, guidance: float, size: int) -> Contender:
    def draw_batch(batch_size: int) -> None:
        prompts = [PROMPTS[0]] * batch_size
        draw(pipeline, prompts, seeds=range(batch_size), steps=steps, guidance=guidance, size=(size, size))

    return Contender(label, draw_batch, steps, guidance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="sdxl", help="sdxl, sd15, sd2, embedded, or a diffusers folder")
    parser.add_argument("--sizes", default="512,1024", help="pixels a side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--teacher-steps", default="50,25")
    parser.add_argument("--skip", default="", help="of compiled, tiny")
    parser.add_argument("--out", help="write the figures as JSON")
    arguments = parser.parse_args()
    quiet_libraries()
    use_machine()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipelines = pipelines_of(arguments.architecture, device, skip=set(arguments.skip.split(",")))
    timer = part_timer(pipelines["eager"])
    time_parts(timer, *pipelines.values())
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    console, figures = Console(width=140), {"device": name, "architecture": arguments.architecture, "sizes": {}}
    for size in map(int, arguments.sizes.split(",")):
        ways = [
            contender(pipelines["teacher"], f"teacher, {n} steps", steps=int(n), guidance=GUIDANCE, size=size)
            for n in arguments.teacher_steps.split(",")
        ]
        ways += [
            contender(pipeline, f"student, 1 step, {label}", steps=1, guidance=0.0, size=size)
            for label, pipeline in pipelines.items()
            if label != "teacher"
        ]
        rows = measure_latency(ways, timer, num_runs=arguments.rounds, batch_sizes=(arguments.batch,), device=device)
        console.print(f"{arguments.architecture} at {size} px on {name}", style="bold", highlight=False)
        console.print(latency_table(rows))
        figures["sizes"][size] = [
            {"label": row.label, "seconds": row.total, "parts": dict(row.parts), "speedup": row.speedup} for row in rows
        ]
    if arguments.out:
        with open(arguments.out, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()

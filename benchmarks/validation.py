"""A quick look between two trainings, on validation pictures: distance, adherence, and what is drawn as named.

    python benchmarks/validation.py                                  # the teacher's guidance scales, 25 steps
    python benchmarks/validation.py --model runs/embedded/student --steps 1 2 4 --scales 0

Prints, for each sampler, number of steps and guidance scale, the Fréchet distance to real validation pictures and the
prompt adherence, both by the judge, the latter also by attribute. The scale that it finds best for the teacher belongs
into `onestroke.embedded.GUIDANCE`; held-out pictures play no part.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from onestroke.api import load
from onestroke.commands.machine import use_machine
from onestroke.commands.quiet import quiet_libraries
from onestroke.embedded import embedded_judge
from onestroke.embedded.held_out import JUDGE, comic_pictures, comic_prompts, judged, value_namer
from onestroke.evaluate.adherence import adherence
from onestroke.evaluate.distances import frechet_distance
from onestroke.evaluate.drawn import PictureCache
from onestroke.evaluate.pictures import DrawnSet, orders_of, ways_of
from onestroke.fast import make_fast

SAMPLERS = {
    "euler": (EulerDiscreteScheduler, {}),
    "ddim": (DDIMScheduler, {"timestep_spacing": "trailing"}),
    "dpm++": (DPMSolverMultistepScheduler, {"timestep_spacing": "trailing"}),
    "sde": (DPMSolverMultistepScheduler, {"timestep_spacing": "trailing", "algorithm_type": "sde-dpmsolver++"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded-teacher", help="a folder, or an embedded model's name")
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--steps", type=int, nargs="+", default=[25])
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 4.0])
    parser.add_argument("--samplers", nargs="+", default=["own"], choices=["own", *SAMPLERS])
    parser.add_argument("--cache", type=Path, default=Path("runs/validation"))
    options = parser.parse_args()
    quiet_libraries()
    use_machine()
    judge, pipeline = embedded_judge(), make_fast(load(options.model))
    own = pipeline.scheduler
    prompts = comic_prompts(options.num_images, split="validation")
    real = comic_pictures(options.num_images, odd=True, label="real", split="validation")
    reference = judged(judge, real, options.cache).parts[JUDGE]
    orders, name_values = orders_of(prompts.texts), value_namer(judge)
    for sampler, steps, scale in product(options.samplers, options.steps, options.scales):
        pipeline.scheduler = own
        if sampler != "own":
            kind, settings = SAMPLERS[sampler]
            pipeline.scheduler = kind.from_config(own.config, **settings)
        way = ways_of(pipeline, [steps], guidance=scale)[steps]
        drawn = DrawnSet("drawn", "model", way, orders, PictureCache(options.cache))
        seen = judged(judge, drawn, options.cache).parts[JUDGE]
        score = adherence(prompts.named, name_values(seen))
        print(
            f"{sampler:5} {steps:3} steps, guidance {scale:4.1f}  distance {frechet_distance(seen, reference):8.3f}  "
            f"adherence {score.value:.3f}",
            flush=True,
        )
        found = ((name, one.corrected) for name, one in score.attributes.items() if one.corrected is not None)
        print("      " + ", ".join(f"{name} {share:.2f}" for name, share in found), flush=True)


if __name__ == "__main__":
    main()

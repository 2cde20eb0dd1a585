"""Choose the embedded teacher's guidance scale and sampler on validation pictures.

    python benchmarks/teacher_guidance.py [--num-images 500] [--steps 25]

Prints, for each scale and sampler, the Fréchet distance to real validation pictures and the prompt adherence, both by
the judge. The scale that it finds best belongs into `onestroke.embedded.GUIDANCE`; held-out pictures play no part.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusers import DDIMScheduler, EulerDiscreteScheduler

from onestroke.api import load
from onestroke.embedded import embedded_judge
from onestroke.embedded.held_out import JUDGE, comic_pictures, comic_prompts, judged, value_namer
from onestroke.evaluate.adherence import adherence
from onestroke.evaluate.distances import frechet_distance
from onestroke.evaluate.drawn import PictureCache
from onestroke.evaluate.pictures import DrawnSet, orders_of, ways_of

SAMPLERS = {"euler": EulerDiscreteScheduler, "ddim": DDIMScheduler}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 4.0])
    parser.add_argument("--samplers", nargs="+", default=["euler"], choices=list(SAMPLERS))
    parser.add_argument("--cache", default="runs/teacher-guidance")
    options = parser.parse_args()
    judge, pipeline = embedded_judge(), load("embedded-teacher")
    prompts = comic_prompts(options.num_images, split="validation")
    real = comic_pictures(options.num_images, odd=True, label="real", split="validation")
    cache = Path(options.cache)
    reference = judged(judge, real, cache).parts[JUDGE]
    orders, name_values = orders_of(prompts.texts), value_namer(judge)
    for sampler in options.samplers:
        pipeline.scheduler = SAMPLERS[sampler].from_config(pipeline.scheduler.config)
        for scale in options.scales:
            way = ways_of(pipeline, [options.steps], guidance=scale)[options.steps]
            seen = judged(judge, DrawnSet("drawn", "teacher", way, orders, PictureCache(cache)), cache).parts[JUDGE]
            print(
                f"{sampler:6} guidance {scale:4.1f}  distance {frechet_distance(seen, reference):8.3f}  "
                f"adherence {adherence(prompts.named, name_values(seen)).value:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

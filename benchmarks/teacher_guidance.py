"""Choose the embedded teacher's guidance scale and sampler on validation pictures.

    python benchmarks/teacher_guidance.py [--num-images 500] [--steps 25]

Prints, for each scale and sampler, the Fréchet distance to real validation pictures and the prompt adherence, both by
the judge. The scale that it finds best belongs into `onestroke.embedded.GUIDANCE`; held-out pictures play no part.
"""

from __future__ import annotations

import argparse

from diffusers import DDIMScheduler, EulerDiscreteScheduler

from onestroke.api import load
from onestroke.embedded import embedded_judge
from onestroke.embedded.assess import judge_drawn, judge_real, prompts, way_of
from onestroke.evaluate.metrics import adherence, frechet_distance

SAMPLERS = {"euler": EulerDiscreteScheduler, "ddim": DDIMScheduler}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 4.0])
    parser.add_argument("--samplers", nargs="+", default=["euler"], choices=list(SAMPLERS))
    options = parser.parse_args()
    judge, pipeline = embedded_judge(), load("embedded-teacher")
    captions = prompts(options.num_images, split="validation")
    reference = judge_real(judge, options.num_images, odd=True, split="validation")
    named = [caption.named for caption in captions]
    for sampler in options.samplers:
        pipeline.scheduler = SAMPLERS[sampler].from_config(pipeline.scheduler.config)
        for scale in options.scales:
            way = way_of(pipeline, steps=options.steps, guidance=scale)
            drawn = judge_drawn(judge, way, [caption.text for caption in captions])
            distance = frechet_distance(drawn.features, reference.features)
            print(
                f"{sampler:6} guidance {scale:4.1f}  distance {distance:8.3f}  "
                f"adherence {adherence(named, drawn.values).value:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

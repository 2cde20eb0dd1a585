"""A quick look between two trainings, on validation pictures: distance, adherence, and what is drawn as named.

    python benchmarks/validation.py                                  # the teacher's guidance scales, 25 steps
    python benchmarks/validation.py --model runs/embedded/student --steps 1 2 4 --scales 0
    python benchmarks/validation.py --model embedded --steps 4 --scales 0 --sharpen 0 60     # is it soft lines?
    python benchmarks/validation.py --model embedded --steps 1 --scales 0 --gains 1 0.95     # are latents exaggerated?
    python benchmarks/validation.py --model embedded --steps 1 --scales 0 --text-gains 1 1.2 # are words left out?

Prints, for each sampler, number of steps and guidance scale, the Fréchet distance to real validation pictures and the
prompt adherence, both by the judge, the latter also by attribute. The scale that it finds best for the teacher belongs
into `onestroke.embedded.GUIDANCE`; held-out pictures play no part. `--sharpen PERCENT` puts an unsharp mask over what
is looked at, and over other real pictures and what the VAE leaves of them, whose distances it prints too: what a mask
mends in drawn pictures and in no others is the softness of their lines. `--gains` multiplies the latents that are
decoded: what `sharpen.gain` of a recipe should be; `--text-gains` what sets the text apart from an empty prompt's, as
`sharpen.text_gain` does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from PIL import Image, ImageFilter

from onestroke.api import load
from onestroke.commands.machine import use_machine
from onestroke.commands.quiet import quiet_libraries
from onestroke.embedded import embedded_judge
from onestroke.embedded.held_out import JUDGE, comic_pictures, comic_prompts, judged, value_namer
from onestroke.evaluate.adherence import adherence
from onestroke.evaluate.distances import frechet_distance
from onestroke.evaluate.drawn import PictureCache
from onestroke.evaluate.pictures import DrawnSet, Failed, PictureSet, ReconstructedSet, orders_of, ways_of
from onestroke.fast import make_fast

SAMPLERS = {
    "euler": (EulerDiscreteScheduler, {}),
    "ddim": (DDIMScheduler, {"timestep_spacing": "trailing"}),
    "dpm++": (DPMSolverMultistepScheduler, {"timestep_spacing": "trailing"}),
    "sde": (DPMSolverMultistepScheduler, {"timestep_spacing": "trailing", "algorithm_type": "sde-dpmsolver++"}),
}


class Sharpened:
    """A set's pictures under an unsharp mask."""

    def __init__(self, pictures: PictureSet, percent: int) -> None:
        self.pictures, self.percent = pictures, percent
        self.label, self.role = pictures.label, pictures.role

    def __len__(self) -> int:
        return len(self.pictures)

    def key(self, row: int) -> str:
        return f"{self.pictures.key(row)} sharpened {self.percent}"

    def prompt(self, row: int) -> str:
        return self.pictures.prompt(row)

    def read(self, rows: Sequence[int]) -> Iterator[tuple[int, np.ndarray | Failed]]:
        mask = ImageFilter.UnsharpMask(radius=1, percent=self.percent, threshold=0)
        for row, picture in self.pictures.read(rows):
            if not isinstance(picture, Failed):
                picture = np.asarray(Image.fromarray(picture).filter(mask))
            yield row, picture


def reading_more(encode_prompt: Callable, gain: float) -> Callable:
    """An SDXL pipeline's `encode_prompt`, its embeddings `gain` times as far from those of an empty prompt."""

    def encode(*, prompt: list[str], **settings):
        words, no_words, pooled, none_pooled = encode_prompt(prompt=prompt, **settings)
        empty, _, empty_pooled, _ = encode_prompt(prompt=[""], **settings)
        return torch.lerp(empty, words, gain), no_words, torch.lerp(empty_pooled, pooled, gain), none_pooled

    return encode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded-teacher", help="a folder, or an embedded model's name")
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--steps", type=int, nargs="+", default=[25])
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 4.0])
    parser.add_argument("--samplers", nargs="+", default=["own"], choices=["own", *SAMPLERS])
    parser.add_argument("--sharpen", type=int, nargs="+", default=[], help="percent; 0 leaves a picture as it is")
    parser.add_argument("--gains", type=float, nargs="+", default=[1.0], help="of the latents that are decoded")
    parser.add_argument("--text-gains", type=float, nargs="+", default=[1.0], help="of the prompts' embeddings")
    parser.add_argument("--cache", type=Path, default=Path("runs/validation"))
    options = parser.parse_args()
    quiet_libraries()
    use_machine()
    judge, pipeline = embedded_judge(), make_fast(load(options.model))
    own, scaling, encode_prompt = pipeline.scheduler, pipeline.vae.config.scaling_factor, pipeline.encode_prompt
    prompts = comic_prompts(options.num_images, split="validation")
    real = comic_pictures(options.num_images, odd=True, label="real", split="validation")
    reference = judged(judge, real, options.cache).parts[JUDGE]
    orders, name_values = orders_of(prompts.texts), value_namer(judge)

    def seen_in(pictures: PictureSet, percent: int) -> np.ndarray:
        return judged(judge, Sharpened(pictures, percent) if percent else pictures, options.cache).parts[JUDGE]

    for percent in options.sharpen:
        others = comic_pictures(options.num_images, odd=False, label="other real pictures", split="validation")
        for pictures in (others, ReconstructedSet(others, pipeline)):
            distance = frechet_distance(seen_in(pictures, percent), reference)
            print(f"{pictures.label}, sharpened {percent}%: distance {distance:8.3f}", flush=True)
    asked = (options.samplers, options.steps, options.scales, options.gains, options.text_gains)
    for sampler, steps, scale, gain, text_gain in product(*asked):
        pipeline.scheduler = own
        if sampler != "own":
            kind, settings = SAMPLERS[sampler]
            pipeline.scheduler = kind.from_config(own.config, **settings)
        pipeline.vae.register_to_config(scaling_factor=scaling / gain)
        pipeline.encode_prompt = encode_prompt if text_gain == 1 else reading_more(encode_prompt, text_gain)
        way = ways_of(pipeline, [steps], guidance=scale)[steps]
        gains = {"gain": gain, "text gain": text_gain}
        altered = "".join(f", {name} {value:g}" for name, value in gains.items() if value != 1)
        way = replace(way, key=f"{way.key}{altered.replace(',', '')}")
        drawn = DrawnSet("drawn", "model", way, orders, PictureCache(options.cache))
        for percent in options.sharpen or [0]:
            seen = seen_in(drawn, percent)
            score = adherence(prompts.named, name_values(seen))
            print(
                f"{sampler:5} {steps:3} steps, guidance {scale:4.1f}{altered}"
                f"{f', sharpened {percent}%' if percent else ''}  "
                f"distance {frechet_distance(seen, reference):8.3f}  adherence {score.value:.3f}",
                flush=True,
            )
            found = ((name, one.corrected) for name, one in score.attributes.items() if one.corrected is not None)
            print("      " + ", ".join(f"{name} {share:.2f}" for name, share in found), flush=True)


if __name__ == "__main__":
    main()

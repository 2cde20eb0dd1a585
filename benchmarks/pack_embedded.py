"""Put trained embedded models into the package, in float16, stored once each.

    python benchmarks/pack_embedded.py --teacher runs/pretrain/teacher --student runs/mini/student \\
        --judge runs/pretrain/judge/judge.safetensors

Prints the size of all weights together (at most 40 MB). `--mixed-with FOLDER --share 0.4` takes that share of each of
the student's weights from another one, of the same training a round before.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from onestroke.embedded import weights_folder
from onestroke.export import export_folder, forget_origins

LIMIT = 40_000_000  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("teacher", "student", "judge"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--mixed-with", type=Path, help="a student of an earlier round")
    parser.add_argument("--share", type=float, default=0.4, help="of the earlier student")
    options = parser.parse_args()
    out = weights_folder()
    if options.teacher:
        pipeline = StableDiffusionXLPipeline.from_pretrained(options.teacher)
        card = (options.teacher / "README.md").read_text("utf-8")
        export_folder(pipeline, out / "teacher", card=card, dtype=torch.float16)
    if options.student:
        unet = UNet2DConditionModel.from_pretrained(options.student, subfolder="unet")
        if options.mixed_with:
            earlier = UNet2DConditionModel.from_pretrained(options.mixed_with, subfolder="unet").state_dict()
            unet.load_state_dict({name: w.lerp(earlier[name], options.share) for name, w in unet.state_dict().items()})
        unet.half().save_pretrained(out / "student" / "unet")
        forget_origins(out / "student" / "unet")
        shutil.copy(options.student / "README.md", out / "student" / "README.md")
    if options.judge:
        shutil.copy(options.judge, out / "judge.safetensors")
    size = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    print(f"{size / 1e6:.2f} MB of weights in {out}")
    if size > LIMIT:
        raise SystemExit(f"more than {LIMIT / 1e6:.0f} MB")


if __name__ == "__main__":
    main()

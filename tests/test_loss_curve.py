"""The losses of the embedded recipe, step by step, beside those stored: a refactor changes no numbers.

Networks begin untrained, so that better embedded weights leave the curve as it is. After a change that is meant to move
the losses, `python tests/test_loss_curve.py` stores them anew.
"""

import json
from itertools import chain
from pathlib import Path

import pytest
import torch

from onestroke.config import load_recipe
from onestroke.data.comicset.dataset import ComicSource
from onestroke.data.loader import batches
from onestroke.embedded import weights_folder
from onestroke.plan.architecture import architecture_of
from onestroke.plan.untrained import untrained_method
from onestroke.train.trainer import Trainer, TrainSettings

STORED = Path(__file__).parent / "data" / "embedded_curve.json"
STEPS, BATCH = 4, 4
WATCHED = (
    "student/loss", "student/adversarial", "student/distillation", "student/grad_norm",
    "discriminator/hinge", "discriminator/grad_norm", "discriminator/real_3", "discriminator/fake_3",
)  # fmt: skip
TOLERANCE = 1e-6


def curve():
    """The watched numbers of the first steps of `mini`.

    In float64, random draws included, where CPUs agree to 1e-13. They differ in the last bits of float32, and AdamW
    enlarges such differences where a gradient is all but zero: the student's gradient norm was 0.6% off after one step.
    """
    torch.manual_seed(0)
    recipe = load_recipe("mini", [
        "train.precision=float32", f"train.batch_size={BATCH}", "train.micro_batch_size=3", "train.num_images=1000",
        "student_optimizer.warmup_images=0", "student_optimizer.kind=adamw", "losses.r1_every=2",
        "student_optimizer.learning_rate=1e-5", "discriminator_optimizer.learning_rate=1e-5",
    ])  # fmt: skip
    method, networks = untrained_method(recipe, architecture_of(str(weights_folder() / "teacher")), device="cpu")
    for network in chain(*networks.values()):
        network.double()
    trainer = Trainer(method, TrainSettings(1000, BATCH, 3))
    source, size = ComicSource(1000, size=recipe.data.size), (recipe.data.size,) * 2
    data = batches(source, batch_size=BATCH, size=size, first_slot=0, last_slot=STEPS * BATCH, seed=0, num_workers=0)
    return [{key: progress.terms[key] for key in WATCHED} for progress in trainer.run(lambda first: data)]


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_losses_of_the_embedded_recipe_are_those_stored(in_float64):
    stored, now = json.loads(STORED.read_text()), curve()
    assert len(stored) == len(now) == STEPS
    for step, (one, two) in enumerate(zip(stored, now, strict=True)):
        for key in WATCHED:
            assert two[key] == pytest.approx(one[key], rel=TOLERANCE), f"step {step}, {key}"


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    STORED.write_text(json.dumps(curve(), indent=1))

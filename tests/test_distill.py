"""A distillation on tiny pipelines from end to end."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image
from PIL import Image
from pipelines import tiny_sd, tiny_sdxl
from tiny_runs import tiny_batch, tiny_dinov2, tiny_recipe, tiny_trainer, write_folder

import onestroke
from onestroke.errors import DataError, RecipeError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    return tiny_dinov2(tmp_path_factory.mktemp("dinov2"))


@pytest.mark.parametrize(("build", "kind", "zero_snr", "guidance", "features", "extra"), [
    (tiny_sdxl, "epsilon", False, 5, "efficientnet-lite0", ()),
    (tiny_sdxl, "v_prediction", True, 1, "dinov2-small", ("data.random_flip=true", "data.crop=random")),
    (tiny_sd, "epsilon", False, 1, "dinov2-small", ("student.unet.layers_per_block=1", "train.precision=bfloat16")),
    (tiny_sd, "v_prediction", True, 5, "efficientnet-lite0", ("student.gradient_checkpointing=true",)),
    (tiny_sd, "v_prediction", True, 3, "dinov2-small", ("student.prediction_type=sample",)),
])  # fmt: skip
def test_a_folder_of_mixed_sizes_becomes_a_student_that_plain_diffusers_draws_with(
    build, kind, zero_snr, guidance, features, extra, pictures, dinov2, tmp_path
):
    build(kind, zero_snr).save_pretrained(tmp_path / "teacher")
    source = [f"discriminator.features_source={dinov2}"] if features == "dinov2-small" else []
    recipe = tiny_recipe(
        f"teacher.source={tmp_path / 'teacher'}", f"teacher.guidance=[{guidance}, {guidance}]",
        f"data.source={pictures}", f"discriminator.features={features}", *source, "train.precision=float32",
        "train.batch_size=3", "train.num_images=6", "student.ema_images=1", "train.sample_images=3", *extra,
    )  # fmt: skip
    terms = []
    folder = onestroke.distill(recipe, tmp_path / "run", observe=lambda progress, left: terms.append(progress.terms))
    assert len(terms) == 2 and all(np.isfinite(list(step.values())).all() for step in terms)
    assert len(list((tmp_path / "run" / "logs" / "samples").glob("*.png"))) == 2

    pipeline = AutoPipelineForText2Image.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    wanted = recipe.student.prediction_type or kind
    assert pipeline.scheduler.config.prediction_type == wanted
    assert bool(pipeline.scheduler.config.rescale_betas_zero_snr) == zero_snr
    drawn = [draw(pipeline, steps) for steps in (1, 2, 4)]
    assert all(image.shape == (1, 32, 32, 3) and np.isfinite(image).all() and image.std() > 0 for image in drawn)
    assert not np.allclose(drawn[0], drawn[1]) and not np.allclose(drawn[1], drawn[2])
    again = AutoPipelineForImage2Image.from_pipe(pipeline)
    image = again(
        "a person", image=Image.new("RGB", (32, 32), "red"), num_inference_steps=2, strength=0.5, guidance_scale=0.0,
        generator=torch.Generator().manual_seed(0), output_type="np",
    ).images  # fmt: skip
    assert np.isfinite(image).all() and image.std() > 0


def draw(pipeline, steps: int) -> np.ndarray:
    return pipeline(
        "a person", num_inference_steps=steps, guidance_scale=0.0, height=32, width=32,
        generator=torch.Generator().manual_seed(0), output_type="np",
    ).images  # fmt: skip


def test_distill_stays_callable_when_the_package_of_that_name_has_been_imported():
    code = "import onestroke; import onestroke.distill.losses; import sys; sys.exit(not callable(onestroke.distill))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_size_that_the_model_cannot_draw_is_refused_before_anything_runs(pictures, tmp_path):
    tiny_sd().save_pretrained(tmp_path / "teacher")
    recipe = tiny_recipe(f"teacher.source={tmp_path / 'teacher'}", f"data.source={pictures}", "data.size=36")
    with pytest.raises(RecipeError, match=r"data\.size: 36 pixels do not divide by 8\. Set it to 32"):
        onestroke.distill(recipe, tmp_path / "run")


def test_broken_pictures_are_reported_and_too_many_stop_the_run(pictures, tmp_path, caplog):
    folder = write_folder(tmp_path / "pictures")
    (folder / "0.png").write_bytes(b"broken")
    tiny_sd().save_pretrained(tmp_path / "teacher")
    lines = [f"teacher.source={tmp_path / 'teacher'}", f"data.source={folder}", "train.precision=float32",
             "train.num_images=12", "losses.distill_weight=0"]  # fmt: skip
    with pytest.raises(DataError, match="broken"):
        onestroke.distill(tiny_recipe(*lines, "data.max_broken_share=0"), tmp_path / "strict")
    assert onestroke.distill(tiny_recipe(*lines, "data.max_broken_share=0.9"), tmp_path / "lenient").is_dir()
    assert "1 of" in caplog.text and "0.png" in caplog.text


def test_some_steps_bring_the_student_nearer_to_its_teacher():
    """Adversarial term off, one noise level: the distillation loss on the same pictures falls."""
    trainer = tiny_trainer(
        "losses.adversarial_weight=0", "student.num_timesteps=1", "student.prediction_type=v_prediction",
        "discriminator_optimizer.every=1000",
    )  # fmt: skip
    curve = [trainer._step(tiny_batch(2))["student/distillation"] for _ in range(8)]
    assert curve[-1] < 0.8 * curve[0]

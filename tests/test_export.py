"""What is exported draws by itself what was trained, whole or not at all."""

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, EulerAncestralDiscreteScheduler
from pipelines import tiny_sd, tiny_sdxl
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_runs import tiny_add, tiny_recipe

from onestroke.card import model_card
from onestroke.distill.add import STUDENT
from onestroke.errors import ResourceError
from onestroke.export import export_folder, student_pipeline
from onestroke.families.load import from_pipeline, load_pipeline
from onestroke.sample import student_scheduler
from onestroke.schedule import NoiseSchedule
from onestroke.single_file_export import save_single_file

PROMPTS = ["a laughing person", "an old wizard"]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def latents_drawn(pipeline, eps: torch.Tensor, *, steps: int = 1, output_type: str = "latent") -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    side = 4 * eps.shape[-1]
    return pipeline(
        PROMPTS, num_inference_steps=steps, guidance_scale=0.0, latents=eps, height=side, width=side,
        output_type=output_type, generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip


@pytest.mark.parametrize(("kind", "zero_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)])
def test_the_exported_sampler_is_sdxl_turbos_with_the_teachers_betas(kind, zero_snr, tmp_path):
    pipeline = tiny_sd(kind, zero_snr)
    teacher = from_pipeline(pipeline)
    folder = export_folder(student_pipeline(teacher, teacher.unet), tmp_path / "student")
    scheduler = DiffusionPipeline.from_pretrained(folder).scheduler
    assert type(scheduler) is EulerAncestralDiscreteScheduler
    config, given = scheduler.config, pipeline.scheduler.config
    assert config.timestep_spacing == "trailing" and config.prediction_type == kind
    assert bool(config.rescale_betas_zero_snr) == zero_snr
    for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps"):
        assert config[key] == given[key]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_betas_are_rescaled_in_the_export_exactly_where_training_rescaled_them(kind):
    for teacher_kind in ("epsilon", "v_prediction"):
        config = tiny_sd(teacher_kind, True).scheduler.config
        exported = student_scheduler(config, prediction_type=kind)
        trained = NoiseSchedule.from_config(config)
        assert exported.config.rescale_betas_zero_snr == trained.ends_in_pure_noise == (teacher_kind != "epsilon")
        torch.testing.assert_close(
            exported.alphas_cumprod[:-1].double(), trained.alphas_cumprod[:-1], atol=2e-6, rtol=1e-4
        )


@pytest.mark.parametrize(("family", "kind", "zero_snr", "student_kind"), [
    ("sdxl", "epsilon", False, None), ("sdxl", "v_prediction", True, None), ("sd", "epsilon", False, "v_prediction"),
    ("sd", "v_prediction", True, "sample"),
])  # fmt: skip
def test_a_1_step_drawing_is_the_students_own_prediction_from_the_same_noise(family, kind, zero_snr, student_kind):
    lines = [f"student.prediction_type={student_kind}"] if student_kind else []
    method = tiny_add(*lines, family=family, kind=kind, zero_snr=zero_snr, dtype=torch.float32)
    model, unet = method.model, method.players[STUDENT].module
    with torch.no_grad():
        unet.conv_out.weight.add_(0.05 * noise(*unet.conv_out.weight.shape))  # no longer the teacher
        eps, t = noise(2, 4, 8, 8), torch.tensor([999, 999])
        x_s = model.schedule.student_input(torch.zeros_like(eps), eps, t)
        x0 = method.student(x_s, t, model.full_size(model.encode_prompts(PROMPTS), (32, 32)))
        pixels = model.decode_latents(x0)
    pipeline = student_pipeline(model, unet.eval(), prediction_type=student_kind)
    torch.testing.assert_close(latents_drawn(pipeline, eps), x0, atol=1e-3, rtol=1e-3)
    drawn = latents_drawn(pipeline, eps, output_type="pt")
    torch.testing.assert_close(drawn, (pixels / 2 + 0.5).clamp(0, 1), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("t", [749, 499])
def test_ddpm_on_the_same_timesteps_is_euler_ancestral_in_other_units(t):
    """Why a student that predicts "sample", which diffusers' Euler ancestral cannot read, is exported with DDPM."""
    config = tiny_sd("v_prediction").scheduler.config
    euler = student_scheduler(config)
    ddpm = DDPMScheduler.from_config(
        student_scheduler(config, prediction_type="sample").config, prediction_type="v_prediction"
    )
    for scheduler in (euler, ddpm):
        scheduler.set_timesteps(4)
    i = euler.timesteps.tolist().index(t)
    before, after = ((1 + euler.sigmas[k] ** 2) ** 0.5 for k in (i, i + 1))
    x_t, output = noise(1, 4, 4, 4), noise(1, 4, 4, 4, seed=1)
    euler._step_index, euler.is_scale_input_called = i, True
    one = euler.step(output, euler.timesteps[i], x_t * before, generator=torch.Generator().manual_seed(2)).prev_sample
    two = ddpm.step(output, ddpm.timesteps[i], x_t, generator=torch.Generator().manual_seed(2)).prev_sample
    torch.testing.assert_close(one / after, two, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("build", "kind", "zero_snr", "student_kind"), [
    (tiny_sdxl, "epsilon", False, None), (tiny_sd, "v_prediction", True, None), (tiny_sdxl, "epsilon", False, "sample"),
])  # fmt: skip
def test_a_student_survives_the_folder_and_the_single_file(build, kind, zero_snr, student_kind, tmp_path):
    teacher = from_pipeline(build(kind, zero_snr))
    pipeline = student_pipeline(teacher, teacher.unet, prediction_type=student_kind)
    eps = noise(2, 4, 8, 8)
    expected = latents_drawn(pipeline, eps, steps=2)
    folder = export_folder(pipeline, tmp_path / "student", card="# card\n")
    file = save_single_file(pipeline, tmp_path / "student.safetensors", dtype=torch.float32)
    for source in (folder, file):
        loaded = load_pipeline(source)
        assert type(loaded.scheduler) is type(pipeline.scheduler)
        assert loaded.scheduler.config.prediction_type == student_kind or kind
        assert loaded.scheduler.config.timestep_spacing == "trailing"
        torch.testing.assert_close(latents_drawn(loaded, eps, steps=2), expected, atol=1e-4, rtol=1e-4)
        blank = from_pipeline(loaded).zero_blank_prompt
        assert blank == teacher.zero_blank_prompt
    assert (folder / "README.md").read_text() == "# card\n"


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), SafetensorError("No space left")])
def test_an_old_export_survives_a_failing_one(failure, tmp_path, monkeypatch):
    teacher = from_pipeline(tiny_sd())
    pipeline = student_pipeline(teacher, teacher.unet)
    out = export_folder(pipeline, tmp_path / "student", card="first")

    def fail(folder, **options):
        folder.mkdir()
        (folder / "half").write_text("half")
        raise failure

    monkeypatch.setattr(pipeline, "save_pretrained", fail)
    with pytest.raises(ResourceError, match="Free disk space") as caught:
        export_folder(pipeline, out, card="second")
    assert "\n" not in str(caught.value)
    assert (out / "README.md").read_text() == "first" and load_pipeline(out)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_single_file_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    """What safetensors itself raises when the disk is full is no OSError."""

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("onestroke.tensor_files.save_file", fail)
    with pytest.raises(ResourceError, match="No space left"):
        save_single_file(tiny_sd(), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_new_export_replaces_the_old_one_whole(tmp_path):
    teacher = from_pipeline(tiny_sd())
    pipeline = student_pipeline(teacher, teacher.unet)
    out = export_folder(pipeline, tmp_path / "student", card="first")
    (out / "stale").write_text("from before")
    export_folder(pipeline, out, card="second")
    assert (out / "README.md").read_text() == "second" and not (out / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl])
def test_an_export_does_not_tell_where_its_parts_were_loaded_from(build, tmp_path):
    build("epsilon", False).save_pretrained(tmp_path / "secret place")
    out = export_folder(load_pipeline(str(tmp_path / "secret place")), tmp_path / "out")
    assert not [path for path in out.rglob("*") if path.is_file() and b"secret place" in path.read_bytes()]
    load_pipeline(str(out))


def test_exporting_in_half_precision_leaves_the_models_own_weights_alone(tmp_path):
    teacher = from_pipeline(tiny_sdxl())
    before = {name: value.clone() for name, value in teacher.unet.state_dict().items()}
    out = export_folder(student_pipeline(teacher, teacher.unet), tmp_path / "student", dtype=torch.float16)
    assert all(torch.equal(value, before[name]) for name, value in teacher.unet.state_dict().items())
    assert teacher.vae.dtype == torch.float32
    files = sorted(out.rglob("*.safetensors"))
    assert [file.parent.name for file in files] == ["text_encoder", "text_encoder_2", "unet", "vae"]
    assert {value.dtype for file in files for value in load_file(file).values()} == {torch.float16}
    loaded = DiffusionPipeline.from_pretrained(out)
    assert loaded.config.force_zeros_for_empty_prompt == teacher.zero_blank_prompt


def test_the_model_card_says_how_to_draw_and_what_was_trained():
    card = model_card(tiny_recipe("name=my student", "losses.distill_weight=1.25"), images=12345)
    for part in ("# my student", "guidance_scale=0.0", "num_inference_steps=1", "12,345", "distill_weight: 1.25",
                 "Not measured yet"):  # fmt: skip
        assert part in card
    assert "Not measured yet" not in model_card(tiny_recipe(), images=1, figures="FD 3\n")
    assert "on 12,345 pictures.\n" in card
    card = model_card(tiny_recipe("student.source=mine", "anchors.count=500", "anchors.images=2000"), images=9)
    before = "after 2,000 showings of 500 that the teacher had drawn, beginning from the student `mine`"
    assert f"on 9 pictures, {before}.\n" in card

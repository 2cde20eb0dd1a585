"""SDXL and SD 1.x/2.x against diffusers' own pipelines and schedulers, on tiny random models."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from pipelines import tiny_sd, tiny_sdxl

from onestroke.errors import ModelError, OnestrokeError
from onestroke.families.load import from_pipeline, load_model
from onestroke.families.model import Denoiser, guided
from onestroke.types import Condition

PROMPTS = ["a laughing person", "an old wizard with a very long beard"]
BUILDERS = pytest.mark.parametrize("build", [tiny_sdxl, tiny_sd], ids=["sdxl", "sd"])


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conditioned(model, prompts=PROMPTS) -> Condition:
    with torch.no_grad():
        return model.full_size(model.encode_prompts(prompts), (64, 64))


def raw_output(pipeline, x_t, t, condition: Condition) -> torch.Tensor:
    """The UNet called as the pipeline calls it."""
    added = {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
    kwargs = {"added_cond_kwargs": added} if condition.pooled is not None else {}
    with torch.no_grad():
        return pipeline.unet(x_t, t, encoder_hidden_states=condition.text, **kwargs).sample


def test_sdxls_words_are_the_last_but_one_states_and_the_first_encoders_last_layer_is_not_computed():
    pipeline = tiny_sdxl()
    model, run = from_pipeline(pipeline), []
    for encoder in model.text_encoders:
        layers = getattr(encoder, "text_model", encoder).encoder.layers
        layers[-1].register_forward_hook(lambda *_, encoder=encoder: run.append(encoder))
    condition = conditioned(model)
    assert run == model.text_encoders[1:]
    device = torch.device("cpu")
    with torch.no_grad():
        words, _, pooled, _ = pipeline.encode_prompt(PROMPTS, device=device, do_classifier_free_guidance=False)
    assert torch.equal(condition.text, words) and torch.equal(condition.pooled, pooled)


@BUILDERS
def test_encode_and_decode_have_round_shapes_at_any_aspect(build):
    model = from_pipeline(build())
    images = noise(2, 3, 64, 48).clamp(-1, 1)
    with torch.no_grad():
        latents = model.encode_images(images)
        assert latents.shape == (2, 4, 16, 12) and model.vae_scale_factor == 4 and model.default_size == 64
        assert model.decode_latents(latents).shape == images.shape


@BUILDERS
def test_latents_are_the_scaled_posterior_and_decode_divides_the_scale_out_again(build):
    pipeline = build()
    model = from_pipeline(pipeline)
    images = noise(1, 3, 32, 32).clamp(-1, 1)
    scale = {"sdxl": 0.13025, "sd": 0.18215}[model.family.name]
    with torch.no_grad():
        posterior = pipeline.vae.encode(images).latent_dist
        torch.testing.assert_close(model.encode_images(images), scale * posterior.mean)
        unit = noise(*posterior.mean.shape)
        sampled = model.encode_images(images, lambda shape: unit)
        torch.testing.assert_close(sampled, scale * (posterior.mean + posterior.std * unit))
        torch.testing.assert_close(model.decode_latents(scale * unit), pipeline.vae.decode(unit).sample)


def test_gradients_flow_through_decode_to_the_latents_and_to_no_weight():
    model = from_pipeline(tiny_sdxl())
    latents = noise(1, 4, 8, 8).requires_grad_()
    model.decode_latents(latents).square().mean().backward()
    assert latents.grad.abs().max() > 0
    modules = (model.vae, model.unet, *model.text_encoders)
    assert all(p.grad is None and not p.requires_grad for m in modules for p in m.parameters())


@BUILDERS
def test_embeddings_equal_the_pipelines_own_encode_prompt(build):
    pipeline = build()
    model = from_pipeline(pipeline)
    with torch.no_grad():
        condition = model.encode_prompts(PROMPTS)
        blank = model.blank_prompts(condition)
        if model.family.name == "sdxl":
            text, negative, pooled, negative_pooled = pipeline.encode_prompt(PROMPTS, device="cpu")
            torch.testing.assert_close(condition.pooled, pooled)
            torch.testing.assert_close(blank.pooled, negative_pooled)
        else:
            text, negative = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
            assert condition.pooled is None and condition.time_ids is None
    torch.testing.assert_close(condition.text, text)
    torch.testing.assert_close(blank.text, negative)
    assert (condition.text[0] - condition.text[1]).abs().max() > 1e-3


def test_prompts_longer_than_the_tokenizer_are_cut_as_the_pipeline_cuts_them():
    pipeline = tiny_sd()
    model = from_pipeline(pipeline)
    long = ["x" * 500]
    with torch.no_grad():
        torch.testing.assert_close(model.encode_prompts(long).text, pipeline.encode_prompt(long, "cpu", 1, False)[0])


def test_sdxls_blank_prompt_is_zeros_or_encoded_as_the_pipeline_says():
    pipeline = tiny_sdxl()
    model = from_pipeline(pipeline)
    condition = conditioned(model)
    assert model.zero_blank_prompt  # the class's default
    with torch.no_grad():
        blank = model.blank_prompts(condition)
        assert not blank.text.any() and not blank.pooled.any()
        assert torch.equal(blank.time_ids, condition.time_ids)
        pipeline.register_to_config(force_zeros_for_empty_prompt=False)
        encoded = from_pipeline(pipeline).blank_prompts(condition)
        _, negative, _, negative_pooled = pipeline.encode_prompt(PROMPTS, device="cpu")
    assert encoded.text.any()
    torch.testing.assert_close(encoded.text, negative)
    torch.testing.assert_close(encoded.pooled, negative_pooled)


def test_sdxls_time_ids_follow_the_pictures_sizes_and_crops():
    """Original height and width, crop top and left, target height and width: 1024 nowhere."""
    model = from_pipeline(tiny_sdxl())
    sizes = torch.tensor([[600, 800, 3, 7], [64, 48, 0, 0]])
    condition = model.with_sizes(model.encode_prompts(PROMPTS), sizes, (64, 48))
    assert condition.time_ids.tolist() == [[600, 800, 3, 7, 64, 48], [64, 48, 0, 0, 64, 48]]
    drawn = model.full_size(condition, (64, 48))
    pipeline = tiny_sdxl()
    expected = pipeline._get_add_time_ids((64, 48), (0, 0), (64, 48), torch.float32, 24)
    assert torch.equal(drawn.time_ids, expected.expand(2, -1))


def test_sdxls_unet_is_told_the_time_ids():
    model = from_pipeline(tiny_sdxl())
    x_t, t = noise(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        condition = model.encode_prompts(PROMPTS[:1])
        small, large = (model.denoiser()(x_t, t, model.full_size(condition, size)) for size in ((64, 64), (1024, 1024)))
    assert (small - large).abs().max() > 1e-4


@BUILDERS
@pytest.mark.parametrize(("kind", "zero_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)])
def test_the_denoisers_x0_is_what_diffusers_own_scheduler_computes(build, kind, zero_snr):
    pipeline = build(kind, zero_snr)
    model = from_pipeline(pipeline)
    condition, x_t = conditioned(model), noise(2, 4, 16, 16)
    reference = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=True)
    reference.set_timesteps(1000)
    for t in (999, 520, 1):
        with torch.no_grad():
            x0 = model.denoiser()(x_t, torch.tensor([t, t]), condition)
        output = raw_output(pipeline, x_t, t, condition)
        expected = reference.step(output, t, x_t).pred_original_sample
        torch.testing.assert_close(x0, expected, atol=1e-4, rtol=1e-3)


def test_the_prediction_type_changes_what_the_same_output_means():
    condition, x_t, t = conditioned(from_pipeline(tiny_sd())), noise(2, 4, 16, 16), torch.tensor([700, 700])
    with torch.no_grad():
        one, two = (from_pipeline(tiny_sd(kind)).denoiser()(x_t, t, condition) for kind in ("epsilon", "v_prediction"))
    assert (one - two).abs().max() > 0.1


def test_a_noise_prediction_under_zero_terminal_snr_is_refused_not_infinite():
    model = from_pipeline(tiny_sd("v_prediction", True))
    with pytest.raises(ModelError, match="prediction_type"):
        model.denoiser(prediction_type="epsilon")
    assert isinstance(model.denoiser(prediction_type="sample"), Denoiser)


@BUILDERS
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_guidance_is_the_pipelines_formula_on_the_unets_output(build, kind):
    """diffusers: output = blank + scale * (text - blank); then the scheduler reads x0."""
    pipeline = build(kind)
    model = from_pipeline(pipeline)
    condition, x_t, t = conditioned(model), noise(2, 4, 16, 16), torch.tensor([700, 300])
    scales = torch.tensor([3.0, 7.5]).reshape(2, 1, 1, 1)
    with torch.no_grad():
        blank = model.blank_prompts(condition)
        x0 = guided(model.denoiser(), x_t, t, condition, blank, scales)
    text, without = raw_output(pipeline, x_t, t, condition), raw_output(pipeline, x_t, t, blank)
    expected = model.schedule.to_x0(without + scales * (text - without), x_t, t, kind)
    torch.testing.assert_close(x0, expected, atol=1e-4, rtol=1e-4)


def test_guidance_1_is_the_unguided_prediction_and_asks_once():
    model = from_pipeline(tiny_sd())
    condition, x_t, t = conditioned(model), noise(2, 4, 16, 16), torch.tensor([700, 300])
    sizes = []

    def denoiser(x_t, t, condition):
        sizes.append(len(x_t))
        return model.denoiser()(x_t, t, condition)

    with torch.no_grad():
        blank = model.blank_prompts(condition)
        once = guided(denoiser, x_t, t, condition, blank, 1.0)
        both = guided(denoiser, x_t, t, condition, blank, torch.ones(2, 1, 1, 1))
    torch.testing.assert_close(once, both, atol=1e-5, rtol=1e-5)
    assert sizes == [2, 4]


def test_a_model_in_float64_computes_in_float64():
    pipeline = tiny_sdxl().to(torch.float64)
    model = from_pipeline(pipeline)
    with torch.no_grad():
        latents = model.encode_images(noise(1, 3, 32, 32).double())
        x0 = model.denoiser()(latents, torch.tensor([500]), conditioned(model, PROMPTS[:1]))
        assert latents.dtype == x0.dtype == model.decode_latents(x0).dtype == torch.float64


# --- what cannot be loaded --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sd"
    tiny_sd("v_prediction", True).save_pretrained(folder)
    return folder


def assert_one_line(error: OnestrokeError, *parts: str) -> None:
    line = str(error)
    assert "\n" not in line and error.fix and error.where and all(part in line for part in parts), line


def test_a_saved_folder_loads_with_its_family_prediction_and_schedule(sd_folder):
    model = load_model(sd_folder)
    assert (model.family.name, model.prediction_type) == ("sd", "v_prediction")
    assert model.schedule.ends_in_pure_noise and model.source == str(sd_folder)


def test_a_missing_folder_is_one_line_with_the_fix(tmp_path):
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path / "nowhere")
    assert_one_line(caught.value, "no such file or folder", "nowhere")


def test_a_folder_that_is_no_model_is_one_line_with_the_fix(tmp_path):
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path)
    assert_one_line(caught.value, "model_index.json")


def test_an_unsupported_family_is_one_line_naming_those_that_are(tmp_path):
    unet = UNet2DModel(sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",),
                       up_block_types=("UpBlock2D",), norm_num_groups=4)  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path)
    assert_one_line(caught.value, "DDPMPipeline is not supported", "SDXL or SD 1.x/2.x")


def test_truncated_weights_are_one_line_with_the_fix(sd_folder, tmp_path):
    folder = shutil.copytree(sd_folder, tmp_path / "cut")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    assert_one_line(caught.value, "cannot be loaded", str(folder))


def test_missing_weights_are_an_error_not_random_numbers(sd_folder, tmp_path):
    folder = shutil.copytree(sd_folder, tmp_path / "gone")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    assert_one_line(caught.value, "cannot be loaded")


@pytest.mark.parametrize(("changes", "message"), [
    ({"prediction_type": "flow_prediction"}, "flow_prediction"), ({"beta_schedule": "squaredcos_cap_v2"}, "squaredcos"),
])  # fmt: skip
def test_a_scheduler_that_is_not_supported_is_named(sd_folder, tmp_path, changes, message):
    folder = shutil.copytree(sd_folder, tmp_path / "other")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelError, match=message) as caught:
        load_model(folder)
    assert_one_line(caught.value)

"""Single checkpoints: what is written comes back exactly, in the layout that other tools read."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from onestroke.errors import ModelError
from onestroke.families import ldm_keys
from onestroke.families.clip_vocabulary import clip_tokenizer
from onestroke.families.load import load_pipeline
from onestroke.families.single_file import (
    CONFIG_KEY,
    Header,
    load_single_file,
    packaged_configs,
    read_header,
    recognise,
    stated_prediction,
    with_prediction,
)
from onestroke.single_file_export import checkpoint_metadata, checkpoint_tensors, pipeline_configs, save_single_file
from tests.pipelines import tiny_sd, tiny_sdxl

PIPELINES = {"sdxl": tiny_sdxl, "sd1": tiny_sd, "sd2": lambda: tiny_sd(open_clip=True)}
MODULES = ("unet", "vae", "text_encoder", "text_encoder_2")


def modules(pipeline) -> dict[str, torch.nn.Module]:
    return {name: getattr(pipeline, name) for name in MODULES if getattr(pipeline, name, None) is not None}


def jittered(pipeline):
    """No two tensors alike: fresh norms and biases are all ones or zeros, and could be mixed up unseen."""
    generator = torch.Generator().manual_seed(1)
    for module in modules(pipeline).values():
        for parameter in module.parameters():
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    return pipeline


def assert_same_weights(loaded, original, dtype: torch.dtype) -> None:
    assert modules(loaded).keys() == modules(original).keys()
    for name, module in modules(original).items():
        got = modules(loaded)[name].state_dict()
        assert got.keys() == module.state_dict().keys()
        for key, tensor in module.state_dict().items():
            assert got[key].dtype == dtype
            assert torch.equal(got[key], tensor.to(dtype)), f"{name}: {key}"


def settings(config) -> dict:
    return {key: value for key, value in config.items() if not key.startswith("_")}


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weights_come_back_exactly_in_the_written_dtype(family, dtype, tmp_path):
    pipeline = jittered(PIPELINES[family]())
    path = save_single_file(pipeline, tmp_path / "model.safetensors", dtype=dtype)
    loaded = load_single_file(path, dtype=dtype)
    assert type(loaded) is type(pipeline)
    assert_same_weights(loaded, pipeline, dtype)


@pytest.mark.parametrize("family", PIPELINES)
def test_a_written_model_draws_the_same_picture_as_the_original(family, tmp_path):
    pipeline = jittered(PIPELINES[family]())
    path = save_single_file(pipeline, tmp_path / "model.safetensors", dtype=torch.float32)

    def draw(model):
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        model.set_progress_bar_config(disable=True)
        return model("a red Hat!", num_inference_steps=2, guidance_scale=3.0, latents=noise, output_type="pt").images

    assert torch.equal(draw(load_pipeline(path)), draw(pipeline))


@pytest.mark.parametrize("family", PIPELINES)
def test_diffusers_own_converter_reads_the_layout_without_our_metadata(family, tmp_path):
    """diffusers tells SDXL's encoders apart by width, so here they differ: 32 and 40."""
    pipeline = jittered(tiny_sdxl(second_width=40) if family == "sdxl" else PIPELINES[family]())
    path = tmp_path / "bare.safetensors"
    save_file(checkpoint_tensors(pipeline), path)
    pipeline.save_pretrained(tmp_path / "folder")
    for weights in (tmp_path / "folder").rglob("*.safetensors"):
        weights.unlink()
    loaded = type(pipeline).from_single_file(str(path), config=str(tmp_path / "folder"), local_files_only=True)
    assert_same_weights(loaded, pipeline, torch.float32)


def test_scheduler_tokenizers_and_configs_come_back(tmp_path):
    pipeline = tiny_sdxl("v_prediction", zero_snr=True)
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    loaded = load_single_file(save_single_file(pipeline, tmp_path / "model.safetensors"))
    assert type(loaded.scheduler) is EulerAncestralDiscreteScheduler
    assert settings(loaded.scheduler.config) == settings(pipeline.scheduler.config)
    assert loaded.config.force_zeros_for_empty_prompt == pipeline.config.force_zeros_for_empty_prompt
    for name in ("tokenizer", "tokenizer_2"):
        ours, theirs = getattr(pipeline, name), getattr(loaded, name)
        assert theirs.get_vocab() == ours.get_vocab() and theirs.model_max_length == 77
        prompt = ["Ink & brush, 2 cats"]
        assert theirs(prompt, padding="max_length").input_ids == ours(prompt, padding="max_length").input_ids
    assert loaded.vae.config.scaling_factor == 0.13025


@pytest.mark.parametrize(
    ("prediction_type", "zero_snr", "marks", "spec"),
    [
        ("epsilon", False, set(), "epsilon"),
        ("v_prediction", False, {"v_pred"}, "v"),
        ("v_prediction", True, {"v_pred", "ztsnr"}, "v"),
        ("epsilon", True, set(), "epsilon"),
    ],
)
def test_prediction_type_and_sampler_are_marked_for_other_tools(prediction_type, zero_snr, marks, spec, tmp_path):
    pipeline = tiny_sd(prediction_type, zero_snr)
    config = dict(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(config)
    path = save_single_file(pipeline, tmp_path / "model.safetensors", metadata={"modelspec.title": "Comic"})
    with safe_open(path, framework="pt") as file:
        notes, keys = file.metadata(), set(file.keys())
    assert {"v_pred", "ztsnr"} & keys == marks
    assert notes["modelspec.prediction_type"] == spec
    assert notes["modelspec.title"] == "Comic"
    assert notes["modelspec.resolution"] == "64x64"
    assert notes["onestroke.scheduler"] == "EulerAncestralDiscreteScheduler"
    assert notes["onestroke.timestep_spacing"] == "trailing"
    assert "trailing" in notes["modelspec.usage_hint"]


def test_metadata_holds_no_machine_paths(tmp_path):
    tiny_sd().save_pretrained(tmp_path / "folder")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "folder")
    assert str(tmp_path) not in json.dumps(pipeline_configs(pipeline))


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")

    def full_disk(tensors, unfinished, metadata):
        unfinished.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onestroke.tensor_files.save_file", full_disk)
    with pytest.raises(Exception, match="No space left"):
        save_single_file(tiny_sd(), path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_weights_that_do_not_fit_the_dtype_are_refused(tmp_path):
    pipeline = tiny_sd()
    pipeline.unet.conv_in.bias.data[0] = 1e6  # above float16's 65504
    with pytest.raises(ModelError, match="input_blocks.0.0.bias: a weight is not finite in torch.float16"):
        save_single_file(pipeline, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_loading_opens_no_connection(tmp_path, monkeypatch):
    path = save_single_file(tiny_sdxl(), tmp_path / "model.safetensors")

    def refuse(*_args, **_kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    load_single_file(path)


# Released architectures, on the meta device: published parameter counts and checkpoint keys.

NUM_PARAMETERS = {
    "sdxl": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd2": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
}


def meta_pipeline(family: str):
    """The released model without weights."""
    configs = packaged_configs(family)
    index = configs["model_index.json"]
    with init_empty_weights(include_buffers=True):
        parts = {
            "unet": UNet2DConditionModel.from_config(configs["unet/config.json"]),
            "vae": AutoencoderKL.from_config(configs["vae/config.json"]),
        }
        for name in ("text_encoder", "text_encoder_2"):
            if name in index:
                config = transformers.CLIPTextConfig(**configs[f"{name}/config.json"])
                parts[name] = getattr(transformers, index[name][1])(config)
    scheduler = tiny_sd().scheduler
    if family == "sdxl":
        return StableDiffusionXLPipeline(
            **parts,
            scheduler=scheduler,
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(pad_token="!"),
            add_watermarker=False,
        )
    return StableDiffusionPipeline(
        **parts,
        scheduler=scheduler,
        tokenizer=clip_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def released():
    return {family: meta_pipeline(family) for family in NUM_PARAMETERS}


@pytest.mark.parametrize("family", NUM_PARAMETERS)
def test_packaged_configs_build_models_of_the_published_size(family, released):
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in modules(released[family]).items()}
    assert counts == NUM_PARAMETERS[family]


LDM = "model.diffusion_model."
KNOWN_KEYS = {
    "sdxl": {
        f"{LDM}input_blocks.0.0.weight": (320, 4, 3, 3),
        f"{LDM}input_blocks.3.0.op.weight": (320, 320, 3, 3),
        f"{LDM}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
        f"{LDM}input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        f"{LDM}middle_block.1.transformer_blocks.9.attn1.to_q.weight": (1280, 1280),
        f"{LDM}output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        f"{LDM}output_blocks.8.0.out_layers.3.weight": (320, 320, 3, 3),
        f"{LDM}label_emb.0.0.weight": (1280, 2816),
        f"{LDM}out.2.weight": (4, 320, 3, 3),
        "first_stage_model.decoder.up.3.block.0.norm1.weight": (512,),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.decoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.11.self_attn.q_proj.weight": (768, 768),
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": (3840, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,),
        "conditioner.embedders.1.model.positional_embedding": (77, 1280),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
    },
    "sd15": {
        f"{LDM}input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        f"{LDM}output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        f"{LDM}output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
    },
    "sd2": {
        f"{LDM}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        f"{LDM}input_blocks.1.1.proj_in.weight": (320, 320),
        "cond_stage_model.model.ln_final.weight": (1024,),
        "cond_stage_model.model.transformer.resblocks.23.ln_1.weight": (1024,),
    },
}
NUM_UNET_TENSORS = {"sdxl": 1680, "sd15": 686, "sd2": 686}


@pytest.mark.parametrize("family", KNOWN_KEYS)
def test_released_architectures_get_the_keys_and_shapes_of_community_checkpoints(family, released):
    shapes = {key: tuple(tensor.shape) for key, tensor in checkpoint_tensors(released[family]).items()}
    assert {key: shapes.get(key) for key in KNOWN_KEYS[family]} == KNOWN_KEYS[family]
    assert sum(key.startswith(LDM) for key in shapes) == NUM_UNET_TENSORS[family]


def test_only_released_architectures_are_named_as_such(released):
    names = {"sdxl": "stable-diffusion-xl-v1-base", "sd15": "stable-diffusion-v1", "sd2": "stable-diffusion-v2-512"}
    named = lambda pipeline: checkpoint_metadata(pipeline, "t")["modelspec.architecture"]  # noqa: E731
    assert {family: named(pipeline) for family, pipeline in released.items()} == names
    assert named(tiny_sdxl()) == "onestroke/sdxl-custom"


@pytest.mark.parametrize("family", NUM_PARAMETERS)
def test_checkpoints_without_metadata_are_recognised_by_their_keys(family, released, tmp_path):
    tensors = checkpoint_tensors(released[family])
    header = Header(tmp_path, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, {})
    assert recognise(header) == family


def test_mapping_numbers_blocks_by_the_configs_layers_and_attention():
    config = {"layers_per_block": 1, "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]}
    key = lambda name: ldm_keys.unet_place(name, config).key  # noqa: E731
    assert key("down_blocks.1.resnets.0.norm1.weight") == "input_blocks.3.0.in_layers.0.weight"
    assert key("down_blocks.1.downsamplers.0.conv.bias") == "input_blocks.4.0.op.bias"
    assert key("up_blocks.0.upsamplers.0.conv.weight") == "output_blocks.1.1.conv.weight"
    assert key("up_blocks.1.upsamplers.0.conv.weight") == "output_blocks.3.2.conv.weight"
    assert key("mid_block.resnets.1.time_emb_proj.weight") == "middle_block.2.emb_layers.1.weight"


def test_adapters_that_are_not_fused_are_refused():
    config = {"layers_per_block": 1, "up_block_types": []}
    with pytest.raises(ModelError, match="no place for this tensor"):
        ldm_keys.unet_place("encoder_hid_proj.weight", config)
    with pytest.raises(ModelError, match="no place for this tensor"):
        ldm_keys.open_clip_place("encoder.layers.0.self_attn.q_proj.lora_A.weight")


# What a foreign checkpoint says of itself.


def header_of(keys=(), metadata=None, shapes=None) -> Header:
    return Header(Path("model.safetensors"), dict.fromkeys(keys, (1,)) | (shapes or {}), metadata or {})


@pytest.mark.parametrize(
    ("keys", "metadata", "stated"),
    [
        ((), {}, None),
        (("v_pred",), {}, "v_prediction"),
        ((), {"modelspec.prediction_type": "v"}, "v_prediction"),
        (("v_pred",), {"modelspec.prediction_type": "epsilon"}, "v_prediction"),
        ((), {"modelspec.prediction_type": "epsilon"}, "epsilon"),
    ],
)
def test_stated_prediction_type_is_read_from_marker_then_metadata(keys, metadata, stated):
    assert stated_prediction(header_of(keys, metadata)) == stated


def test_an_unknown_stated_prediction_type_is_an_error():
    with pytest.raises(ModelError, match="'edm' is not known"):
        stated_prediction(header_of((), {"modelspec.prediction_type": "edm"}))


def test_markers_reach_the_scheduler_and_the_argument_overrides_them():
    header = header_of(("v_pred", "ztsnr"))
    configs = packaged_configs("sdxl")
    scheduler = with_prediction(configs, header, None, is_own=False)["scheduler/scheduler_config.json"]
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert scheduler["timestep_spacing"] == "trailing"
    overridden = with_prediction(configs, header, "epsilon", is_own=False)["scheduler/scheduler_config.json"]
    assert overridden["prediction_type"] == "epsilon"


@pytest.mark.parametrize("family", PIPELINES)
def test_a_checkpoint_without_our_metadata_loads_by_the_packaged_configs(family, tmp_path, monkeypatch):
    """The packaged configs are replaced by tiny ones: the released sizes are checked on the meta device."""
    pipeline = jittered(PIPELINES[family]())
    asked = []

    def tiny_configs(name):
        asked.append(name)
        return pipeline_configs(pipeline)

    monkeypatch.setattr("onestroke.families.single_file.packaged_configs", tiny_configs)
    markers = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    save_file(checkpoint_tensors(pipeline) | markers, tmp_path / "model.safetensors")
    loaded = load_single_file(tmp_path / "model.safetensors")
    assert asked == [{"sdxl": "sdxl", "sd1": "sd15", "sd2": "sd2"}[family]]
    assert_same_weights(loaded, pipeline, torch.float32)
    assert loaded.scheduler.config.prediction_type == "v_prediction" and loaded.scheduler.config.rescale_betas_zero_snr


def test_sd2_is_epsilon_at_512_unless_it_is_said_to_predict_v_at_768():
    header = header_of(("cond_stage_model.model.ln_final.weight",))
    configs = packaged_configs("sd2")
    plain = with_prediction(configs, header, None, is_own=False)
    v = with_prediction(configs, header, "v_prediction", is_own=False)
    found = [
        (c["scheduler/scheduler_config.json"]["prediction_type"], c["unet/config.json"]["sample_size"] * 8)
        for c in (plain, v)
    ]
    assert found == [("epsilon", 512), ("v_prediction", 768)]


def test_the_argument_overrides_our_own_checkpoints_too(tmp_path):
    path = save_single_file(tiny_sd(), tmp_path / "model.safetensors")
    assert load_single_file(path).scheduler.config.prediction_type == "epsilon"
    assert load_single_file(path, prediction_type="sample").scheduler.config.prediction_type == "sample"


SD_PARTS = (f"{LDM}out.2.weight", "first_stage_model.quant_conv.weight")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("lora_unet_down_blocks_0.lora_up.weight",), "this is a LoRA"),
        (("model.diffusion_model.joint_blocks.0.x.weight",), "SD3"),
        (("model.diffusion_model.double_blocks.0.img_attn.qkv.weight",), "Flux"),
        ((*SD_PARTS, "conditioner.embedders.0.model.ln_final.weight"), "refiner"),
        ((*SD_PARTS, "conditioner.embedders.1.model.ln_final.weight", "edm_mean"), "EDM"),
        (("down_blocks.0.resnets.0.conv1.weight",), "a diffusers UNet without its folder"),
        ((f"{LDM}out.2.weight", "cond_stage_model.model.ln_final.weight"), "no VAE"),
        (SD_PARTS, "no text encoder"),
        (("weight",), "no checkpoint that is known"),
    ],
)
def test_other_kinds_of_files_are_named_in_one_line(keys, message):
    with pytest.raises(ModelError, match=message) as caught:
        recognise(header_of(keys))
    assert "\n" not in str(caught.value)


def test_inpainting_checkpoints_are_refused(tmp_path):
    tensors = {key: torch.zeros(1) for key in (*SD_PARTS, "cond_stage_model.transformer.text_model.x")}
    tensors[f"{LDM}input_blocks.0.0.weight"] = torch.zeros(320, 9, 3, 3)
    save_file(tensors, tmp_path / "inpaint.safetensors")
    with pytest.raises(ModelError, match="inpainting"):
        load_single_file(tmp_path / "inpaint.safetensors")


def rewritten(path, change):
    """The checkpoint at `path` with its tensors and metadata changed by `change(tensors, metadata)`."""
    tensors, metadata = load_file(path), dict(read_header(path).metadata)
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    return save_single_file(tiny_sd(), tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (f"{LDM}out.2.weight", "the UNet is of another architecture"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "the text encoder is incomplete"),
        ("first_stage_model.decoder.conv_out.weight", "the checkpoint cannot be loaded"),
    ],
)
def test_a_missing_tensor_is_an_error_not_a_random_weight(checkpoint, key, message):
    with pytest.raises(ModelError, match=message) as caught:
        load_single_file(rewritten(checkpoint, lambda tensors, _: tensors.pop(key)))
    assert "\n" not in str(caught.value)


def test_a_unet_with_blocks_too_many_is_refused(checkpoint):
    def extend(tensors, _metadata):
        tensors[f"{LDM}input_blocks.9.0.in_layers.0.weight"] = torch.zeros(1)

    with pytest.raises(ModelError, match="input_blocks.9.0.in_layers.0.weight is not known"):
        load_single_file(rewritten(checkpoint, extend))


def test_old_merges_without_text_model_in_their_keys_are_read(checkpoint):
    def shorten(tensors, _metadata):
        for key in [key for key in tensors if ".text_model." in key]:
            tensors[key.replace(".text_model.", ".")] = tensors.pop(key)

    assert_same_weights(load_single_file(rewritten(checkpoint, shorten), dtype=torch.float16), tiny_sd(), torch.float16)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["model_index.json"].update(_class_name="os"),
        lambda c: c["model_index.json"].update(text_encoder=["os", "system"]),
        lambda c: c["tokenizer/tokenizer_config.json"].update(tokenizer_class="AutoModel"),
        lambda c: c["scheduler/scheduler_config.json"].update(_class_name="UNet2DModel"),
        lambda c: c.pop("vae/config.json"),
    ],
    ids=["pipeline", "text encoder", "tokenizer", "scheduler", "missing VAE config"],
)
def test_configs_in_metadata_can_name_only_classes_of_ours(checkpoint, change):
    def tamper(_tensors, metadata):
        configs = json.loads(metadata[CONFIG_KEY])
        change(configs)
        metadata[CONFIG_KEY] = json.dumps(configs)

    with pytest.raises(ModelError, match="damaged"):
        load_single_file(rewritten(checkpoint, tamper))


def test_files_that_are_no_safetensors_are_named(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"not one")
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        load_single_file(tmp_path / "broken.safetensors")
    with pytest.raises(ModelError, match="only .safetensors"):
        load_single_file(tmp_path / "model.ckpt")


def test_packaged_tokenizer_gives_clips_published_ids():
    ids = clip_tokenizer()("a photo of a cat").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert clip_tokenizer(pad_token="!").pad_token_id == 0
    assert len(clip_tokenizer()) == 49408


def test_clips_own_vocabulary_is_not_copied_into_the_metadata():
    pipeline = tiny_sd()
    pipeline.tokenizer = clip_tokenizer(pad_token="!")
    configs = pipeline_configs(pipeline)
    assert "tokenizer/tokenizer.json" not in configs
    assert configs["tokenizer/tokenizer_config.json"]["pad_token"] == "!"

"""Which dtype computes: bfloat16 only where the hardware has it."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline, ModelMixin, StableDiffusionXLImg2ImgPipeline
from pipelines import tiny_sdxl
from tiny_runs import tiny_batch, tiny_trainer
from torch.utils._python_dispatch import TorchDispatchMode

from onestroke.embedded import embedded_student
from onestroke.fast import make_fast
from onestroke.precision import autocast_dtype, cpu_has_bfloat16, fast_dtype, training_attention
from onestroke.sample import draw
from onestroke.train.optimizers import orthogonalised


@pytest.fixture(autouse=True)
def asked_anew():
    cpu_has_bfloat16.cache_clear()
    yield
    cpu_has_bfloat16.cache_clear()


FEATURES = {  # what torch says of a Zen 2, a Sapphire Rapids and a Graviton 3
    "avx2": ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
    "amx": ({"avx2": True, "avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
    "arm": ({"neon": True, "bf16": True}, torch.bfloat16),
}


@pytest.mark.parametrize("cpu", FEATURES)
def test_a_cpu_takes_bfloat16_where_it_computes_in_it(cpu, monkeypatch):
    features, expected = FEATURES[cpu]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert fast_dtype("cpu") == expected
    assert autocast_dtype("auto", "cpu") == (None if expected == torch.float32 else torch.bfloat16)
    assert make_fast(embedded_student()).unet.dtype == expected
    assert orthogonalised(torch.eye(48)[None]).dtype == expected


def test_a_fast_pipeline_still_follows_its_weights_and_is_saved_as_what_it_is(tmp_path):
    plain = tiny_sdxl().to(fast_dtype("cpu")).to(torch.float32)
    pipeline = make_fast(make_fast(tiny_sdxl())).to(torch.float32)
    arguments = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "np"}
    one, two = (p("a bob", generator=torch.Generator().manual_seed(0), **arguments).images for p in (plain, pipeline))
    np.testing.assert_allclose(one, two, atol=0.02)  # merged weights are rounded to bfloat16 after their sums
    pipeline.to(torch.float64)
    assert pipeline.unet.dtype == pipeline.vae.dtype == torch.float64
    assert pipeline._execution_device == pipeline.unet.device == torch.device("cpu")
    pipeline.to("meta")
    assert pipeline._execution_device == pipeline.vae.device == torch.device("meta")
    make_fast(tiny_sdxl()).save_pretrained(tmp_path)
    assert (tmp_path / "model_index.json").read_text() == saved_index(plain, tmp_path / "plain")
    assert type(AutoPipelineForImage2Image.from_pipe(make_fast(tiny_sdxl()))) is StableDiffusionXLImg2ImgPipeline
    assert deepcopy(pipeline.unet).dtype == torch.float64


def test_a_fast_pipeline_is_not_searched_for_offloading_hooks(monkeypatch):
    pipeline = make_fast(tiny_sdxl())
    searched = property(lambda self: pytest.fail(f"{type(self).__name__} was searched"))
    monkeypatch.setattr(DiffusionPipeline, "_execution_device", searched)
    for name in ("device", "dtype"):
        monkeypatch.setattr(ModelMixin, name, searched)
    draw(pipeline, ["a bob"], seeds=[0], steps=1, guidance=0.0)


def saved_index(pipeline, folder) -> str:
    pipeline.save_pretrained(folder)
    return (folder / "model_index.json").read_text()


def test_torch_without_a_list_of_features_is_asked_for_each(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert fast_dtype("cpu") == torch.bfloat16


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("float32", None), ("float64", None), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_a_precision_that_a_recipe_names_is_obeyed(precision, expected):
    assert autocast_dtype(precision, "cpu") == expected


class Attentions(TorchDispatchMode):
    """The names of the attention operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if "scaled_dot_product" in name or name in ("aten::bmm", "aten::_softmax"):
            self.seen.add("fused" if "scaled_dot_product" in name else "plain")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("pixels", "expected"), [(128 * 128, {"plain"}), (128 * 129, {"fused"})])
def test_a_cpus_step_on_small_pictures_takes_the_plain_attention(pixels, expected):
    query = torch.randn(2, 3, 64, 32, requires_grad=True)
    with training_attention("cpu", pixels), Attentions() as attentions:
        F.scaled_dot_product_attention(query, query, query).sum().backward()
    assert attentions.seen == expected


def test_the_trainer_steps_with_it():
    for size, expected in ((32, {"plain"}), (136, {"fused"})):
        trainer = tiny_trainer(f"data.size={size}")
        with Attentions() as attentions:
            trainer._step(tiny_batch(size=size))
        assert (expected == {"fused"}) == ("fused" in attentions.seen), size

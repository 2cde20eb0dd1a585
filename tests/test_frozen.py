"""Networks that are not trained, in bfloat16 and float8: who is lowered, who begins whole, and what a plan says."""

import sys

import pytest
import torch
from pipelines import tiny_sdxl
from rank_runs import make_inputs
from tiny_runs import tiny_batch, tiny_recipe
from torch import nn

import onestroke
from onestroke.build import add_trainer, teacher_of
from onestroke.commands.plan import _settled
from onestroke.distill.frozen import float8_bytes, to_float8
from onestroke.errors import RecipeError, ResourceError
from onestroke.families.load import load_model, load_pipeline
from onestroke.plan.architecture import architecture_of
from onestroke.plan.simulation import bytes_by_network
from onestroke.plan.untrained import untrained_method
from onestroke.precision import frozen_dtype, named_frozen_precision

LOW = ("train.precision=bfloat16", "train.frozen_precision=bfloat16", "train.device=cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def source_of(inputs) -> str:
    return inputs[0].partition("=")[2]


def size_of(*modules: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for m in modules for t in (*m.parameters(), *m.buffers()))


def test_auto_is_bfloat16_on_a_gpu_whose_step_is_and_as_before_elsewhere():
    assert named_frozen_precision("auto", "bfloat16", "cuda") == "bfloat16"
    assert named_frozen_precision("auto", "float32", "cuda") == "float32"
    assert frozen_dtype("auto", "bfloat16", "cpu") == torch.float32
    assert frozen_dtype("auto", "float64", "cpu") == torch.float64
    with pytest.raises(RecipeError, match="need a step in bfloat16") as caught:
        frozen_dtype("bfloat16", "float32", "cuda")
    assert "train.precision" in str(caught.value) and "\n" not in str(caught.value)
    settled = _settled(tiny_recipe(), "bfloat16", "cuda").train
    assert (settled.precision, settled.frozen_precision) == ("bfloat16", "bfloat16")


def test_a_student_begins_from_whole_weights_beside_a_teacher_in_bfloat16(inputs):
    recipe = tiny_recipe(*inputs, *LOW)
    trainer = add_trainer(recipe, teacher_of(recipe))
    method, whole = trainer.method, load_model(source_of(inputs))
    for name, value in whole.unet.state_dict().items():
        assert torch.equal(method.student.unet.state_dict()[name], value), name
    assert method.features.scale.dtype == torch.float32  # pictures are normalised and resized whole
    for network in (method.model.unet, method.model.vae, *method.model.text_encoders, method.features):
        assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    ids = method._condition(tiny_batch(4, first=1000)).time_ids
    assert ids[:, 0].tolist() == [1100, 1101, 1102, 1103]  # which bfloat16 would round
    plain = add_trainer(other := tiny_recipe(*inputs, LOW[0], LOW[2]), teacher_of(other))
    low, full = (one._step(tiny_batch(4)) for one in (trainer, plain))
    assert low.keys() == full.keys()
    for name in ("student/distillation", "discriminator/hinge"):
        assert low[name] == pytest.approx(full[name], rel=0.1) and low[name] != full[name]


def test_what_a_run_in_bfloat16_writes_and_draws_is_made_of_the_teachers_whole_weights(inputs, tmp_path):
    lines = (*LOW, "train.num_images=4", "train.sample_images=4", "student.lora.rank=2", "data.size=16")
    folder = onestroke.distill(tiny_recipe(*inputs, *lines), tmp_path / "run")
    assert len(list((tmp_path / "run/logs/samples").glob("*.png"))) == 1
    written, teacher = load_pipeline(folder), load_pipeline(source_of(inputs))
    for part in ("vae", "text_encoder", "text_encoder_2"):
        for name, value in getattr(teacher, part).state_dict().items():
            assert torch.equal(getattr(written, part).state_dict()[name], value), name
    changed = 0
    for name, value in teacher.unet.state_dict().items():
        difference = (written.unet.state_dict()[name] - value).abs().max()
        changed += difference > 0
        assert difference < 1e-2, name
    assert 0 < changed < len(teacher.unet.state_dict()) / 2  # what the adapter is not on is whole, to the bit


@pytest.mark.parametrize("line", ["train.frozen_precision=bfloat16", "teacher.fp8=weights"])
def test_a_plan_counts_the_bytes_of_the_lowered_networks(line, tmp_path):
    tiny_sdxl().save_pretrained(tmp_path / "teacher")
    architecture = architecture_of(str(tmp_path / "teacher"))
    lines = ("train.precision=bfloat16", "train.device=cpu")
    plain, low = (
        bytes_by_network(untrained_method(tiny_recipe(*lines, *more), architecture, device="meta"))
        for more in ((), (line,))
    )
    unet = load_model(tmp_path / "teacher").unet
    expected = float8_bytes(unet) if "fp8" in line else size_of(unet.to(torch.bfloat16))
    assert low["teacher UNet"] == expected < plain["teacher UNet"]
    assert low["student"] == plain["student"]
    if "fp8" not in line:
        assert low["text encoders"] < 0.6 * plain["text encoders"]


# --- float8 -----------------------------------------------------------------------------------------------------------


def test_a_teacher_in_float8_predicts_nearly_the_same_and_takes_the_bytes_that_are_planned():
    pytest.importorskip("torchao")
    unet = tiny_sdxl().unet.requires_grad_(False)
    inputs = {"encoder_hidden_states": torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0)),
              "added_cond_kwargs": {"text_embeds": torch.ones(2, 24), "time_ids": torch.ones(2, 6)}}  # fmt: skip
    x_t, planned = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), float8_bytes(unet)
    before = unet(x_t, 500, **inputs).sample
    to_float8(unet, "weights", torch.device("cpu"))
    after = unet(x_t, 500, **inputs).sample
    assert 0 < (after - before).norm() < 0.05 * before.norm()
    layers = [m.weight for m in unet.modules() if isinstance(m, nn.Linear)]
    held = sum(w.qdata.nbytes + w.scale.nbytes for w in layers)
    others = {id(w) for w in layers}
    assert held + sum(t.nbytes for t in (*unet.parameters(), *unet.buffers()) if id(t) not in others) == planned


def test_a_run_with_a_teacher_in_float8_trains_a_whole_student(inputs):
    pytest.importorskip("torchao")
    recipe = tiny_recipe(*inputs, "train.precision=float32", "teacher.fp8=weights", "train.device=cpu")
    trainer = add_trainer(recipe, teacher_of(recipe))
    terms = trainer._step(tiny_batch(4))
    assert all(torch.isfinite(torch.tensor(value)) for value in terms.values()) and terms["student/grad_norm"] > 0
    assert {type(p) for p in trainer.method.student.unet.parameters()} == {nn.Parameter}


def test_where_float8_does_not_go_is_one_line_with_the_fix(inputs, monkeypatch):
    pytest.importorskip("torchao")
    recipe = tiny_recipe(*inputs, "teacher.fp8=weights", "student.lora.rank=2")
    with pytest.raises(RecipeError, match="a LoRA student learns through its weights"):
        add_trainer(recipe, teacher_of(recipe))
    unet = tiny_sdxl().unet
    with pytest.raises(ResourceError, match="does not multiply in float8") as caught:
        to_float8(unet, "dynamic", torch.device("cpu"))
    assert "weights" in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ResourceError, match=r"pip install 'onestroke\[torchao\]'"):
        to_float8(unet, "weights", torch.device("cpu"))

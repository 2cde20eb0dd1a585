"""LoRA students and adapters: trained, merged, extracted, and read back by plain diffusers in both layouts."""

from copy import deepcopy

import pytest
import torch
from pipelines import tiny_sd, tiny_sdxl
from safetensors.torch import load_file, save_file
from tiny_runs import endless, tiny_recipe, tiny_trainer

from onestroke.api import export_student
from onestroke.config import LoraRecipe, recipe_from
from onestroke.distill.add import STUDENT
from onestroke.distill.lora import Adapter, drawing_unet, lora_student
from onestroke.errors import ModelError, RecipeError
from onestroke.lora import adaptable, decomposed, extract_lora, load_lora, merge_lora, save_lora

LORA = ("student.lora.rank=2", "student.lora.alpha=6", "student.lora.targets=[to_q, to_out.0, ff.net.2, conv1]")
PIPELINES = {"sdxl": tiny_sdxl, "sd": tiny_sd}


def predicted(unet, family):
    """The UNet's output on fixed inputs."""
    make = torch.Generator().manual_seed(1)
    dtype = unet.dtype
    x, text = (
        torch.randn(*shape, generator=make).to(dtype)
        for shape in ((2, 4, 8, 8), (2, 5, 64 if family == "sdxl" else 32))
    )
    added = {"text_embeds": torch.randn(2, 24, generator=make).to(dtype), "time_ids": torch.ones(2, 6).to(dtype)}
    extra = {"added_cond_kwargs": added} if family == "sdxl" else {}
    with torch.no_grad():
        return unet(x, torch.tensor([900, 10]), encoder_hidden_states=text, **extra).sample


def changed(unet, *, rank=2, seed=5):
    """A copy of `unet` whose adaptable layers each gained a random matrix of `rank`."""
    copy, make = deepcopy(unet), torch.Generator().manual_seed(seed)
    for layer in adaptable(copy).values():
        out, rest = layer.weight.flatten(1).shape
        gain = torch.randn(out, rank, generator=make) @ torch.randn(rank, rest, generator=make) * 0.02
        layer.weight.data += gain.view_as(layer.weight)
    return copy


@pytest.mark.parametrize("family", ["sdxl", "sd"])
def test_a_lora_student_learns_alone_and_its_adapter_loads_on_the_teacher_by_plain_diffusers(family, tmp_path):
    trainer = tiny_trainer(*LORA, family=family)
    method, teacher = trainer.method, trainer.method.model
    before = {name: value.clone() for name, value in teacher.unet.state_dict().items()}
    torch.testing.assert_close(
        predicted(method.student.unet.eval(), family), predicted(teacher.unet, family)
    )  # it begins as the teacher
    method.student.unet.train()
    for _, _ in zip(range(3), trainer.run(endless()), strict=False):
        pass
    for name, value in teacher.unet.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.abs().max() > 0 for name, p in method.players[STUDENT].module.named().items() if "lora_B" in name)
    recipe = method.recipe
    folder = export_student(trainer, teacher, recipe, tmp_path / "student")

    average = drawing_unet(method.student.unet, trainer.averages[STUDENT])
    assert average is not method.student.unet
    expected = predicted(average.eval(), family).float()
    assert (expected - predicted(teacher.unet, family).float()).abs().max() > 1e-4
    merged = type(teacher.unet).from_pretrained(folder, subfolder="unet")
    torch.testing.assert_close(predicted(merged, family), expected, atol=1e-4, rtol=1e-3)
    for file in (tmp_path / "lora", tmp_path / "lora-kohya.safetensors"):
        plain = PIPELINES[family]()  # the teacher, the same weights
        plain.load_lora_weights(str(file))
        torch.testing.assert_close(predicted(plain.unet, family), expected, atol=1e-4, rtol=1e-3)
    export_student(trainer, teacher, recipe, tmp_path / "best")  # beside it, under names of its own
    kohya = [tmp_path / f"{name}-kohya.safetensors" for name in ("lora", "best-lora")]
    assert kohya[0].read_bytes() == kohya[1].read_bytes() and (tmp_path / "best-lora").is_dir()


def test_a_lora_student_keeps_the_teachers_weights_once_and_its_averages_are_as_small_as_the_adapter():
    trainer = tiny_trainer(*LORA)
    method = trainer.method
    shared = {id(p) for p in method.model.unet.parameters()}
    assert {id(p) for name, p in method.student.unet.named_parameters() if ".lora_" not in name} == shared
    adapter = method.players[STUDENT].module
    assert isinstance(adapter, Adapter) and isinstance(trainer.averages[STUDENT], Adapter)
    count = sum(p.numel() for p in adapter.parameters())
    assert 0 < count < 0.2 * sum(p.numel() for p in method.model.unet.parameters())
    assert sum(v.numel() for v in trainer.state()["players"][STUDENT].values()) == count


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("family", ["sdxl", "sd"])
def test_an_adapter_survives_either_layout_and_diffusers_reads_it(family, layout, tmp_path):
    pipeline = PIPELINES[family]()
    student = changed(pipeline.unet)
    found = extract_lora(student, pipeline.unet, rank=2)
    file = save_lora(found.factors, tmp_path / "x.safetensors", student, layout=layout, is_sdxl=family == "sdxl")
    back = load_lora(file, pipeline.unet, is_sdxl=family == "sdxl")
    assert back.keys() == found.factors.keys() == adaptable(student).keys()
    for name, pair in found.factors.items():
        torch.testing.assert_close(back[name].up @ back[name].down, pair.up @ pair.down)
    expected = predicted(student, family)
    pipeline.load_lora_weights(str(file))
    torch.testing.assert_close(predicted(pipeline.unet, family), expected, atol=1e-4, rtol=1e-3)


def test_kohyas_keys_are_ldms_for_sdxl_and_diffusers_for_sd_with_an_alpha(tmp_path):
    names = {}
    for family, make in PIPELINES.items():
        unet = make().unet
        layer = next(name for name in adaptable(unet) if name.endswith("attn1.to_q"))
        factors = extract_lora(changed(unet), unet, rank=1).factors
        file = save_lora({layer: factors[layer]}, tmp_path / family, unet, layout="kohya", is_sdxl=family == "sdxl")
        names[family] = set(load_file(file))
    start = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    assert names["sdxl"] == {f"{start}.lora_down.weight", f"{start}.lora_up.weight", f"{start}.alpha"}
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.alpha" in names["sd"]


def test_a_files_alpha_scales_it(tmp_path):
    unet = tiny_sdxl().unet
    layer, pair = next(iter(extract_lora(changed(unet), unet, rank=2).factors.items()))
    file = save_lora({layer: pair}, tmp_path / "x.safetensors", unet, layout="kohya", is_sdxl=True)
    tensors = load_file(file)
    save_file({k: torch.tensor(1.0) if k.endswith("alpha") else v for k, v in tensors.items()}, file)
    torch.testing.assert_close(load_lora(file, unet, is_sdxl=True)[layer].up, pair.up / 2)


def test_extraction_holds_all_of_a_low_rank_change_and_says_what_it_leaves_out():
    teacher = tiny_sdxl().unet
    student = changed(teacher, rank=2)
    found = extract_lora(student, teacher, rank=2)
    assert found.held == pytest.approx(1, abs=1e-5) and found.outside == pytest.approx(0, abs=1e-9)
    copy = deepcopy(teacher)
    merge_lora(copy, found.factors)
    for one, two in zip(copy.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    half = extract_lora(student, teacher, rank=1)
    assert 0.5 < half.held < 0.95
    student.conv_norm_out.bias.data += 1  # 16 numbers by 1 each
    inside = sum((s - t).square().sum() for s, t in zip(copy.parameters(), teacher.parameters(), strict=True)).item()
    assert extract_lora(student, teacher, rank=2).outside == pytest.approx(16 / (16 + inside), rel=1e-3)
    assert extract_lora(teacher, teacher, rank=1) == ({}, 1.0, 0.0)


def test_a_large_matrix_is_decomposed_nearly_as_well_as_can_be_and_the_same_each_time():
    make = torch.Generator().manual_seed(0)
    matrix = (
        torch.randn(700, 600, generator=make)
        @ torch.diag(0.97 ** torch.arange(600))
        @ torch.randn(600, 600, generator=make)
    )
    pair = decomposed(matrix, 8)
    values = torch.linalg.svdvals(matrix)
    best = values[8:].square().sum().sqrt()
    assert (matrix - pair.up @ pair.down).norm() < 1.001 * best
    assert torch.equal(decomposed(matrix, 8).up, pair.up)


def test_what_does_not_fit_is_one_line(tmp_path):
    unet = tiny_sdxl().unet
    with pytest.raises(ModelError, match="other architectures"):
        extract_lora(tiny_sd().unet, unet, rank=1)
    with pytest.raises(RecipeError, match=r"no layer .* 'to_w'"):
        lora_student(unet, LoraRecipe(rank=1, targets=("to_w",)), seed=0)
    with pytest.raises(RecipeError, match="adapts the teacher itself"):
        recipe_from({}, ["student.lora.rank=4", "student.init=random"])
    save_file({"unet.nothing.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"does not fit the UNet \(unet.nothing"):
        load_lora(tmp_path / "x.safetensors", unet, is_sdxl=True)
    assert tiny_recipe("student.lora.rank=4").student.lora.scaling == 4

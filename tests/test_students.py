"""What a student starts as, what its output is read as, and which ones are refused."""

from copy import deepcopy

import pytest
import torch
from pipelines import tiny_sd, tiny_sdxl
from tiny_runs import Spy, tiny_add, tiny_batch, tiny_recipe

from onestroke.distill.add import DISCRIMINATOR, STUDENT
from onestroke.distill.student import build_student
from onestroke.errors import ModelError
from onestroke.export import student_pipeline
from onestroke.families.load import from_pipeline
from onestroke.schedule import PREDICTION_TYPES

BOTH = frozenset({STUDENT, DISCRIMINATOR})


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_students_output_is_read_as_the_recipe_says_and_exported_so(kind):
    method = tiny_add(f"student.prediction_type={kind}", "losses.distance=latent")
    batch = tiny_batch(2)
    method.student = spy = Spy(method.student)
    rollout = method.rollout(batch, BOTH)
    x_t, t = spy.asked[0]
    model, unet = method.model, method.players[STUDENT].module
    condition = model.with_sizes(model.encode_prompts(batch.captions), batch.sizes, (32, 32))
    with torch.no_grad():
        output = model.family.call_unet(unet, x_t, t, condition)
    alpha = model.schedule.alphas_cumprod[t].sqrt().reshape(-1, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    expected = {"epsilon": (x_t - sigma * output) / alpha, "v_prediction": alpha * x_t - sigma * output}
    torch.testing.assert_close(rollout.x0.detach(), expected.get(kind, output), atol=1e-9, rtol=1e-7)
    assert student_pipeline(model, unet, prediction_type=kind).scheduler.config.prediction_type == kind


def test_the_student_starts_as_the_teacher_itself():
    method = tiny_add()
    teacher, student = method.model.unet.state_dict(), method.players[STUDENT].module.state_dict()
    assert all(torch.equal(teacher[name], student[name]) for name in teacher)
    assert method.players[STUDENT].module is not method.model.unet


def test_a_smaller_students_matching_blocks_are_the_teachers():
    teacher = from_pipeline(tiny_sdxl())
    recipe = tiny_recipe("student.unet.layers_per_block=1").student
    student = build_student(teacher, recipe, seed=0)
    mine, theirs = student.state_dict(), teacher.unet.state_dict()
    assert len(mine) < len(theirs) and student.config.layers_per_block == 1
    alike = {name for name in mine if name in theirs and mine[name].shape == theirs[name].shape}
    assert all(torch.equal(mine[name], theirs[name]) for name in alike)
    attention = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert {"conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", attention} <= alike
    assert len(alike) > 0.8 * len(mine)
    assert all(p.requires_grad for p in student.parameters()) and student.training


def test_a_random_student_is_not_the_teacher_and_its_seed_is_the_recipes():
    teacher = from_pipeline(tiny_sdxl())
    recipe = tiny_recipe("student.init=random").student
    state = torch.get_rng_state()
    one, same, other = (build_student(teacher, recipe, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one.conv_in.weight, same.conv_in.weight)
    assert not torch.equal(one.conv_in.weight, other.conv_in.weight)
    assert not torch.equal(one.conv_in.weight, teacher.unet.conv_in.weight)


def test_a_unet_that_cannot_be_built_is_one_line():
    with pytest.raises(ModelError, match="one entry per block") as caught:
        build_student(from_pipeline(tiny_sd()), tiny_recipe("student.unet.block_out_channels=[8]").student, seed=0)
    assert "\n" not in str(caught.value)


def test_a_student_can_be_continued_but_only_as_what_it_predicts(tmp_path):
    teacher = from_pipeline(tiny_sd())
    unet = deepcopy(teacher.unet)
    with torch.no_grad():
        unet.conv_in.weight.add_(1)
    student_pipeline(teacher, unet, prediction_type="v_prediction").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="student.prediction_type to v_prediction"):
        build_student(teacher, tiny_recipe(f"student.source={tmp_path}").student, seed=0)
    recipe = tiny_recipe(f"student.source={tmp_path}", "student.prediction_type=v_prediction").student
    continued = build_student(teacher, recipe, seed=0)
    assert torch.equal(continued.conv_in.weight, unet.conv_in.weight) and continued.conv_in.weight.requires_grad


def test_an_epsilon_student_of_a_zero_terminal_snr_teacher_is_refused():
    with pytest.raises(ModelError, match="zero terminal SNR"):
        tiny_add("student.prediction_type=epsilon", kind="v_prediction", zero_snr=True)

"""Recipes: what is refused, how it is said, and that what is written is what is read."""

import pytest
import yaml
from pydantic import ValidationError

from onestroke.config import Recipe, load_recipe, pretrain_recipe, recipe_from, save_recipe
from onestroke.errors import RecipeError


@pytest.mark.parametrize(("tree", "wrong", "near"), [
    ({"losses": {"distil_weight": 1}}, "losses.distil_weight", "losses.distill_weight"),
    ({"teachr": {}}, "teachr", "teacher"),
    ({"student": {"unet": {"layers_per_blok": 1}}}, "student.unet.layers_per_blok", "student.unet.layers_per_block"),
    ({"student_optimizer": {"lerning_rate": 1}}, "student_optimizer.lerning_rate", "student_optimizer.learning_rate"),
])  # fmt: skip
def test_an_unknown_key_names_itself_and_the_nearest(tree, wrong, near):
    with pytest.raises(RecipeError) as caught:
        recipe_from(tree)
    assert f"unknown key {wrong!r}" in str(caught.value) and f"Did you mean {near!r}?" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_key_near_to_none_lists_the_known_ones():
    with pytest.raises(RecipeError, match=r"Known keys: adversarial_weight, distance, distill_weight"):
        recipe_from({"losses": {"zzzzzzzz": 1}})


@pytest.mark.parametrize("line", [
    "train.batch_size=0", "losses.distill_weight=-1", "losses.distance=fourier", "data.size=4", "seed=-1",
    "student_optimizer.learning_rate=0", "teacher.min_t=0.99", "teacher.guidance=[7, 3]", "student.num_timesteps=0",
    "discriminator.conditioning=sound", "train.precision=int8", "data.max_broken_share=1.5", "train.batch_size=many",
    "student_optimizer.betas=[0.9, 1.0]", "student_optimizer.betas=[-0.1, 0.9]", "student.timestep_weights=[1, 2]",
    "student.timestep_weights=[0, 0, 0, 0]", "student.timestep_weights=[1, 1, 1, -1]", "train.num_images=8",
])  # fmt: skip
def test_a_value_out_of_range_is_one_line_with_the_key(line):
    with pytest.raises(RecipeError) as caught:
        recipe_from({}, [line])
    key = line.split("=")[0]
    assert key.split(".")[0] in str(caught.value) and key.split(".")[-1] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_reach_any_depth_and_leave_what_they_were_given_alone():
    tree = {"losses": {"distill_weight": 1.0}}
    recipe = recipe_from(tree, [
        "losses.distill_weight=0.5", "student.unet.layers_per_block=1", "teacher.guidance=[2, 4]",
        "student_optimizer.learning_rate=1e-4", "name=a=b",
    ])  # fmt: skip
    assert recipe.losses.distill_weight == 0.5 and recipe.student.unet.layers_per_block == 1
    assert recipe.teacher.guidance == (2.0, 4.0) and recipe.student_optimizer.learning_rate == 1e-4
    assert recipe.name == "a=b" and tree == {"losses": {"distill_weight": 1.0}}
    assert recipe.student_optimizer.betas == (0.0, 0.99)  # the rest of the section keeps its defaults


@pytest.mark.parametrize(("line", "message"), [
    ("losses.distill_weight", "section.key=value"), ("losses.distill_weight=[1", "not YAML"),
    ("name.first=x", "holds a value"), ("losses.distil_weight=1", "Did you mean 'losses.distill_weight'"),
])  # fmt: skip
def test_a_malformed_override_is_one_line(line, message):
    with pytest.raises(RecipeError, match=message) as caught:
        recipe_from({"name": "n"}, [line])
    assert "\n" not in str(caught.value)


def test_a_saved_recipe_holds_every_setting_and_reads_back_equal(tmp_path):
    recipe = recipe_from({}, ["student.unet.block_out_channels=[8, 16]", "student.timestep_weights=[4, 3, 2, 1]"])
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    tree = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert set(tree) == set(Recipe.model_fields) and set(tree["losses"]) == set(type(recipe.losses).model_fields)


@pytest.mark.parametrize("name", ["mini", "mini-long", "sdxl-anime", "sd15"])
def test_packaged_recipes_load_by_name(name):
    assert load_recipe(name).name == name


def test_the_platforms_recipe_states_its_own_experiment():
    recipe = load_recipe("sdxl-anime")
    assert recipe.discriminator.features == "dinov2-large" == recipe.discriminator.image_encoder
    assert "CLIP-ViT-g-14" in recipe.discriminator.text_encoder and recipe.discriminator.conditioning == "both"
    losses = recipe.losses
    assert (losses.distill_weight, losses.r1_gamma, losses.weighting, losses.distance) == (
        2.5, 1e-5, "exponential", "pixel",
    )  # fmt: skip
    assert recipe.student.num_timesteps == 4


def test_the_defaults_are_the_papers():
    losses = Recipe().losses
    assert (losses.distill_weight, losses.r1_gamma) == (2.5, 1e-5)
    assert (losses.weighting, losses.distance) == ("exponential", "pixel") and Recipe().student.init == "teacher"


def test_no_such_recipe_lists_those_that_are_there():
    with pytest.raises(RecipeError, match=r"mini, mini-long, sd15, sdxl-anime"):
        load_recipe("no-such-recipe")


@pytest.mark.parametrize(("text", "message"), [("a: [1", "not YAML"), ("- 1\n- 2", "mapping of sections")])
def test_a_file_that_is_no_recipe_is_one_line(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_recipes_are_frozen():
    with pytest.raises(ValidationError):
        Recipe().seed = 1


def test_keys_that_do_not_go_together_are_named_without_the_whole_section():
    with pytest.raises(RecipeError) as caught:
        recipe_from({}, ["student.timestep_weights=[1, 2]"])
    assert str(caught.value) == (
        "recipe: student: timestep_weights has to hold one number per timestep, none negative, not all zero"
    )


def test_a_teacher_that_goes_on_knows_its_words_already():
    assert pretrain_recipe().text_captions == 40_000
    assert pretrain_recipe(["start=embedded-teacher"]).text_captions == 0
    assert pretrain_recipe(["start=embedded-teacher", "text_captions=64"]).text_captions == 64


def test_a_recipe_in_another_encoding_is_one_line(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes("name: ä".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"recipe\.yaml: this is not UTF-8\. Save it as UTF-8"):
        load_recipe(path)

"""Short evaluations of a run: they change nothing of it, come when they should, keep the best; of two processes too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import AutoPipelineForText2Image
from duels import assert_identical
from pipelines import tiny_sdxl
from rank_runs import in_ranks
from tiny_runs import tiny_dinov2, tiny_recipe, write_folder

from onestroke.api import distill
from onestroke.build import source_of, yardstick_of
from onestroke.commands.distill import best_lines
from onestroke.config import Recipe
from onestroke.errors import RecipeError
from onestroke.train.checkpoint import load_newest
from onestroke.train.evaluation import Evaluation, Figures, best_of, evaluations_of, figures_in

FIGURES = Figures(100, {1: 3.0, 4: 1.0}, {1: 2.5, 4: 0.5}, 0.75, "key")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    """Six steps of two pictures, evaluated at 8 and at the end, 12; by a network that the discriminator has not."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_sdxl().save_pretrained(folder / "teacher")
    write_folder(folder / "pictures", rounds=2)
    return tiny_recipe(
        f"teacher.source={folder / 'teacher'}", f"data.source={folder / 'pictures'}", "data.size=16",
        "student.num_timesteps=2", "train.batch_size=2", "train.num_images=12", "train.evaluate_images=8",
        "train.evaluate_count=5", "discriminator.features=dinov2-small",
        f"discriminator.features_source={tiny_dinov2(folder / 'dinov2')}",
    )  # fmt: skip


def without_evaluation(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"evaluate_images": 0})})


def test_a_stopped_and_evaluated_run_has_the_weights_of_one_without_and_its_best_student_draws(recipe, tmp_path):
    told: list[str] = []
    distill(recipe, tmp_path / "run", minutes=0, tell=told.append)
    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/evaluation/pictures").rglob("*.png")}
    assert len(drawn) == 5 and not (tmp_path / "run/best").exists()
    distill(recipe, tmp_path / "run", tell=told.append)
    assert drawn == {path: path.stat().st_mtime_ns for path in (tmp_path / "run/evaluation/pictures").rglob("*.png")}
    told = [line for line in told if not line.startswith("the teacher's pictures: ")]  # as many as the time it takes
    assert [line.partition(",")[0] for line in told] == [
        "the teacher draws 5 pictures to evaluate the student by; once for this folder",
        "evaluation after 8 pictures", "evaluation after 12 pictures",
    ]  # fmt: skip

    distill(without_evaluation(recipe), tmp_path / "plain")
    assert_identical(load_newest(tmp_path / "run/checkpoints"), load_newest(tmp_path / "plain/checkpoints"))

    found, best = evaluations_of(tmp_path / "run"), best_of(tmp_path / "run")
    assert [figures.images for figures in found] == [8, 12] and best == min(found, key=lambda one: one.score)
    assert all(set(figures.to_real) == set(figures.to_teacher) == {1, 2} for figures in found)
    assert len({figures.teacher_to_real for figures in found}) == 1 and found[0].to_real != found[1].to_real
    picture = AutoPipelineForText2Image.from_pretrained(tmp_path / "run/best")(
        "picture number 1", num_inference_steps=1, guidance_scale=0.0, height=16, width=16
    ).images[0]
    assert picture.size == (16, 16)
    assert best_lines(tmp_path / "run")[0].startswith(f"best:    {tmp_path / 'run/best'} (") and not best_lines(
        tmp_path
    )


def _distilled(recipe: Recipe, out: Path) -> list[str]:
    told: list[str] = []
    distill(recipe, out, tell=told.append)
    return told


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_find_the_figures_of_one_and_the_first_alone_draws(parallel, recipe, tmp_path):
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"parallel": parallel})})
    (alone,), (first, second) = (in_ranks(_distilled, n, recipe, tmp_path / str(n)) for n in (1, 2))
    assert len(alone) == len(first) == 3 and second == []
    one, two = evaluations_of(tmp_path / "1"), evaluations_of(tmp_path / "2")
    assert [figures.images for figures in two] == [8, 12]
    for a, b in zip(one, two, strict=True):
        assert b.to_real == pytest.approx(a.to_real, rel=1e-3) and b.to_teacher == pytest.approx(a.to_teacher, rel=1e-3)
    assert best_of(tmp_path / "2").images == best_of(tmp_path / "1").images


def test_the_best_student_is_replaced_by_a_better_one_alone_or_where_it_was_measured_otherwise(tmp_path):
    kept: list[int] = []

    def keep(weights, folder: Path, notes) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "evaluation.json").write_text(notes["evaluation.json"])
        kept.append(json.loads(notes["evaluation.json"])["images"])

    class Steps:
        num_timesteps = 4

    class OfSteps:
        student = Steps

    told: list[str] = []
    evaluation = Evaluation(None, None, None, None, OfSteps, tmp_path, keep=keep, tell=told.append)
    assert evaluation.steps == (1, 4)
    for figures in (
        FIGURES,
        replace(FIGURES, images=200, to_real={1: 3.5, 4: 0.75}),
        replace(FIGURES, images=300, to_real={1: 2.5}),
        replace(FIGURES, images=400, to_real={1: 1.0, 4: 1.0}),
        replace(FIGURES, images=500, to_real={1: 9.0, 4: 9.0}, key="other"),
    ):  # fmt: skip
        evaluation._keep_best(None, figures)
    assert kept == [100, 400, 500]
    assert told[0] == (
        "evaluation after 100 pictures, Fréchet distance: 1 step 3.00 to real pictures and 2.50 to the teacher's; "
        "4 steps 1.00 to real pictures and 0.50 to the teacher's (the teacher is at 0.75 to real ones); the best so far"
    )
    assert told[1].endswith("the best is of 100 pictures")


def test_figures_are_read_as_they_were_written_and_a_killed_runs_last_line_is_passed_over(tmp_path):
    assert FIGURES.score == 2.0 and figures_in(FIGURES.text()) == FIGURES
    again = replace(FIGURES, to_real={1: 1.0, 4: 1.0})  # trained on twice
    lines = [FIGURES.text(), replace(FIGURES, images=50).text(), again.text(), FIGURES.text()[:40]]
    (tmp_path / "evaluations.jsonl").write_text("\n".join(lines))
    assert evaluations_of(tmp_path) == [replace(FIGURES, images=50), again]
    assert best_of(tmp_path) is None


def test_a_network_that_the_discriminator_sees_is_refused_and_never_chosen(recipe):
    def chosen(features: str, discriminator: str = "efficientnet-lite0", **data: str):
        changed = recipe.model_copy(update={
            "train": recipe.train.model_copy(update={"evaluate_features": features}),
            "discriminator": recipe.discriminator.model_copy(update={"features": discriminator}),
            "data": recipe.data.model_copy(update=data),
        })  # fmt: skip
        return yardstick_of(changed, source_of(changed.data))

    with pytest.raises(RecipeError, match=r"train\.evaluate_features: the discriminator sees efficientnet-lite0 too"):
        chosen("efficientnet-lite0")
    with pytest.raises(RecipeError, match="the judge knows the embedded pictures alone"):
        chosen("judge")
    with pytest.raises(RecipeError, match=r"cannot be loaded.*or set train\.evaluate_images to 0"):
        chosen("dinov2-large")  # which is not on this machine
    own = chosen("auto", "dinov2-large")
    assert own.observer.name in ("inception", "clip-vit-large", "efficientnet-lite0")
    assert len(own.prompts) == len(own.real) == 5
    assert not set(own.prompts) & {own.real.prompt(row) for row in range(5)}  # other pictures
    comic = chosen("auto", source="comicset", size=128)
    assert comic.observer.name == "comic judge" and "validation" in comic.real.key(0)

"""`onestroke distill`: from options to a run, and what it shows of it."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console

from onestroke.commands import distill, generate
from onestroke.commands.progress import Display, clock_time, summary
from onestroke.errors import ModelError, RecipeError
from onestroke.train.trainer import Progress
from tests.consoles import paper, text_of
from tests.pipelines import tiny_sd, tiny_sdxl


def test_a_teacher_without_a_recipe_gets_its_familys_at_its_own_size(tmp_path):
    for name, pipeline, recipe in (("xl", tiny_sdxl(), "sdxl-anime"), ("sd", tiny_sd(), "sd15")):
        pipeline.save_pretrained(tmp_path / name)
        resolved = distill.resolve_recipe(None, str(tmp_path / name), None, "pictures: of #1")
        assert (resolved.name, resolved.data.size, resolved.data.source) == (recipe, 64, "pictures: of #1")
        if not torch.cuda.is_available():
            assert resolved.train.device == "auto"


def test_configs_tell_what_loading_the_weights_would(tmp_path):
    from onestroke.families.load import load_model

    tiny_sdxl().save_pretrained(tmp_path / "xl")
    model = load_model(tmp_path / "xl")
    assert distill.inspect_teacher(str(tmp_path / "xl")) == distill.TeacherTraits(model.family.name, model.default_size)


def test_options_override_a_recipe_and_set_overrides_options():
    resolved = distill.resolve_recipe("mini", "123", None, "~", ["data.source=mine", "train.batch_size=8"])
    assert (resolved.teacher.source, resolved.data.source, resolved.train.batch_size) == ("123", "mine", 8)
    assert distill.resolve_recipe(None, "embedded", None, None).name == "mini"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((None, None, None, None), "onestroke distill mini"),
        (("sdxl-anime", None, None, "pictures"), "--teacher"),
        (("sdxl-anime", "model", None, None), "--data"),
        (("minni", None, None, None), "mini"),
    ],
)
def test_what_a_run_still_lacks_is_named(arguments, part):
    with pytest.raises(RecipeError, match=part):
        distill.resolve_recipe(*arguments)


def test_a_teacher_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        distill.resolve_recipe(None, str(tmp_path / "nowhere"), None, "pictures")


def test_distill_leaves_a_student_and_goes_on_from_it(weights, tmp_path):
    settings = ["train.batch_size=2", "train.num_images=4", "train.sample_images=0", "data.num_workers=0"]
    settings += ["train.evaluate_images=4", "train.evaluate_count=2"]
    out = tmp_path / "a run"
    for expected in ("after 2 of 4 pictures", "finished"):
        console = paper()
        distill.run_distill(
            "mini", None, None, None, settings, 0.0 if "after" in expected else None, out, console=console
        )
        assert expected in text_of(console)
    assert "evaluation after 4 pictures" in text_of(console)
    assert f"best:    {out}/best (the one of 4 pictures" in text_of(console)
    console = paper()
    lines = distill.next_commands(distill.resolve_recipe("mini", None, None, None), out / "student", out)
    assert (out / "student" / "model_index.json").exists()
    assert f"--model '{out}/student'" in lines[0] and lines[2].startswith("onestroke evaluate")
    generate.run_generate(
        "a person", tmp_path / "a.png", str(out / "student"), steps=1, seed=0, guidance=0.0, count=1, console=console
    )
    assert "a.png" in text_of(console)


def gan_step(step: int, seconds: float, **terms: float) -> Progress:
    return Progress(step, 100 + 16 * step, seconds, terms)


def test_lines_come_every_ten_seconds_and_at_the_end():
    now = 0.0
    console = paper()
    with Display(console, 1000, "run", clock=lambda: now) as observe:
        for step in range(1, 16):
            now = 2.0 * step
            observe(gan_step(step, now, **{"denoiser/loss": 0.5}), 30.0)
    lines = text_of(console).splitlines()
    assert [re.search(r"([\d,]+)/1,000", line)[1] for line in lines] == ["116", "196", "276", "340"]
    assert lines[-1] == "run: 340/1,000 pictures (34%), 8.0 pictures/s, 0:30 left; denoiser/loss 0.5000"


def test_a_terminal_shows_the_same_in_place():
    console = Console(file=io.StringIO(), width=100, force_terminal=True, legacy_windows=False)
    with Display(console, 1000, "run") as observe:
        observe(gan_step(1, 1.0, **{"denoiser/loss": 0.5}), None)
    assert "116/1,000" in text_of(console)


def test_a_display_that_saw_no_step_prints_nothing():
    console = paper()
    with Display(console, 1000, "run") as observe:
        pass
    assert text_of(console) == "" and observe.images == 0


def test_summary_averages_logits_over_heads():
    terms = {
        "student/adversarial": 0.25,
        "student/distillation": 0.5,
        "student/loss": 9.0,
        "discriminator/real_0": 1.0,
        "discriminator/real_1": 3.0,
        "discriminator/fake_0": -1.0,
        "discriminator/real_positive_0": 50.0,
    }
    assert summary(terms) == "adversarial 0.250, distillation 0.500, real logits +2.00, fake logits -1.00"
    assert [clock_time(seconds) for seconds in (5, 485, 3723)] == ["0:05", "8:05", "1:02:03"]

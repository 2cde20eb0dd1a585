"""`onestroke demo`: what fits into its minutes."""

from __future__ import annotations

import shlex

import pytest
import torch

from onestroke.build import source_of, teacher_of
from onestroke.commands import demo
from onestroke.config import load_recipe, save_recipe
from onestroke.embedded import embedded_student
from onestroke.evaluate.compare import Ways
from onestroke.evaluate.pictures import Way
from onestroke.export import export_folder
from onestroke.train import anchoring


@pytest.mark.parametrize(
    ("seconds", "count"),
    [(0.05, demo.DEMO_IMAGES), (0.25, 260), (0.333, 200), (2.0, demo.FEWEST_IMAGES)],  # half as many again for spread
)
def test_a_demo_draws_as_many_pictures_as_there_is_time_for(seconds, count):
    assert demo.images_within(100.0, seconds) == count


def test_a_demo_times_a_picture_by_every_way(monkeypatch):
    clock = iter([0.0, 8.0, 10.0, 14.0, 20.0, 24.0])
    monkeypatch.setattr(demo.time, "monotonic", lambda: next(clock))
    drawn = []
    way = Way("key", 1, lambda prompts, seeds: drawn.append(len(prompts)))
    assert demo.seconds_a_picture(Ways({1: way, 4: way}, {1: way})) == 1.0  # 16 s for 16 pictures by all three
    assert drawn == [16, 16, 16]


def anchors(out, minutes: float) -> tuple[int, int]:
    recipe = demo.demo_recipe(out, minutes=minutes, seed=3)
    assert recipe.seed == 3
    return recipe.anchors.count, recipe.anchors.images


def test_a_demo_with_time_has_anchors_and_one_that_goes_on_keeps_what_it_began_with(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "seconds_an_anchor", lambda *_: 0.05)
    assert anchors(tmp_path, 1.9) == (0, 0) and anchors(tmp_path, 10) == (1000, 4000)
    for folder in ("short", "long/anchoring", "longer"):
        (tmp_path / folder).mkdir(parents=True)
    save_recipe(demo.demo_recipe(tmp_path, minutes=1, seed=3), tmp_path / "short" / "recipe.yaml")
    assert anchors(tmp_path / "short", 30) == (0, 0)
    begun = demo.demo_recipe(tmp_path, minutes=10, seed=3)
    for folder in ("long/anchoring", "longer"):  # killed before ADD, or in it
        save_recipe(begun, tmp_path / folder / "recipe.yaml")
    assert anchors(tmp_path / "long", 30) == anchors(tmp_path / "longer", 30) == (1000, 4000)
    assert demo.demo_recipe(tmp_path / "long", minutes=30, seed=3) == begun


@pytest.mark.parametrize(("seconds", "count"), [(0.1, 1000), (0.15, 660), (0.43, 230), (0.6, 160), (1.1, 0)])
def test_a_slow_machine_draws_fewer_anchors_or_none(seconds, count, tmp_path, monkeypatch):
    """At 0.43 seconds each, those of a fast machine took longer than the demo, and ADD never began.

    In tens and with a lower bar, so that a machine's noise does not decide whether there are any: at 0.5 seconds each
    either 200 were drawn or none, and without any four steps came to twice the distance from real pictures.
    """
    monkeypatch.setattr(demo, "seconds_an_anchor", lambda *_: seconds)
    assert anchors(tmp_path, 10) == (count, 4 * count)


def test_anchors_are_timed_as_they_are_drawn_by_every_core_and_after_a_first_that_does_not_count(monkeypatch):
    clock, calls = [0.0], []
    drawing = anchoring._drawing

    def slow(*networks):
        draw = drawing(*networks)

        def timed(captions, rows, at_once):
            calls.append((len(captions), len(rows), at_once))
            clock[0] += 100.0 if len(calls) == 1 else 8.0
            return draw(captions, rows, at_once)

        return timed

    monkeypatch.setattr(anchoring, "_drawing", slow)
    monkeypatch.setattr(anchoring.time, "monotonic", lambda: clock[0])
    recipe = load_recipe("mini-long", ["anchors.steps=4"])
    assert anchoring.seconds_an_anchor(teacher_of(recipe), source_of(recipe.data), recipe) == 0.5
    assert calls == [(2, 2, 1), (16, 16, max(1, 16 // torch.get_num_threads()))]


def test_the_next_commands_go_on_with_the_same_run_wherever_it_is(tmp_path):
    draw, go_on, _ = (
        shlex.split(line, comments=True)
        for line in demo.next_commands(tmp_path / "my run" / "student", tmp_path / "my run", minutes=20, seed=5)
    )
    assert go_on == ["onestroke", "demo", "--minutes", "60", "--seed", "5", "--out", str(tmp_path / "my run")]
    assert draw[2:5] == ["a laughing person with pink hair and round glasses", "--model", f"{tmp_path}/my run/student"]
    assert "--seed" not in demo.next_commands(tmp_path, tmp_path, minutes=1, seed=0)[1]


def test_a_demo_that_ends_before_add_begins_has_a_report(tmp_path, monkeypatch):
    for name, value in (("FEWEST_IMAGES", 30), ("DEMO_IMAGES", 30), ("SHOWN_TEACHER_STEPS", (1,))):
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "measure_latency", lambda *_, **__: ())
    recipe = load_recipe("mini-long", ["seed=3"])
    student = export_folder(embedded_student(), tmp_path / "student", card="")
    report = demo.demo_report(recipe, student, tmp_path, minutes=10, on_progress=lambda *_: None)
    assert report.recipe.startswith("name: mini-long\nseed: 3") and report.facts["pictures seen"] == "0"
    (grid,) = report.grids
    assert [column.label for column in grid.columns] == ["1 step", "1 step", "2 steps", "4 steps"]
    assert (tmp_path / "report.html").stat().st_size > 10_000

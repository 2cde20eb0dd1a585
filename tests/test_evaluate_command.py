"""The command `evaluate`: gate, report, card, grids, from model folders to exit status."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from painted import colour_looking, never, noise_pictures, paint, task_of
from PIL import Image
from pipelines import tiny_sd
from rich.console import Console

from onestroke import cli
from onestroke.card import model_card, recipe_in, with_evaluation
from onestroke.commands import evaluate
from onestroke.config import recipe_from
from onestroke.errors import RecipeError
from onestroke.evaluate.catalog import MEASURES, QUESTIONS
from onestroke.evaluate.compare import Looking, Ways, compare_grid, find, report_of
from onestroke.evaluate.features import STYLE
from onestroke.evaluate.findings import Measured, Missing
from onestroke.evaluate.gate import judge_gate, parse_gate
from onestroke.evaluate.measures import measure_all
from onestroke.evaluate.pictures import Way
from onestroke.evaluate.report import Report
from onestroke.evaluate.scored import Networks, Scored
from onestroke.evaluate.section import card_section
from onestroke.sample import student_scheduler

CPU = torch.device("cpu")


# the gate


def measured(key: str, value: float, low: float | None, high: float | None, **changes) -> Measured:
    base = Measured(key, "student, 1 step", value, low, high, 1000, 1, role="student")
    return replace(base, **changes)


NETWORKS = Networks({"seen": ("fd",), "judge": ("fd",)}, trained_against=frozenset({"seen"}))


def test_the_gate_tests_the_worse_end_and_says_which_line_failed():
    found = [
        measured("fd_ratio", 1.05, 1.0, 1.12, network="judge"),
        measured("fd_ratio", 0.5, 0.4, 0.6, network="seen"),
        measured("spread_ratio", 0.9, 0.86, 0.95, network="judge"),
        measured("adherence_drop", 0.01, -0.01, 0.03),
    ]
    for text, passed, part in (
        ("fd_ratio@1<=1.1", False, "fd_ratio(judge)@1 = 1.05, 95% interval 1 to 1.12 (n = 1000): 1.12 > 1.1"),
        ("fd_ratio<=1.12", True, "1.12 <= 1.12"),
        ("spread_ratio@1 >= .85", True, "0.86 >= 0.85"),
        ("adherence_drop@1<=0.02", False, "0.03 > 0.02"),
        ("fd_ratio(seen)@1<=9", False, "trained against"),
        ("recall@1>=0.5", False, "not measured"),
    ):
        [outcome] = judge_gate(parse_gate(text, steps=(1, 4)), found, NETWORKS)
        assert (outcome.passed, part in outcome.line) == (passed, True), outcome.line


def test_a_gate_on_nothing_but_seen_features_or_nan_does_not_pass():
    seen = [measured("fd_ratio", 0.5, 0.4, 0.6, network="seen")]
    [outcome] = judge_gate(
        parse_gate("fd_ratio<=9", steps=(1,)), seen, Networks({"seen": ("fd",)}, trained_against=frozenset({"seen"}))
    )
    assert not outcome.passed
    nan = [measured("fd_ratio", float("nan"), float("nan"), float("nan"), network="judge")]
    assert not judge_gate(parse_gate("fd_ratio<=9", steps=(1,)), nan, NETWORKS)[0].passed


def test_a_missing_network_is_named_where_the_gate_needs_it():
    missing = [Missing("pickscore", "its weights are not on this machine", "hf download it")]
    [outcome] = judge_gate(parse_gate("pickscore_drop@1<=0", steps=(1,)), [], NETWORKS, missing)
    assert not outcome.passed and "hf download it" in outcome.line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fd_ration@1<=1", "no measure is called 'fd_ration'. Did you mean 'fd_ratio'"),
        ("fd_ratio@8<=1", "not drawn at 8 steps. Drawn: 1, 4"),
        ("fd_ratio@1<1", "no condition"),
        ("fd_ratio", "no condition"),
        ("zzzz<=1", "Measures: fd, "),
    ],
)
def test_a_gate_that_no_run_can_meet_is_refused(text, said):
    with pytest.raises(RecipeError, match=re.escape(said)):
        parse_gate(f"fd@1<=3, {text}", steps=(1, 4))


def test_every_measure_answers_a_question_and_every_alarm_says_what_is_broken():
    assert {measure.question for measure in MEASURES.values()} == set(QUESTIONS)
    assert all(measure.alarm_says for measure in MEASURES.values() if measure.alarm != (None, None))


# the command, from model folders to exit status


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny student and teacher with the recipe that made one of the other, and captioned pictures in two styles."""
    root = tmp_path_factory.mktemp("models")
    recipe = recipe_from({"name": "tiny", "teacher": {"source": str(root / "teacher"), "guidance": [2.0, 4.0]},
                          "data": {"source": str(root / "training"), "size": 64}})  # fmt: skip
    tiny_sd("v_prediction", True).save_pretrained(root / "teacher")
    student = tiny_sd("v_prediction", True)
    student.scheduler = student_scheduler(student.scheduler.config)
    student.save_pretrained(root / "student")
    (root / "student" / "README.md").write_text(model_card(recipe, images=10), "utf-8")
    (root / "pictures").mkdir()
    lines = []
    for i in range(44):
        Image.fromarray(noise_pictures(1, 70)[0] // (1 + i % 3)).save(root / "pictures" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}))
    (root / "pictures" / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
    return root


def evaluated(folders, out, monkeypatch, capsys, *options: str) -> tuple[int, str, str]:
    monkeypatch.setattr("onestroke.evaluate.compare.SPREAD_PROMPTS", 20)
    monkeypatch.setattr("onestroke.evaluate.compare.SPREAD_SEEDS", 2)
    monkeypatch.setattr(cli, "console", Console(width=300, no_color=True))
    monkeypatch.setattr(
        "sys.argv",
        ["onestroke", "evaluate", str(folders / "student"), "--steps", "1", "--teacher-steps", "2", "--no-latency",
         "--out", str(out), *options],
    )  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr()
    return stop.value.code, said.out, said.err


def test_evaluate_writes_the_report_and_the_card_and_exits_by_the_gate(folders, tmp_path, monkeypatch, capsys):
    data, card = ("--data", str(folders / "pictures")), folders / "student" / "README.md"
    card.write_text(card.read_text("utf-8") + "\n## What was tried\n\n- This,\n  in vain.\n- And that.\n", "utf-8")
    status, said, _ = evaluated(
        folders, tmp_path, monkeypatch, capsys, *data, "--gate", "kd_teacher@1<=-1e9, failed<=0"
    )
    assert status == 3
    assert "gate FAILED: kd_teacher(efficientnet-lite0)" in said or "trained against, and gates nothing" in said
    assert "gate passed: failed@1 = 0" in said and "not measured: pickscore" in said
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert report["facts"]["teacher"] == f"{folders / 'teacher'}, 2 steps, guidance 3"  # of the recipe
    assert report["facts"]["picture size"] == "64 x 64 pixels"
    lite = [m for m in report["measures"] if m["network"] == "efficientnet-lite0"]
    assert {m["count"] for m in lite if m["key"] == "fd"} == {22} and all(m["low"] is not None for m in lite)
    assert "Trained against" in {note["heading"] for note in report["notes"]}
    assert {"heading": "What was tried", "text": "- This, in vain.\n- And that."} in report["notes"]
    assert "<h3>What was tried</h3>" in (tmp_path / "report.html").read_text("utf-8")
    assert {one["name"] for one in report["missing"]} >= {"hpsv2"}
    card = card.read_text("utf-8")
    assert "Not measured yet" not in card and "Saturation, times the teacher's (n = 22)" in card
    assert recipe_in(card).name == "tiny"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cache", "evaluation.md", "grid.png", "report.html", "report.json",
    ]  # fmt: skip
    # the second time nothing is drawn
    monkeypatch.setattr("onestroke.evaluate.pictures.draw", never)
    first = (tmp_path / "report.json").read_text("utf-8")
    status, _, _ = evaluated(folders, tmp_path, monkeypatch, capsys, *data, "--gate", "failed<=0")
    again = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert status == 0 and again["measures"] == json.loads(first)["measures"]


def test_evaluate_refuses_what_cannot_work_before_it_loads_a_model(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("onestroke.commands.evaluate.load", never)
    (tmp_path / "empty.txt").write_text("")
    for options, said in (
        (("--gate", "fd_ration@1<=1"), "Did you mean 'fd_ratio'"),
        (("--steps", "0,2"), "no numbers of steps"),
        (("--data", "x", "--prompts", str(tmp_path / "empty.txt")), "no prompts"),
        (("--weights", "hpsv2"), "NAME=PATH"),
        (("--weights", f"hpsv2={tmp_path / 'none'}"), "no such file"),
        ((), "Give --data FOLDER"),
    ):
        status, printed, error = evaluated(folders, tmp_path, monkeypatch, capsys, *options)
        assert status == 1 and said in error and error.count("\n") == 1 and not printed, error


def test_the_recipe_tells_which_features_were_trained_against():
    def seen(**discriminator):
        return evaluate.trained_against(recipe_from({"discriminator": discriminator}))

    assert seen() == {"efficientnet-lite0", STYLE}
    assert seen(features="dinov2-small", image_encoder="dinov2-large") == {"dinov2-small", "dinov2-large"}
    assert seen(features="dinov2-small", image_encoder="dinov2-large", conditioning="text") == {"dinov2-small"}
    assert evaluate.trained_against(None) == set()
    assert evaluate.trained_against(evaluate.student_recipe("embedded")) == {"efficientnet-lite0", STYLE}


def test_the_cards_evaluation_is_replaced_and_another_card_is_left_alone():
    card = model_card(recipe_from({"name": "mine"}), images=10)
    once = with_evaluation(card, "| a \\1 | b |\n")
    assert "Not measured yet" not in once and "## Evaluation\n\n| a \\1 | b |\n\n## Recipe" in once
    assert with_evaluation(once, "other\n").count("## Evaluation") == 1 and "| a" not in with_evaluation(
        once, "other\n"
    )
    assert recipe_in(once) == recipe_in(card) == recipe_from({"name": "mine"})
    assert with_evaluation("# Somebody's model\n", "x") is None and recipe_in("# Somebody's model\n") is None
    assert recipe_in("## Recipe\n\n```yaml\nno_such_key: 1\n```\n") is None


def test_short_of_its_aims_the_packaged_students_report_says_what_was_tried():
    notes = evaluate.notes_of(evaluate.Request(), None, Looking((), (), Networks({}), {}))
    (tried,) = (note for note in notes if note.heading == "What was tried")
    assert "10 times the 50-step teacher's" in tried.text and tried.text.count("\n- ") > 5


def test_the_cards_section_leaves_out_what_was_trained_against_and_says_so():
    report = Report(
        "t", "s", flags=(), missing=(Missing("pickscore", "w", "f"),),
        measures=(
            measured("fd", 2.0, 1.0, 3.0, network="judge"), measured("fd", 9.0, 8.0, 10.0, network="seen"),
            measured("fd", 1.0, 0.5, 1.5, network="judge", label="teacher, 50 steps", role="teacher", steps=50),
        ),
    )  # fmt: skip
    section = card_section(report, trained_against=frozenset({"seen"}))
    assert "| measure | student, 1 step | teacher, 50 steps |" in section
    assert "(judge, n = 1,000) | 2.00 [1.00 to 3.00] | 1.00 [0.500 to 1.50] |" in section
    assert "9.00" not in section and "saw them: seen" in section and "Not measured: pickscore" in section
    assert "No model was flagged" in section


def test_the_grid_of_pictures_shows_what_failed_as_grey(tmp_path):
    def fails_on_b(prompts, seeds):
        if "b" in prompts:
            raise ValueError("no b")
        return paint(prompts, seeds)

    grid = compare_grid(Ways({1: Way("s", 1, fails_on_b)}, {4: Way("t", 4, paint, 3.0)}), ("a", "b"), tmp_path)
    assert [(c.group, c.label) for c in grid.columns] == [("teacher", "4 steps"), ("student", "1 step")]
    np.testing.assert_array_equal(grid.rows[0].pictures[0], grid.rows[0].pictures[1])
    assert (grid.rows[1].pictures[1] == 128).all() and grid.rows[1].pictures[0].std() > 0
    assert "guidance 3" in grid.caption


def test_the_worst_pictures_are_the_worst_and_stand_beside_the_teachers(tmp_path):
    def dull_at_nine(prompts, seeds):
        pictures = paint(prompts, seeds)
        pictures[[prompt.endswith(" of 18") for prompt in prompts]] = 90
        return pictures

    looking = colour_looking()
    report = report_of(find(task_of(tmp_path, dull_at_nine), looking), looking, title="t", summary="s")
    gallery = next(g for g in report.galleries if g.title.startswith("Contrast"))
    assert len(gallery.tiles) == 16 and gallery.tiles[0].prompt.endswith(" of 18")
    assert (gallery.tiles[0].picture == 90).all() and gallery.tiles[0].beside.std() > 0


def test_a_share_of_a_heed_that_may_be_nothing_is_not_told(tmp_path):
    rng = np.random.default_rng(0)
    looking = colour_looking()
    collected = find(task_of(tmp_path), looking).collected
    noise, sure = rng.standard_normal(40), 1 + 0.1 * rng.standard_normal(40)
    for teachers, is_told in ((noise, False), (sure, True)):
        scored = Scored({"adherence": dict.fromkeys(collected.sets, teachers)}, {})
        found, missing = measure_all(collected, scored, looking.networks)
        assert any(m.key == "adherence_kept" for m in found) == is_told
        assert any(one.name == "adherence_kept" for one in missing) == (not is_told)

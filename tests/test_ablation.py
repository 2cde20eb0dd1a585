"""Ablations: which runs they take, what they may claim, and that a finished run is not run again."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from rich.console import Console

from onestroke import cli
from onestroke.ablation import scores as ablation_scores
from onestroke.ablation.report import ablation_html, ablation_json, ablation_markdown, shown_value, words
from onestroke.ablation.scores import STEPS, Scores, Yardstick, load_scores, save_scores
from onestroke.ablation.study import entries_of, load_study, parse_over, runs_of, study_from, study_over
from onestroke.ablation.table import (
    Measured,
    Reading,
    Row,
    Spread,
    claims_of,
    pooled_spread,
    rows_of,
    widened,
)
from onestroke.commands import ablate
from onestroke.errors import NonFiniteLoss, RecipeError, ResourceError
from onestroke.evaluate.intervals import Interval, paired_bootstrap
from onestroke.train.trainer import Progress
from tests.pipelines import tiny_sdxl

ROOT = Path(__file__).parents[1]
CONDITIONING = "discriminator.conditioning=none,text,image,both"


# which runs


def test_values_are_yaml():
    assert parse_over(CONDITIONING) == ("discriminator.conditioning", ["none", "text", "image", "both"])
    assert parse_over("losses.r1_gamma=0, 1e-5") == ("losses.r1_gamma", [0, "1e-5"])
    assert parse_over("teacher.guidance=[2, 2],[3, 5]") == ("teacher.guidance", [[2, 2], [3, 5]])
    assert parse_over("student.prediction_type=null,sample")[1] == [None, "sample"]


def test_each_key_is_varied_by_itself_or_all_are_combined():
    over = ["losses.weighting=exponential,sds", "discriminator.conditioning=none,both"]
    alone, together = (study_over("mini", over, shared={}, is_grid=is_grid) for is_grid in (False, True))
    assert [(group.title, len(group.settings)) for group in alone.groups] == [
        ("losses.weighting", 2),
        ("discriminator.conditioning", 2),
    ]
    assert [len(group.settings) for group in together.groups] == [4]
    recipes = [entry.runs[0].recipe for entry in entries_of(together)]
    assert {(recipe.losses.weighting, recipe.discriminator.conditioning) for recipe in recipes} == {
        ("exponential", "none"), ("exponential", "both"), ("sds", "none"), ("sds", "both"),
    }  # fmt: skip
    assert len(runs_of(entries_of(alone))) == 3  # exponential and both are the recipe's own, one run


def test_only_what_is_varied_differs_and_every_row_comes_before_a_second_seed():
    study = study_over("mini", [CONDITIONING], shared={"train.num_images": 320}, seeds=[3, 4])
    entries = entries_of(study)
    runs = runs_of(entries)
    assert [run.recipe.seed for run in runs] == [3] * 4 + [4] * 4
    assert len({run.name for run in runs}) == 8 and all(re.fullmatch(r"[\w.=-]+", run.name) for run in runs)
    for run in runs:
        same = replaced(run.recipe.model_dump(), seed=0, conditioning="both")
        assert same == replaced(runs[0].recipe.model_dump(), seed=0, conditioning="both")
        assert run.recipe.train.num_images == 320
    assert [run.name for run in runs_of(entries_of(study))] == [run.name for run in runs]
    longer = study_over("mini", [CONDITIONING], shared={"train.num_images": 640}, seeds=[3])
    assert not {run.name for run in runs_of(entries_of(longer))} & {run.name for run in runs}


def replaced(tree: dict, *, seed: int, conditioning: str) -> dict:
    return tree | {"seed": seed, "discriminator": tree["discriminator"] | {"conditioning": conditioning}}


@pytest.mark.parametrize(
    ("over", "part"),
    [
        (["discriminator.conditionin=none"], "Did you mean 'discriminator.conditioning'"),
        (["discriminator.conditioning=non"], "discriminator.conditioning = 'non'"),
        (["train.num_images=100,200"], "cannot differ between runs.*--num-images"),
        (["seed=0,1"], "--seeds"),
        (["data.size=64,128"], "cannot be judged.*128"),
        (["losses.weighting=sds,sds"], "a value stands twice"),
        (["losses.weighting=sds", "losses.weighting=nfsd"], "varied twice"),
        (["losses.weighting="], "no value"),
        (["losses.weighting"], "section.key=value"),
        (["losses.weighting=[sds"], "not YAML"),
    ],
)
def test_what_cannot_be_varied_is_told_in_one_line(over, part):
    with pytest.raises(RecipeError, match=part) as caught:
        entries_of(study_over("mini", over, shared={}))
    assert "\n" not in str(caught.value)


def test_a_study_file_is_checked_and_options_change_it(tmp_path):
    path = tmp_path / "study.yaml"
    tree = {
        "title": "t",
        "set": {"train.num_images": 800},
        "seeds": [1],
        "groups": [{"title": "g", "seeds": [1, 2], "settings": [{"label": "a"}, {"label": "b", "seeds": [5]}]}],
    }
    path.write_text(yaml.safe_dump(tree))
    options = {"is_grid": False, "seeds": None, "num_images": None, "count": None}
    study = ablate.study_of(str(path), [], **options)
    assert [[run.recipe.seed for run in entry.runs] for entry in entries_of(study)] == [[1, 2], [5]]
    changed = ablate.study_of(str(path), [], **options | {"seeds": "7", "num_images": 160, "count": 100})
    runs = runs_of(entries_of(changed))
    assert [(run.recipe.seed, run.recipe.train.num_images) for run in runs] == [(7, 160)] and changed.count == 100
    for key, value, part in (
        ("grups", [], "Did you mean 'groups'"),
        ("count", 5, "count: .*100"),
        ("groups", [tree["groups"][0]] * 2, "two are called 'g'"),
    ):
        with pytest.raises(RecipeError, match=part):
            study_from(tree | {key: value})
    with pytest.raises(RecipeError, match="Drop --over"):
        ablate.study_of(str(path), [CONDITIONING], **options)
    with pytest.raises(RecipeError, match="nothing is varied"):
        ablate.study_of("mini", [], **options)
    with pytest.raises(RecipeError, match="--seeds 0,1,2"):
        ablate.study_of("mini", [CONDITIONING], **options | {"seeds": "a"})


def test_the_papers_table_is_ready_with_equal_budgets():
    study = load_study(ROOT / "benchmarks" / "table1.yaml")
    entries = entries_of(study)
    runs = runs_of(entries)
    assert len(runs) == 16 and len({run.recipe.train.num_images for run in runs}) == 1
    assert study.count >= 2000
    rows = {entry.setting.label: entry.runs for entry in entries}
    assert all(len(rows[label]) == 3 for label in ("adversarial alone", "distillation alone", "both"))
    assert rows["adversarial alone"][0].recipe.losses.distill_weight == 0
    assert rows["distillation alone"][0].recipe.losses.adversarial_weight == 0
    for same in ("exponential", "text and image", "the teacher's weights", "latents"):
        assert rows[same] == rows["both"]
    different = {run.recipe.model_dump_json(exclude={"seed"}) for run in runs}
    assert len(different) == 10
    assert "onestroke ablate benchmarks/table1.yaml" in (ROOT / "benchmarks" / "table1.yaml").read_text()


# the table


def scores_of(reference: np.ndarray, shift: float, followed: float = 0.5) -> Scores:
    """Features at a Fréchet distance of `shift` squared from the reference; every prompt followed alike."""
    features = reference.copy()
    features[:, 0] += shift
    shown = np.zeros((2, 4, 4, 3), np.uint8)
    per_prompt = np.full(len(reference), followed)
    return Scores(dict.fromkeys(STEPS, features), dict.fromkeys(STEPS, per_prompt), dict.fromkeys(STEPS, shown))


@pytest.fixture
def reference() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(200, 3))


def test_spread_between_seeds_matches_hand_computation():
    spread = pooled_spread([[1.0, 3.0], [0.0, 0.0, 6.0], [5.0]])  # squares 2 and 24, freedom 1 and 2
    assert spread.deviation == pytest.approx(math.sqrt(26 / 3)) and spread.freedom == 3
    assert Spread(2.0, 2).reach(4) == pytest.approx(4.30265 * 2 / 2, rel=1e-4)  # Student's t, 2 degrees of freedom
    assert pooled_spread([[1.0], [2.0]]).reach(1) == 0
    wide = widened(Interval(10.0, 7.0, 15.0), 4.0)
    assert (wide.low, wide.high) == (pytest.approx(5.0), pytest.approx(10 + math.sqrt(41)))


def test_a_row_of_several_seeds_is_their_mean_and_its_interval_holds_their_spread(reference):
    one = Measured("g", "one", "", (0,), (scores_of(reference, 3.0),))
    two = Measured("g", "two", "", (0, 1), (scores_of(reference, 2.0, 0.4), scores_of(reference, 4.0, 0.6)))
    alone = rows_of([one], reference)[0].reading("distance", 1)
    assert alone.value == pytest.approx(9) and alone.low <= 9 <= alone.high
    rows = rows_of([one, two], reference)
    distance = rows[1].reading("distance", 4)
    assert distance.by_seed == (pytest.approx(4), pytest.approx(16)) and distance.value == pytest.approx(8)
    reach = 12.7062 * math.log(4) / math.sqrt(2) / math.sqrt(2)  # t of 1, times the deviation of ln 4 and ln 16
    assert distance.high == pytest.approx(8 * math.exp(reach), rel=1e-3)
    adherence = rows[1].reading("adherence", 1)
    assert adherence.value == pytest.approx(0.5) and adherence.by_seed == (pytest.approx(0.4), pytest.approx(0.6))
    assert adherence.high == pytest.approx(0.5 + 12.7062 * 0.1, rel=1e-3)
    pooled = rows[0].reading("distance", 1)  # of one seed, it takes the others' spread
    assert pooled.high == pytest.approx(9 * math.exp(reach * math.sqrt(2)), rel=1e-3)
    twice = rows_of([one, two, replace(two, group="h")], reference)
    assert twice[:2] == rows  # a setting in two groups tells its spread once


def test_the_chance_of_the_pictures_is_that_of_the_metrics(reference):
    rng = np.random.default_rng(1)
    followed, features = rng.normal(0.5, 0.2, 200), rng.normal(size=(200, 3)) + 1
    scores = Scores(dict.fromkeys(STEPS, features), dict.fromkeys(STEPS, followed), {})
    row = rows_of([Measured("g", "a", "", (0,), (scores,))], reference)[0]
    expected = paired_bootstrap(followed)
    assert row.reading("adherence", 1).low == pytest.approx(expected.low)
    distance = row.reading("distance", 1)
    assert 0.7 < math.log(distance.high / distance.low) / (2 * 2.262 * 2 / math.sqrt(3 * 200)) < 2.8  # delta method


def reading(measure: str, value: float, reach: float, steps: int = 1) -> Reading:
    return Reading(measure, steps, value, value - reach, value + reach, (value,))


def row(label: str, distance: float, followed: float, *, reach: float = 1.0, group: str = "g", failed: str = "") -> Row:
    readings = [
        reading(measure, value, reach * scale, steps)
        for measure, value, scale in (("distance", distance, 1.0), ("adherence", followed, 0.1))
        for steps in STEPS
    ]
    return Row(group, label, "", (0,), () if failed else tuple(readings), failed)


def test_an_order_is_claimed_only_where_intervals_part():
    rows = (row("a", 10, 0.9), row("b", 11.9, 0.5), row("c", 13, 0.75), row("d", 1, 0.1, group="other"))
    claims = claims_of(rows)
    distance = {(c.better, c.worse) for c in claims if c.measure == "distance" and c.steps == 1}
    adherence = {(c.better, c.worse) for c in claims if c.measure == "adherence" and c.steps == 4}
    assert distance == {("a", "c")}  # 10 +- 1 and 13 +- 1; lower is better
    assert adherence == {("a", "b"), ("c", "b")}  # higher is better
    assert {c.group for c in claims} == {"g"}
    touching = (row("a", 10, 0.5), row("b", 12, 0.5))
    assert claims_of(touching) == ()
    assert claims_of((row("a", 1, 0.9), row("b", 0, 0, failed="no"), row("c", 2, 0.9))) == ()


def report_with(rows, **changes):
    study = study_over("mini", ["losses.weighting=sds,nfsd"], shared={"train.num_images": 320}, count=100)
    prompts = SimpleNamespace(texts=tuple(f"a fox {i}" for i in range(6)))
    reference = np.random.default_rng(0).normal(size=(100, 3))
    state = ablate._Progress(Path(), Yardstick(None, prompts, reference, scores_of(reference, 0.1)), Console(), None)
    report = ablate.report_of(study, entries_of(study), state, None, "onestroke ablate mini --over losses.weighting=a")
    return replace(report, rows=tuple(rows), claims=claims_of(rows), **changes)


def test_words_say_what_is_claimed_and_how_much_is_not():
    report = report_with((row("a", 10, 0.9), row("b", 11.9, 0.5), row("c", 13, 0.75), row("d", 1, 0.1, group="h")))
    said = words(report, "g")
    assert (
        said[0]
        == "Fréchet distance, 1 step: “a” is nearer to real pictures than “c”. Of 3 pairs, 2 are not told apart."
    )
    assert said[3] == (
        "Prompt adherence, 4 steps: “a” and “c” follow their prompts better than “b”. Of 3 pairs, 1 is not told apart."
    )
    assert words(report, "h") == []
    assert words(report_with((row("a", 10, 0.9), row("b", 11, 0.9))), "g") == [
        "No order is claimed: at every measure and number of steps, all intervals touch."
    ]


def test_markdown_json_and_page_say_the_same_and_escape_it():
    nasty = "a|b <script>alert(1)</script>"
    rows = (row(nasty, 10, 0.9), row("b", 120, 0.5), row("c", 0, 0, failed="did not finish: loss is not finite"))
    report = report_with(rows, num_missing=2, shown={("g", "b"): {1: np.zeros((2, 4, 4, 3), np.uint8)}})
    markdown = ablation_markdown(report)
    assert (
        "| a\\|b <script>alert(1)</script> | 1 | 10.0 [9.00, 11.0] | 10.0 [9.00, 11.0] | 90.0% [80.0%, 100.0%]"
        in markdown
    )
    assert "| c | 1 | did not finish: loss is not finite |" in markdown
    assert "2 runs are missing" in markdown and "Every run saw 320 pictures" in markdown
    assert "| real held-out pictures |" in markdown
    table = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    tree = json.loads(ablation_json(report))
    assert tree["rows"][0]["readings"][0]["value"] == 10 and "shown" not in tree and len(tree["claims"]) == 4
    page = ablation_html(report)
    assert "<script" not in page and "&lt;script&gt;" in page and "did not finish" in page
    assert page.count("data:image/webp;base64,") == 2
    assert not re.search(r"https?:|url\(|@import|<link", page)


def test_numbers_are_written_for_readers():
    assert [shown_value("distance", v) for v in (0.01234, 9.999, 12.3, 99.96, 1234.5)] == [
        "0.0123", "10.0", "12.3", "100", "1,234",
    ]  # fmt: skip
    assert [shown_value("adherence", v) for v in (0.6124, -0.012)] == ["61.2%", "−1.2%"]


# the runs


def test_scores_come_back_whole_for_the_same_yardstick_alone(tmp_path, reference, monkeypatch):
    path = tmp_path / "runs" / "scores.npz"
    assert load_scores(path, "judge/200") is None
    save_scores(scores_of(reference, 1.0), "judge/200", path)
    found = load_scores(path, "judge/200")
    np.testing.assert_array_equal(found.features[4], scores_of(reference, 1.0).features[4])
    np.testing.assert_array_equal(found.shown[1], np.zeros((2, 4, 4, 3), np.uint8))
    assert load_scores(path, "judge/100") is None
    before = path.read_bytes()
    path.write_bytes(before[: len(before) // 2])
    assert load_scores(path, "judge/200") is None

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ablation_scores.os, "fsync", full)
    with pytest.raises(ResourceError, match="No space left"):
        save_scores(scores_of(reference, 1.0), "judge/200", path)
    assert [p.name for p in path.parent.iterdir()] == ["scores.npz"]


class Machine:
    """Stands for training and measuring: what was trained how far, and when it breaks."""

    def __init__(self, monkeypatch, reference: np.ndarray) -> None:
        self.trained, self.stops, self.breaks = [], set(), set()
        self.reference = reference
        prompts = SimpleNamespace(texts=tuple(f"a fox {i}" for i in range(len(reference))))
        yardstick = Yardstick(None, prompts, reference, scores_of(reference, 0.1))
        monkeypatch.setattr(Yardstick, "stamp", "judge")
        monkeypatch.setattr(ablate, "make_yardstick", lambda judge, count, cache: yardstick)
        monkeypatch.setattr(ablate, "distill", self.distill)
        monkeypatch.setattr(ablate, "load", str)
        monkeypatch.setattr(
            ablate, "measure", lambda model, yardstick, cache, **more: scores_of(reference, 1.0 + len(self.trained))
        )

    def distill(self, recipe, out, *, minutes, observe):
        key = (recipe.losses.weighting, recipe.seed)
        self.trained.append(key)
        total = recipe.train.num_images
        if key in self.breaks:
            raise NonFiniteLoss("student/loss is not finite", where="step 3")
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        observe(Progress(1, total // 2 if key in self.stops else total, 1.0, {"student/loss": 1.0}), None)
        return out / "student"


@pytest.fixture
def machine(monkeypatch, reference) -> Machine:
    return Machine(monkeypatch, reference)


def run(out: Path, *, minutes=None, seeds=(0, 1)) -> tuple[bool, str]:
    study = study_over(
        "mini", ["losses.weighting=exponential,sds,nfsd"], shared={"train.num_images": 320}, seeds=list(seeds)
    )
    console = Console(file=io.StringIO(), width=200)
    done = ablate.run_ablate(study, out, minutes=minutes, command="onestroke ablate mini", console=console)
    return done, console.file.getvalue()


def test_finished_runs_are_not_repeated_and_a_stopped_one_goes_on(tmp_path, machine):
    machine.stops = {("sds", 0)}
    done, printed = run(tmp_path)
    assert not done and "5 of 6 runs to go; run again to continue" in printed
    assert machine.trained == [("exponential", 0), ("sds", 0)]
    assert not list(tmp_path.glob("runs/*exponential*/checkpoints")) and not list(
        tmp_path.glob("runs/base*/checkpoints")
    )
    assert len(list(tmp_path.glob("runs/*/checkpoints"))) == 1  # the stopped one goes on from its own
    machine.stops, machine.trained = set(), []
    done, _ = run(tmp_path)
    assert done and machine.trained == [("sds", 0), ("nfsd", 0), ("exponential", 1), ("sds", 1), ("nfsd", 1)]
    first = (tmp_path / "ablation.json").read_text()
    machine.trained = []
    done, _ = run(tmp_path)
    assert done and machine.trained == []
    values = [
        [r["readings"] for r in json.loads(text)["rows"]] for text in (first, (tmp_path / "ablation.json").read_text())
    ]
    assert values[0] == values[1] and len(values[0]) == 3
    done, _ = run(tmp_path, seeds=(0, 1, 2))
    assert machine.trained == [("exponential", 2), ("sds", 2), ("nfsd", 2)]


def test_a_row_stands_in_the_table_once_all_its_seeds_are_there(tmp_path, machine):
    machine.stops = {("sds", 1)}
    run(tmp_path)
    tree = json.loads((tmp_path / "ablation.json").read_text())
    assert [one["label"] for one in tree["rows"]] == ["losses.weighting=exponential"]
    assert tree["num_missing"] == 2 and tree["freedom"] == 1
    assert [one["label"] for one in tree["yardsticks"]] == ["real held-out pictures"]  # the teacher comes last


def test_no_time_left_trains_nothing(tmp_path, machine):
    done, printed = run(tmp_path, minutes=0.0)
    assert not done and machine.trained == [] and "6 of 6 runs to go" in printed
    assert not (tmp_path / "ablation.json").exists()


def test_a_run_that_breaks_is_a_finding_and_the_others_go_on(tmp_path, machine):
    machine.breaks = {("sds", 0)}
    done, printed = run(tmp_path, seeds=(0,))
    assert done and "failed" in printed
    rows = json.loads((tmp_path / "ablation.json").read_text())["rows"]
    assert [bool(one["readings"]) for one in rows] == [True, False, True]
    assert rows[1]["failed"] == "did not finish: student/loss is not finite, step 3"
    assert "did not finish" in (tmp_path / "ablation.md").read_text()


def test_an_interrupted_measurement_leaves_the_table_of_what_is_there(tmp_path, machine, monkeypatch, reference):
    def interrupted(model, yardstick, cache, **more):
        if len(machine.trained) == 2:
            raise KeyboardInterrupt
        return scores_of(reference, 1.0)

    monkeypatch.setattr(ablate, "measure", interrupted)
    done, printed = run(tmp_path, seeds=(0,))
    assert not done and "2 of 3 runs to go" in printed and (tmp_path / "ablation.html").exists()


def test_the_command_line_makes_the_study_and_the_line_that_makes_it_again(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(ablate, "run_ablate", lambda *arguments, **more: calls.append((*arguments, more)))
    line = "onestroke ablate mini --over losses.distance=pixel,latent --over seed=0 --grid --set train.batch_size=2"
    line += " --seeds 0,1 --num-images 4 --count 100"
    monkeypatch.setattr(sys, "argv", [*line.split(), "--minutes", "3", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    ((study, out, more),) = calls
    assert out == tmp_path and more["minutes"] == 3 and more["command"] == line
    assert study.set == {"train.batch_size": 2, "train.num_images": 4} and study.seeds == (0, 1) and study.count == 100
    assert [setting.label for setting in study.groups[0].settings] == [
        "losses.distance=pixel, seed=0",
        "losses.distance=latent, seed=0",
    ]


def test_a_tiny_run_ends_in_a_table(tmp_path, monkeypatch):
    pipeline = tiny_sdxl()
    pipeline.unet.register_to_config(sample_size=32)  # 128 px
    pipeline.save_pretrained(tmp_path / "teacher")
    settings = {
        "teacher.source": str(tmp_path / "teacher"), "train.num_images": 4, "train.batch_size": 2,
        "train.precision": "float32", "data.num_workers": 0, "student_optimizer.warmup_images": 0,
    }  # fmt: skip
    study = study_over("mini", ["losses.distance=latent"], shared=settings).model_copy(update={"count": 24})
    console = Console(file=io.StringIO(), width=200)
    assert ablate.run_ablate(study, tmp_path / "out", minutes=None, command="onestroke ablate", console=console)
    tree = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert [one["label"] for one in tree["rows"]] == ["losses.distance=latent"]
    assert (tree["num_images"], tree["count"], tree["num_missing"]) == (4, 24, 0)
    labels = [one["label"] for one in tree["yardsticks"]]
    assert labels == ["real held-out pictures", "the teacher under guidance 3"]  # of the recipe
    for one in (*tree["rows"], *tree["yardsticks"]):
        assert len(one["readings"]) == 4 and all(r["low"] < r["value"] < r["high"] for r in one["readings"])
    student, real = tree["rows"][0]["readings"], tree["yardsticks"][0]["readings"]
    assert student[0]["value"] > real[0]["value"] and student[2]["value"] < real[2]["value"]
    (run,) = (tmp_path / "out" / "runs").iterdir()
    assert yaml.safe_load((run / "recipe.yaml").read_text())["losses"]["distance"] == "latent"
    assert {path.name for path in run.iterdir()} == {".lock", "logs", "recipe.yaml", "scores.npz", "student"}

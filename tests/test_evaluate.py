"""Evaluation: what it refuses of prompts, what it draws and keeps, how it counts."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from painted import Coloured, colour_looking, mean_colour, never, paint, task_of

from onestroke.errors import DataError, ModelError, ResourceError
from onestroke.evaluate import collect as collecting
from onestroke.evaluate.collect import Effort, observe
from onestroke.evaluate.compare import find, plan_of, report_of
from onestroke.evaluate.drawn import MeasureCache, PictureCache
from onestroke.evaluate.gate import judge_gate, parse_gate
from onestroke.evaluate.pictures import DrawnSet, Failed, Order, RealSet, Way, halves, orders_of
from onestroke.evaluate.prompts import PromptSet, read_prompts, shuffled
from onestroke.evaluate.report import report_html
from onestroke.sample import draw

CPU = torch.device("cpu")


# prompts


def test_prompts_are_read_from_every_kind_of_file_with_their_columns(tmp_path):
    rows = [{"prompt": "a cat", "style": "ink", "n": 1}, {"prompt": "a  dog ", "style": "", "n": 2}]
    (tmp_path / "a.txt").write_text("a cat\n\n a dog\n", "utf-8")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    (tmp_path / "a.csv").write_text("\ufeffprompt,style,n\na cat,ink,1\na  dog ,,2\n", "utf-8")
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_prompts(tmp_path / "a.txt") == PromptSet(("a cat", "a dog"))
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        read = read_prompts(tmp_path / name)
        assert read.texts == ("a cat", "a dog")
        assert read.columns == {"style": ("ink", "none"), "n": ("1", "2")}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"\n \n", "no prompts"),
        ("a.txt", "caf\u00e9".encode("latin-1"), "not UTF-8"),
        ("a.csv", b"style\nink\n", "columns style.*prompt"),
        ("a.jsonl", b'{"prompt": "a cat"}\n[1]\n', "line 2 is not an object"),
        ("a.jsonl", b'{"prompt": "a cat"}\n{"prompt": 3}\n', "prompt 2 is empty or not text"),
        ("a.parquet", b"nonsense", "cannot be read as Parquet"),
        ("a.docx", b"a cat", "no prompts are read"),
    ],
)
def test_a_prompt_file_that_cannot_be_used_is_refused_in_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said) as error:
        read_prompts(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_sorted_prompt_file_is_shuffled_alike_each_time_and_keeps_its_rows():
    prompts = PromptSet(tuple("abcdefgh"), {"column": tuple("ABCDEFGH")})
    mixed = shuffled(prompts)
    assert mixed == shuffled(prompts) and mixed.texts != prompts.texts and sorted(mixed.texts) == list("abcdefgh")
    assert [text.upper() for text in mixed.texts] == list(mixed.columns["column"])


def test_columns_group_where_they_have_few_values_or_are_asked_for():
    prompts = PromptSet(
        tuple("abcd" * 5), {"style": ("x", "y") * 10, "one": ("z",) * 20, "id": tuple(map(str, range(20)))}
    )
    assert list(prompts.groupings()) == ["style"]
    assert list(prompts.groupings(("id",))) == ["id"]
    with pytest.raises(DataError, match="no column 'mood'.*style"):
        prompts.groupings(("mood",))


def test_halves_share_no_picture_and_take_from_everywhere():
    first, second = halves(100)
    assert not set(first) & set(second) and len(first) == len(second) == 50
    assert 15 < sum(index < 50 for index in first) < 35
    with pytest.raises(DataError, match="too few"):
        halves(3)


# drawing, looking and keeping


def test_what_was_drawn_and_looked_at_costs_nothing_the_second_time(tmp_path):
    orders = orders_of(["a", "b", "c"], repeats=2)
    first = DrawnSet("x", "student", Way("model 1", 1, paint), orders, PictureCache(tmp_path))
    seen = observe(first, [mean_colour()], MeasureCache(tmp_path))
    again = replace(first, way=Way("model 1", 1, never))
    unseeing = replace(mean_colour(), observe=never)
    np.testing.assert_array_equal(
        observe(again, [unseeing], MeasureCache(tmp_path)).parts["colour"], seen.parts["colour"]
    )
    # another observer looks at the kept pictures; fewer prompts, another order: still not drawn
    observe(replace(again, orders=orders[3:1:-1]), [mean_colour("2")], MeasureCache(tmp_path))
    for other in (Way("model 2", 1, never), Way("model 1", 1, never)):
        with pytest.raises(ModelError, match="again"):
            changed = [Order("a", 99)] if other.key == "model 1" else orders
            observe(
                DrawnSet("x", "student", other, changed, PictureCache(tmp_path)),
                [mean_colour()],
                MeasureCache(tmp_path),
            )


def test_kept_measures_of_another_layout_or_cut_short_are_taken_again(tmp_path):
    cache = MeasureCache(tmp_path)
    cache.save("colour-1", ["a", "b"], np.ones((2, 3)))
    assert cache.load("colour-1", ["a", "b"], 3).tolist() == [[1, 1, 1]] * 2
    assert cache.load("colour-1", ["a", "b"], 4) is None and cache.load("colour-1", ["b", "a"], 3) is None
    [file] = tmp_path.rglob("*.npy")
    file.write_bytes(file.read_bytes()[:-4])
    assert cache.load("colour-1", ["a", "b"], 3) is None
    assert [path for path in tmp_path.rglob("*") if path.name.startswith(".")] == []


def test_a_killed_run_goes_on_and_a_damaged_picture_is_drawn_again(tmp_path):
    orders, drawn = orders_of([f"prompt {i}" for i in range(40)]), []

    def dies_later(prompts, seeds):
        if len(drawn) >= 20:
            raise KeyboardInterrupt
        drawn.extend(prompts)
        return paint(prompts, seeds)

    pictures = DrawnSet("x", "student", Way("m", 1, dies_later), orders, PictureCache(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        observe(pictures, [mean_colour()], MeasureCache(tmp_path))
    assert len(drawn) == 32 and pictures.missing() == 8  # batches of 16
    files = sorted((tmp_path / "pictures").rglob("*.png"))
    files[0].write_bytes(files[0].read_bytes()[:40])
    drawn.clear()
    whole = observe(pictures, [mean_colour()], MeasureCache(tmp_path))
    assert len(drawn) == 9
    fresh = DrawnSet("x", "student", Way("m", 1, paint), orders, PictureCache(tmp_path / "other"))
    np.testing.assert_array_equal(
        observe(fresh, [mean_colour()], MeasureCache(tmp_path / "other")).parts["colour"], whole.parts["colour"]
    )


def test_one_bad_prompt_costs_one_picture_and_no_room_stops_the_run(tmp_path):
    def fails_on_b(prompts, seeds):
        if "b" in prompts:
            raise ValueError("no b\nplease")
        return paint(prompts, seeds)

    orders = orders_of(["a", "b", "c"])
    pictures = DrawnSet("x", "student", Way("m", 1, fails_on_b), orders, PictureCache(tmp_path))
    assert dict(pictures.read(range(3)))[1] == Failed("ValueError: no b please")
    seen = observe(pictures, [mean_colour()], MeasureCache(tmp_path))
    assert seen.failures == {1: "ValueError: no b please"} and np.isnan(seen.parts["colour"][1]).all()
    assert np.isfinite(seen.parts["colour"][[0, 2]]).all()

    def no_room(prompts, seeds):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        observe(replace(pictures, way=Way("n", 1, no_room)), [mean_colour()], MeasureCache(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="goes on where it stopped"):
        observe(replace(pictures, cache=PictureCache(tmp_path / "file")), [mean_colour()], MeasureCache(tmp_path))


def test_pictures_are_looked_at_a_chunk_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "CHUNK", 16)
    sizes = []
    counting = replace(mean_colour(), observe=lambda p, _: sizes.append(len(p)) or p.mean(axis=(1, 2)))
    orders = orders_of([f"prompt {i}" for i in range(40)])
    observe(
        DrawnSet("x", "student", Way("m", 1, paint), orders, PictureCache(tmp_path)), [counting], MeasureCache(tmp_path)
    )
    assert sizes == [16, 16, 8]


def test_a_model_that_draws_what_is_not_finite_is_told():
    class Overflowing:
        def __call__(self, prompt, **_):
            return type("Output", (), {"images": torch.full((len(prompt), 3, 8, 8), torch.nan)})

    with pytest.raises(ModelError, match="not finite"):
        draw(Overflowing(), ["a"], seeds=[0], steps=1, guidance=0.0)


def test_prompts_that_fail_are_counted_left_out_of_all_sets_and_fail_the_gate(tmp_path):
    def fails(prompts, seeds):
        if any(prompt.startswith("prompt 3") for prompt in prompts):
            raise ValueError("cannot draw 3")
        return paint(prompts, seeds)

    looking = colour_looking()
    findings = find(task_of(tmp_path, fails), looking)
    assert len(findings.collected.rows) == 32
    assert {len(one.parts["colour"]) for one in findings.collected.sets.values()} == {32}
    failed = next(m for m in findings.measured if (m.key, m.label) == ("failed", "student, 1 step"))
    assert (failed.value, failed.count) == (8, 40)
    report = report_of(findings, looking, title="t", summary="s", gate=parse_gate("saturation_ratio<=9", steps=(1,)))
    lines = {outcome.line: outcome.passed for outcome in report.gate}
    assert lines["student, 1 step: failed on 8 of 40 pictures"] is False
    assert (
        report.failures["student, 1 step"][0] == "8 of 40" and "cannot draw 3" in report.failures["student, 1 step"][1]
    )
    assert "cannot draw 3" in report_html(report)
    # the teacher is whole again, and so is the student: nothing of the failure is kept
    assert len(find(task_of(tmp_path), looking).collected.rows) == 40


def test_a_model_that_draws_nothing_at_all_stops_the_run(tmp_path):
    with pytest.raises(ModelError, match="student, 1 step: no picture could be drawn .*again"):
        find(task_of(tmp_path, never), colour_looking())


def test_counts_are_cut_to_the_fewest_and_few_prompts_are_drawn_with_several_seeds(tmp_path):
    task = task_of(tmp_path, count=30)
    few = replace(task, real=RealSet("real pictures", Coloured(400), range(0, 50, 2), (16, 16), str))
    assert {len(pictures) for pictures in (plan_of(few).reference, *plan_of(few).sets)} == {25}
    repeated = plan_of(replace(task, prompts=PromptSet(("a", "b", "c")), num_images=31))
    assert {len(pictures) for pictures in (repeated.reference, *repeated.sets)} == {30}
    student = repeated.sets[-1]
    assert [student.prompt(row) for row in range(11)] == ["a"] * 10 + ["b"] and list(repeated.groups[8:12]) == [
        0,
        0,
        1,
        1,
    ]
    assert len({order.seed for order in student.orders}) == 30
    assert student.orders == repeated.sets[1].orders  # teacher and student draw to the same prompts and seeds
    with pytest.raises(DataError, match="1 prompts are too few"):
        plan_of(replace(task, prompts=PromptSet(("a",))))


def test_what_there_are_too_few_pictures_for_says_how_many_it_needs(tmp_path):
    looking = colour_looking()
    findings = find(task_of(tmp_path, count=12), looking)
    assert not {"fd", "spread_ratio", "saturation_ratio"} & {m.key for m in findings.measured}
    assert any(one.why == "12 prompts are too few" and "--num-images 20" in one.fix for one in findings.missing)
    [outcome] = judge_gate(parse_gate("fd@1<=1e9", steps=(1,)), findings.measured, looking.networks, findings.missing)
    assert not outcome.passed and "not measured" in outcome.line and "12 prompts" in outcome.line


def test_with_fewer_than_ten_prompts_nothing_is_measured_but_failures(tmp_path):
    findings = find(task_of(tmp_path, count=9), colour_looking())
    assert {m.key for m in findings.measured} == {"failed"}
    assert any(one.name == "everything" and "Take 10 at least" in one.fix for one in findings.missing)
    assert "Take 10 at least" in report_html(report_of(findings, colour_looking(), title="t", summary="s"))


def test_measures_are_grouped_by_the_columns_of_the_prompts(tmp_path):
    def loud_in_ink(prompts, seeds):
        pictures = paint(prompts, seeds).astype(float)
        mean = pictures.mean(axis=3, keepdims=True)
        is_ink = np.array([int(p.split()[-1]) % 4 == 0 for p in prompts])[:, None, None, None]
        return np.where(is_ink, mean + 0.3 * (pictures - mean), pictures).clip(0, 255).astype(np.uint8)

    columns = {
        "style": tuple("ink" if i % 4 == 0 else "oil" for i in range(0, 120, 2)),
        "id": tuple(map(str, range(60))),
    }
    looking = colour_looking()
    report = report_of(
        find(task_of(tmp_path, loud_in_ink, count=60, columns=columns), looking), looking, title="t", summary="s"
    )
    of = {m.group: m for m in report.measures if (m.key, m.label) == ("saturation_ratio", "student, 1 step")}
    assert of["ink"].value == pytest.approx(0.3, abs=0.05) and of["oil"].value == pytest.approx(1)
    assert of["ink"].count == of["oil"].count == 30 and 0.4 < of[""].value < 0.9
    assert [(table.column, table.label) for table in report.groups] == [("style", "student, 1 step")]
    assert "fd" not in {m.key for m in report.measures if m.column}  # real pictures have no such columns


def test_the_time_left_counts_only_what_is_still_to_be_drawn(tmp_path):
    now, told = [0.0], []
    plan = plan_of(task_of(tmp_path, with_floor=False))
    effort = Effort(plan, lambda *said: told.append(said), clock=lambda: now[0])
    place = {pictures.label: i for i, pictures in enumerate(effort.sets)}
    for label, seconds in (
        ("ref", 10.0),
        ("real pictures", 20.0),
        ("teacher, 1 step", 60.0),
        ("teacher, 20 steps", 500.0),
    ):
        now[0] += seconds
        effort.tell(place[label], 40)
    # nothing is told while the pace of drawing is unknown
    assert [said[3] for said in told[:2]] == [None, None]
    assert told[3][:3] == ("teacher, 20 steps", 40, 40)
    # 41 UNet and VAE evaluations a picture at 20 guided steps, 2 at 1 step; 1.5 to look at it. Drawn: 40 pictures of
    # either. Left: the student's 40 at 1 step, then 5 seeds of 40 prompts of all three.
    done, left = 40 * (3.5 + 42.5), 40 * 3.5 + 200 * (3.5 + 42.5 + 3.5)
    assert told[3][3] == pytest.approx(560 * left / done)
    find(task_of(tmp_path, with_floor=False), colour_looking())
    again = Effort(plan, lambda *said: None)
    assert sum(again.works) == 1.5 * (5 * 40 + 3 * 200)  # to be looked at only

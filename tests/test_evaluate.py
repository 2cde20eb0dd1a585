"""Evaluation from prompts to gate: what it refuses, what it keeps, and that it catches broken students."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from pipelines import tiny_sd, tiny_text_config, tiny_tokenizer
from rich.console import Console
from scipy.ndimage import gaussian_filter
from tiny_runs import tiny_dinov2
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionModelWithProjection

from onestroke import cli
from onestroke.card import model_card, recipe_in, with_evaluation
from onestroke.commands import evaluate
from onestroke.config import recipe_from
from onestroke.embedded import embedded_judge, embedded_student
from onestroke.embedded.held_out import JUDGE, comic_pictures, comic_prompts, judge_observer, value_namer
from onestroke.errors import DataError, ModelError, RecipeError, ResourceError
from onestroke.evaluate import collect as collecting
from onestroke.evaluate.catalog import MEASURES, QUESTIONS
from onestroke.evaluate.collect import Effort, observe
from onestroke.evaluate.compare import Looking, Task, Ways, compare_grid, find, plan_of, report_of
from onestroke.evaluate.drawn import MeasureCache, PictureCache
from onestroke.evaluate.features import FEATURES, STYLE, load_all, load_observer
from onestroke.evaluate.figures import flags_of
from onestroke.evaluate.findings import Measured, Missing
from onestroke.evaluate.gate import judge_gate, parse_gate
from onestroke.evaluate.intervals import paired_bootstrap
from onestroke.evaluate.measures import measure_all
from onestroke.evaluate.observer import Observer, looks
from onestroke.evaluate.pictures import DrawnSet, Failed, Order, RealSet, Way, halves, orders_of
from onestroke.evaluate.prompts import PromptSet, read_prompts, shuffled
from onestroke.evaluate.report import Report, report_html
from onestroke.evaluate.scored import Networks, Scored
from onestroke.evaluate.scorers import OTHER, SCORERS
from onestroke.evaluate.section import card_section
from onestroke.families.fingerprint import fingerprint
from onestroke.sample import draw, make_fast, student_scheduler

CPU = torch.device("cpu")
torch.set_num_threads(1)


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


def paint(prompts, seeds):
    """A picture that tells prompt and seed: its colour is the prompt's, its noise the seed's."""
    pictures = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        colour = np.random.default_rng(sum(map(ord, prompt))).integers(40, 200, 3)
        noise = np.random.default_rng(seed).integers(-30, 30, (16, 16, 1))
        pictures.append((colour + noise).clip(0, 255).astype(np.uint8))
    return np.stack(pictures)


def mean_colour(version: str = "1") -> Observer:
    return Observer("colour", version, {"colour": 3}, lambda pictures, prompts: pictures.mean(axis=(1, 2)))


def never(*_):
    raise AssertionError("drawn or looked at again")


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


class Coloured:
    """A source of real pictures: what `paint` draws."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def caption(self, index: int) -> str:
        return f"prompt {index % 5} of {index}"

    def read(self, index: int, *, slot=None):
        return type("Picture", (), {"image": paint([self.caption(index)], [index])[0]})


def task_of(tmp_path: Path, student=paint, *, count: int = 40, teacher=paint, columns=None, **changes) -> Task:
    source = Coloured(400)
    real, reference = (
        RealSet(n, source, range(k, 400, 2), (16, 16), str) for n, k in (("real pictures", 0), ("ref", 1))
    )
    prompts = PromptSet(tuple(source.caption(i) for i in range(0, 2 * count, 2)), columns or {})
    ways = Ways({1: Way("student", 1, student)}, {1: Way("t1", 1, teacher), 20: Way("t20", 20, teacher, 2.0)})
    return replace(Task(ways, prompts, reference, real, count, tmp_path), **changes)


def colour_looking(**networks) -> Looking:
    known = Networks({"colour": ("fd", "kd")}, **networks)
    return Looking((mean_colour(), looks()), (mean_colour(),), known, {"colour": "mean colour"})


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


# networks and scorers


def test_networks_that_are_not_here_are_named_with_the_way_to_get_them(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found, missing = load_all([*FEATURES, *SCORERS], FEATURES | SCORERS, weights={}, device=CPU)
    assert "efficientnet-lite0" in {one.name for one in found}
    by_name = {one.name: one for one in missing}
    assert by_name.keys() | {one.name for one in found} == {*FEATURES, *SCORERS}
    assert all(one.why and f"--weights {name}=PATH" in one.fix for name, one in by_name.items())
    if "dinov2-large" in by_name:
        assert "hf download facebook/dinov2-large" in by_name["dinov2-large"].fix


def test_a_folder_that_was_given_and_does_not_load_is_an_error(tmp_path):
    for name, kinds in (("dinov2-large", FEATURES), ("clip-vit-large", FEATURES), ("hpsv2", SCORERS)):
        with pytest.raises(ModelError):
            load_observer(name, kinds, weights={name: str(tmp_path)}, device=CPU)


def noise_pictures(count: int = 5, side: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_imagenet_features_come_with_a_style_that_knows_tone_and_not_place():
    network = load_observer("efficientnet-lite0", FEATURES, weights={}, device=CPU)
    pictures = np.stack([comic_pictures(3, odd=False, label="x").source.read(2 * i).image for i in range(3)])
    moved, toned = np.roll(pictures, 32, axis=2), (pictures * 0.6).astype(np.uint8)
    parts = [network.split(network.observe(p, [""] * 3)) for p in (pictures, moved, toned)]
    assert parts[0]["efficientnet-lite0"].shape == (3, 320) and parts[0][STYLE].shape == (3, 128)
    distance = [np.linalg.norm(p[STYLE] - parts[0][STYLE]) for p in parts]
    assert distance[1] < 0.5 * distance[2]


def test_dinov2_and_clip_vision_features_are_those_of_transformers(tmp_path):
    tiny_dinov2(tmp_path / "dino")
    dino = load_observer("dinov2-large", FEATURES, weights={"dinov2-large": str(tmp_path / "dino")}, device=CPU)
    assert dino.observe(noise_pictures(), [""] * 5).shape == (5, 16)
    torch.manual_seed(0)
    config = tiny_clip_config().vision_config
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "clip")
    clip = load_observer("clip-vit-large", FEATURES, weights={"clip-vit-large": str(tmp_path / "clip")}, device=CPU)
    square = noise_pictures(side=32)  # as the network wants it: nothing is resized
    model = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "clip").eval()
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)(list(square), return_tensors="pt")
    with torch.no_grad():
        expected = model(**pixels).image_embeds.numpy()
    np.testing.assert_allclose(clip.observe(square, [""] * 5), expected, atol=1e-5)


class _Script(torch.nn.Module):
    """Stands for inception-2015-12-05.pt: called with uint8 pictures and return_features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 7, 3)

    def forward(self, pixels: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features and pixels.dtype == torch.uint8
        return self.conv(pixels.float()).mean(dim=(2, 3))


def test_inception_is_read_from_a_torchscript_file(tmp_path):
    torch.manual_seed(0)
    module = _Script()
    torch.jit.script(module).save(tmp_path / "inception.pt")
    observer = load_observer("inception", FEATURES, weights={"inception": str(tmp_path / "inception.pt")}, device=CPU)
    pictures = noise_pictures()
    with torch.no_grad():
        expected = module(torch.from_numpy(pictures).permute(0, 3, 1, 2), True)
    np.testing.assert_allclose(observer.observe(pictures, [""] * 5), expected.numpy(), rtol=1e-5)


def tiny_clip_config() -> CLIPConfig:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 32, "patch_size": 8, "projection_dim": 24}
    return CLIPConfig(
        text_config=tiny_text_config("gelu").to_dict(),
        vision_config=vision,
        projection_dim=24,
        logit_scale_init_value=3.0,
    )


def test_scores_are_those_of_transformers_clip_model(tmp_path):
    torch.manual_seed(0)
    CLIPModel(tiny_clip_config()).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    prompts = ["a cat", "a dog on a mat", "ink", "a bird"]
    pictures = noise_pictures(4, side=48)[:, :, :40]  # 48 x 40: scaled, and cut to the middle
    model = CLIPModel.from_pretrained(tmp_path).eval()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    words = tiny_tokenizer()(prompts, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        output = model(**processor(list(pictures), return_tensors="pt"), input_ids=words.input_ids)
    scaled = output.logits_per_image.numpy()
    for name, scale in (("clip-score", model.logit_scale.exp().item()), ("pickscore", 1.0), ("hpsv2", None)):
        scorer = load_observer(name, SCORERS, weights={name: str(tmp_path)}, device=CPU)
        rows = scorer.split(scorer.observe(pictures, prompts))
        expected = scaled / (scale or model.logit_scale.exp().item())
        # PIL rounds resized pixels to whole levels
        np.testing.assert_allclose(rows[name][:, 0], expected.diagonal(), atol=0.01 * np.abs(expected).max())
        np.testing.assert_allclose(
            rows[name + OTHER][:, 0], expected[range(4), [2, 3, 0, 1]], atol=0.01 * np.abs(expected).max()
        )


def test_a_score_counts_what_is_heeded_of_the_prompt(tmp_path):
    """A scorer that knows `paint`: heed is 1 for it, 0 for a painter that does not read."""

    def fit(pictures, prompts):
        def score(prompt, picture):
            return 0.3 - np.abs(paint([prompt], [0])[0].mean((0, 1)) - picture.mean((0, 1))).mean() / 1000

        others = np.roll(prompts, len(prompts) // 2)
        return np.array([[score(p, x), score(o, x)] for p, o, x in zip(prompts, others, pictures, strict=True)])

    scorer = Observer("clip-score", "1", {"clip-score": 1, "clip-score" + OTHER: 1}, fit)
    plain = colour_looking(scorers=("clip-score",))
    looking = replace(plain, observers=(*plain.observers, scorer))
    for student, low, high in (
        (lambda p, s: paint(p, [x + 5 for x in s]), 0.8, 1.2),
        (lambda p, s: paint(["x"] * len(p), s), -0.3, 0.3),
    ):
        findings = find(task_of(tmp_path / str(low), student), looking)
        kept = next(m for m in findings.measured if m.key == "clip_score_kept" and m.role == "student")
        assert low < kept.value < high
        flags = flags_of(findings.measured, base_steps=20)
        assert (("student, 1 step", "clip_score_kept") in {(f.label, f.key) for f in flags}) == (low < 0)


def test_fingerprints_tell_weights_apart_and_change_nothing():
    one, other = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    assert fingerprint(one) == fingerprint(one) != fingerprint(other)
    assert fingerprint(one.to(torch.bfloat16)) == fingerprint(one)


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
    monkeypatch.setattr("onestroke.commands.evaluate.cap_threads", lambda: None)
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
    data = ("--data", str(folders / "pictures"))
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
    assert {one["name"] for one in report["missing"]} >= {"hpsv2"}
    card = (folders / "student" / "README.md").read_text("utf-8")
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


# broken students, made from the embedded model's own pictures

NUM_PICTURES, NUM_VARIED = 40, 20


def drawn_by_the_shipped_student(cache: PictureCache):
    """The embedded student at 2 steps."""
    pipeline = make_fast(embedded_student())
    way = Way("embedded", 4, lambda prompts, seeds: draw(pipeline, prompts, seeds=seeds, steps=2, guidance=0.0))

    def look_up(prompts, seeds):
        orders = [Order(p, s) for p, s in zip(prompts, seeds, strict=True)]
        return np.stack(
            [picture for _, picture in sorted(DrawnSet("", "student", way, orders, cache).read(range(len(orders))))]
        )

    return look_up


def drawn_by_a_perfect_model(cache: PictureCache):
    """Real pictures of the prompts, which the seed moves and mirrors: no later weights draw better."""
    prompts, source = comic_prompts(NUM_PICTURES), comic_pictures(NUM_PICTURES, odd=False, label="").source
    real = {prompt: source.read(2 * i).image for i, prompt in enumerate(prompts.texts)}

    def look_up(prompts, seeds):
        pictures = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            rng = np.random.default_rng(seed)
            moved = np.roll(real[prompt], rng.integers(-9, 10, 2), axis=(0, 1))
            pictures.append(moved[:, ::-1] if rng.random() < 0.5 else moved)
        return np.stack(pictures)

    return look_up


@pytest.fixture(scope="module", params=[drawn_by_a_perfect_model, drawn_by_the_shipped_student])
def model(request, tmp_path_factory):
    return request.param(PictureCache(tmp_path_factory.mktemp("drawn")))


def whole(change, *, apart: int = 77):
    """A student whose pictures are changed after drawing; its seeds lie so far from the teacher's."""
    return lambda model: lambda prompts, seeds: change(model(prompts, [seed + apart for seed in seeds]).astype(float))


def saturated(pictures):
    grey = pictures.mean(axis=3, keepdims=True)
    return (grey + 2.5 * (pictures - grey)).clip(0, 255).astype(np.uint8)


def gridded(pictures):
    pictures[:, ::8] -= 12
    pictures[:, :, ::8] -= 12
    return pictures.clip(0, 255).astype(np.uint8)


STUDENTS = {
    "healthy": (whole(lambda pictures: pictures.astype(np.uint8)), None),
    "collapsed": (lambda model: lambda prompts, seeds: model(prompts, [5] * len(seeds)), "spread_ratio"),
    "prompt-ignoring": (
        lambda model: lambda prompts, seeds: model([*prompts[1:], prompts[0]], seeds),
        "adherence_kept",
    ),
    "blurred": (whole(lambda p: gaussian_filter(p, (0, 1, 1, 0)).astype(np.uint8)), "sharpness_ratio"),
    # of the same picture: of 40 others, in a model whose seeds differ, the interval would be too wide to tell
    "oversaturated": (whole(saturated, apart=0), "saturation_ratio"),
    "gridded": (whole(gridded), "grid"),
}


@pytest.fixture(scope="module")
def judging():
    judge = embedded_judge()
    networks = Networks({JUDGE: ("fd",)}, judge=JUDGE, name_values=value_namer(judge))
    return Looking((judge_observer(judge), looks()), (judge_observer(judge),), networks, {})


@pytest.fixture
def comic_findings(judging, tmp_path, monkeypatch):
    monkeypatch.setattr("onestroke.evaluate.compare.SPREAD_PROMPTS", NUM_VARIED)
    monkeypatch.setattr("onestroke.evaluate.compare.SPREAD_SEEDS", 2)
    monkeypatch.setattr("onestroke.evaluate.measures._neighbours", lambda *_: iter(()))

    def findings_of(student, teacher, *, with_floor):
        reference, real = (
            comic_pictures(NUM_PICTURES, odd=odd, label=name) for odd, name in ((True, "ref"), (False, "real"))
        )
        ways = Ways({1: Way("student", 1, student)}, {50: Way("teacher", 50, teacher)})
        task = Task(
            ways, comic_prompts(NUM_PICTURES), reference, real, NUM_PICTURES, tmp_path, with_floor=with_floor
        )  # fmt: skip
        return find(task, judging)

    return findings_of


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_broken_student_is_flagged_by_the_right_measure_and_the_teacher_never(kind, model, comic_findings):
    make, expected = STUDENTS[kind]
    findings = comic_findings(make(model), model, with_floor=kind == "healthy")
    flags = {(flag.label, flag.key) for flag in flags_of(findings.measured, base_steps=50)}
    assert {label for label, _ in flags} <= {"student, 1 step"}
    if kind == "prompt-ignoring":
        teachers = paired_bootstrap(findings.scored.rows["adherence"]["teacher, 50 steps"])
        if teachers.low < 0.2:
            pytest.skip(f"these weights follow prompts too little themselves ({teachers.value:.2f}) to tell")
    assert flags == (set() if expected is None else {("student, 1 step", expected)})

"""Broken students, made from the embedded model's own pictures: each is flagged, and no whole one is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from onestroke.embedded import embedded_judge, embedded_student
from onestroke.embedded.held_out import JUDGE, comic_pictures, comic_prompts, judge_observer, value_namer
from onestroke.evaluate.compare import Looking, Task, Ways, find
from onestroke.evaluate.drawn import PictureCache
from onestroke.evaluate.figures import flags_of
from onestroke.evaluate.intervals import paired_bootstrap
from onestroke.evaluate.observer import looks
from onestroke.evaluate.pictures import DrawnSet, Order, Way
from onestroke.evaluate.scored import Networks
from onestroke.fast import make_fast
from onestroke.sample import draw

CPU = torch.device("cpu")


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

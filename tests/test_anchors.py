"""Anchors: drawn once, kept whole, learnt before ADD and beside it."""

from __future__ import annotations

import math
import re
import threading
from functools import partial
from itertools import chain

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from duels import assert_identical
from pipelines import tiny_sdxl
from rank_runs import in_ranks
from tiny_runs import endless, some_anchors, tiny_add, tiny_batch, tiny_dinov2, tiny_recipe, write_folder

from onestroke.api import distill
from onestroke.build import add_trainer, source_of, teacher_of
from onestroke.config import Recipe, StudentRecipe, recipe_from
from onestroke.distill.add import STUDENT
from onestroke.distill.anchors import MOST, ROUND, Anchoring, Anchors, Drawn, anchor_loss, anchored, draw_anchors
from onestroke.errors import CheckpointError, DataError, RecipeError
from onestroke.families.load import from_pipeline, load_model
from onestroke.schedule import beta_settings
from onestroke.train import anchoring, stage
from onestroke.train.anchoring import SHARD_PICTURES, anchor_batches, anchors_of
from onestroke.train.checkpoint import load_newest
from onestroke.train.method import OptimizerSettings
from onestroke.train.trainer import Progress, Trainer, TrainSettings


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    """Six steps of two pictures, after four steps on three anchors; one anchor to two pictures."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_sdxl("v_prediction", True).save_pretrained(folder / "teacher")
    write_folder(folder / "pictures", rounds=2)
    return tiny_recipe(
        f"teacher.source={folder / 'teacher'}", f"data.source={folder / 'pictures'}", "data.size=16",
        "train.batch_size=2", "train.num_images=12", "discriminator.features=dinov2-small",
        f"discriminator.features_source={tiny_dinov2(folder / 'dinov2')}",
        "anchors.count=3", "anchors.steps=8", "anchors.images=8", "anchors.every=2",
    )  # fmt: skip


def changed(recipe: Recipe, **settings) -> Recipe:
    return recipe.model_copy(update={"anchors": recipe.anchors.model_copy(update=settings)})


def test_the_loss_by_hand():
    drawn, target = torch.zeros(2, 1, 1, 2), torch.tensor([[[[1.0, 3.0]]], [[[2.0, 0.0]]]])
    even, uneven = torch.ones(2, 1, 2), torch.tensor([[[0.5, 1.5]], [[0.0, 40.0]]])

    def huber(square: float) -> float:
        return math.sqrt(square + ROUND**2) - ROUND

    plain, emphasised = partial(anchor_loss, emphasis=0.0), partial(anchor_loss, emphasis=2.0)
    assert plain(drawn, target, uneven, 2).item() == pytest.approx((huber(5) + huber(2)) / 2)
    assert plain(drawn, target, even, 0.5).item() == pytest.approx(2 * (huber(5) + huber(2)))
    assert plain(drawn[:0], target[:0], even[:0], 0.5).item() == 0.0
    assert emphasised(drawn, target, even, 2).item() == pytest.approx((huber(15) + huber(6)) / 2)
    # (1 + 2 * 0.5) 1 + (1 + 2 * 1.5) 9 over 2; 1 * 4 over 2, and the other place, at 1 + MOST, is right
    assert emphasised(drawn, target, uneven, 2).item() == pytest.approx((huber(19) + huber(2)) / 2)
    assert emphasised(target, drawn, uneven.flip(2), 2).item() == pytest.approx(
        (huber((4 * 1 + 2 * 9) / 2) + huber((1 + MOST) * 4 / 2)) / 2
    )


def test_a_late_timestep_has_as_much_of_a_say_as_an_early_one():
    """The gradient of a distance, unlike that of its square, does not grow with it."""
    target, even = torch.zeros(2, 1, 4, 4), torch.ones(2, 4, 4)
    drawn = torch.stack([torch.full((1, 4, 4), 1.0), torch.full((1, 4, 4), 0.2)]).requires_grad_()
    anchor_loss(drawn, target, even, 2, emphasis=0.0).backward()
    early, late = drawn.grad.flatten(1).norm(dim=1).tolist()
    assert late == pytest.approx(early, rel=0.02)


def test_each_anchor_comes_once_an_epoch_whatever_the_batches():
    anchors = some_anchors(5)
    rows = [anchors.rows_of(torch.arange(first, first + 6), 3) for first in range(0, 30, 6)]
    assert [len(part) for part in rows] == [2] * 5
    flat = list(chain(*rows))
    assert sorted(flat[:5]) == sorted(flat[5:]) == list(range(5)) and flat[:5] != flat[5:]
    assert flat == [row for slot in range(30) for row in anchors.rows_of(torch.tensor([slot]), 3)]


@pytest.mark.parametrize("perceptual", [0, 3])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_parts_of_a_batch_add_up_to_its_gradient(micro_batch_size, perceptual):
    settings = ("anchors.count=5", "anchors.every=2", f"anchors.perceptual={perceptual}")

    def weights(size: int | None) -> list[torch.Tensor]:
        method = tiny_add(*settings, kind="v_prediction", zero_snr=True)
        method.anchors = some_anchors()
        trainer = Trainer(method, TrainSettings(8, 4, size))
        for _ in trainer.run(endless()):
            pass
        return list(method.players[STUDENT].module.parameters())

    for one, other in zip(weights(None), weights(micro_batch_size), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_anchors_pull_the_student_alone_and_only_with_their_weight():
    def terms(*overrides: str, anchors: Anchors | None) -> dict[str, float]:
        method = tiny_add("anchors.count=5", "anchors.every=2", *overrides, kind="v_prediction", zero_snr=True)
        method.anchors = anchors
        rollout = method.rollout(tiny_batch(), frozenset(method.players))
        found = {}
        for player in method.players:
            loss = method.loss(player, rollout)
            found |= {f"{player}/{name}": value.item() for name, value in {"total": loss.total, **loss.terms}.items()}
        return found

    without, some, more = (
        terms(anchors=None), terms("anchors.weight=1", anchors=some_anchors()), terms(anchors=some_anchors()),
    )  # fmt: skip
    anchor = some.pop("student/anchor")
    assert anchor == more.pop("student/anchor") and anchor > 0
    assert some.pop("student/total") == pytest.approx(without["student/total"] + anchor)
    assert more.pop("student/total") == pytest.approx(without.pop("student/total") + 5 * anchor)
    assert some == more == pytest.approx(without)


def test_the_teacher_draws_them_as_plain_diffusers_does_from_the_noise_that_the_student_is_given(recipe, tmp_path):
    teacher = teacher_of(recipe)
    anchors = anchors_of(teacher, source_of(recipe.data), recipe, tmp_path, tell=lambda line: None)
    assert len(set(anchors.captions)) == 3
    rows = range(3)
    pipeline = StableDiffusionXLPipeline.from_pretrained(recipe.teacher.source, torch_dtype=torch.float64)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, final_sigmas_type="zero", timestep_spacing="trailing"
    )
    drawn, noise, schedule = anchors.at(rows), anchors.noise(rows).double(), teacher.schedule

    def plain(latents: torch.Tensor, timesteps: list[int]) -> torch.Tensor:
        return pipeline(
            list(anchors.captions), latents=latents, timesteps=timesteps, guidance_scale=3.0, height=16, width=16,
            output_type="latent",
        ).images  # fmt: skip

    begun = [999, 874, 749, 624, 499, 374, 249, 124]
    for place, timestep in enumerate((999, 749, 499, 249)):
        over = drawn.pictures[:, place - 1].double() if place else torch.zeros_like(noise[:, 0])
        x_s = schedule.add_noise(over, noise[:, place], torch.full((3,), timestep))
        expected = plain(x_s, begun[2 * place :])
        torch.testing.assert_close(drawn.pictures[:, place].double(), expected, rtol=2e-3, atol=2e-3)
    assert len(set(noise.flatten().tolist())) == noise.numel()  # none is another's
    assert drawn.worded.shape == (3, 4, 4, 4) and drawn.worded.double().std() > 0.1
    torch.testing.assert_close(drawn.worded.double().mean((2, 3)), torch.ones(3, 4).double(), rtol=1e-3, atol=0)

    given = []

    def student(x_t, t, condition):
        given.append((x_t, t))
        return x_t

    settings = StudentRecipe(timestep_weights=[2, 1, 1, 1])
    linear = torch.nn.Linear(1, 1)
    alone = Anchoring(teacher, student, linear, anchors, settings, OptimizerSettings(1e-3), emphasis=1.0)
    (batch,) = anchor_batches(anchors, 0, 300, 300)
    _, lesson = alone.rollout(batch, frozenset({STUDENT}))
    order = anchors.rows_of(batch.slots, 1)
    shown = anchors.at(order)
    assert list(batch.captions) == [anchors.captions[row] for row in order]
    (x_t, t), noise = given[0], anchors.noise(order).double()
    assert torch.equal(lesson.x_s, x_t) and torch.equal(lesson.s, t)
    for place, timestep in enumerate((999, 749, 499, 249)):
        here = t == timestep
        over = shown.pictures[:, place - 1].double() if place else torch.zeros_like(noise[:, 0])
        expected = schedule.add_noise(over, noise[:, place], t)
        assert torch.equal(x_t[here], expected[here])
        assert torch.equal(lesson.target[here], shown.pictures[here, place].double())
        assert torch.equal(lesson.worded[here], shown.worded[here, place].double())
        assert 30 < here.sum() < 90 if place else 90 < here.sum() < 150


def test_the_teachers_own_sampling_does_not_move_the_timesteps():
    """Many finetunes come with Karras sigmas, whose timesteps are none of the student's."""
    noise = torch.randn(1, 4, 4, 4, 4, generator=torch.Generator().manual_seed(0))

    def drawn(**sampling) -> Drawn:
        model = from_pipeline(tiny_sdxl("v_prediction", True))
        model.scheduler_config |= sampling
        condition = model.full_size(model.encode_prompts(["a"]), (16, 16))
        with torch.no_grad():
            blank = model.blank_prompts(condition)
            return draw_anchors(model, model.denoiser(), condition, blank, noise, steps=8, guidance=3.0)

    plain = drawn()
    assert plain.pictures.shape[1] == 4 and torch.equal(drawn(use_karras_sigmas=True).pictures, plain.pictures)


def test_the_teacher_mends_what_the_student_drew(recipe, tmp_path):
    """Of half of them, the later timesteps begin from the student's pictures, drawn as it draws, one from the other."""
    teacher, source = teacher_of(recipe), source_of(recipe.data)
    folder = tmp_path / "student"
    pipeline = tiny_sdxl("v_prediction", True)
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(1.5)
    pipeline.save_pretrained(folder)
    student = teacher.denoiser(load_model(folder, dtype=torch.float64).unet)
    mixed = changed(recipe, count=12, given_by_student=0.5)
    mixed = mixed.model_copy(update={"student": mixed.student.model_copy(update={"source": str(folder)})})
    anchors = anchors_of(teacher, source, mixed, tmp_path / "mixed", tell=lambda line: None)
    alone = anchors_of(teacher, source, changed(recipe, count=12), tmp_path / "alone", tell=lambda line: None)
    rows = range(12)
    drawn, plain, noise = anchors.at(rows), alone.at(rows), anchors.noise(rows).double()
    assert torch.equal(drawn.pictures[:, 0], plain.pictures[:, 0]) and not drawn.given[:, 0].any()
    assert torch.equal(plain.given[:, 1:], plain.pictures[:, :-1])
    own = (drawn.given[:, 1] != plain.given[:, 1]).flatten(1).any(1)
    assert 2 <= own.sum() <= 10
    for one, other in zip(drawn, plain, strict=True):
        assert torch.equal(one[~own], other[~own])
    condition = teacher.full_size(teacher.encode_prompts(anchors.captions), anchors.size)
    with torch.no_grad():
        for place, timestep in enumerate((999, 749, 499)):
            t = torch.full((12,), timestep)
            x_s = teacher.schedule.student_input(drawn.given[:, place].double(), noise[:, place], t)
            begun = student(x_s, t, condition)
            torch.testing.assert_close(drawn.given[own, place + 1].double(), begun[own], rtol=2e-3, atol=2e-3)
        # the last two of eight steps, from the student's picture at 499 under noise
        t, solver = torch.full((12,), 249), DPMSolverMultistepScheduler(
            **beta_settings(teacher.scheduler_config), prediction_type="sample", timestep_spacing="trailing",
            final_sigmas_type="zero",
        )  # fmt: skip
        solver.set_timesteps(8)
        solver.set_begin_index(6)
        x = teacher.schedule.student_input(drawn.given[:, 3].double(), noise[:, 3], t)
        blank, unguided = teacher.blank_prompts(condition), teacher.denoiser()
        for step in solver.timesteps[6:]:
            worded, wordless = (unguided(x, step.expand(12), one) for one in (condition, blank))
            x = solver.step(wordless + 3.0 * (worded - wordless), step, x).prev_sample
    torch.testing.assert_close(drawn.pictures[:, 3].double(), x, rtol=2e-3, atol=2e-3)

    (batch,) = anchor_batches(anchors, 0, 60, 60)
    lesson = anchors.lesson(batch.slots, 1, StudentRecipe(), teacher.schedule, noise)
    order, here = anchors.rows_of(batch.slots, 1), lesson.s == 749
    expected = teacher.schedule.add_noise(drawn.given[order, 1].double(), noise[order, 1], lesson.s)
    assert torch.equal(lesson.x_s[here], expected[here]) and here.sum() > 5
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(1.5)
    pipeline.save_pretrained(folder)
    with pytest.raises(DataError, match=re.escape("these anchors are of another teacher, student")):
        anchors_of(teacher, source, mixed, tmp_path / "mixed", tell=lambda line: None)


def test_only_a_student_that_draws_already_gives_pictures(recipe):
    with pytest.raises(RecipeError, match=re.escape("name it in student.source")):
        recipe_from(recipe.model_dump(), ["anchors.given_by_student=0.5"])


def test_anchors_are_read_under_the_autocast_of_a_cpu():
    anchors = some_anchors()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(anchors.at([4]).pictures[0], anchors.shards[1].pictures[1].float())


def test_they_are_drawn_under_the_autocast_of_a_cpu():
    pipeline = tiny_sdxl("v_prediction", True)
    pipeline.unet.float()
    model, noise = from_pipeline(pipeline), torch.randn(1, 2, 4, 4, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        condition = model.full_size(model.encode_prompts(["a"]), (16, 16))
        drawn = draw_anchors(
            model, model.denoiser(), condition, model.blank_prompts(condition), noise, steps=4, guidance=3.0
        )
    assert drawn.pictures.dtype == drawn.worded.dtype == torch.float16 and drawn.pictures.shape == (1, 2, 4, 4, 4)


def test_words_are_seen_to_move_what_only_they_say():
    """A teacher whose late steps differ in one place with words and without."""
    model = from_pipeline(tiny_sdxl("v_prediction", True))
    condition = model.full_size(model.encode_prompts(["a", "b"]), (16, 16))

    def teacher(x_t, t, both):
        told = torch.zeros_like(x_t)
        told[: len(x_t) // 2, :, 1, 2] = 1.0
        told[: len(x_t) // 2] += (t[0] > 499) * 5.0  # what words change early counts nothing
        return told

    noise = torch.randn(2, 2, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    blank = model.blank_prompts(condition)
    drawn = draw_anchors(model, teacher, condition, blank, noise, steps=4, guidance=3.0)
    assert drawn.pictures.shape == (2, 2, 4, 4, 4)
    expected = torch.zeros(2, 2, 4, 4).half()
    expected[..., 1, 2] = 16
    assert torch.equal(drawn.worded, expected)
    assert torch.equal(drawn.pictures[..., 1, 2], torch.full((2, 2, 4), 3.0).half())  # the last prediction, guided


def test_they_are_drawn_once_and_those_of_another_teacher_are_refused(recipe, tmp_path):
    told: list[str] = []
    teacher, source = teacher_of(recipe), source_of(recipe.data)
    many = changed(recipe, count=SHARD_PICTURES + 3)
    anchors = anchors_of(teacher, source, many, tmp_path, tell=told.append)
    assert told[-1] == "the teacher's pictures: 503/503" and len(anchors) == len(anchors.captions) == 503
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    first, second = (tmp_path / f"anchors-{rows}.safetensors" for rows in ("0000000-0000499", "0000500-0000502"))
    assert sorted(stamps) == [first, second]
    second.unlink()  # what a killed run had not come to
    again = anchors_of(teacher, source, many, tmp_path, tell=told.append)
    for one, other in zip(anchors.at(range(503)), again.at(range(503)), strict=True):
        assert torch.equal(one, other)
    assert [path for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp] == [second]
    told.clear()
    more = anchors_of(teacher, source, changed(recipe, count=2 * SHARD_PICTURES), tmp_path, tell=told.append)
    assert len(told) == 2 and first.stat().st_mtime_ns == stamps[first]  # a larger count goes on
    assert torch.equal(more.at([499, 501]).pictures, anchors.at([499, 501]).pictures)
    first.unlink()
    assert anchors_of(teacher, source, many, tmp_path, is_late=lambda: True, tell=told.append) is None
    assert not first.exists()
    with torch.no_grad():
        next(teacher.unet.parameters()).add_(1e-3)
    second.rename(first)
    told.clear()
    with pytest.raises(DataError, match=re.escape("these anchors are of another teacher")):
        anchors_of(teacher, source, many, tmp_path, tell=told.append)
    assert not told and not second.exists()  # nothing is drawn beside what another run drew


@pytest.mark.usefixtures("two_threads")
def test_each_core_draws_some_and_the_same(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(anchoring, "DRAWN_AT_ONCE", 2)
    teacher, source, by = teacher_of(recipe), source_of(recipe.data), set()
    forward = teacher.unet.forward
    teacher.unet.forward = lambda *args, **kinds: (by.add(threading.get_ident()), forward(*args, **kinds))[1]
    many = changed(recipe, count=9)
    shared = anchors_of(teacher, source, many, tmp_path / "shared", tell=lambda text: None)
    assert len(by) == 2 and threading.get_ident() not in by
    torch.set_num_threads(1)
    alone = anchors_of(teacher, source, many, tmp_path / "alone", tell=lambda text: None)
    assert threading.get_ident() in by
    for one, other in zip(shared.at(range(9)), alone.at(range(9)), strict=True):
        assert torch.equal(one, other)


def test_a_run_that_was_stopped_before_and_in_add_ends_in_the_same_weights(recipe, tmp_path):
    distill(recipe, tmp_path / "stopped", minutes=-1)  # late before it has drawn
    assert (tmp_path / "stopped" / "student").exists() and not (tmp_path / "stopped" / "anchoring").exists()
    drawn = tmp_path / "stopped" / "anchors"
    anchors_of(teacher_of(recipe), source_of(recipe.data), recipe, drawn, tell=lambda line: None)
    for _ in range(3):
        distill(recipe, tmp_path / "stopped", minutes=0)  # a step each
    assert not (tmp_path / "stopped" / "checkpoints").exists()
    distill(recipe, tmp_path / "stopped", minutes=0)
    assert load_newest(tmp_path / "stopped" / "anchoring" / "checkpoints")["images"] == 8
    distill(recipe, tmp_path / "stopped")
    distill(recipe, tmp_path / "straight")
    one, other = (load_newest(tmp_path / name / "checkpoints") for name in ("stopped", "straight"))
    assert_identical(one, other)
    told: list[str] = []
    distill(recipe, tmp_path / "straight", tell=told.append)  # finished: nothing is drawn or learnt again
    assert told == []


def test_pictures_a_second_are_those_since_the_run_went_on(monkeypatch):
    monkeypatch.setattr(stage, "TOLD_SECONDS", -1.0)
    told: list[str] = []
    teller = stage.Teller("anchors", "anchor", 4000, told.append)
    for images, seconds in ((1016, 1.0), (1216, 11.0)):
        teller(Progress(images // 16, images, seconds, {"student/anchor": 0.5}), None)
    assert told[-1] == "anchors: 1,216/4,000 pictures, 20.0 a second; 0.5000"


def test_add_begins_with_what_the_anchors_taught(recipe, tmp_path):
    teacher, source = teacher_of(recipe), source_of(recipe.data)
    longer = changed(recipe, images=400, learning_rate=1e-2)
    distill(longer, tmp_path / "run", minutes=None)
    anchors = anchors_of(teacher, source, longer, tmp_path / "run" / "anchors", tell=lambda line: None)
    learnt = load_newest(tmp_path / "run" / "anchoring" / "checkpoints")["players"]["student"]

    def distance(state: dict | None) -> float:
        method = add_trainer(recipe, teacher, anchors=anchors).method
        if state is not None:
            method.players[STUDENT].module.load_state_dict(state)
        rows, last = range(3), torch.full((3,), 999)
        condition = teacher.full_size(teacher.encode_prompts(anchors.captions), anchors.size)
        with torch.no_grad():
            drawn = method.student(anchors.noise(rows)[:, 0].double(), last, condition)
        return (drawn - anchors.at(rows).pictures[:, 0]).square().mean().item()

    began, taught = distance(None), distance(learnt)
    ended = distance(load_newest(tmp_path / "run" / "checkpoints")["players"]["student"])
    assert taught < 0.7 * began and ended < 0.9 * began


def test_the_exported_student_keeps_its_share_of_what_the_anchors_left(recipe, tmp_path):
    kept = changed(recipe, kept=0.25)
    distill(kept, tmp_path / "run", minutes=0)
    distill(kept, tmp_path / "run")
    before = load_newest(tmp_path / "run" / "anchoring" / "checkpoints")["players"]["student"]
    after = load_newest(tmp_path / "run" / "checkpoints")["averages"]["student"]
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for share in (0.25, 0.5, 0.0):  # another share of a finished run is exported without training
        distill(changed(recipe, kept=share), tmp_path / "run")
        for name, weight in exported_weights(tmp_path / "run").items():
            mixed = share * before[name] + (1 - share) * after[name]
            torch.testing.assert_close(weight.double(), mixed, rtol=1e-5, atol=1e-7)
    (tmp_path / "run" / "anchoring" / "student.safetensors").unlink()
    with pytest.raises(CheckpointError, match="the weights that the anchors left are not there"):
        distill(kept, tmp_path / "run")


def exported_weights(run) -> dict[str, torch.Tensor]:
    return UNet2DConditionModel.from_pretrained(run / "student" / "unet").state_dict()


def _distilled(recipe: Recipe, out) -> None:
    distill(recipe, out)


def test_two_processes_end_near_one(recipe, tmp_path):
    kept = changed(recipe, kept=0.25)
    in_ranks(_distilled, 2, kept, tmp_path / "two")
    distill(kept, tmp_path / "one")
    one, two = (load_newest(tmp_path / name / "checkpoints")["players"]["student"] for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], rtol=1e-6, atol=1e-8)
    one, two = (exported_weights(tmp_path / name) for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], rtol=1e-5, atol=1e-7)


def test_anchors_may_come_at_other_timesteps_than_the_pictures():
    recipe = tiny_recipe(
        "anchors.count=5", "student.timestep_weights=[1, 0, 0, 0]", "anchors.timestep_weights=[0, 1, 1, 0]"
    )
    slots, like, schedule = torch.arange(40), torch.empty(0), from_pipeline(tiny_sdxl("v_prediction", True)).schedule
    lesson = some_anchors().lesson(slots, 2, anchored(recipe), schedule, like)
    assert len(lesson.s) == 20 and set(lesson.s.tolist()) == {749, 499}
    assert anchored(tiny_recipe("anchors.count=5")).timestep_weights is None

    method = tiny_add(
        "anchors.count=5",
        "anchors.every=2",
        "anchors.timestep_weights=[0, 0, 0, 1]",
        kind="v_prediction",
        zero_snr=True,
    )
    method.anchors = some_anchors()
    assert set(method.rollout(tiny_batch(), frozenset({STUDENT})).anchored.lesson.s.tolist()) == {249}


def test_what_cannot_be_is_refused():
    with pytest.raises(RecipeError, match="can be learnt only from a count of anchors"):
        tiny_recipe("anchors.images=10")
    with pytest.raises(RecipeError, match="anchors.kept is a share of what anchors.images pictures left"):
        tiny_recipe("anchors.count=10", "anchors.kept=0.5")
    with pytest.raises(RecipeError, match="anchors.kept mixes whole weights: set it to 0 for an adapter"):
        tiny_recipe(
            "anchors.count=10", "anchors.steps=8", "anchors.images=8", "anchors.kept=0.5", "student.lora.rank=2"
        )
    with pytest.raises(RecipeError, match="anchors are of one size: set data.buckets to none"):
        tiny_recipe("anchors.count=10", "data.buckets=computed")
    with pytest.raises(RecipeError, match="anchors.steps is no multiple of student.num_timesteps: set it to 12"):
        tiny_recipe("anchors.count=10", "anchors.steps=10")
    with pytest.raises(RecipeError, match="anchors.timestep_weights has to hold one number per timestep"):
        tiny_recipe("anchors.count=10", "anchors.timestep_weights=[1, 2]")

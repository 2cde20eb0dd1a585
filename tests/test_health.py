"""Alarms: what rings them, what they say, and what a run does about them."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from duels import duel, run, slots
from pipelines import tiny_sdxl
from tiny_runs import tiny_trainer

from onestroke.errors import TrainingAlarm
from onestroke.families.load import from_pipeline
from onestroke.train import health as room
from onestroke.train.checkpoint import list_checkpoints, load_newest
from onestroke.train.health import WINDOW, Alarm, Health, spreads
from onestroke.train.run import run_training
from onestroke.train.samples import SamplePainter


def heads(hinge: float, right: float) -> dict[str, float]:
    """The discriminator's numbers of a step with two heads: its hinge loss a head, the share that it tells right."""
    shares = {f"discriminator/{name}_{k}": right for name in ("real_positive", "fake_negative") for k in (0, 1)}
    return {"discriminator/hinge": 2 * hinge, "student/loss": 1.0, **shares}


def test_a_discriminator_that_wins_rings_once_after_a_window_of_its_own_steps_and_again_after_it_had_ended():
    health = Health()
    idle = {"student/loss": 1.0}  # a step of the student alone says nothing
    rung = [health.after_step(terms) for _ in range(2 * WINDOW) for terms in (heads(0.05, 0.99), idle)]
    assert [i for i, alarms in enumerate(rung) if alarms] == [2 * (WINDOW - 1)]
    (alarm,) = rung[2 * (WINDOW - 1)]
    assert "it tells 99% right, at a hinge loss of 0.05 a head" in str(alarm)
    assert "discriminator_optimizer.learning_rate" in str(alarm) and alarm.player == "discriminator"
    assert not any(health.after_step(heads(1.0, 0.6)) for _ in range(WINDOW))
    assert sum(len(health.after_step(heads(0.05, 0.99))) for _ in range(WINDOW)) == 1


@pytest.mark.parametrize(("hinge", "right"), [(0.05, 0.9), (0.5, 0.99), (1.0, 0.6)])
def test_a_discriminator_that_does_not_win_rings_nothing(hinge, right):
    health = Health()
    assert not any(health.after_step(heads(hinge, right)) for _ in range(3 * WINDOW))


def test_a_fall_of_either_spread_below_half_of_the_best_names_it():
    health = Health()
    assert health.after_pictures("average", 10.0, 20.0) == health.after_pictures("average", 30.0, 40.0) == []
    assert health.after_pictures("average", 16.0, 21.0) == []  # 53%
    (diversity,) = health.after_pictures("average", 12.0, 40.0)
    assert "Diversity is falling" in str(diversity) and "differ 40% as much as at best" in str(diversity)
    (prompt,) = health.after_pictures("average", 12.0, 4.0)  # the other was told
    assert "ignoring the prompt" in str(prompt) and "differ 10% as much" in str(prompt)
    assert "losses.distill_weight" in str(prompt) and prompt.player == "student"
    assert health.after_pictures("live", 12.0, 4.0) == []  # other weights have a best of their own


def test_spreads_are_those_worked_by_hand():
    """Two prompts (levels 0 and 100) by two seeds (10 more); sizes that 16 cells do not divide."""
    levels = np.array([[0, 10], [100, 110]], np.uint8)
    pictures = np.broadcast_to(levels[:, :, None, None, None], (2, 2, 40, 33, 3))
    assert spreads(pictures) == pytest.approx((10.0, 100.0))


def test_spreads_are_blind_to_grain():
    grain = np.where(np.indices((32, 32)).sum(0) % 2, 200, 100)
    pictures = np.stack([grain, 300 - grain])[None, ..., None].repeat(3, axis=-1).astype(np.uint8)  # 1 2 32 32 3
    assert spreads(pictures) == (0.0, 0.0)


@pytest.fixture
def short_window(monkeypatch):
    monkeypatch.setattr(room, "WINDOW", 2)


def winning():
    """A trainer that reports a discriminator that wins, from its third step on."""
    trainer = duel()
    step = trainer._step
    trainer._step = lambda batch: step(batch) | (heads(0.01, 1.0) if trainer.step > 2 else heads(1.0, 0.5))
    return trainer


def test_an_alarm_warns_and_goes_on_by_default(tmp_path, short_window, caplog):
    with caplog.at_level(logging.WARNING):
        assert run(winning(), tmp_path)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["picture 16"]


def test_an_alarm_stops_the_run_by_one_line_after_a_checkpoint(tmp_path, short_window):
    with pytest.raises(TrainingAlarm, match="picture 16: The discriminator is winning") as caught:
        run(winning(), tmp_path, every=1e9, on_alarm="stop")
    assert "\n" not in str(caught.value) and load_newest(tmp_path / "checkpoints")["images"] == 16


def test_an_alarm_goes_back_to_the_oldest_checkpoint_at_half_the_rate_three_times_and_then_stops(
    tmp_path, caplog, monkeypatch
):
    """It rings at the fourth step; the checkpoints of 8, 12 and 16 pictures are there, and 8 is gone back to."""
    trainer, seen = duel(), []
    step = trainer._step

    def counted(batch):
        seen.append(trainer.images)
        return step(batch) | {"step": trainer.step}

    trainer._step = counted
    alarm = Alarm("name", "left", "It goes wrong", "Mend it.")
    monkeypatch.setattr(Health, "after_step", lambda self, terms: [alarm] if terms["step"] == 4 else [])
    with caplog.at_level(logging.WARNING), pytest.raises(TrainingAlarm, match="It goes wrong"):
        run(trainer, tmp_path, on_alarm="rollback", keep_checkpoints=3)
    assert seen == [0, 4, 8, 12, *[8, 12] * 3]
    assert "back at picture 8, left at 0.125 times its learning rate" in caplog.text
    assert load_newest(tmp_path / "checkpoints")["rates"] == {"left": 0.125}
    rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in trainer.optimizers.items()}
    assert rates == {"left": pytest.approx(0.1 / 8), "right": pytest.approx(0.1)}
    assert [path.name[-6:-3] for path in list_checkpoints(tmp_path / "checkpoints")] == ["008", "012", "016"]


def test_the_samples_of_a_run_are_measured_and_their_fall_rings(tmp_path, caplog):
    measured = iter([{"average": (10.0, 10.0)}, {"average": (10.0, 3.0)}])
    with caplog.at_level(logging.WARNING):
        run_training(
            duel(8), slots, tmp_path, recipe_text="a: 1", on_samples=lambda log: next(measured), sample_images=4
        )
    assert "picture 8: The student is ignoring the prompt" in caplog.text


def test_the_painter_tells_a_student_that_is_deaf_to_its_prompt_from_one_that_is_not():
    trainer = tiny_trainer("data.size=16")
    painter = SamplePainter(
        from_pipeline(tiny_sdxl().to(torch.float64)), trainer, trainer.method.recipe, ["one", "two"]
    )
    _, before = painter.paint()
    for parameter in trainer.averages["student"].parameters():
        parameter.zero_()  # what is drawn is the noise alone
    _, after = painter.paint()
    assert before["live"] == after["live"] and min(before["live"]) > 0
    assert after["average"][1] == 0 < before["average"][1] and after["average"][0] > 0

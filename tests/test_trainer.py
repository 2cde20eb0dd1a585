"""The loop by hand on two numbers that learn, and its stored loss curve.

`python tests/test_trainer.py` writes `data/loss_curve.json` again, for a change that is meant to change the numbers.
"""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from duels import assert_identical, copied, duel, run, slots
from tiny_runs import endless, tiny_batch, tiny_trainer

from onestroke.errors import NonFiniteLoss
from onestroke.train.checkpoint import list_checkpoints, load_newest
from onestroke.train.method import OptimizerSettings
from onestroke.train.trainer import ema_decay, learning_rate

CURVE = Path(__file__).parent / "data" / "loss_curve.json"


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_then_stays_or_falls():
    constant = OptimizerSettings(0.5, warmup_images=100)
    assert [learning_rate(constant, n, 1000) for n in (25, 50, 100, 1000)] == [0.125, 0.25, 0.5, 0.5]
    cosine = OptimizerSettings(0.5, decay="cosine")
    # 0.1 + 0.9 * (1 + cos(pi * p)) / 2 at p = 0, 1/3, 1/2, 1 and beyond
    expected = [0.5, 0.5 * (0.1 + 0.9 * 0.75), 0.5 * 0.55, 0.05, 0.05]
    assert [learning_rate(cosine, n, 900) for n in (0, 300, 450, 900, 1200)] == pytest.approx(expected)
    linear = OptimizerSettings(0.5, decay="linear")  # whole until 60%, then straight down, to a fiftieth
    assert [learning_rate(linear, n, 1000) for n in (0, 600, 800, 990, 1000)] == pytest.approx(
        [0.5, 0.5, 0.25, 0.0125, 0.01]
    )
    both = OptimizerSettings(0.5, decay="cosine", warmup_images=900)
    assert learning_rate(both, 450, 900) == pytest.approx(0.5 * 0.5 * 0.55)


def test_ema_halves_in_its_half_life_and_sooner_early_on():
    assert ema_decay(100, 10_000, 100) == 0.5 and ema_decay(100, 10_000, 50) == pytest.approx(0.5**0.5)
    assert ema_decay(100, 200, 10) == 0.5  # a twentieth of 200 pictures is 10
    assert ema_decay(100, 0, 10) == 0


def test_the_average_follows_the_weights_by_the_arithmetic_of_its_half_life():
    trainer = duel()
    mean = 0.0
    for _, progress in zip(range(6), trainer.run(slots), strict=False):
        value = trainer.method.players["left"].module.value.item()
        decay = 0.5 ** (4 / min(8, 0.05 * progress.images))
        mean = decay * mean + (1 - decay) * value
        assert trainer.averages["left"].value.item() == pytest.approx(mean, rel=1e-12)
    assert "right" not in trainer.averages
    assert not trainer.averages["left"].value.requires_grad


def test_one_step_of_adam_is_the_hand_computed_one():
    """Adam's first step is the learning rate times the sign of the gradient; left goes to (0+1+2+3)/4 = 1.5."""
    trainer = duel()
    progress = next(trainer.run(slots))
    assert trainer.method.players["left"].module.value.item() == pytest.approx(0.1, rel=1e-6)
    assert trainer.method.players["right"].module.value.item() == pytest.approx(0.9, rel=1e-6)  # towards the OLD left
    assert progress.terms["left/loss"] == 2.25 and progress.terms["left/distance"] == 1.5
    assert progress.terms["left/grad_norm"] == 3 and progress.terms["right/grad_norm"] == 2
    assert (progress.step, progress.images) == (1, 4)


def test_gradients_are_clipped_to_the_recipes_norm_and_the_norm_before_is_shown():
    trainer = duel(max_grad_norm=0.5, betas=(0.0, 0.0), eps=1.0)
    progress = next(trainer.run(slots))
    assert progress.terms["left/grad_norm"] == 3
    # without momentum Adam steps by rate * g / (|g| + eps) = 0.1 * 0.5 / 1.5
    assert trainer.method.players["left"].module.value.item() == pytest.approx(0.1 * 0.5 / 1.5, rel=1e-4)


def test_only_the_player_whose_loss_runs_requires_gradients_and_only_the_due_in_the_rollout():
    trainer = duel()
    for _ in zip(range(2), trainer.run(slots), strict=False):
        pass
    both, left = ["left", "right"], ["left"]
    assert trainer.method.seen == [
        ("rollout", *both), ("left", "left"), ("right", "right"), ("rollout", *left), ("left", "left"),
    ]  # fmt: skip
    assert all(p.module.value.requires_grad for p in trainer.method.players.values())


def test_a_run_ends_at_its_number_of_pictures_and_never_beyond():
    trainer = duel(num_images=11)
    assert [progress.images for progress in trainer.run(slots)] == [4, 8]
    assert list(trainer.run(slots)) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_loss_stops_names_term_and_step_and_changes_nothing(value):
    trainer = duel(breaks=lambda step, name, loss: loss * value if (step, name) == (2, "right") else loss)
    states = []
    with pytest.raises(NonFiniteLoss) as caught:
        for _ in trainer.run(slots):
            states.append(copied(trainer.state()))
    assert "right/loss" in str(caught.value) and "left" not in str(caught.value)
    assert "step 2" in str(caught.value) and "\n" not in str(caught.value)
    assert len(states) == 2
    assert_identical(trainer.state(), states[-1])


def test_a_non_finite_gradient_of_a_finite_loss_stops_too():
    def square_root_of_zero(step, name, loss):
        return loss + (loss - loss).abs().sqrt() if (step, name) == (1, "left") else loss

    trainer = duel(breaks=square_root_of_zero)
    with pytest.raises(NonFiniteLoss, match=r"step 1.*left/grad_norm is not finite"):
        list(trainer.run(slots))


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4])
def test_a_stopped_and_continued_trainer_equals_an_uninterrupted_one_in_every_number(steps):
    straight, stopped, continued = (duel(decay="cosine", warmup_images=10) for _ in range(3))
    list(straight.run(slots))
    for _ in zip(range(steps), stopped.run(slots), strict=False):
        pass
    continued.load_state(copied(stopped.state()))
    continued.method.step = steps
    list(continued.run(slots))
    assert_identical(continued.state(), straight.state())


def test_a_stopped_and_continued_adversarial_run_is_bit_identical():
    """Weights, spectral norms, averages and optimizers in float32, the players due unequally often."""
    lines = ("train.num_images=8", "train.batch_size=2", "discriminator_optimizer.every=2")
    straight, stopped, continued = (tiny_trainer(*lines, dtype=torch.float32) for _ in range(3))
    assert len(list(straight.run(endless(2)))) == 4
    for _ in zip(range(1), stopped.run(endless(2)), strict=False):
        pass
    continued.load_state(copied(stopped.state()))
    assert len(list(continued.run(endless(2)))) == 3
    assert_identical(continued.state(), straight.state())
    assert continued.step == 4 and continued.images == 8


def test_a_run_for_some_minutes_is_continued_to_the_same_end(tmp_path):
    straight = duel()
    assert run(straight, tmp_path / "straight")
    assert not run(duel(), tmp_path / "cut", minutes=0)  # one step
    assert [path.name for path in list_checkpoints(tmp_path / "cut/checkpoints")] == ["images-000000000004.pt"]
    assert run(duel(), tmp_path / "cut")
    assert_identical(load_newest(tmp_path / "cut/checkpoints"), load_newest(tmp_path / "straight/checkpoints"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_finishes_its_step_saves_and_continues_to_the_same_end(number, tmp_path):
    def interrupt(progress, left):
        if progress.step == 3:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    assert not run(duel(), tmp_path / "cut", every=1e9, observe=interrupt)
    assert load_newest(tmp_path / "cut/checkpoints")["images"] == 12
    assert signal.getsignal(number) is before
    assert run(duel(), tmp_path / "cut")
    run(duel(), tmp_path / "straight")
    assert_identical(load_newest(tmp_path / "cut/checkpoints"), load_newest(tmp_path / "straight/checkpoints"))


def test_a_second_interrupt_stops_at_once(tmp_path):
    def interrupt(progress, left):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(duel(), tmp_path, observe=interrupt)


def test_a_finished_run_is_left_as_it_is(tmp_path):
    run(duel(), tmp_path)
    newest = list_checkpoints(tmp_path / "checkpoints")[-1]
    before = newest.stat().st_mtime_ns
    steps = []
    assert run(duel(), tmp_path, observe=lambda progress, left: steps.append(progress))
    assert steps == [] and newest.stat().st_mtime_ns == before


def test_a_non_finite_loss_leaves_the_last_checkpoint_whole(tmp_path):
    with pytest.raises(NonFiniteLoss):
        run(duel(breaks=lambda step, name, loss: loss * math.nan if step == 3 else loss), tmp_path)
    assert load_newest(tmp_path / "checkpoints")["step"] == 3


# --- the stored loss curve --------------------------------------------------------------------------------------------


def loss_curve() -> dict[str, list[float]]:
    """Ten steps of ADD on the tiny SDXL pipeline, in float64."""
    trainer = tiny_trainer("train.batch_size=2", "train.num_images=20", "discriminator_optimizer.every=2")
    rows = [progress.terms for progress in trainer.run(endless(2))]
    names = (
        "student/adversarial", "student/distillation", "student/grad_norm", "discriminator/hinge", "discriminator/r1",
    )  # fmt: skip
    return {name: [row[name] for row in rows if name in row] for name in names}


def test_ten_steps_give_the_stored_loss_curve():
    """A refactor changes no numbers."""
    expected, curve = json.loads(CURVE.read_text()), loss_curve()
    assert curve.keys() == expected.keys()
    for name, values in curve.items():
        assert values == pytest.approx(expected[name], rel=1e-4, abs=1e-9), name
    assert len(curve["student/adversarial"]) == 10 and len(curve["discriminator/hinge"]) == 5


def test_the_endless_set_gives_a_slot_the_same_picture_in_any_batch():
    assert torch.equal(next(endless(4)(0)).images[2:], tiny_batch(2, first=2).images)


if __name__ == "__main__":
    CURVE.write_text(json.dumps(loss_curve(), indent=1) + "\n")

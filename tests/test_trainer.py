"""The loop by hand on two numbers that learn, and whole runs: stopped, killed, continued, refused, out of disk.

`python tests/test_trainer.py` writes `data/loss_curve.json` again, for a change that is meant to change the numbers.
"""

import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from pipelines import tiny_sdxl
from tiny_runs import endless, tiny_batch, tiny_dinov2, tiny_recipe, tiny_trainer, write_folder
from torch import nn

from onestroke.api import distill
from onestroke.data.buckets import assign
from onestroke.data.facts import identity_of, measured_sizes
from onestroke.data.folder import open_folder
from onestroke.errors import CheckpointError, NonFiniteLoss, ResourceError
from onestroke.ownership import sole_owner
from onestroke.train import checkpoint
from onestroke.train.checkpoint import list_checkpoints, load_newest, save_checkpoint
from onestroke.train.method import Loss, OptimizerSettings, Player
from onestroke.train.run import run_training
from onestroke.train.tracking import read_metrics
from onestroke.train.trainer import Trainer, TrainSettings, ema_decay, learning_rate
from onestroke.train.writer import CheckpointWriter
from onestroke.types import Batch

torch.set_num_threads(1)

CURVE = Path(__file__).parent / "data" / "loss_curve.json"


class Number(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))


class Duel:
    """Two numbers: `left` goes to the mean of the batch's slots, `right` to `left`; `breaks` can spoil a loss."""

    def __init__(self, *, breaks=lambda step, name, loss: loss, **settings) -> None:
        optimizer = OptimizerSettings(**{"learning_rate": 0.1, "max_grad_norm": None} | settings)
        self.players = {
            "left": Player(Number(0.0), optimizer, ema_images=8), "right": Player(Number(1.0), optimizer, every=2)
        }  # fmt: skip
        self.breaks, self.step = breaks, 0
        self.seen: list[tuple] = []  # who required gradients, and when

    def rollout(self, batch: Batch, due: frozenset[str]):
        self.seen.append(("rollout", *self._open()))
        return batch.slots.double().mean(), self.players["left"].module.value.detach()

    def loss(self, player: str, rollout) -> Loss:
        self.seen.append((player, *self._open()))
        value = self.players[player].module.value
        total = (value - rollout[player == "right"]).square()
        return Loss(self.breaks(self.step, player, total), {"distance": total.detach().sqrt()})

    def finish_step(self, due: frozenset[str]) -> None:
        self.step += 1

    def _open(self) -> list[str]:
        return [name for name, player in self.players.items() if player.module.value.requires_grad]


def duel(num_images: int = 40, **kinds) -> Trainer:
    return Trainer(Duel(**kinds), TrainSettings(num_images, 4))


def slots(first_slot: int) -> Iterator[Batch]:
    while True:
        numbers = torch.arange(first_slot, first_slot + 4)
        yield Batch(torch.zeros(4, 3, 1, 1), ("",) * 4, numbers, torch.zeros(4, 4).long())
        first_slot += 4


def run(trainer: Trainer, out: Path, *, recipe="a: 1\n", every=0.0, observe=lambda progress, left: None, **rest):
    """A run that saves after every step; whether its end was reached."""
    return run_training(trainer, slots, out, recipe_text=recipe, checkpoint_minutes=every, observe=observe, **rest)


def flat(state, name: str = "") -> dict[str, object]:
    """A checkpoint's numbers by their path."""
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flat(value, f"{name}/{key}").items()}
    if isinstance(state, list | tuple):
        return {k: v for i, value in enumerate(state) for k, v in flat(value, f"{name}/{i}").items()}
    return {name: state}


def assert_identical(one: dict, two: dict) -> None:
    first, second = flat(one), flat(two)
    assert first.keys() == second.keys() and len(first) > 10
    for name, value in first.items():
        other = second[name]
        same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert same, name


def copied(state: dict) -> dict:
    """As a checkpoint would keep it: later steps do not reach it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


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


# --- one folder, one run ----------------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_at_the_same_time_is_refused(tmp_path):
    refused = []

    def intrude(progress, left):
        with pytest.raises(CheckpointError, match="another run is writing") as caught:
            run(duel(), tmp_path)
        refused.append(str(caught.value))

    run(duel(num_images=4), tmp_path, observe=intrude)
    assert len(refused) == 1 and "\n" not in refused[0]
    assert run(duel(num_images=4), tmp_path)  # and afterwards it is free


OWN_AND_FORK = """
import os, sys, time
from pathlib import Path
from onestroke.ownership import sole_owner
with sole_owner(Path(sys.argv[1])):
    if not os.fork():
        print(os.getpid(), flush=True)  # the worker itself: the fork's hooks have run in it
    time.sleep(60)
"""


def test_a_killed_run_leaves_its_folder_free_though_its_workers_are_still_there(tmp_path):
    command = [sys.executable, "-c", OWN_AND_FORK, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        worker = int(process.stdout.readline())
        with pytest.raises(CheckpointError, match="another run is writing"), sole_owner(tmp_path):
            pass
        process.kill()
        process.wait()
        os.kill(worker, 0)  # it is there
        with sole_owner(tmp_path):
            os.kill(worker, signal.SIGKILL)


def test_another_recipe_in_the_same_folder_is_refused_with_the_keys_that_differ(tmp_path):
    before = "a: 1\nadam:\n  rate: 0.5\n  betas: [0, 1]\ntrain:\n  parallel: ddp\n"
    run(duel(), tmp_path, recipe=before)
    with pytest.raises(CheckpointError) as caught:
        run(duel(), tmp_path, recipe="a: 1\nnew: 3\nadam:\n  rate: 0.25\n  betas: [0, 1]\n")
    assert "(new: None -> 3, adam.rate: 0.5 -> 0.25)" in str(caught.value) and "\n" not in str(caught.value)
    assert (tmp_path / "recipe.yaml").read_text() == before
    run(duel(), tmp_path, recipe=before.replace("ddp", "fsdp"))  # which changes nothing that is learnt
    assert "fsdp" in (tmp_path / "recipe.yaml").read_text()


def test_a_run_of_a_time_when_the_recipe_had_fewer_keys_goes_on_with_their_defaults_alone(tmp_path):
    run(duel(), tmp_path, recipe="a: 1\n")
    run(duel(), tmp_path, recipe="a: 1\ndecode: {margin: null}\n")
    (tmp_path / "recipe.yaml").write_text("a: 1\n")
    with pytest.raises(CheckpointError, match=r"\(decode.margin: None -> 2\)"):
        run(duel(), tmp_path, recipe="a: 1\ndecode: {margin: 2}\n")


def test_a_run_that_began_with_other_pictures_is_refused_until_its_record_is_deleted(tmp_path):
    before = {"number of pictures": 40, "file names": 7}
    run(duel(), tmp_path, pictures=before, minutes=0)
    with pytest.raises(CheckpointError, match=r"other pictures \(40 -> 39\)\. Put them back") as caught:
        run(duel(), tmp_path, pictures=before | {"number of pictures": 39})
    with pytest.raises(CheckpointError, match=r"other pictures \(file names\)"):
        run(duel(), tmp_path, pictures=before | {"file names": 8})
    assert "\n" not in str(caught.value) and f"delete {tmp_path / 'pictures.yaml'}" in str(caught.value)
    (tmp_path / "pictures.yaml").unlink()
    assert run(duel(), tmp_path, pictures=before | {"file names": 8})


def test_pictures_are_told_apart_by_their_names_and_their_buckets_and_not_by_when_they_were_written(tmp_path):
    source = open_folder(write_folder(tmp_path, rounds=2))
    square, split = (32, 32), assign(measured_sizes(source), ((32, 16), (16, 32)), batch_size=2)
    found = identity_of(source, square)
    os.utime(tmp_path / "0.png", (1, 1))
    assert identity_of(open_folder(tmp_path), square) == found and found["number of pictures"] == 12
    assert identity_of(source, split) == found | {"sizes": identity_of(source, split)["sizes"]}
    assert identity_of(source, split) != identity_of(source, replace(split, members=split.members[::-1]))
    write_folder(tmp_path)  # six of them have no caption now
    assert identity_of(open_folder(tmp_path), square)["number of pictures"] == 6


def test_a_run_is_evaluated_at_the_same_pictures_whether_or_not_it_is_stopped(tmp_path):
    """Batches of 4: 12, 20, 32 and 40 are the first at or beyond a multiple of 10; the end counts too."""
    at: list[int] = []
    for name, minutes in (("straight", (None,)), ("stopped", (0, 0, 0, 0, None))):
        for limit in minutes:
            trainer = duel(num_images=44)
            run(
                trainer, tmp_path / name, minutes=limit, evaluate_images=10,
                on_evaluate=lambda log, trainer=trainer: at.append(trainer.images),
            )  # fmt: skip
    assert at == [12, 20, 32, 40, 44] * 2


def test_the_numbers_of_every_step_reach_the_log_once_each(tmp_path):
    run(duel(num_images=160), tmp_path, minutes=0)
    run(duel(num_images=160), tmp_path)
    rows = read_metrics(tmp_path / "logs")
    assert [row["images"] for row in rows] == sorted({row["images"] for row in rows}) and len(rows) >= 3
    assert all(math.isfinite(row["left/loss"]) for row in rows)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run(duel(), tmp_path, keep_checkpoints=2)
    assert [path.name[-6:-3] for path in list_checkpoints(tmp_path / "checkpoints")] == ["036", "040"]


def half_then(error: BaseException):
    def save(state, file):
        file.write(b"half of a checkpoint")
        raise error

    return save


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
])  # fmt: skip
def test_a_full_disk_leaves_the_last_checkpoint_whole_and_the_run_continues_from_it(error, tmp_path, monkeypatch):
    """The second is what torch makes of a write that failed half-way."""
    save, fail = torch.save, half_then(error)

    def filled_by_the_third(state, file):
        (fail if state["step"] == 3 else save)(state, file)

    monkeypatch.setattr(checkpoint.torch, "save", filled_by_the_third)
    with pytest.raises(ResourceError, match="Free disk space") as caught:
        run(duel(), tmp_path / "full")
    assert "\n" not in str(caught.value)
    assert [path.name for path in sorted((tmp_path / "full/checkpoints").iterdir())] == [
        "images-000000000004.pt", "images-000000000008.pt",
    ]  # fmt: skip
    monkeypatch.undo()
    assert run(duel(), tmp_path / "full")
    run(duel(), tmp_path / "straight")
    assert_identical(load_newest(tmp_path / "full/checkpoints"), load_newest(tmp_path / "straight/checkpoints"))


def test_training_goes_on_while_a_checkpoint_is_written_which_holds_the_state_of_then(tmp_path, monkeypatch):
    """The checkpoint of the second step is held up until the fourth is made; that of the fourth waits for it."""
    trainer, save, expected, written, made_four = duel(), torch.save, [], [], threading.Event()

    def slow_save(state, file):
        assert made_four.wait(timeout=60)
        written.append(state["step"])
        save(state, file)

    monkeypatch.setattr(checkpoint.torch, "save", slow_save)
    with CheckpointWriter(tmp_path, keep=2) as writer:
        for progress in trainer.run(slots):
            if progress.step == 4:
                assert written == []
                made_four.set()
            if progress.step in (2, 4):
                writer.begin(trainer.state())
                expected.append(deepcopy(trainer.state()))
    assert written == [2, 4] and trainer.step == 10
    for path, state in zip(list_checkpoints(tmp_path), expected, strict=True):
        assert_identical(torch.load(path, weights_only=True), state)


def test_leaving_by_an_error_finishes_the_checkpoint_that_is_being_written(tmp_path, monkeypatch):
    trainer, save = duel(), torch.save
    monkeypatch.setattr(checkpoint.torch, "save", lambda state, file: (time.sleep(0.3), save(state, file)))
    with pytest.raises(ZeroDivisionError), CheckpointWriter(tmp_path, keep=2) as writer:
        next(trainer.run(slots))
        writer.begin(trainer.state())
        raise ZeroDivisionError
    assert load_newest(tmp_path)["step"] == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_that_is_really_full_is_one_line(tmp_path):
    save_checkpoint(duel().state(), tmp_path)
    (tmp_path / "images-000000000004.tmp").symlink_to("/dev/full")
    with pytest.raises(ResourceError, match="No space left on device"):
        save_checkpoint({"images": 4, "weights": torch.zeros(100_000)}, tmp_path)
    assert load_newest(tmp_path)["images"] == 0


def test_a_save_that_is_cut_off_leaves_nothing_under_a_checkpoints_name(tmp_path, monkeypatch):
    """As a kill in the middle of writing would: no handler runs."""
    save_checkpoint(duel().state(), tmp_path)
    monkeypatch.setattr(checkpoint.torch, "save", half_then(SystemExit()))
    with pytest.raises(SystemExit):
        save_checkpoint({"images": 4}, tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["images-000000000000.pt"]
    assert load_newest(tmp_path)["images"] == 0


def test_a_file_that_a_crash_left_half_written_is_cleared_away(tmp_path):
    save_checkpoint(duel().state(), tmp_path)
    (tmp_path / "images-000000000004.tmp").write_bytes(b"half")
    assert load_newest(tmp_path)["images"] == 0 and not list(tmp_path.glob("*.tmp"))


def test_a_damaged_checkpoint_is_one_line_and_its_deletion_the_fix(tmp_path):
    run(duel(), tmp_path)
    newest = list_checkpoints(tmp_path / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="Delete this file") as caught:
        run(duel(), tmp_path)
    assert "\n" not in str(caught.value) and newest.name in str(caught.value)
    newest.unlink()
    assert run(duel(), tmp_path)
    run(duel(), tmp_path / "straight")
    assert_identical(load_newest(tmp_path / "checkpoints"), load_newest(tmp_path / "straight/checkpoints"))


# --- whole runs -------------------------------------------------------------------------------------------------------

RUN_IT = """
import sys, torch
torch.set_num_threads(1)
from onestroke.api import distill
from onestroke.config import load_recipe
distill(load_recipe(sys.argv[1]), sys.argv[2])
"""


def test_a_distillation_killed_at_a_random_moment_and_continued_ends_bit_identical(tmp_path):
    tiny_sdxl().save_pretrained(tmp_path / "teacher")
    write_folder(tmp_path / "pictures")
    recipe = tiny_recipe(
        f"teacher.source={tmp_path / 'teacher'}", f"data.source={tmp_path / 'pictures'}", "train.precision=float32",
        "train.batch_size=2", "train.num_images=24", "train.checkpoint_minutes=1e-9", "data.num_workers=1",
        "train.sample_images=8", "student.ema_images=4", "discriminator.features=dinov2-small",
        f"discriminator.features_source={tiny_dinov2(tmp_path / 'dinov2')}",
    )  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", RUN_IT, path, killed], stderr=subprocess.PIPE)
    try:
        while process.poll() is None and not list_checkpoints(killed / "checkpoints"):
            time.sleep(0.02)
        moment = random.SystemRandom().uniform(0, 0.8)
        time.sleep(moment)
    finally:
        process.kill()
        _, errors = process.communicate()
    reached = load_newest(killed / "checkpoints")
    assert reached is not None, errors.decode()[-2000:]
    assert 2 <= reached["images"] <= 24

    continued, straight = distill(recipe, killed), distill(recipe, tmp_path / "straight")
    message = f"killed {moment:.3f} s after the first checkpoint, at picture {reached['images']}"
    try:
        assert_identical(load_newest(killed / "checkpoints"), load_newest(tmp_path / "straight/checkpoints"))
    except AssertionError as error:
        raise AssertionError(message) from error
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (continued / weights).read_bytes() == (straight / weights).read_bytes(), message


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

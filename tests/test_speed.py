"""What a step's operations are counted to be, that counting changes nothing, and what the log says of a run's speed."""

from contextlib import nullcontext

import pytest
from duels import assert_identical, copied
from tiny_runs import endless, tiny_add, tiny_batch
from torch.utils.flop_counter import FlopCounterMode

from onestroke.operations import CPU_FORMULAS
from onestroke.plan.devices import DEVICES, NAMES, peak_of
from onestroke.train.run import run_training
from onestroke.train.speed import Speed
from onestroke.train.tracking import read_metrics
from onestroke.train.trainer import Trainer, TrainSettings

BOTH = frozenset({"student", "discriminator"})


def trainer(*lines: str, shows_speed: bool = True, num_images: int = 400) -> Trainer:
    method = tiny_add(*lines)
    micro = method.recipe.train.micro_batch_size
    return Trainer(method, TrainSettings(num_images, 4, micro, shows_speed=shows_speed))


class NoModules(nullcontext):
    """In place of `FlopCounterMode`'s tracker of modules, whose hooks R1's `autograd.grad` does not bear."""

    parents = ("Global",)


def test_a_steps_operations_are_pytorchs_count_and_recomputation_is_left_out():
    lean = ("student.gradient_checkpointing=true", "decode.chunk=2", "train.micro_batch_size=2")
    found = {}
    for lines in ((), lean):
        run = trainer(*lines)
        next(run.run(endless()))
        found[lines] = run.speed.operations[BOTH]
    plain = trainer(shows_speed=False)
    counter = FlopCounterMode(display=False, custom_mapping=CPU_FORMULAS)
    counter.mod_tracker = NoModules()
    with counter:
        plain._step(tiny_batch(4))
    assert 4 * found[()] == pytest.approx(counter.get_total_flops(), rel=0.01)  # "" is encoded once for a batch
    assert found[lean] == found[()] > 0


@pytest.mark.parametrize("lines", [(), ("train.micro_batch_size=2", "student.gradient_checkpointing=true")])
def test_counting_changes_no_bit_of_a_run_and_happens_once_for_each_set_of_players(lines):
    ends, counts = [], []
    for shows_speed in (False, True):
        run = trainer(*lines, "discriminator_optimizer.every=2", shows_speed=shows_speed)
        if shows_speed:
            plain = run._try
            run._try = lambda batch, due, plain=plain: (counts.append(due), plain(batch, due))
        for _ in zip(range(4), run.run(endless()), strict=False):
            pass
        ends.append(copied(run.state()))
    assert_identical(*ends)
    assert counts == [BOTH, frozenset({"student"})]


def test_the_log_has_pictures_and_operations_a_second_and_the_share_of_a_known_peak():
    speed = Speed(peak=8e12)
    speed.operations[BOTH] = int(1e12)
    assert speed.of(BOTH, 8, 2.0) == {  # four pictures a second, of 1e12 each
        "speed/pictures_a_second": 4.0, "speed/teraflops_a_second": 4.0, "speed/model_flop_utilisation": 0.5,
    }  # fmt: skip
    assert set(DEVICES) == set(NAMES.values())
    assert peak_of("NVIDIA H100 80GB HBM3") == 989e12 and peak_of("NVIDIA H100 PCIe") is None


def test_a_run_on_an_unknown_device_logs_its_speed_without_a_share(tmp_path):
    seconds = []
    run_training(trainer(num_images=40), endless(), tmp_path, recipe_text="a: 1\n",
                 observe=lambda progress, left: seconds.append(progress.seconds))  # fmt: skip
    (row,) = read_metrics(tmp_path / "logs")
    assert "speed/model_flop_utilisation" not in row
    whole = 40 / seconds[-1]  # the first steps' warm-up and the picture that is counted are in it
    assert 0.5 * whole < row["speed/pictures_a_second"] < 20 * whole
    assert row["speed/teraflops_a_second"] > 0

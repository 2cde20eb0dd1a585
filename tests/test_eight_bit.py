"""AdamW with moments of 8 bits beside torch's own AdamW: its steps, its state in a checkpoint, what it refuses."""

import io
import shutil
import sys

import pytest
import torch
from torch import nn

from onestroke.errors import RecipeError, ResourceError
from onestroke.train.eight_bit import BYTES, AdamW8bit
from onestroke.train.method import OptimizerSettings
from onestroke.train.optimizers import build_optimizer

pytest.importorskip("torchao")
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torchao's step is compiled, which needs g++")

SETTINGS = OptimizerSettings(1e-2, "adamw8bit", betas=(0.0, 0.99))


def layers() -> nn.Module:
    """A convolution in channels_last and a matrix, of 4096 numbers each; biases are too small for 8 bits."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(64, 16, 2), nn.Linear(64, 64)).to(memory_format=torch.channels_last)


def take_step(network: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    make = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=make)  # contiguous, unlike the convolution itself
    optimizer.step()


@needs_compiler
def test_steps_are_adamws_up_to_the_rounding_of_its_moments():
    ours, theirs = layers(), layers()
    eight = build_optimizer(ours, SETTINGS)
    plain = torch.optim.AdamW(theirs.parameters(), 1e-2, (0.0, 0.99), weight_decay=0.0)
    for seed in range(3):
        take_step(ours, eight, seed)
        take_step(theirs, plain, seed)
        for one, two, start in zip(ours.parameters(), theirs.parameters(), layers().parameters(), strict=True):
            moved = (two - start).norm()
            assert (one - two).norm() < 0.02 * moved and moved > 0
    assert eight.param_groups[0]["lr"] == 1e-2
    for group in eight.param_groups:
        group["lr"] = 0.0
    before = [p.clone() for p in ours.parameters()]
    take_step(ours, eight, 9)
    assert all(torch.equal(a, b) for a, b in zip(before, ours.parameters(), strict=True))  # the rate is read each step


@needs_compiler
def test_a_checkpoint_holds_plain_tensors_of_a_byte_and_a_run_goes_on_from_it_in_the_same_bits():
    def run(cut: int | None) -> tuple[list[torch.Tensor], dict]:
        network = layers()
        optimizer = build_optimizer(network, SETTINGS)
        for seed in range(4):
            if seed == cut:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                with torch.serialization.safe_globals([]):
                    state = torch.load(file, weights_only=True)
                optimizer = build_optimizer(network, SETTINGS)
                optimizer.load_state_dict(state)
            take_step(network, optimizer, seed)
        return [p.detach() for p in network.parameters()], optimizer.state_dict()

    straight, state = run(None)
    assert all(torch.equal(a, b) for a, b in zip(straight, run(2)[0], strict=True))
    moments = state["state"][0]
    assert {type(v) for part in ("exp_avg", "exp_avg_sq") for v in moments[part].values()} == {torch.Tensor}
    held = sum(v.nbytes for part in ("exp_avg", "exp_avg_sq") for v in moments[part].values())
    assert held == 4096 * BYTES
    assert state["state"][1]["exp_avg"].dtype == torch.float32  # the bias


def test_what_it_cannot_run_on_is_one_line_with_the_fix(monkeypatch):
    with pytest.raises(RecipeError, match="float32 weights") as caught:
        AdamW8bit(nn.Linear(4, 4).double().parameters(), SETTINGS)
    assert "\n" not in str(caught.value) and "train.precision" in str(caught.value)
    with pytest.raises(ResourceError, match="nothing is compiled for meta devices"):
        AdamW8bit(nn.Linear(4, 4, device="meta").parameters(), SETTINGS)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ResourceError, match=r"pip install 'onestroke\[torchao\]'"):
        AdamW8bit(nn.Linear(4, 4).parameters(), SETTINGS)

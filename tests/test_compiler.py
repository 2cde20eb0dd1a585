"""Compiled blocks: the numbers of the same run uncompiled, the same names of weights, copies that are not compiled."""

import shutil
from copy import deepcopy

import pytest
import torch
from rank_runs import curves, in_ranks, make_inputs
from tiny_runs import tiny_recipe

from onestroke.build import add_trainer, teacher_of
from onestroke.compiler import check_compiler
from onestroke.errors import ResourceError
from onestroke.train.folder import FREE

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="PyTorch compiles for a CPU by g++")

LINES = ("train.batch_size=4", "train.num_images=12", "data.size=16", "losses.r1_every=2", "losses.r1_gamma=1",
         "student.gradient_checkpointing=true", "train.micro_batch_size=2", "train.device=cpu")  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@needs_compiler
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_compiled_run_has_the_numbers_of_the_uncompiled_one(parallel, inputs):
    """In float64, over three steps; R1, accumulation, gradient checkpointing and EMA on."""
    rows, _, average = curves((*inputs, *LINES))
    lines = (*inputs, *LINES, "train.compile=true", f"train.parallel={parallel}")
    other, _, compiled = in_ranks(curves, 2, *[lines])[0] if parallel == "fsdp" else curves(lines)
    assert len(rows) == len(other) == 3
    for step, (one, two) in enumerate(zip(rows, other, strict=True)):
        for name, value in one.items():
            assert abs(two[name] - value) <= 1e-9 * max(1, abs(value)), f"step {step}: {name}"
    assert compiled.keys() == average.keys()
    for name, value in average.items():
        assert torch.allclose(compiled[name], value, rtol=0, atol=1e-9), name


@needs_compiler
def test_blocks_of_students_teachers_and_dinov2_are_compiled_and_nothing_else_is(inputs):
    recipe = tiny_recipe(*inputs, "train.compile=true", "train.device=cpu")
    trainer = add_trainer(recipe, teacher_of(recipe))
    method, plain = trainer.method, add_trainer(other := tiny_recipe(*inputs, "train.device=cpu"), teacher_of(other))

    def kinds(network) -> set[str]:
        return {type(m).__name__ for m in network.modules() if m._compiled_call_impl is not None}

    assert kinds(method.student.unet) == kinds(method.model.unet) == {"BasicTransformerBlock"}
    assert kinds(method.features) == {"Dinov2Layer"}
    assert not kinds(method.heads) and not kinds(trainer.averages["student"]) and not kinds(plain.method.student.unet)
    assert not kinds(deepcopy(method.student.unet))
    for name, state in plain.state()["players"].items():
        assert trainer.state()["players"][name].keys() == state.keys()
    assert "train.compile" in FREE


def test_a_machine_that_cannot_compile_is_told_in_one_line(monkeypatch):
    with pytest.raises(ResourceError, match="nothing is compiled for mps devices"):
        check_compiler(torch.device("mps"), where="train.compile")
    monkeypatch.setenv("PATH", "")
    with (  # pytest's monkeypatch would leave the option hidden from the tests after this one
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ResourceError, match=r"needs a C\+\+ compiler") as caught,
    ):
        check_compiler(torch.device("cpu"), where="train.compile")
    assert "g++" in str(caught.value) and "\n" not in str(caught.value)

"""One run on several processes (gloo, CPU): the same numbers as on one, killed, continued, and stopped together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from rank_runs import Numbered, curves, in_ranks, make_inputs, newest, numbered_buckets, outcomes, run_pair
from tiny_runs import tiny_recipe
from torch.distributed import TCPStore

from onestroke.data.buckets import Size
from onestroke.data.loader import batches
from onestroke.errors import RecipeError
from onestroke.train.checkpoint import list_checkpoints
from onestroke.train.ranks import check_same, num_ranks, rank, share_of, wait_for_all

TWENTY_STEPS = (
    "train.batch_size=4", "train.num_images=80", "data.size=24", "data.buckets=computed", "losses.r1_gamma=0.1",
    "discriminator_optimizer.every=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[str, ...]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def alone(inputs) -> tuple[list[dict[str, float]], list[Size], dict[str, torch.Tensor]]:
    """One process, two micro-batches a step."""
    return in_ranks(curves, 1, (*inputs, *TWENTY_STEPS, "train.micro_batch_size=2"))[0]


@pytest.mark.parametrize("lines", [
    ("train.parallel=ddp", "train.micro_batch_size=1"),
    ("train.parallel=fsdp", "train.micro_batch_size=1"),
    ("train.parallel=fsdp", "student.gradient_checkpointing=true"),
])  # fmt: skip
def test_two_processes_give_the_numbers_of_one_over_20_steps(lines, inputs, alone):
    """Buckets, accumulation, R1, EMA on, in float64; every loss, term and gradient norm, and the averaged student."""
    rows, sizes, average = alone
    results = in_ranks(curves, 2, (*inputs, *TWENTY_STEPS, *lines))
    assert len(rows) == 20 and sum("discriminator/r1" in row for row in rows) == 10
    assert max(row.get("discriminator/r1", 0) for row in rows) > 1e-3
    assert {(16, 32), (24, 24), (32, 16)} == set(sizes)  # height, width
    for other, others_sizes, _ in results:  # in both processes
        assert others_sizes == sizes
        assert [row.keys() for row in other] == [row.keys() for row in rows]
        for step, (one, two) in enumerate(zip(rows, other, strict=True)):
            for name, value in one.items():
                assert abs(two[name] - value) <= 1e-6 * max(1, abs(value)), f"step {step}: {name}"
    first, second = results[0][2], results[1][2]
    assert second == {} and first.keys() == average.keys()
    for name, value in average.items():
        assert torch.allclose(first[name], value, rtol=0, atol=1e-6), name


# --- who sees what ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
def test_the_parts_of_a_batch_put_together_are_the_batch(count):
    how = {"batch_size": 6, "size": (4, 4), "first_slot": 12, "last_slot": 32, "seed": 1}  # 3 batches and 2 pictures
    whole = list(batches(Numbered(), **how))
    parts = [list(batches(Numbered(), **how, rank=number, num_ranks=count)) for number in range(count)]
    assert len(whole) == 4 and all(len(part) == 3 for part in parts)
    for batch, *theirs in zip(whole, *parts):
        assert all(len(part) == 6 // count for part in theirs)
        assert torch.cat([part.slots for part in theirs]).tolist() == batch.slots.tolist()
        assert sum((part.captions for part in theirs), ()) == batch.captions


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_continued_on_other_numbers_of_processes_shows_every_picture_of_the_epoch_once(parallel, tmp_path):
    """One step each on 1, 2, 1 and 3, in buckets: the same end, EMA included, as four steps on one."""
    shown, ends = [], []
    assert len(numbered_buckets()) == 3
    for count in (1, 2, 1, 3):
        results = in_ranks(run_pair, count, tmp_path / "changing", parallel, 0.0)
        shown += [number for _, numbers, _ in results for number in numbers]
        ends.append(results[0][0])
    assert sorted(shown) == list(range(48)) and ends == [False, False, False, True]
    ((_, _, straight),) = in_ranks(run_pair, 1, tmp_path / "straight", parallel)
    for name, weights in results[0][2].items():
        assert weights.keys() == straight[name].keys() and weights
        for key, value in weights.items():
            assert torch.allclose(value, straight[name][key], rtol=0, atol=1e-12), f"{name}/{key}"


# --- killed, failing, stopped -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("moment", "number"), [("training", 0), ("training", 1), ("writing", 1), ("renaming", 0)])
def test_a_run_that_loses_a_process_says_so_once_and_continues_to_the_same_end(moment, number, tmp_path):
    """Sharded, so that either process writes a part of the checkpoint."""
    found = outcomes(_run_disturbed, 2, tmp_path / "cut", "fsdp", moment, number)
    assert found[number] is None and not found[1 - number][0]
    assert "lost contact" in found[1 - number][1].splitlines()[-1]
    left = list_checkpoints(tmp_path / "cut/checkpoints")
    assert [path.name[-2:] for path in left] == ["12", "24"]
    assert newest(tmp_path / "cut")["images"] == 24
    results = in_ranks(run_pair, 2, tmp_path / "cut", "fsdp")
    straight = in_ranks(run_pair, 2, tmp_path / "straight", "fsdp")
    assert results[0][0] and len(results[0][1]) == 12  # two steps' parts
    for name, weights in results[0][2].items():
        assert all(torch.equal(value, straight[0][2][name][key]) for key, value in weights.items()) and weights
    assert [path.name[-2:] for path in list_checkpoints(tmp_path / "cut/checkpoints")] == ["36", "48"]


@pytest.mark.parametrize(("parallel", "number"), [("ddp", 0), ("fsdp", 0), ("fsdp", 1)])
def test_a_disk_that_is_full_for_one_process_ends_all_with_one_message_and_the_checkpoints_before_whole(
    parallel, number, tmp_path
):
    found = outcomes(_run_disturbed, 2, tmp_path, parallel, "full disk", number)
    last = sorted(outcome[1].splitlines()[-1] for outcome in found)
    assert last[0] == "SystemExit: 1" and not any(outcome[0] for outcome in found)
    assert "could not be written (No space left on device). Free disk space" in last[1]
    assert newest(tmp_path)["images"] == 24
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


def test_an_error_in_one_process_ends_all_with_one_message(tmp_path):
    found = outcomes(_run_disturbed, 2, tmp_path, "ddp", "error", 1)
    assert [outcome[0] for outcome in found] == [False, False]
    assert found[1][1].splitlines()[-1].endswith("DataError: folder: pictures are gone. Mend it.")
    assert found[0][1].splitlines()[-1] == "SystemExit: 1"  # which prints nothing


def test_a_process_that_runs_out_of_memory_ends_all_with_the_allocators_one_message(tmp_path):
    """Which the command line turns into what to change."""
    found = outcomes(_run_disturbed, 2, tmp_path, "fsdp", "memory", 1)
    assert [outcome[0] for outcome in found] == [False, False]
    assert "can't allocate memory" in found[1][1].splitlines()[-1]
    assert found[0][1].splitlines()[-1] == "SystemExit: 1"


def test_a_signal_to_one_process_stops_all_after_the_same_step_and_saves(tmp_path):
    results = in_ranks(_run_disturbed, 2, tmp_path, "ddp", "stop", 1)
    assert [ended for ended, _, _ in results] == [False, False] and len(results[0][1]) == len(results[1][1]) == 18
    assert newest(tmp_path)["images"] == 36


def _run_disturbed(out: Path, parallel: str, moment: str, number: int):
    return run_pair(out, parallel, moment=moment, number=number)


def test_processes_that_disagree_on_the_recipe_name_the_line_once():
    found = outcomes(_check_recipes, 3)
    last = [outcome[1].splitlines()[-1] for outcome in found]
    assert [outcome[0] for outcome in found] == [False, False, False]
    assert sorted(last)[:2] == ["SystemExit: 1"] * 2
    assert "process 2 has another recipe than process 0 (rate: 2 in place of rate: 1)" in sorted(last)[2]


def _check_recipes() -> None:
    check_same(f"seed: 0\nrate: {1 + (rank() == 2)}\n")


def test_a_batch_that_does_not_divide_is_refused_with_the_numbers_that_do():
    (refused, *_), (accepted, *_) = in_ranks(_share, 3, 16), in_ranks(_share, 3, 15)
    assert "16 pictures do not divide among 3 processes. Set it to 15 or 18" in refused and accepted == 5


def _share(batch_size: int):
    try:
        return share_of(batch_size)
    except RecipeError as error:
        return str(error)


def test_processes_that_torchrun_starts_again_meet_and_fail_anew_though_its_store_remembers_the_first_ones():
    """The store that an agent keeps over restarts holds the addresses of processes that are gone, and who failed."""
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for attempt, failing in enumerate((0, 1)):
        variables = {"MASTER_PORT": str(agent.port), "TORCHELASTIC_RESTART_COUNT": str(attempt), "LATE": str(attempt)}
        found = [outcome[1].splitlines()[-1] for outcome in outcomes(_fail, 2, failing, variables=variables)]
        assert found[failing] == f"ZeroDivisionError: of 2 processes, {failing}"
        assert found[1 - failing] == "SystemExit: 1"


def _fail(number: int) -> None:
    wait_for_all()
    if rank() == number:
        raise ZeroDivisionError(f"of {num_ranks()} processes, {number}")
    wait_for_all()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find torchrun's workers")
def test_torchrun_distils_sharded_loses_a_worker_and_goes_on_by_itself(inputs, tmp_path):
    """Started again once, all processes meet and end the run. The first one writes."""
    lines = (
        "train.batch_size=4", "train.num_images=16", "data.size=16", "train.precision=float32", "train.parallel=fsdp",
        "train.checkpoint_minutes=1e-9", "train.sample_images=8", "data.num_workers=1",
    )  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(*inputs, *lines).model_dump(mode="json")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "-m", "onestroke", "distill", str(recipe), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    while process.poll() is None and not list_checkpoints(tmp_path / "run/checkpoints"):
        time.sleep(0.02)
    os.kill(_worker_of(process.pid, rank=1), signal.SIGKILL)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    assert errors.count("lost contact with another one") <= 1 and printed.count("student: ") == 1
    assert newest(tmp_path / "run")["images"] == 16
    assert len(list((tmp_path / "run/logs/samples").glob("*.png"))) >= 1
    teacher = UNet2DConditionModel.from_pretrained(tmp_path_of(inputs, "teacher.source") / "unet")
    student = UNet2DConditionModel.from_pretrained(tmp_path / "run/student/unet")
    weights = student.state_dict()
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert any(not torch.equal(value, weights[name]) for name, value in teacher.state_dict().items())


def _worker_of(torchrun: int, *, rank: int) -> int:
    for child in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError("torchrun has no such worker")


def tmp_path_of(lines: tuple[str, ...], key: str) -> Path:
    return Path(next(line for line in lines if line.startswith(f"{key}=")).partition("=")[2])

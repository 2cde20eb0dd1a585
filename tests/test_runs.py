"""One folder, one run: refused, killed, continued to the same bits."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import yaml
from duels import assert_identical, duel, run
from pipelines import tiny_sdxl
from tiny_runs import tiny_dinov2, tiny_recipe, write_folder

from onestroke.api import distill
from onestroke.data.buckets import assign
from onestroke.data.facts import identity_of, measured_sizes
from onestroke.data.folder import open_folder
from onestroke.errors import CheckpointError
from onestroke.ownership import sole_owner
from onestroke.train.checkpoint import list_checkpoints, load_newest
from onestroke.train.tracking import read_metrics


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


RUN_IT = """
import sys
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

"""Checkpoints: kept, written beside the training, cut off, damaged, out of disk."""

import threading
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from duels import assert_identical, duel, run, slots

from onestroke.errors import CheckpointError, ResourceError
from onestroke.train import checkpoint
from onestroke.train.checkpoint import list_checkpoints, load_newest, save_checkpoint
from onestroke.train.writer import CheckpointWriter


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


def test_a_checkpoint_of_another_version_is_one_line_that_names_the_difference_and_stays(tmp_path):
    run(duel(), tmp_path)
    newest = list_checkpoints(tmp_path / "checkpoints")[-1]
    state = torch.load(newest, weights_only=True)
    state["players"]["left"] = {"number": state["players"]["left"]["value"]}
    save_checkpoint(state, newest.parent)
    before = newest.read_bytes()
    with pytest.raises(CheckpointError, match="this version's .*value") as caught:
        run(duel(60), tmp_path)
    assert "\n" not in str(caught.value) and newest.read_bytes() == before

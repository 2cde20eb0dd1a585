"""The command as a process: one line for an error, and its status."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from onestroke import cli
from onestroke.commands import generate
from onestroke.commands.machine import cap_threads
from onestroke.errors import OnestrokeError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("fill", [lambda: torch.empty(1 << 50), lambda: [0] * (1 << 60)])
def test_a_machine_without_room_is_one_line_that_says_what_to_change(fill, monkeypatch, capsys):
    """What PyTorch's CPU allocator and Python themselves raise."""
    monkeypatch.setattr(cli, "app", lambda **how: fill())
    with pytest.raises(SystemExit) as exited:
        cli.main()
    errors = capsys.readouterr().err
    assert exited.value.code == 1 and errors.count("\n") == 1
    assert errors.startswith("onestroke: the device has no room. Lower train.micro_batch_size")


@pytest.mark.parametrize(
    ("number", "fix"),
    [(errno.ENOSPC, "Free disk space"), (errno.EACCES, "Check its permissions"), (errno.EEXIST, "A file")],
)
def test_a_folder_that_cannot_be_written_to_is_one_line_with_its_name(number, fix, monkeypatch, capsys):
    def write(**how):
        raise OSError(number, os.strerror(number), "runs/metrics.jsonl")

    monkeypatch.setattr(cli, "app", write)
    with pytest.raises(SystemExit) as exited:
        cli.main()
    errors = capsys.readouterr().err
    assert exited.value.code == 1 and errors.count("\n") == 1
    assert errors.startswith(f"onestroke: runs/metrics.jsonl: {os.strerror(number)}. {fix}")


def test_no_memory_for_another_process_is_no_room(monkeypatch, capsys):
    def fork(**how):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(cli, "app", fork)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err.startswith("onestroke: the device has no room.")


def test_the_command_exits_with_one_line_and_status_1(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "onestroke", "distill", "sdxl-anime", "--data", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("onestroke: ") and result.stderr.count("\n") == 1 and "--teacher" in result.stderr


@pytest.mark.parametrize(
    ("variables", "before", "threads"),
    [
        ({}, 1, 4),
        ({}, 9, 4),
        ({"OMP_NUM_THREADS": "3"}, 3, 3),
        ({"OMP_NUM_THREADS": "9"}, 9, 4),
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, 1, 2),  # torchrun's own 1
    ],
)
def test_threads_are_as_many_as_the_cores_and_fewer_where_the_user_says_so(variables, before, threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    monkeypatch.delenv("OMP_NUM_THREADS")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    torch.set_num_threads(before)
    try:
        cap_threads()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc's allocator")
@pytest.mark.parametrize("thread", ["main", "other"])
def test_memory_that_is_let_go_is_kept_unless_the_user_says_how(thread):
    """Counted in page faults of ten times the same blocks, in a process of its own."""

    def faults(environment: dict[str, str]) -> int:
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
        command = [sys.executable, "-c", BLOCKS, thread]
        return int(subprocess.check_output(command, env=plain | environment, text=True))

    size = 12 * 8 * 2**20 // 4096  # pages; more than the 64 MiB of a further arena's heap
    assert faults({}) < 2 * size
    assert faults({"MALLOC_MMAP_THRESHOLD_": "65536"}) >= 9 * size


BLOCKS = """
import resource
import sys
from threading import Thread
from onestroke.commands.machine import keep_memory
keep_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    for _ in range(10):
        [b"x" * (8 * 2**20) for _ in range(12)]
if sys.argv[1] == "main":
    work()
else:
    thread = Thread(target=work)
    thread.start()
    thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_errors_of_commands_are_the_users_kind():
    with pytest.raises(OnestrokeError):
        generate.check_order("", Path("a.png"))

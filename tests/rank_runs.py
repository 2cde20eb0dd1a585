"""What the processes of the distributed tests run, and the ways to start them: forked, or by torchrun."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pipelines import tiny_sdxl
from tiny_runs import tiny_dinov2, tiny_recipe, write_folder
from torch import nn
from torch.distributed import TCPStore

from onestroke.build import add_trainer, sizes_of, source_of, teacher_of
from onestroke.config import Recipe
from onestroke.data.buckets import Buckets, Size, assign
from onestroke.data.facts import measured_sizes
from onestroke.data.loader import batches
from onestroke.data.source import Picture
from onestroke.errors import DataError
from onestroke.train import checkpoint
from onestroke.train.checkpoint import list_checkpoints, load_newest
from onestroke.train.method import Loss, OptimizerSettings, Player
from onestroke.train.ranks import joined, num_ranks, rank
from onestroke.train.run import run_training
from onestroke.train.sharded_checkpoint import HuggingFaceStorageWriter
from onestroke.train.trainer import Trainer, TrainSettings
from onestroke.types import Batch

HERE = Path(__file__).parent
SAVE = torch.save  # which a disturbed process replaces


def in_ranks(function: Callable, count: int, *arguments) -> list[Any]:
    """What `function(*arguments)` returns in each of `count` processes that have met."""
    found = outcomes(function, count, *arguments)
    for number, outcome in enumerate(found):
        assert outcome is not None and outcome[0], f"process {number} of {count}: {outcome and outcome[1]}"
    return [value for _, value in found]


def outcomes(
    function: Callable, count: int, *arguments, variables: Mapping[str, str] | None = None
) -> list[tuple[bool, Any] | None]:
    """As `in_ranks`: (True, what came back), (False, the traceback), or None of a process that was killed.

    They meet as torchrun's do, at a store that outlives them. `variables` of the environment; "LATE": so many seconds
    after the first one do the others set out. They are forked from a server that has imported this file and nothing
    else, which saves importing it again.
    """
    context, before = multiprocessing.get_context("forkserver"), os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), before])
    context.set_forkserver_preload(["rank_runs"])
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / str(number) for number in range(count)]
        agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        variables = meeting | dict(variables or {})
        processes = [
            context.Process(target=_run, args=(function, arguments, number, count, variables, path))
            for number, path in enumerate(paths)
        ]
        for process in processes:
            process.start()
        os.environ["PYTHONPATH"] = before
        for process in processes:
            process.join()
        return [torch.load(path) if path.exists() else None for path in paths]


def _run(
    function: Callable, arguments: tuple, number: int, count: int, variables: Mapping[str, str], path: Path
) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count), **variables}
    try:
        if number > 0:
            time.sleep(float(variables.get("LATE", 0)))
        with joined():
            SAVE((True, function(*arguments)), path)
    except BaseException:
        SAVE((False, traceback.format_exc()), path)


def make_inputs(folder: Path) -> tuple[str, ...]:
    """A teacher, a feature network and pictures on the disk; the recipe lines that name them."""
    tiny_sdxl().save_pretrained(folder / "teacher")
    write_folder(folder / "pictures", rounds=4)
    return (
        f"teacher.source={folder / 'teacher'}", f"data.source={folder / 'pictures'}", "student.ema_images=40",
        "discriminator.features=dinov2-small", f"discriminator.features_source={tiny_dinov2(folder / 'dinov2')}",
    )  # fmt: skip


def tiny_run(recipe: Recipe) -> tuple[Trainer, Callable]:
    """The trainer of a recipe in this process, and its `batches_from`."""
    teacher = teacher_of(recipe)
    source = source_of(recipe.data, seed=recipe.seed)
    size = sizes_of(recipe, source, teacher)

    def batches_from(first_slot: int):
        return batches(
            source, batch_size=recipe.train.batch_size, size=size, first_slot=first_slot,
            last_slot=recipe.train.num_images, seed=0, random_flip=True, rank=rank(), num_ranks=num_ranks(),
        )  # fmt: skip

    return add_trainer(recipe, teacher), batches_from


def curves(lines: tuple[str, ...]) -> tuple[list[dict[str, float]], list[Size], dict[str, torch.Tensor]]:
    """Every number of every step, the size of its pictures, and the student's average at the end (in process 0)."""
    trainer, batches_from = tiny_run(tiny_recipe(*lines))
    sizes: list[Size] = []

    def seen(first_slot: int):
        for batch in batches_from(first_slot):
            sizes.append(batch.picture_size)
            yield batch

    rows = [dict(progress.terms) for progress in trainer.run(seen)]
    average = trainer.whole("student", average=True)
    return rows, sizes, {} if average is None else dict(average.state_dict())


class Numbered:
    """A source of black pictures whose captions are their numbers: half are square, a quarter wide, a quarter tall."""

    def __len__(self) -> int:
        return 48

    def caption(self, index: int, *, slot: int | None = None) -> str:
        return str(index)

    def read(self, index: int, *, slot: int | None = None) -> Picture:
        return Picture(np.zeros((*self.size_of(index), 3), np.uint8), str(index))

    def size_of(self, index: int) -> Size:
        return ((4, 4), (4, 4), (4, 8), (8, 4))[index % 4]


def numbered_buckets() -> Buckets:
    """Of 24, 12 and 12 pictures: batches of 12 show each once in an epoch."""
    return assign(measured_sizes(Numbered()), ((4, 4), (4, 8), (8, 4)), batch_size=12)


class Pair:
    """A network that is sharded under FSDP and a head that is not, in float64; keeps what it was shown."""

    frozen = ()

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net, head = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5)).double(), nn.Linear(5, 1).double()
        settings = OptimizerSettings(0.01, betas=(0.5, 0.9))
        self.players = {"net": Player(net, settings, ema_images=24), "head": Player(head, settings, every=2)}
        self.shown: list[int] = []

    def rollout(self, batch: Batch, due: frozenset[str]) -> torch.Tensor:
        self.shown += [int(caption) for caption in batch.captions]
        slots = batch.slots.double()
        with torch.set_grad_enabled("net" in due):
            return self.players["net"].module(torch.stack([slots.sin(), slots.cos(), slots / 48], dim=1))

    def loss(self, player: str, out: torch.Tensor) -> Loss:
        head = self.players["head"].module
        if player == "net":
            return Loss(out.square().mean() - head(out).mean())
        return Loss((1 - head(out.detach())).relu().mean())

    def finish_step(self, due: frozenset[str]) -> None:
        pass


def run_pair(
    out: Path, parallel: str, minutes: float | None = None, *, moment: str = "", number: int = 0
) -> tuple[bool, list[int], dict]:
    """A run of four steps of 12 pictures, saved after each: whether it ended, what was shown here, the state it left.

    `moment`: when process `number` is killed, or fails, or is told to stop: see `_disturb`.
    """
    method = Pair()
    sharded = frozenset({"net"} if parallel == "fsdp" and num_ranks() > 1 else ())
    trainer = Trainer(method, TrainSettings(48, 12, 2, sharded=sharded))

    def batches_from(first_slot: int):
        settings = {"batch_size": 12, "size": numbered_buckets(), "first_slot": first_slot, "last_slot": 48, "seed": 0}
        for batch in batches(Numbered(), rank=rank(), num_ranks=num_ranks(), **settings):
            if rank() == number and trainer.step == 2 and moment:
                while not any(path.stem.endswith("24") for path in list_checkpoints(out / "checkpoints")):
                    time.sleep(0.01)  # it is being written
                _disturb(moment)
            yield batch

    ended = run_training(
        trainer, batches_from, out, recipe_text=f"parallel: {parallel}\n", minutes=minutes, checkpoint_minutes=1e-9
    )
    whole = {name: trainer.whole("net", average=name == "average") for name in ("net", "average")}
    weights = {name: dict(module.state_dict()) if module else {} for name, module in whole.items()}
    return ended, method.shown, weights


def _disturb(moment: str) -> None:
    def kill(*_, **__) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fill(*_, **__) -> None:
        raise OSError(28, "No space left on device")

    if moment == "training":
        kill()
    elif moment == "writing":  # in the middle of the checkpoint of step 3
        HuggingFaceStorageWriter.write_data = kill
        checkpoint.torch.save = kill
    elif moment == "renaming":
        checkpoint.os.replace = kill
    elif moment == "full disk":  # in the middle of the checkpoint of step 3
        HuggingFaceStorageWriter.write_data = fill
        checkpoint.torch.save = fill
    elif moment == "stop":
        os.kill(os.getpid(), signal.SIGTERM)
    elif moment == "memory":
        torch.empty(1 << 50)
    elif moment == "error":
        raise DataError("pictures are gone", where="folder", fix="Mend it.")


def newest(folder: Path) -> dict:
    """The newest checkpoint of a run, whole; in one process."""
    return load_newest(folder / "checkpoints")

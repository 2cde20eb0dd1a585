"""Checkpoints written while training goes on: the state is copied in memory, and a thread writes the copy.

The thread's collectives have a process group of their own, beside those of training. Copies are made by PyTorch's
stager, in pinned memory where there is a GPU, and their room is used again by the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from types import TracebackType

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from onestroke.train.checkpoint import save_checkpoint
from onestroke.train.ranks import TIMEOUT, num_ranks, rank, wait_for_all
from onestroke.train.sharded_checkpoint import is_sharded


class CheckpointWriter:
    """Writes the checkpoints of a run into `folder`, never two at once; all processes make the same calls.

    Why a write in the background failed is raised by the next call here, in a process that took part. Leaving its
    `with` by an error waits for what is being written; by Ctrl-C it does not.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if num_ranks() > 1 else None
        self._stager = DefaultStager(StagingOptions(torch.cuda.is_available(), False, False, False))
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def begin(self, state: Mapping) -> None:
        """Copy `state` and return, while the copy is being written; waits for the one before."""
        self.wait()
        if rank() == 0 or is_sharded(state):  # else the first process has it whole
            copy = self._stager.stage(dict(state))
            self._thread = Thread(target=self._save, args=(copy,), name="checkpoint", daemon=True)
            self._thread.start()

    def write(self, state: Mapping) -> None:
        """Write `state` and return when it is on the disk."""
        self.wait()
        wait_for_all()  # each process now sees the same checkpoints
        save_checkpoint(state, self.folder, keep=self.keep)
        wait_for_all()

    def check(self) -> None:
        """Raise why a write that has ended failed; one that goes on is left alone."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written by this process any more."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _save(self, state: Mapping) -> None:
        try:
            save_checkpoint(state, self.folder, keep=self.keep, group=self._group)
        except BaseException as error:  # whatever it is, a thread has nobody else to tell
            self._error = error

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.wait()
            wait_for_all()  # a run ends well in all processes or in none
            self._stager.close()
            if self._group is not None:
                dist.destroy_process_group(self._group)
        elif self._thread is not None and isinstance(error, Exception):
            self._thread.join()

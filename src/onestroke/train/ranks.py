"""The processes of a distributed run: how they meet, what they decide together, and how they end together.

`torchrun` starts them; without it there is one, and everything here leaves it alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from onestroke.errors import RecipeError, ResourceError

TIMEOUT = timedelta(minutes=30)  # the others wait while the first draws samples or writes the student
FAILED = "failed"  # under this key the first process that fails leaves its rank


def rank() -> int:
    """This process's number, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def joined() -> Iterator[None]:
    """Meet the other processes that torchrun started. What one raises ends all, and is told by that one alone.

    The others leave by SystemExit(1) without a word. Within another `joined`, or with one process, this does nothing.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    store = _meet()
    try:
        yield
    except BaseException as error:
        if not _is_first_to_fail(store):
            raise SystemExit(1) from None
        if is_lost_contact(error):
            raise ResourceError(
                f"process {rank()} of {num_ranks()} lost contact with another one ({_reason(error)})",
                where="distributed training",
                fix="Run again to continue from the last checkpoint; torchrun --max-restarts N does so by itself.",
            ) from error
        raise
    dist.destroy_process_group()


def _meet() -> dist.Store:
    has_gpus = torch.cuda.is_available()
    if has_gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        store, number, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # torchrun keeps its store over restarts (torch 2.13): in one place, a process that starts sooner than another
        # would find where that one's forerunner was, be refused, and all would take the first failure for theirs
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if has_gpus else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore("ranks", store), rank=number, world_size=size, timeout=TIMEOUT
        )
    except (ValueError, RuntimeError) as error:
        raise ResourceError(
            f"the processes did not find one another ({_reason(error)})",
            where="distributed training",
            fix="Start them by `torchrun --nproc-per-node N -m onestroke distill RECIPE`.",
        ) from error
    return store


def _is_first_to_fail(store: dist.Store) -> bool:
    """Whether no other process has failed before; where nobody can be asked any more, this one speaks."""
    try:
        mine = str(rank())
        return store.compare_set(FAILED, "", mine).decode() == mine
    except RuntimeError:
        return True


def is_lost_contact(error: BaseException) -> bool:
    """Whether `error` is what a collective operation raises when another process is gone."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")
    return type(error) is RuntimeError and any(word in str(error) for word in words)


def _reason(error: BaseException) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line.rpartition("] ")[2][:120].rstrip(". ")


def check_same(
    text: str, *, what: str = "recipe", fix: str = "Give every process the same recipe file and the same options."
) -> None:
    """Raise RecipeError, naming the first line that differs, unless every process gives the same `text`."""
    if num_ranks() == 1:
        return
    texts: list[str] = [""] * num_ranks()
    dist.all_gather_object(texts, text)
    for number, other in enumerate(texts):
        if other != texts[0]:
            raise RecipeError(
                f"process {number} has another {what} than process 0 ({_first_difference(texts[0], other)})",
                where="distributed training",
                fix=fix,
            )


def _first_difference(one: str, other: str) -> str:
    lines, others = one.splitlines(), other.splitlines()
    a, b = next(
        ((a, b) for a, b in zip(lines, others, strict=False) if a != b),
        (f"{len(lines)} lines", f"{len(others)} lines"),
    )
    return f"{b.strip()} in place of {a.strip()}"


def from_first(value):
    """Process 0's `value`, in every process; it has to be picklable."""
    if num_ranks() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def any_rank(*flags: bool, group: dist.ProcessGroup | None = None) -> tuple[bool, ...]:
    """For each flag, whether it is set in any process: what all of them do next. `group`: not the one of training."""
    if num_ranks() == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=group)
    return tuple(bool(vote) for vote in votes.tolist())


def wait_for_all(group: dist.ProcessGroup | None = None) -> None:
    """Return when every process has come here."""
    any_rank(False, group=group)


def wait_through(work: Iterable[object]) -> None:
    """Process 0 goes through `work`; the others, which may give anything, wait piece by piece and not for all of it."""
    pieces = iter(work)
    while any_rank(rank() == 0 and next(pieces, pieces) is not pieces)[0]:
        pass


def mean_of(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scalars averaged over the processes, which hold equally many pictures; every process has to have the same."""
    if num_ranks() == 1 or not terms:
        return dict(terms)
    values = torch.stack([value.double() for value in terms.values()])
    dist.all_reduce(values)
    return dict(zip(terms, (values / num_ranks()).unbind(), strict=True))


def share_of(batch_size: int) -> int:
    """The pictures of a batch that each process trains on; raises RecipeError where they do not come out even."""
    count = num_ranks()
    if batch_size % count:
        near = max(count, batch_size // count * count)
        raise RecipeError(
            f"{batch_size} pictures do not divide among {count} processes",
            where="train.batch_size",
            fix=f"Set it to {near} or {near + count}, or start another number of processes.",
        )
    return batch_size // count
